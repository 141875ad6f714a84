// Numbers side by side in a register: sixteen, with AVX-512. `lanes_avx2.h` has the same names for eight.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

namespace avx512 {

using Lanes = __m512;
constexpr int64_t kLanes = 16;
constexpr bool kManyRegisters = true;

// count is not negative
inline __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1); }

inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }
inline Lanes load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Lanes x, int64_t count) { _mm512_mask_storeu_ps(to, first(count), x); }
inline void store(float* to, __m128 x, int64_t count) {
  _mm_mask_storeu_ps(to, static_cast<__mmask8>(first(count) & 15), x);
}
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes subtract(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes divide(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes multiply_subtract(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a, b, c); }
inline Lanes subtract_product(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }
inline Lanes least(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }  // `b` where either is no number
inline Lanes most(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes magnitude(Lanes x) { return _mm512_abs_ps(x); }
inline Lanes whole(Lanes x) { return _mm512_roundscale_ps(x, 0); }
inline Lanes by_power(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }  // x times 2^n, n whole
inline bool none(Lanes x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }  // any is no number
inline bool beyond(Lanes x, Lanes bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ); }  // any is, or no number
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest(Lanes x) { return _mm512_reduce_max_ps(x); }
inline Lanes widened(__m128 x) { return _mm512_castps128_ps512(x); }
inline __m128 narrowed(Lanes x) { return _mm512_castps512_ps128(x); }
// The first `count` of `x`, and of `other` the rest.
inline Lanes mixed(Lanes x, Lanes other, int64_t count) { return _mm512_mask_mov_ps(other, first(count), x); }

// Sums of each of four registers, in their order.
inline __m128 sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 both = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Sixteen registers of sixteen numbers of 32 bits, turned.
inline void turn(__m512i (&x)[16]) {
  __m512i a[16], b[16];
  _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i lower = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i higher = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    x[i] = _mm512_shuffle_i32x4(low, lower, 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(low, lower, 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(high, higher, 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(high, higher, 0xdd);
  }
}
inline void turn(Lanes (&x)[16]) {
  __m512i turned[16];
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) turned[i] = _mm512_castps_si512(x[i]);
  turn(turned);
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) x[i] = _mm512_castsi512_ps(turned[i]);
}

}  // namespace avx512

#pragma GCC pop_options

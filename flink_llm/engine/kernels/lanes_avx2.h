// Numbers side by side in a register: eight, with AVX2 and FMA. `lanes_avx512.h` has the same names for sixteen.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace avx2 {

using Lanes = __m256;
constexpr int64_t kLanes = 8;
constexpr bool kManyRegisters = false;

alignas(32) constexpr int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
inline __m256i first(int64_t count) {
  const int64_t some = count < 0 ? 0 : count > kLanes ? kLanes : count;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + kLanes - some));
}

inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes load(const float* from) { return _mm256_loadu_ps(from); }
inline Lanes load(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : _mm256_maskload_ps(from, first(count));
}
inline void store(float* to, Lanes x) { _mm256_storeu_ps(to, x); }
// A store by a mask takes some processors dozens of operations.
inline void store(float* to, Lanes x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  alignas(32) float each[kLanes];
  _mm256_store_ps(each, x);
  for (int64_t i = 0; i < count; i++) to[i] = each[i];
}
inline void store(float* to, __m128 x, int64_t count) {
  if (count >= 4) return _mm_storeu_ps(to, x);
  alignas(16) float each[4];
  _mm_store_ps(each, x);
  for (int64_t i = 0; i < count; i++) to[i] = each[i];
}
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes subtract(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
inline Lanes divide(Lanes a, Lanes b) { return _mm256_div_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes multiply_subtract(Lanes a, Lanes b, Lanes c) { return _mm256_fmsub_ps(a, b, c); }
inline Lanes subtract_product(Lanes a, Lanes b, Lanes c) { return _mm256_fnmadd_ps(a, b, c); }
inline Lanes least(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
inline Lanes most(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes magnitude(Lanes x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Lanes whole(Lanes x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// n from -126 to 127
inline Lanes by_power(Lanes x, Lanes n) {
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
inline bool none(Lanes x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
inline bool beyond(Lanes x, Lanes bound) { return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ)); }
inline Lanes mixed(Lanes x, Lanes other, int64_t count) {
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(first(count)));
}
inline Lanes widened(__m128 x) { return _mm256_castps128_ps256(x); }
inline __m128 narrowed(Lanes x) { return _mm256_castps256_ps128(x); }

inline __m128 sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  const __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
  const __m256 both = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
  return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}
inline float sum(Lanes x) { return _mm_cvtss_f32(sums(x, x, x, x)); }
inline float largest(Lanes x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Eight registers of eight numbers, turned.
inline void turn(Lanes (&x)[8]) {
  Lanes a[8], b[8];
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
  _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
    x[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    x[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

}  // namespace avx2

#pragma GCC pop_options

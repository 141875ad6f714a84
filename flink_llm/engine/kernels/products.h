// Products of a few rows by a matrix held in eight or four bits, for processors with AVX-512 and VNNI.
//
// A matrix is [columns of the product, inputs], as it is trained: each column's inputs lie together, and are read
// once, in order, for all rows. A row's numbers never depend on how many rows there are.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

namespace products {

// Else the sums of a tile are kept in memory.
#define UNROLLED _Pragma("GCC unroll 5")

constexpr int64_t kWide = 64;    // bytes in a register
constexpr int64_t kColumns = 4;  // of a tile
constexpr int64_t kRows = 4;     // of a tile, at most; 5 where there is one alone

inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// Sums of each of four registers, in their order.
inline __m128i sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1); }

// The largest magnitude; NaN where there is a NaN.
inline float largest(const float* x, int64_t count) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 lost = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 part = _mm512_maskz_loadu_ps(first(count - i), x + i);
    lost |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, _mm512_abs_ps(part));
  }
  return lost ? NAN : _mm512_reduce_max_ps(most);
}

// exp, to some 2 units in the last place: 2^n times a polynomial of the rest (Cephes).
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.3f), _mm512_max_ps(_mm512_set1_ps(-87.3f), x));  // in this order NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(_mm512_mul_ps(y, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

// gate * sigmoid(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer")
inline __m512 gated(__m512 gate, __m512 up) {
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
  return _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1.0f), e)), up);
}

inline __m128 gated(__m128 gate, __m128 up) {
  return _mm512_castps512_ps128(gated(_mm512_castps128_ps512(gate), _mm512_castps128_ps512(up)));
}

// x + skip, and what it becomes over the root of its mean square (Zhang and Sennrich 2019), times `gain`.
inline void skip_norm(const float* x, const float* skip, const float* gain, float epsilon, int64_t count, float* sum,
                      float* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = first(count - i);
    const __m512 both = _mm512_add_ps(_mm512_maskz_loadu_ps(there, x + i), _mm512_maskz_loadu_ps(there, skip + i));
    _mm512_mask_storeu_ps(sum + i, there, both);
    squares = _mm512_fmadd_ps(both, both, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = first(count - i);
    const __m512 part = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, sum + i), by);
    _mm512_mask_storeu_ps(to + i, there, _mm512_mul_ps(part, _mm512_maskz_loadu_ps(there, gain + i)));
  }
}

// ---- Eight bits: one scale for a row, one for a column.

struct RowBytes {  // rows in unsigned bytes around 128
  uint8_t* bytes;   // [rows, wide]
  float* largest;   // [rows]
  int64_t inputs, wide;
};

// To the bit what Div and QuantizeLinear by 1/127 make of a row. A division takes ten times as long as a product, whose
// whole number is the same unless it lies next to the middle between two.
inline void to_bytes(const float* x, int64_t row, const RowBytes& to) {
  const float most = largest(x, to.inputs);
  to.largest[row] = most;
  uint8_t* out = to.bytes + row * to.wide;
  const __m512 by = _mm512_set1_ps(most), step = _mm512_set1_ps(1.0f / 127.0f), bound = _mm512_set1_ps(127.0f);
  const __m512 quick = _mm512_set1_ps(127.0f / most), sure = _mm512_set1_ps(0.4999f);
  for (int64_t i = 0; i < to.wide; i += 16) {
    const __m512 part = _mm512_maskz_loadu_ps(first(to.inputs - i > 0 ? to.inputs - i : 0), x + i);
    __m512 level = _mm512_mul_ps(part, quick);
    const __m512 beyond = _mm512_abs_ps(_mm512_sub_ps(level, _mm512_roundscale_ps(level, 0)));
    if (_mm512_cmp_ps_mask(beyond, sure, _CMP_NLT_UQ)) {  // or no number
      level = _mm512_div_ps(_mm512_div_ps(part, by), step);
      level = _mm512_max_ps(_mm512_min_ps(level, bound), _mm512_sub_ps(_mm512_setzero_ps(), bound));
    }
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(level), _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(whole));
  }
}

struct Bytes {  // a matrix in signed bytes
  const int8_t* weights;   // [columns, inputs]
  const float* scales;     // [columns]
  const int32_t* middles;  // [columns]: 128 times the sum of a column
  int64_t columns, inputs;
};

inline void middles(const int8_t* weights, int64_t columns, int64_t inputs, int32_t* to) {
  for (int64_t n = 0; n < columns; n++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs; k++) sum += weights[n * inputs + k];
    to[n] = 128 * sum;
  }
}

// Memory is quickest where it is read in its order, so a single row goes column by column; several, which go
// through four columns at once, meanwhile fetch the next four's in their order: `Fetch` quarters of them, after `done`.
template <int R, int Fetch>
inline void tile(const RowBytes& rows, int64_t row, const Bytes& of, int64_t column, int done, __m128 (&to)[R]) {
  const int8_t* w[kColumns];
  UNROLLED
  for (int c = 0; c < kColumns; c++) {
    w[c] = of.weights + (column + c < of.columns ? column + c : of.columns - 1) * of.inputs;
  }
  const uint8_t* x = rows.bytes + row * rows.wide;
  const int64_t whole = of.inputs / kWide * kWide;
  __m512i sum[R][kColumns];
  UNROLLED
  for (int r = 0; r < R; r++) {
    UNROLLED
    for (int c = 0; c < kColumns; c++) sum[r][c] = _mm512_setzero_si512();
  }
  if constexpr (R == 1) {
    UNROLLED
    for (int c = 0; c < kColumns; c++) {
      for (int64_t k = 0; k < whole; k += kWide) {
        sum[0][c] = _mm512_dpbusd_epi32(sum[0][c], _mm512_loadu_si512(x + k), _mm512_loadu_si512(w[c] + k));
      }
    }
  } else {
    const int8_t* next = w[0] + (kColumns + done) * of.inputs;
    for (int64_t k = 0; k < whole; k += kWide) {
      __m512i part[kColumns];
      UNROLLED
      for (int c = 0; c < kColumns; c++) {
        part[c] = _mm512_loadu_si512(w[c] + k);
        if (c < Fetch) _mm_prefetch(next + Fetch * k + kWide * c, _MM_HINT_T0);
      }
      UNROLLED
      for (int r = 0; r < R; r++) {
        const __m512i row_part = _mm512_loadu_si512(x + r * rows.wide + k);
        UNROLLED
        for (int c = 0; c < kColumns; c++) sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], row_part, part[c]);
      }
    }
  }
  if (whole < of.inputs) {
    const __mmask64 some = (1ull << (of.inputs - whole)) - 1;
    UNROLLED
    for (int r = 0; r < R; r++) {
      const __m512i row_part = _mm512_loadu_si512(x + r * rows.wide + whole);
      UNROLLED
      for (int c = 0; c < kColumns; c++) {
        sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], row_part, _mm512_maskz_loadu_epi8(some, w[c] + whole));
      }
    }
  }
  const __mmask8 there = static_cast<__mmask8>(first(of.columns - column) & 15);
  const __m128i middle = _mm_maskz_loadu_epi32(there, of.middles + column);
  const __m128 scale = _mm_maskz_loadu_ps(there, of.scales + column);
  UNROLLED
  for (int r = 0; r < R; r++) {
    const __m128i total = _mm_sub_epi32(sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), middle);
    to[r] = _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(total), scale), _mm_set1_ps(rows.largest[row + r]));
  }
}

// ---- Four bits: a scale for each block of inputs, of a row as of a column.

constexpr int64_t kLevels = 2 * kWide;  // levels of four bits in a register

struct RowBlocks {  // rows in signed bytes, even inputs of each 128 before the odd ones
  int8_t* bytes;     // [rows, blocks, block]
  int32_t* middles;  // [rows, blocks]: 8 times the sum of a block
  float* scales;     // [rows, blocks]
  int64_t inputs, block, blocks;
};

inline void to_blocks(const float* x, int64_t row, const RowBlocks& to) {
  alignas(64) int8_t level[kLevels];
  for (int64_t b = 0; b < to.blocks; b++) {
    int8_t* bytes = to.bytes + (row * to.blocks + b) * to.block;
    const int64_t left = to.inputs - b * to.block;
    const float most = largest(x + b * to.block, left < to.block ? left : to.block);
    const __m512 turned = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < to.block; k += kLevels) {
      for (int64_t i = 0; i < kLevels; i += 16) {
        const int64_t from = k + i;
        const __mmask16 there = first(left - from > 0 ? left - from : 0);
        const __m512 part = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + b * to.block + from), turned);
        _mm_store_si128(reinterpret_cast<__m128i*>(level + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(part)));
      }
      for (int64_t i = 0; i < kWide; i++) {
        bytes[k + i] = level[2 * i];
        bytes[k + kWide + i] = level[2 * i + 1];
      }
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(8), _mm512_loadu_si512(bytes + k));
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(8), _mm512_loadu_si512(bytes + k + kWide));
    }
    to.middles[row * to.blocks + b] = _mm512_reduce_add_epi32(sum);
    to.scales[row * to.blocks + b] = most / 127.0f;
  }
}

struct Blocks {  // a matrix in four bits around 8, even inputs in the lower ones: as MatMulNBits has it
  const uint8_t* weights;  // [columns, blocks, block / 2]
  const float* scales;     // [columns, blocks]
  int64_t columns, blocks, block;
};

// The even ones of 128 levels, or the odd ones.
inline __m512i even(__m512i packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
inline __m512i odd(__m512i packed) { return even(_mm512_srli_epi16(packed, 4)); }

template <int R, int Fetch>
inline void tile(const RowBlocks& rows, int64_t row, const Blocks& of, int64_t column, int done, __m128 (&to)[R]) {
  const int64_t length = of.blocks * of.block / 2;  // bytes of a column
  int64_t at[kColumns];
  UNROLLED
  for (int c = 0; c < kColumns; c++) at[c] = column + c < of.columns ? column + c : of.columns - 1;
  const uint8_t* next = of.weights + (at[0] + kColumns + done) * length;
  __m128 made[R];
  UNROLLED
  for (int r = 0; r < R; r++) made[r] = _mm_setzero_ps();
  for (int64_t b = 0; b < of.blocks; b++) {
    __m512i sum[R][kColumns];
    UNROLLED
    for (int c = 0; c < kColumns; c++) {
      const uint8_t* w = of.weights + at[c] * length + b * of.block / 2;
      UNROLLED
      for (int r = 0; r < R; r++) sum[r][c] = _mm512_setzero_si512();
      for (int64_t k = 0; k < of.block; k += kLevels) {
        const __m512i packed = _mm512_loadu_si512(w + k / 2), evens = even(packed), odds = odd(packed);
        UNROLLED
        for (int r = 0; r < R; r++) {
          const int8_t* x = rows.bytes + ((row + r) * rows.blocks + b) * of.block + k;
          sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], evens, _mm512_loadu_si512(x));
          sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], odds, _mm512_loadu_si512(x + kWide));
        }
      }
    }
    for (int64_t i = 0; i < Fetch * of.block / 2; i += kWide) {
      _mm_prefetch(next + Fetch * b * of.block / 2 + i, _MM_HINT_T0);
    }
    const float* scales = of.scales + b;
    const __m128 scale = _mm_setr_ps(scales[at[0] * of.blocks], scales[at[1] * of.blocks], scales[at[2] * of.blocks],
                                     scales[at[3] * of.blocks]);
    UNROLLED
    for (int r = 0; r < R; r++) {
      const int64_t of_row = (row + r) * rows.blocks + b;
      const __m128i middle = _mm_set1_epi32(rows.middles[of_row]);
      const __m128i total = _mm_sub_epi32(sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), middle);
      const __m128 worth = _mm_mul_ps(scale, _mm_set1_ps(rows.scales[of_row]));
      made[r] = _mm_fmadd_ps(_mm_cvtepi32_ps(total), worth, made[r]);
    }
  }
  UNROLLED
  for (int r = 0; r < R; r++) to[r] = made[r];
}

// ---- Either: columns from `begin` to `end` of all rows, with a second matrix for the other half of a gate.

template <int R, int Fetch, typename Rows, typename Matrix>
inline void place(const Rows& rows, int64_t row, const Matrix& of, const Matrix* other, int64_t column, int64_t end,
                  int done, float* to) {
  const __mmask8 there = static_cast<__mmask8>(first(end - column) & 15);
  __m128 made[R], ups[R];
  tile<R, Fetch>(rows, row, of, column, done, made);
  if (other) tile<R, Fetch>(rows, row, *other, column, done, ups);
  UNROLLED
  for (int r = 0; r < R; r++) {
    const __m128 value = other ? gated(made[r], ups[r]) : made[r];
    _mm_mask_storeu_ps(to + (row + r) * of.columns + column, there, value);
  }
}

template <typename Rows, typename Matrix>
inline void columns(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end,
                    float* to) {
  constexpr bool five = std::is_same_v<Matrix, Bytes>;  // of four bits there is no room for so many sums
  const int64_t tiles = five && count == 5 ? 1 : (count + kRows - 1) / kRows;
  for (int64_t column = begin; column < end; column += kColumns) {
    int done = 0;
    for (int64_t row = 0, tile = 0; tile < tiles; tile++) {
      const int fetch = done == 4 ? 0 : tiles == 1 ? 4 : tiles == 2 || (tiles == 3 && done == 0) ? 2 : 1;
      const int64_t left = count - row, here = (left + tiles - tile - 1) / (tiles - tile);  // about as many in each
#define PLACE(R, F) place<R, F>(rows, row, of, other, column, end, done, to)
#define EITHER(R) (fetch == 4 ? PLACE(R, 4) : fetch == 2 ? PLACE(R, 2) : fetch == 1 ? PLACE(R, 1) : PLACE(R, 0))
      if constexpr (five) {
        if (here == 5) PLACE(5, 4);
      }
      if (here == 4) EITHER(4);
      if (here == 3) EITHER(3);
      if (here == 2) EITHER(2);
      if (here == 1) EITHER(1);
#undef EITHER
#undef PLACE
      row += here;
      done += fetch;
    }
  }
}

}  // namespace products

#pragma GCC pop_options

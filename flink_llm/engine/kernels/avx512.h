// Products of rows by a matrix held in eight or four bits, for processors with AVX-512 and VNNI.
//
// A matrix is [columns of the product, inputs], as it is trained: each column's inputs lie together, and are read
// once, in order, for all rows. A row's numbers never depend on how many rows there are.
#pragma once
#include <cmath>
#include <type_traits>

#include "lanes_avx512.h"
#include "shapes.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

namespace avx512 {

using namespace attention;
using namespace products;
#include "rows.inc"
#include "attention.inc"

constexpr int64_t kWide = 64;    // bytes in a register
constexpr int64_t kColumns = 4;  // of a tile
constexpr int64_t kRows = 4;     // of a tile, at most; 5 where there is one alone

// Sums of each of four registers, in their order.
inline __m128i sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// ---- Eight bits: one scale for a row, one for a column.

struct RowBytes {  // rows in unsigned bytes around 128
  uint8_t* bytes;   // [rows, wide]
  float* largest;   // [rows]
  int64_t inputs, wide;
};

inline void to_levels(const float* x, int64_t row, const RowBytes& to) {
  const float most_of_it = largest(x, to.inputs);
  to.largest[row] = most_of_it;
  uint8_t* out = to.bytes + row * to.wide;
  for (int64_t i = 0; i < to.wide; i += kLanes) {
    const Lanes level = levels(load(x + i, to.inputs - i > 0 ? to.inputs - i : 0), most_of_it);
    const __m512i around = _mm512_add_epi32(_mm512_cvtps_epi32(level), _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(around));
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

struct RowBlocks {  // rows in signed bytes, even inputs of each 128 before the odd ones
  int8_t* bytes;     // [rows, blocks, block]
  int32_t* middles;  // [rows, blocks]: 8 times the sum of a block
  float* scales;     // [rows, blocks]
  int64_t inputs, block, blocks;
};

inline void to_levels(const float* x, int64_t row, const RowBlocks& to) {
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

// Columns from `begin` to `end` of rows, with a second matrix for the other half of a gate.
template <int R, int Fetch, typename Rows, typename Matrix>
inline void place(const Rows& rows, int64_t row, const Matrix& of, const Matrix* other, int64_t column, int64_t end,
                  int done, float* to) {
  __m128 made[R], ups[R];
  tile<R, Fetch>(rows, row, of, column, done, made);
  if (other) tile<R, Fetch>(rows, row, *other, column, done, ups);
  UNROLLED
  for (int r = 0; r < R; r++) {
    const __m128 value = other ? gated(made[r], ups[r]) : made[r];
    store(to + (row + r) * of.columns + column, value, end - column);
  }
}

template <typename Rows, typename Matrix>
inline void columns(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end,
                    float* to) {
  constexpr bool five = std::is_same_v<Matrix, Bytes>;  // else there is no room for so many sums
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

// ---- Many rows: a panel of columns is turned once, so that sixteen of them lie in one register, and all rows go
// through it. The numbers are the same, to the bit.

constexpr int kTogether = 6;    // rows, at most

// A panel's registers: as many as leave room for the sums of its rows.
template <typename Matrix>
constexpr int kParts = std::is_same_v<Matrix, Bytes> ? 4 : 2;
template <typename Matrix>
constexpr int64_t kPanel = kLanes * kParts<Matrix>;  // columns

// 64 bytes of a column from an input on; of a block of four bits, as it is unpacked.
inline __m512i bytes_of(const Bytes& of, int64_t column, int64_t k) {
  if (column >= of.columns) return _mm512_setzero_si512();
  const int64_t left = of.inputs - k;
  const __mmask64 there = left >= kWide ? ~0ull : (1ull << left) - 1;
  return _mm512_maskz_loadu_epi8(there, of.weights + column * of.inputs + k);
}
inline __m512i bytes_of(const Blocks& of, int64_t column, int64_t k) {
  if (column >= of.columns) return _mm512_setzero_si512();
  const uint8_t* from = of.weights + (column * of.blocks * of.block + k / kLevels * kLevels) / 2;
  const __m512i packed = _mm512_loadu_si512(from);
  return k % kLevels ? odd(packed) : even(packed);
}
inline int64_t bytes_of(const Bytes& of) { return of.inputs; }  // a column
inline int64_t bytes_of(const Blocks& of) { return of.blocks * of.block / 2; }
inline int64_t length(const Bytes& of) { return up(of.inputs, kWide); }
inline int64_t length(const Blocks& of) { return of.blocks * of.block; }

// Bytes [length / 4, kPanel<Matrix>, 4]: four inputs of a column are one number of 32 bits.
template <typename Matrix>
inline void make_panel(const Matrix& of, int64_t column, int8_t* panel) {
  for (int part = 0; part < kParts<Matrix>; part++) {
    for (int64_t k = 0; k < length(of); k += kWide) {
      __m512i x[16];
      _Pragma("GCC unroll 16") for (int c = 0; c < 16; c++) x[c] = bytes_of(of, column + part * kLanes + c, k);
      turn(x);
      int8_t* to = panel + k * kPanel<Matrix> + part * kWide;
      _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * kWide * kParts<Matrix>, x[i]);
    }
  }
}

inline __m512i four(const void* from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

inline __mmask16 columns_there(int64_t columns, int64_t column) {
  return columns > column ? first(columns - column) : static_cast<__mmask16>(0);
}

#define EACH_ROW _Pragma("GCC unroll 6") for (int r = 0; r < R; r++)

// R rows by a panel; meanwhile what `next` points to is fetched. (What is looked at by a number that
// GCC does not know, it keeps in memory throughout.)
template <int R>
inline void by_panel(const RowBytes& rows, int64_t row, const Bytes& of, int64_t column, const int8_t* panel,
                     const char* next, __m512 (&to)[R][kParts<Bytes>]) {
  __m512i a[R], b[R], c[R], d[R];
  EACH_ROW a[r] = b[r] = c[r] = d[r] = _mm512_setzero_si512();
  const uint8_t* x = rows.bytes + row * rows.wide;
  for (int64_t k = 0; k < rows.wide; k += 4) {
    const int8_t* from = panel + k * kPanel<Bytes>;
    const __m512i one = _mm512_load_si512(from), two = _mm512_load_si512(from + kWide);
    const __m512i three = _mm512_load_si512(from + 2 * kWide), other = _mm512_load_si512(from + 3 * kWide);
    if (next) _mm_prefetch(next + k * (kWide / 4), _MM_HINT_T0);
    EACH_ROW {
      const __m512i given = four(x + r * rows.wide + k);
      a[r] = _mm512_dpbusd_epi32(a[r], given, one);
      b[r] = _mm512_dpbusd_epi32(b[r], given, two);
      c[r] = _mm512_dpbusd_epi32(c[r], given, three);
      d[r] = _mm512_dpbusd_epi32(d[r], given, other);
    }
  }
  __m512i sums[kParts<Bytes>][R];
  EACH_ROW sums[0][r] = a[r], sums[1][r] = b[r], sums[2][r] = c[r], sums[3][r] = d[r];
  for (int part = 0; part < kParts<Bytes>; part++) {
    const __mmask16 there = columns_there(of.columns, column + part * kLanes);
    const __m512i middle = _mm512_maskz_loadu_epi32(there, of.middles + column + part * kLanes);
    const __m512 scale = _mm512_maskz_loadu_ps(there, of.scales + column + part * kLanes);
    EACH_ROW {
      const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[part][r], middle));
      to[r][part] = _mm512_mul_ps(_mm512_mul_ps(total, scale), _mm512_set1_ps(rows.largest[row + r]));
    }
  }
}

template <int R>
inline void by_panel(const RowBlocks& rows, int64_t row, const Blocks& of, int64_t column, const int8_t* panel,
                     const char* next, __m512 (&to)[R][kParts<Blocks>]) {
  __m512 left[R], right[R];
  EACH_ROW left[r] = right[r] = _mm512_setzero_ps();
  const __m512i by = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32(static_cast<int>(of.blocks)));
  const __mmask16 there = columns_there(of.columns, column), beside = columns_there(of.columns, column + kLanes);
  const int8_t* x = rows.bytes + row * rows.blocks * of.block;
  for (int64_t block = 0; block < of.blocks; block++) {
    __m512i a[R], b[R];
    EACH_ROW a[r] = b[r] = _mm512_setzero_si512();
    for (int64_t k = block * of.block; k < (block + 1) * of.block; k += 4) {
      const __m512i one = _mm512_load_si512(panel + k * kPanel<Blocks>);
      const __m512i two = _mm512_load_si512(panel + k * kPanel<Blocks> + kWide);
      if (next) _mm_prefetch(next + k * (kWide / 4), _MM_HINT_T0);
      EACH_ROW {
        const __m512i given = four(x + r * rows.blocks * of.block + k);
        a[r] = _mm512_dpbusd_epi32(a[r], one, given);
        b[r] = _mm512_dpbusd_epi32(b[r], two, given);
      }
    }
    const float* scales = of.scales + column * of.blocks + block;
    const __m512 scale = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, by, scales, sizeof(float));
    const __m512 other =
        _mm512_mask_i32gather_ps(_mm512_setzero_ps(), beside, by, scales + kLanes * of.blocks, sizeof(float));
    EACH_ROW {
      const int64_t of_row = (row + r) * rows.blocks + block;
      const __m512i middle = _mm512_set1_epi32(rows.middles[of_row]);
      const __m512 worth = _mm512_set1_ps(rows.scales[of_row]);
      const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(a[r], middle));
      const __m512 beyond = _mm512_cvtepi32_ps(_mm512_sub_epi32(b[r], middle));
      left[r] = _mm512_fmadd_ps(total, _mm512_mul_ps(scale, worth), left[r]);
      right[r] = _mm512_fmadd_ps(beyond, _mm512_mul_ps(other, worth), right[r]);
    }
  }
  EACH_ROW to[r][0] = left[r], to[r][1] = right[r];
}

template <int R, typename Rows, typename Matrix>
inline void place_panel(const Rows& rows, int64_t row, const Matrix& of, const Matrix* other, int64_t column, int64_t end,
                        const int8_t* panel, const int8_t* other_panel, const char* next, float* to) {
  __m512 made[R][kParts<Matrix>];
  by_panel<R>(rows, row, of, column, panel, next, made);
  if (other) {
    alignas(64) float gates[R][kPanel<Matrix>];
    _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
      _Pragma("GCC unroll 4") for (int p = 0; p < kParts<Matrix>; p++) _mm512_store_ps(gates[r] + p * kLanes, made[r][p]);
    }
    by_panel<R>(rows, row, *other, column, other_panel, nullptr, made);
    for (int r = 0; r < R; r++) {
      for (int p = 0; p < kParts<Matrix>; p++) made[r][p] = gated(_mm512_load_ps(gates[r] + p * kLanes), made[r][p]);
    }
  }
  _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) {
    _Pragma("GCC unroll 4") for (int p = 0; p < kParts<Matrix>; p++) {
      float* at = to + (row + r) * of.columns + column + p * kLanes;
      _mm512_mask_storeu_ps(at, columns_there(end, column + p * kLanes), made[r][p]);
    }
  }
}

// As `columns`. `panels` has room for one panel of each matrix.
template <typename Rows, typename Matrix>
inline void by_panels(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end,
                      int8_t* panels, float* to) {
  int8_t* other_panel = panels + length(of) * kPanel<Matrix>;
  const int64_t bytes = bytes_of(of);
  for (int64_t column = begin; column < end; column += kPanel<Matrix>) {
    make_panel(of, column, panels);
    if (other) make_panel(*other, column, other_panel);
    int64_t fetched = 0;  // of the next panels, by `of` first; whoever multiplies them
    for (int64_t row = 0; row < count;) {
      const char* next = nullptr;
      if (column + kPanel<Matrix> < of.columns && fetched < kPanel<Matrix> * bytes * (other ? 2 : 1)) {
        const bool second = fetched >= kPanel<Matrix> * bytes;
        const auto* weights = reinterpret_cast<const char*>(second ? other->weights : of.weights);
        next = weights + (column + kPanel<Matrix>) * bytes + fetched - (second ? kPanel<Matrix> * bytes : 0);
        fetched += length(of) * (kWide / 4);
      }
#define PLACE(R) place_panel<R>(rows, row, of, other, column, end, panels, other_panel, next, to)
      if (count - row >= kTogether) {
        PLACE(kTogether);
        row += kTogether;
      } else if (count - row >= 4) {
        PLACE(4);
        row += 4;
      } else {
        PLACE(1);
        row += 1;
      }
#undef PLACE
    }
  }
}

// From how many rows on turning a panel is worth it: sooner where that unpacks it as well, and where columns are so short
// that sums across their registers take longer.
inline bool turns(const Bytes& of, int64_t count) { return count >= (of.inputs > 256 ? 36 : 16); }
inline bool turns(const Blocks&, int64_t count) { return count >= 16; }

#include "common.inc"

// What `kernels.cc` takes of this, as in `avx2.h`.
struct Isa : Common {
  using RowBytes = avx512::RowBytes;
  using RowBlocks = avx512::RowBlocks;

  template <typename Memory>
  static void take(Memory& memory, const Bytes& of, int64_t count, RowBytes* rows) {
    rows->wide = up(of.inputs, kWide);
    rows->bytes = memory.template take<uint8_t>(count * rows->wide);
    rows->largest = memory.template take<float>(count);
  }
  template <typename Memory>
  static void take(Memory& memory, const Blocks& of, int64_t count, RowBlocks* rows) {
    rows->block = of.block;
    rows->blocks = of.blocks;
    rows->bytes = memory.template take<int8_t>(count * of.blocks * of.block);
    rows->middles = memory.template take<int32_t>(count * of.blocks);
    rows->scales = memory.template take<float>(count * of.blocks);
  }
  // Bytes that `take` takes for a row.
  static int64_t row(const Bytes& of) { return up(of.inputs, kWide) + 4; }
  static int64_t row(const Blocks& of) { return of.blocks * (of.block + 8); }

  // Columns of a task are a multiple of so many; and bytes of memory that `multiply` wants for so many rows.
  template <typename Matrix>
  static int64_t together(const Matrix& of, int64_t count) {
    return turns(of, count) ? kPanel<Matrix> : kColumns;
  }
  template <typename Matrix>
  static int64_t room(const Matrix& of, int64_t count) {
    return turns(of, count) ? length(of) * kPanel<Matrix> * 2 : 0;
  }
  template <typename Rows, typename Matrix>
  static void multiply(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end,
                       int8_t* room, float* to) {
    if (turns(of, count)) return by_panels(rows, count, of, other, begin, end, room, to);
    columns(rows, count, of, other, begin, end, to);
  }
};

}  // namespace avx512

#pragma GCC pop_options

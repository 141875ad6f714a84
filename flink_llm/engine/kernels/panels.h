// Products of many rows: a panel of columns is turned once, so that sixteen of them lie in one register, and all rows go
// through it. The numbers are those of `products.h`, to the bit.
#pragma once
#include <type_traits>

#include "products.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

namespace products {

constexpr int64_t kLanes = 16;  // columns in a register
constexpr int kTogether = 6;    // rows, at most

// A panel's registers: as many as leave room for the sums of its rows.
template <typename Matrix>
constexpr int kParts = std::is_same_v<Matrix, Bytes> ? 4 : 2;
template <typename Matrix>
constexpr int64_t kPanel = kLanes * kParts<Matrix>;  // columns

// sixteen registers of sixteen numbers of 32 bits, turned
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

}  // namespace products

#pragma GCC pop_options

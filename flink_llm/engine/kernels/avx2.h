// Products of rows by a matrix held in eight or four bits, for processors with AVX2 and without VNNI; laid out as in
// `avx512.h`.
//
// vpmaddubsw multiplies unsigned bytes by signed ones and adds pairs of them in 16 bits. Here the unsigned ones are the weights,
// raised by 64, so that the pairs fit, or by 8 in four bits, where eight of them do; what is raised is taken away again.
#pragma once
#include <cmath>

#include "lanes_avx2.h"
#include "shapes.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace avx2 {

using namespace attention;
using namespace products;
#include "rows.inc"
#include "attention.inc"

constexpr int64_t kWide = 32;     // bytes in a register
constexpr int64_t kColumns = 4;   // of a tile, one after the other: memory is quickest where it is read in its order
constexpr int64_t kRows = 6;      // of a tile, at most: what there are registers for
constexpr int64_t kBlock = 64;    // columns that all tiles of rows go through before the next ones
constexpr int64_t kAhead = 1280;  // bytes, which a single row fetches

// What a tile fetches meanwhile: those of its four columns from `first` to `last`, so many bytes ahead.
struct Fetch {
  int64_t bytes;
  int first, last;
};

inline int64_t bytes_of_column(const Bytes& of) { return of.inputs; }
inline int64_t bytes_of_column(const Blocks& of) { return of.blocks * of.block / 2; }

inline __m256i bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i by(__m256i weights, const int8_t* levels) { return _mm256_maddubs_epi16(weights, bytes(levels)); }
inline __m256i widened(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

// Sums of each of four registers, in their order.
inline __m128i sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// Levels in signed bytes; those of no numbers are some.
inline void to_signed(Lanes level, int8_t* to) {
  const __m256i all = _mm256_cvtps_epi32(level);
  const __m128i two = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(two, two));
}

// ---- Eight bits: one scale for a row, one for a column.

constexpr int64_t kPart = 2 * kWide;
constexpr int kRaised = 64;

struct RowBytes {
  int8_t* bytes;    // [rows, wide]
  int32_t* raised;  // [rows]: what raising the weights adds
  float* largest;   // [rows]
  int64_t inputs, wide;
};

inline void to_levels(const float* x, int64_t row, const RowBytes& to) {
  const float most_of_it = largest(x, to.inputs);
  int8_t* out = to.bytes + row * to.wide;
  __m256i total = _mm256_setzero_si256();
  for (int64_t k = 0; k < to.wide; k += kWide) {
    for (int64_t i = k; i < k + kWide; i += kLanes) to_signed(levels(load(x + i, to.inputs - i), most_of_it), out + i);
    total = _mm256_add_epi32(total, widened(by(_mm256_set1_epi8(kRaised), out + k)));
  }
  to.largest[row] = most_of_it;
  to.raised[row] = _mm_cvtsi128_si32(sums(total, total, total, total));
}

// `parts` of a column by R rows, which are `wide` bytes from each other; meanwhile `next` is fetched, if not null.
template <int R>
inline __attribute__((always_inline)) void gather(const int8_t* x, int64_t wide, const int8_t* of, int64_t parts,
                                                  const int8_t* next, __m256i (&to)[R]) {
  const __m256i raised = _mm256_set1_epi8(kRaised);
  for (int64_t k = 0; k < parts * kPart; k += kPart) {
    const __m256i low = _mm256_add_epi8(bytes(of + k), raised), high = _mm256_add_epi8(bytes(of + k + kWide), raised);
    if (next) _mm_prefetch(next + k, _MM_HINT_T1);
    UNROLLED
    for (int r = 0; r < R; r++) {
      const int8_t* row = x + r * wide + k;
      to[r] = _mm256_add_epi32(to[r], widened(by(low, row)));
      to[r] = _mm256_add_epi32(to[r], widened(by(high, row + kWide)));
    }
  }
}

// Whole numbers of four columns to what they stand for.
inline __m128 scaled(__m128i total, const float* scales, float largest) {
  return _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(total), _mm_load_ps(scales)), _mm_set1_ps(largest));
}

// A tile of weights of any size, slowly.
template <int R>
__attribute__((noinline)) void slow_tile(const RowBytes& rows, int64_t row, const Bytes& of, int64_t column, __m128 (&to)[R]) {
  for (int r = 0; r < R; r++) {
    alignas(16) int32_t made[kColumns] = {};
    alignas(16) float scales[kColumns] = {};
    const int8_t* x = rows.bytes + (row + r) * rows.wide;
    for (int64_t c = 0; c < kColumns && column + c < of.columns; c++) {
      const int8_t* w = of.weights + (column + c) * of.inputs;
      for (int64_t k = 0; k < of.inputs; k++) made[c] += x[k] * w[k];
      scales[c] = of.scales[column + c];
    }
    to[r] = scaled(_mm_load_si128(reinterpret_cast<__m128i*>(made)), scales, rows.largest[row + r]);
  }
}

template <int R>
inline __attribute__((always_inline)) void tile(const RowBytes& rows, int64_t row, const Bytes& of, int64_t column,
                                                const Fetch& fetch, __m128 (&to)[R]) {
  if (!of.small) return slow_tile(rows, row, of, column, to);
  const int64_t whole = of.inputs / kPart, rest = of.inputs % kPart;
  const int8_t* x = rows.bytes + row * rows.wide;
  __m256i sum[kColumns][R];
  alignas(16) float scales[kColumns];
  ROLLED
  for (int c = 0; c < kColumns; c++) {
    const int64_t at = column + c < of.columns ? column + c : of.columns - 1;
    const int8_t* w = of.weights + at * of.inputs;
    scales[c] = of.scales[at];
    __m256i made[R];
    UNROLLED
    for (int r = 0; r < R; r++) made[r] = _mm256_setzero_si256();
    gather<R>(x, rows.wide, w, whole, c >= fetch.first && c < fetch.last ? w + fetch.bytes : nullptr, made);
    if (rest) {
      alignas(32) int8_t last[kPart] = {};
      std::memcpy(last, w + whole * kPart, rest);
      gather<R>(x + whole * kPart, rows.wide, last, 1, nullptr, made);
    }
    UNROLLED
    for (int r = 0; r < R; r++) sum[c][r] = made[r];
  }
  UNROLLED
  for (int r = 0; r < R; r++) {
    const __m128i total = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
    to[r] = scaled(_mm_sub_epi32(total, _mm_set1_epi32(rows.raised[row + r])), scales, rows.largest[row + r]);
  }
}

// ---- Four bits: a scale for each block of inputs, of a row as of a column.

constexpr int64_t kLevelsHeld = kLevels + kWide;

struct RowBlocks {
  // [rows, blocks, block / kLevels, kLevelsHeld]: even inputs of each 64 before the odd ones; behind each 128 what raising the
  // weights adds, to be taken away in the lanes of their sums
  int8_t* bytes;
  float* scales;  // [blocks, rows]
  int64_t inputs, block, blocks, wide, count;
};

inline void to_levels(const float* x, int64_t row, const RowBlocks& to) {
  alignas(32) int8_t level[kLevels];
  int8_t* out = to.bytes + row * to.wide;
  for (int64_t b = 0; b < to.blocks; b++) {
    const int64_t left = to.inputs - b * to.block;
    const float most_of_it = largest(x + b * to.block, left < to.block ? left : to.block);
    const Lanes turned = all(most_of_it > 0 ? 127.0f / most_of_it : 0.0f);
    for (int64_t k = 0; k < to.block; k += kLevels, out += kLevelsHeld) {
      for (int64_t i = 0; i < kLevels; i += kLanes) {
        to_signed(multiply(load(x + b * to.block + k + i, left - k - i), turned), level + i);
      }
      for (int64_t half = 0; half < kLevels; half += 2 * kWide) {
        for (int64_t i = 0; i < kWide; i++) {
          out[half + i] = level[half + 2 * i];
          out[half + kWide + i] = level[half + 2 * i + 1];
        }
      }
      __m256i raised = _mm256_setzero_si256();
      for (int64_t i = 0; i < kLevels; i += kWide) raised = plus(raised, by(_mm256_set1_epi8(8), out + i));
      raised = _mm256_sub_epi16(_mm256_setzero_si256(), raised);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kLevels), raised);
    }
    to.scales[b * to.count + row] = most_of_it / 127.0f;
  }
}

// 128 levels of a column by R rows, which are `wide` bytes from each other.
template <int R>
inline __attribute__((always_inline)) void gather(const int8_t* x, int64_t wide, const uint8_t* of, Lanes scale,
                                                  const float* scales, Lanes (&to)[R]) {
  const __m256i low = _mm256_set1_epi8(15), one = bytes(of), two = bytes(of + kWide);
  const __m256i evens = _mm256_and_si256(one, low), odds = _mm256_and_si256(_mm256_srli_epi16(one, 4), low);
  const __m256i others = _mm256_and_si256(two, low), last = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
  UNROLLED
  for (int r = 0; r < R; r++) {
    const int8_t* levels = x + r * wide;
    const __m256i four = plus(by(odds, levels + kWide), by(others, levels + 2 * kWide));
    const __m256i raised = plus(by(evens, levels), bytes(levels + kLevels));
    const __m256i eight = plus(raised, plus(four, by(last, levels + 3 * kWide)));
    to[r] = multiply_add(_mm256_cvtepi32_ps(widened(eight)), multiply(scale, all(scales[r])), to[r]);
  }
}

template <int R>
inline __attribute__((always_inline)) void tile(const RowBlocks& rows, int64_t row, const Blocks& of, int64_t column,
                                                const Fetch& fetch, __m128 (&to)[R]) {
  const int64_t wide = rows.wide;
  Lanes sum[kColumns][R];
  ROLLED
  for (int c = 0; c < kColumns; c++) {
    const int64_t at = column + c < of.columns ? column + c : of.columns - 1;
    const uint8_t* w = of.weights + at * bytes_of_column(of);
    const float* scales = of.scales + at * of.blocks;
    const float* of_rows = rows.scales + row;
    const int8_t* x = rows.bytes + row * wide;
    const bool ahead = c >= fetch.first && c < fetch.last;
    Lanes made[R];
    UNROLLED
    for (int r = 0; r < R; r++) made[r] = all(0);
    const auto part = [&](int64_t block) __attribute__((always_inline)) {
      if (ahead) _mm_prefetch(w + fetch.bytes, _MM_HINT_T1);
      gather<R>(x, wide, w, all(scales[block]), of_rows + block * rows.count, made);
      w += kLevels / 2, x += kLevelsHeld;
    };
    if (of.block == kLevels) {  // a loop in a loop takes a tenth longer
      for (int64_t block = 0; block < of.blocks; block++) part(block);
    } else {
      for (int64_t block = 0; block < of.blocks; block++) {
        for (int64_t k = 0; k < of.block; k += kLevels) part(block);
      }
    }
    UNROLLED
    for (int r = 0; r < R; r++) sum[c][r] = made[r];
  }
  UNROLLED
  for (int r = 0; r < R; r++) to[r] = sums(sum[0][r], sum[1][r], sum[2][r], sum[3][r]);
}

// A tile of R rows through columns from `begin` to `end`, with a second matrix for the other half of a gate.
template <int R, typename Rows, typename Matrix>
__attribute__((noinline)) void place(const Rows& rows, int64_t row, const Matrix& of, const Matrix* other, int64_t begin,
                                     int64_t end, const Fetch& fetch, float* to) {
  for (int64_t column = begin; column < end; column += kColumns) {
    __m128 made[R], ups[R];
    tile<R>(rows, row, of, column, fetch, made);
    if (other) tile<R>(rows, row, *other, column, fetch, ups);
    UNROLLED
    for (int r = 0; r < R; r++) {
      const __m128 value = other ? gated(made[r], ups[r]) : made[r];
      store(to + (row + r) * of.columns + column, value, end - column);
    }
  }
}

template <typename Rows, typename Matrix>
void columns(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end, float* to) {
  const int64_t tiles = (count + kRows - 1) / kRows, block = tiles == 1 ? end - begin : kBlock;
  const int64_t ahead = count == 1 ? kAhead : bytes_of_column(of) * (tiles == 1 ? kColumns : kBlock);
  for (int64_t column = begin; column < end; column += block) {
    const int64_t stop = column + block < end ? column + block : end;
    for (int64_t row = 0, tile = 0; tile < tiles; tile++) {
      const int64_t left = count - row, here = (left + tiles - tile - 1) / (tiles - tile);  // about as many in each
      const auto fetched = [tiles](int64_t by) { return static_cast<int>(tiles < 4 ? 4 * by / tiles : by); };
      const Fetch fetch{ahead, fetched(tile), fetched(tile + 1)};
      switch (here) {
        case 1: place<1>(rows, row, of, other, column, stop, fetch, to); break;
        case 2: place<2>(rows, row, of, other, column, stop, fetch, to); break;
        case 3: place<3>(rows, row, of, other, column, stop, fetch, to); break;
        case 4: place<4>(rows, row, of, other, column, stop, fetch, to); break;
        case 5: place<5>(rows, row, of, other, column, stop, fetch, to); break;
        default: place<6>(rows, row, of, other, column, stop, fetch, to);
      }
      row += here;
    }
  }
}

#include "common.inc"

// What `kernels.cc` takes of this.
struct Isa : Common {
  using RowBytes = avx2::RowBytes;
  using RowBlocks = avx2::RowBlocks;

  template <typename Memory>
  static void take(Memory& memory, const Bytes& of, int64_t count, RowBytes* rows) {
    rows->wide = up(of.inputs, kPart);
    rows->bytes = memory.template take<int8_t>(count * rows->wide);
    rows->raised = memory.template take<int32_t>(count);
    rows->largest = memory.template take<float>(count);
  }
  template <typename Memory>
  static void take(Memory& memory, const Blocks& of, int64_t count, RowBlocks* rows) {
    rows->block = of.block;
    rows->blocks = of.blocks;
    rows->count = count;
    rows->wide = of.blocks * of.block / kLevels * kLevelsHeld;
    rows->bytes = memory.template take<int8_t>(count * rows->wide);
    rows->scales = memory.template take<float>(count * of.blocks);
  }
  // Bytes that `take` takes for a row.
  static int64_t row(const Bytes& of) { return up(of.inputs, kPart) + 8; }
  static int64_t row(const Blocks& of) { return of.blocks * (of.block / kLevels * kLevelsHeld + 4); }

  // Columns of a task are a multiple of so many; and bytes of memory that `multiply` wants for so many rows.
  template <typename Matrix>
  static int64_t together(const Matrix&, int64_t) {
    return kColumns;
  }
  template <typename Matrix>
  static int64_t room(const Matrix&, int64_t) {
    return 0;
  }
  template <typename Rows, typename Matrix>
  static void multiply(const Rows& rows, int64_t count, const Matrix& of, const Matrix* other, int64_t begin, int64_t end,
                       int8_t*, float* to) {
    columns(rows, count, of, other, begin, end, to);
  }
};

}  // namespace avx2

#pragma GCC pop_options

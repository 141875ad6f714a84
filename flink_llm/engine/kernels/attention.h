// Attention of queries over a cache of keys and values, for processors with AVX-512: grouped heads (Ainslie et al. 2023),
// rotated positions (Su et al. 2021), a causal mask. A query's numbers depend on its own sequence alone.
#pragma once
#include "panels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")

namespace attention {

using products::exponential;
using products::first;
using products::sums;

constexpr int64_t kQueries = 4;  // of a tile, at most
constexpr int64_t kKeys = 4;
constexpr int64_t kWide = 16;

struct Shape {
  int64_t heads, kv_heads, size;  // queries' heads, those of keys and values, numbers in each
  int64_t rotated;                // numbers of a head that turn with its position
  float scale;
};

// One head of one sequence.
struct Head {
  float* keys;    // [places, size]
  float* values;  // [places, size]
};

inline void rotate(const float* x, const float* cosine, const float* sine, const Shape& shape, float* to) {
  const int64_t half = shape.rotated / 2;
  for (int64_t i = 0; i < half; i += kWide) {
    const __mmask16 there = first(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(there, x + i), b = _mm512_maskz_loadu_ps(there, x + half + i);
    const __m512 c = _mm512_maskz_loadu_ps(there, cosine + i), s = _mm512_maskz_loadu_ps(there, sine + i);
    _mm512_mask_storeu_ps(to + i, there, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    _mm512_mask_storeu_ps(to + half + i, there, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
  for (int64_t i = shape.rotated; i < shape.size; i++) to[i] = x[i];
}

// In place: exp(x - the largest); one over their sum.
inline float softmax(float* x, int64_t count) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += kWide) {
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, first(count - i), x + i));
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += kWide) {
    const __mmask16 there = first(count - i);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, x + i), top));
    sum = _mm512_mask_add_ps(sum, there, sum, e);
    _mm512_mask_storeu_ps(x + i, there, e);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

template <int R>
inline void score(const float* const (&queries)[kQueries], const Head& of, const Shape& shape, int64_t keys,
                  float* const (&to)[kQueries]) {
  const __m128 scale = _mm_set1_ps(shape.scale);
  for (int64_t key = 0; key < keys; key += kKeys) {
    const float* k[kKeys];
    UNROLLED
    for (int c = 0; c < kKeys; c++) k[c] = of.keys + (key + c < keys ? key + c : keys - 1) * shape.size;
    __m512 sum[R][kKeys];
    UNROLLED
    for (int r = 0; r < R; r++) {
      UNROLLED
      for (int c = 0; c < kKeys; c++) sum[r][c] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < shape.size; i += kWide) {
      __m512 part[kKeys];
      UNROLLED
      for (int c = 0; c < kKeys; c++) part[c] = _mm512_loadu_ps(k[c] + i);
      UNROLLED
      for (int r = 0; r < R; r++) {
        const __m512 query = _mm512_loadu_ps(queries[r] + i);
        UNROLLED
        for (int c = 0; c < kKeys; c++) sum[r][c] = _mm512_fmadd_ps(query, part[c], sum[r][c]);
      }
    }
    UNROLLED
    for (int r = 0; r < R; r++) {
      _mm_storeu_ps(to[r] + key, _mm_mul_ps(sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), scale));
    }
  }
}

// 16 * C numbers of a head, from `from` on.
template <int R, int C>
inline void mix(const float* const (&weights)[kQueries], const float (&by)[kQueries], const Head& of, const Shape& shape,
                const int64_t (&keys)[kQueries], int64_t from, float* const (&to)[kQueries]) {
  __m512 sum[R][C];
  UNROLLED
  for (int r = 0; r < R; r++) {
    UNROLLED
    for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
  }
  for (int64_t key = 0; key < keys[R - 1]; key++) {
    const float* v = of.values + key * shape.size + from;
    __m512 part[C];
    UNROLLED
    for (int c = 0; c < C; c++) part[c] = _mm512_loadu_ps(v + c * kWide);
    UNROLLED
    for (int r = 0; r < R; r++) {
      const __m512 weight = _mm512_set1_ps(weights[r][key]);
      UNROLLED
      for (int c = 0; c < C; c++) sum[r][c] = _mm512_fmadd_ps(weight, part[c], sum[r][c]);
    }
  }
  UNROLLED
  for (int r = 0; r < R; r++) {
    UNROLLED
    for (int c = 0; c < C; c++) {
      _mm512_storeu_ps(to[r] + from + c * kWide, _mm512_mul_ps(sum[r][c], _mm512_set1_ps(by[r])));
    }
  }
}

// Keys in sixteens, each of them [size, kWide]: many queries score them without a sum across a register. `to` has
// room for whole sixteens.
inline void turn(const Head& of, const Shape& shape, int64_t keys, float* to) {
  for (int64_t key = 0; key < keys; key += kWide, to += shape.size * kWide) {
    for (int64_t i = 0; i < shape.size; i += kWide) {
      __m512i x[16];
      _Pragma("GCC unroll 16") for (int c = 0; c < 16; c++) {
        x[c] = _mm512_loadu_si512(of.keys + (key + c < keys ? key + c : keys - 1) * shape.size + i);
      }
      products::turn(x);
      _Pragma("GCC unroll 16") for (int c = 0; c < 16; c++) _mm512_storeu_si512(to + (i + c) * kWide, x[c]);
    }
  }
}

#define EACH_QUERY _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)
#define INLINE inline __attribute__((always_inline))

// What number `i` of a register gathers in `score`, then how `sums` adds these: the same numbers, to the bit.
template <int R>
INLINE void gather(const float* const (&queries)[kQueries], const float* keys, int64_t size, int64_t i, __m512 (&to)[R]) {
  __m512 part = _mm512_loadu_ps(keys + i * kWide);
  EACH_QUERY to[r] = _mm512_mul_ps(_mm512_set1_ps(queries[r][i]), part);
  for (i += kWide; i < size; i += kWide) {
    part = _mm512_loadu_ps(keys + i * kWide);
    EACH_QUERY to[r] = _mm512_fmadd_ps(_mm512_set1_ps(queries[r][i]), part, to[r]);
  }
}

template <int R>
INLINE void gather_four(const float* const (&queries)[kQueries], const float* keys, int64_t size, int64_t i,
                        __m512 (&to)[R]) {
  __m512 other[R], last[R];
  gather<R>(queries, keys, size, i, to);
  gather<R>(queries, keys, size, i + 2, other);
  EACH_QUERY to[r] = _mm512_add_ps(to[r], other[r]);
  gather<R>(queries, keys, size, i + 1, other);
  gather<R>(queries, keys, size, i + 3, last);
  EACH_QUERY to[r] = _mm512_add_ps(to[r], _mm512_add_ps(other[r], last[r]));
}

template <int R>
inline void score_turned(const float* const (&queries)[kQueries], const float* turned, const Shape& shape, int64_t keys,
                         float* const (&to)[kQueries]) {
  const __m512 scale = _mm512_set1_ps(shape.scale);
  for (int64_t key = 0; key < keys; key += kWide) {
    const float* from = turned + key * shape.size;
    __m512 sum[R], other[R], last[R];
    gather_four<R>(queries, from, shape.size, 0, sum);
    gather_four<R>(queries, from, shape.size, 8, other);
    EACH_QUERY sum[r] = _mm512_add_ps(sum[r], other[r]);
    gather_four<R>(queries, from, shape.size, 4, other);
    gather_four<R>(queries, from, shape.size, 12, last);
    EACH_QUERY sum[r] = _mm512_add_ps(sum[r], _mm512_add_ps(other[r], last[r]));
    EACH_QUERY _mm512_storeu_ps(to[r] + key, _mm512_mul_ps(sum[r], scale));
  }
}

// R queries, the last of which sees most; `scores` has R times `room` places. `turned` are the keys so, where they are.
template <int R>
inline void attend(const float* const (&queries)[kQueries], const Head& of, const float* turned, const Shape& shape,
                   const int64_t (&keys)[kQueries], float* scores, int64_t room, float* const (&to)[kQueries]) {
  float* at[kQueries] = {};
  float by[kQueries] = {};
  for (int r = 0; r < R; r++) at[r] = scores + r * room;
  if (turned) {
    score_turned<R>(queries, turned, shape, keys[R - 1], at);
  } else {
    score<R>(queries, of, shape, keys[R - 1], at);
  }
  for (int r = 0; r < R; r++) {
    by[r] = softmax(at[r], keys[r]);
    for (int64_t key = keys[r]; key < keys[R - 1]; key++) at[r][key] = 0;
  }
  const float* weights[kQueries] = {at[0], at[1], at[2], at[3]};
  int64_t from = 0;
  for (; from + 4 * kWide <= shape.size; from += 4 * kWide) mix<R, 4>(weights, by, of, shape, keys, from, to);
  for (; from < shape.size; from += kWide) mix<R, 1>(weights, by, of, shape, keys, from, to);
}

}  // namespace attention

#pragma GCC pop_options

// What products are made of, whatever the processor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace products {

inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

struct Bytes {  // a matrix in signed bytes, a scale for a column
  const int8_t* weights;   // [columns, inputs]
  const float* scales;     // [columns]
  const int32_t* middles;  // [columns]: 128 times the sum of a column
  int64_t columns, inputs;
  bool small;  // no weight is further than 64 from zero
};

struct Blocks {  // a matrix in four bits around 8, even inputs in the lower ones: as MatMulNBits has it
  const uint8_t* weights;  // [columns, blocks, block / 2]
  const float* scales;     // [columns, blocks]
  int64_t columns, blocks, block;
};

constexpr int64_t kLevels = 128;  // a block is of a multiple of so many

}  // namespace products

namespace attention {

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

}  // namespace attention

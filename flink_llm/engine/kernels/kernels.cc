// Operators of the domain "flink_llm" for ONNX Runtime's CPU provider.
//
// A graph that names them carries the same in ONNX Runtime's own operators, as functions: where this library was not
// built, or the processor lacks what it needs, those run.
#include <cpuid.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "avx2.h"
#include "avx512.h"
#include "shapes.h"

namespace {

using namespace products;

// What the kernels run by. `kMatrices`: AVX-512 with AMX, where products of bytes are left to ONNX Runtime, which has them
// by the latter (not measured beside these).
enum Way { kNone = 0, kAvx512 = 1, kMatrices = 2, kAvx2 = 3 };

Way way() {
  __builtin_cpu_init();
  const char* said = std::getenv("FLINK_LLM_KERNELS");
  const bool less = said && std::strcmp(said, "avx2") == 0;
  if (!less && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3 ? kMatrices : kAvx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? kAvx2 : kNone;
}

#define TRY(call)                        \
  do {                                   \
    if (ort::Status* s = (call)) return s; \
  } while (false)

// Memory of the calling thread, kept from run to run.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t begin = used_;
    used_ += up(count * sizeof(T), 64);
    return reinterpret_cast<T*>(base_ + begin);
  }
  void begin(size_t most) {
    if (held_.size() < most + 64) held_.resize(most + 64);
    base_ = reinterpret_cast<char*>(up(reinterpret_cast<int64_t>(held_.data()), 64));
    used_ = 0;
  }

 private:
  std::vector<char> held_;
  char* base_ = nullptr;
  size_t used_ = 0;
};
thread_local Scratch scratch, panels;

constexpr char kNoFit[] = "the inputs of an attention do not fit together";
constexpr char kNoMemory[] = "Failed to allocate memory for a kernel";

// task(0) to task(count - 1), by the session's threads. No exception may reach those.
template <typename F>
ort::Status* share(const ort::Api& api, ort::KernelContext* context, int64_t count, const F& task) {
  struct Call {
    const F* task;
    std::atomic<bool> failed{false};
  } call{&task};
  const auto run = [](void* data, size_t i) {
    auto* call = static_cast<Call*>(data);
    try {
      (*call->task)(static_cast<int64_t>(i));
    } catch (const std::bad_alloc&) {
      call->failed = true;
    }
  };
  TRY(api.parallel(context, run, static_cast<size_t>(count), &call));
  return call.failed ? api.fail(kNoMemory) : nullptr;
}

struct Array {
  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }

  const void* data = nullptr;
  std::vector<int64_t> sizes;
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

ort::Status* read(const ort::Api& api, const ort::Value* value, Array* to) {
  ort::Shape* shape = nullptr;
  TRY(api.shape(value, &shape));
  size_t rank = 0;
  ort::Status* status = api.rank(shape, &rank);
  to->sizes.resize(rank);
  if (!status) status = api.sizes(shape, to->sizes.data(), rank);
  api.release(shape);
  TRY(status);
  return api.data(value, const_cast<void**>(&to->data));
}

ort::Status* read(const ort::Api& api, ort::KernelContext* context, size_t number, Array* to) {
  const ort::Value* value = nullptr;
  TRY(api.input(context, number, &value));
  return read(api, value, to);
}

template <typename T>
ort::Status* make(const ort::Api& api, ort::KernelContext* context, size_t number, const std::vector<int64_t>& sizes,
                  T** to) {
  ort::Value* value = nullptr;
  TRY(api.output(context, number, sizes.data(), sizes.size(), &value));
  return api.data(value, reinterpret_cast<void**>(to));
}

ort::Status* constant(const ort::Api& api, const ort::KernelInfo* info, size_t number, Array* to) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  TRY(api.constant(info, number, &is_constant, &value));
  if (!is_constant) return api.fail("a matrix and its scales are to be held by the graph");
  return read(api, value, to);
}

// The products of one input by several matrices; or what a gated unit makes of two, gate and up. Where the input is
// skipped over, it is two, `x` and `skip`: their sum is given back, and its norm is what is multiplied.
template <typename Isa, typename Rows, typename Matrix>
struct Product {
  ort::Api api;
  std::vector<Matrix> matrices;
  std::vector<std::vector<int32_t>> sums;
  int64_t inputs = 0;
  bool skips = false, gated = false;
  static constexpr bool kBytes = std::is_same_v<Matrix, Bytes>;
  float epsilon = 0;

  ort::Status* run(ort::KernelContext* context) const {
    Array x, skip, gain;
    TRY(read(api, context, 0, &x));
    if (x.sizes.empty() || x.sizes.back() != inputs) return api.fail("an input's rows are of another length");
    Work work{this, x.as<float>()};
    if (skips) {
      TRY(read(api, context, 1, &skip));
      TRY(read(api, context, 2, &gain));
      if (skip.sizes != x.sizes || gain.sizes != std::vector<int64_t>{inputs}) {
        return api.fail("an input, what skips and the gain are of different sizes");
      }
      TRY(make(api, context, 1, x.sizes, &work.sum));
      work.skip = skip.as<float>();
      work.gain = gain.as<float>();
    }
    work.count = 1;
    for (size_t i = 0; i + 1 < x.sizes.size(); i++) work.count *= x.sizes[i];
    const int64_t count = work.count, made = gated ? 1 : static_cast<int64_t>(matrices.size());
    int64_t columns = 0;
    for (int64_t i = 0; i < made; i++) {
      columns += matrices[i].columns;
      x.sizes.back() = matrices[i].columns;
      TRY(make(api, context, i, x.sizes, &work.to[i]));
    }
    if (count == 0) return nullptr;
    prepare(&work);
    if (count >= kRowsShared) {
      const auto task = [&work](int64_t i) { work.rows_of(i * kRowsOfTask, kRowsOfTask); };
      TRY(share(api, context, (count + kRowsOfTask - 1) / kRowsOfTask, task));
    } else {
      work.rows_of(0, count);
    }
    const int64_t bytes = columns * inputs * (gated ? 2 : 1) * ((count + 3) / 4);
    int64_t tasks = bytes / kTask;
    tasks = tasks < 2 ? 2 : tasks > 64 ? 64 : tasks;
    work.share = up((columns + tasks - 1) / tasks, Isa::together(matrices[0], count));
    tasks = 0;
    for (int64_t i = 0; i < made; i++) tasks += work.shares(i);
    return share(api, context, tasks, [&work](int64_t i) { work.columns_of(i); });
  }

 private:
  static constexpr int64_t kProducts = 3, kRowsShared = 32, kRowsOfTask = 8, kTask = 1 << 17;

  struct Work {
    const Product* product;
    const float* x;
    const float* skip = nullptr;
    const float* gain = nullptr;
    float* sum = nullptr;
    float* normed = nullptr;
    float* to[kProducts] = {};
    int64_t count = 0, share = 0;
    Rows rows{};

    void rows_of(int64_t from, int64_t many) const {
      const int64_t wide = product->inputs;
      for (int64_t row = from; row < count && row < from + many; row++) {
        const float* source = x + row * wide;
        if (skip) {
          Isa::norm_row(source, skip + row * wide, gain, product->epsilon, wide, sum + row * wide, normed + row * wide);
          source = normed + row * wide;
        }
        Isa::row_to_levels(source, row, rows);
      }
    }
    int64_t shares(int64_t matrix) const { return (product->matrices[matrix].columns + share - 1) / share; }

    void columns_of(int64_t task) const {
      int64_t matrix = 0;
      for (; task >= shares(matrix); matrix++) task -= shares(matrix);
      const Matrix& of = product->matrices[matrix];
      const int64_t begin = task * share, end = begin + share < of.columns ? begin + share : of.columns;
      const Matrix* other = product->gated ? &product->matrices[1] : nullptr;
      const int64_t room = Isa::room(of, count);
      panels.begin(room);
      Isa::multiply(rows, count, of, other, begin, end, panels.take<int8_t>(room), to[matrix]);
    }
  };

  void prepare(Work* work) const {
    const int64_t count = work->count, norms = skips ? count * inputs : 0;
    scratch.begin(count * Isa::row(matrices[0]) + 4 * norms + 256);
    Isa::take(scratch, matrices[0], count, &work->rows);
    work->rows.inputs = inputs;
    work->normed = scratch.take<float>(norms);
  }
};

template <typename Isa>
using Eight = Product<Isa, typename Isa::RowBytes, Bytes>;
template <typename Isa>
using Four = Product<Isa, typename Isa::RowBlocks, Blocks>;

template <typename Isa>
ort::Status* add(Eight<Isa>* to, const ort::KernelInfo* info, size_t number) {
  Array weights, scales;
  TRY(constant(to->api, info, number, &weights));
  TRY(constant(to->api, info, number + 1, &scales));
  const auto& sizes = weights.sizes;
  if (sizes.size() != 2 || sizes[0] < 1 || sizes[1] < 1 || scales.sizes != std::vector<int64_t>{sizes[0]} ||
      (!to->matrices.empty() && to->inputs != sizes[1])) {
    return to->api.fail("a matrix is [columns, inputs] and has a scale for each column");
  }
  const int64_t columns = weights.sizes[0];
  to->inputs = weights.sizes[1];
  to->sums.emplace_back(columns);
  const auto* bytes = weights.as<int8_t>();
  bool small = true;
  for (int64_t n = 0; n < columns; n++) {
    int32_t sum = 0;
    for (int64_t k = 0; k < to->inputs; k++, bytes++) sum += *bytes, small &= *bytes >= -64 && *bytes <= 64;
    to->sums.back()[n] = 128 * sum;
  }
  to->matrices.push_back({weights.as<int8_t>(), scales.as<float>(), to->sums.back().data(), columns, to->inputs, small});
  return nullptr;
}

template <typename Isa>
ort::Status* add(Four<Isa>* to, const ort::KernelInfo* info, size_t number) {
  Array weights, scales;
  TRY(constant(to->api, info, number, &weights));
  TRY(constant(to->api, info, number + 1, &scales));
  int64_t inputs = 0;
  TRY(to->api.attribute(info, "K", &inputs));
  const auto& sizes = weights.sizes;
  if (sizes.size() != 3 || sizes[0] < 1 || inputs < 1) {
    return to->api.fail("a matrix of four bits is [columns, blocks, bytes]");
  }
  const int64_t block = sizes[2] * 2;
  if (block < kLevels || block % kLevels || sizes[1] != (inputs - 1) / block + 1) {
    return to->api.fail("blocks of four bits are of a multiple of 128");
  }
  if (scales.count() != sizes[0] * sizes[1]) return to->api.fail("a matrix of four bits has a scale for each block");
  if (!to->matrices.empty() && block != to->matrices[0].block) return to->api.fail("gate and up have different blocks");
  to->inputs = inputs;
  to->matrices.push_back({weights.as<uint8_t>(), scales.as<float>(), sizes[0], sizes[1], block});
  return nullptr;
}

// What a product is of, as `functions.py` has it.
template <int Count, bool Skip, bool Gate>
struct Form {
  static constexpr int matrices = Count, first = Skip ? 3 : 1;
  static constexpr bool skips = Skip, gated = Gate;
};

template <typename Kernel, typename Of>
ort::Status* create(const ort::Operator*, const void* const* table, const ort::KernelInfo* info, void** made) {
  auto kernel = std::make_unique<Kernel>();
  kernel->api = ort::Api(table);
  kernel->skips = Of::skips;
  kernel->gated = Of::gated;
  if (Of::skips) TRY(kernel->api.attribute(info, "epsilon", &kernel->epsilon));
  for (int i = 0; i < Of::matrices; i++) TRY(add(kernel.get(), info, Of::first + 2 * i));
  if (Of::gated && kernel->matrices[0].columns != kernel->matrices[1].columns) {
    return kernel->api.fail("gate and up are of different sizes");
  }
  *made = kernel.release();
  return nullptr;
}

// GroupQueryAttention with rotated positions over a cache that is appended to: queries, keys and values in one input.
// `Mixed`: of a part of one prompt, and of a token of each of some rows, which are all in one row of it.
template <typename Isa, bool Mixed>
struct Attention {
  static constexpr int64_t kAlone = 64, kQueriesOfTask = 32;
  static constexpr int64_t kQueries = 4;  // of a tile
  static constexpr int kCache = 4;        // inputs that are a cache: keys, values, lengths, the longest
  static constexpr int first = Mixed ? 2 + 2 * kCache : 1 + kCache;  // of what is of the model
  ort::Api api;
  attention::Shape shape{};

  ort::Status* run(ort::KernelContext* context) const {
    Array given, cosines, sines;
    TRY(read(api, context, 0, &given));
    TRY(read(api, context, first, &cosines));
    TRY(read(api, context, first + 1, &sines));
    const int64_t all = (shape.heads + 2 * shape.kv_heads);
    if (given.sizes.size() != 3 || given.sizes[2] % all || cosines.sizes.size() != 2 || cosines.sizes != sines.sizes) {
      return api.fail(kNoFit);
    }
    const int64_t size = given.sizes[2] / all, made = shape.heads * size;
    float* to = nullptr;
    TRY(make(api, context, 0, {given.sizes[0], given.sizes[1], made}, &to));
    Work work{};
    if constexpr (!Mixed) {
      TRY(prepare(context, &work, given.sizes[0], given.sizes[1], given.sizes[2], given.as<float>(), 1, cosines, sines, to));
      if (work.rows == 0 || work.queries == 0) return nullptr;
      if (work.queries == 1) return one_by_one(context, work);
      TRY(share(api, context, work.heads(), [&work](int64_t head) { work.append(head); }));
      return several(context, work);
    } else {
      Array split;
      TRY(read(api, context, first - 1, &split));
      if (split.count() != 2 || given.sizes[0] != 1) return api.fail(kNoFit);
      const int64_t many = split.as<int64_t>()[0], rows = split.as<int64_t>()[1];
      if (many < 0 || rows < 0 || many + rows != given.sizes[1]) return api.fail(kNoFit);
      Work chunk{};
      const float* of_rows = given.as<float>() + many * given.sizes[2];
      TRY(prepare(context, &work, rows, 1, given.sizes[2], of_rows, 1, cosines, sines, to + many * made));
      TRY(prepare(context, &chunk, 1, many, given.sizes[2], given.as<float>(), 1 + kCache, cosines, sines, to));
      const int64_t alone = work.heads();
      TRY(share(api, context, alone + (many ? chunk.heads() : 0), [&work, &chunk, alone](int64_t head) {
        if (head >= alone) return chunk.append(head - alone);
        work.append(head), work.attend(head, 0, 1);
      }));
      return many ? several(context, chunk) : nullptr;
    }
  }

 private:
  struct Work {
    attention::Shape shape;
    int64_t rows, wide, queries, longest, places, held, shares;
    bool first;
    const float *given, *cosines, *sines, *old_keys, *old_values;
    const int32_t* lengths;
    float *to, *keys, *values;

    int64_t heads() const { return rows * shape.kv_heads; }
    int64_t past(int64_t row) const { return first ? 0 : lengths[row] + 1 - queries; }

    // Of one head of a sequence: its new keys and values behind those that are held.
    void append(int64_t number) const {
      const int64_t row = number / shape.kv_heads, head = number % shape.kv_heads, before = past(row), size = shape.size;
      float* to_keys = keys + number * places * size;
      float* to_values = values + number * places * size;
      if (keys != old_keys) std::memcpy(to_keys, old_keys + number * held * size, before * size * sizeof(float));
      if (values != old_values) std::memcpy(to_values, old_values + number * held * size, before * size * sizeof(float));
      for (int64_t i = 0; i < queries; i++) {
        const float* token = given + (row * queries + i) * wide + (shape.heads + head) * size;
        const int64_t turn = (before + i) * shape.rotated / 2;
        Isa::rotate_head(token, cosines + turn, sines + turn, shape, to_keys + (before + i) * size);
        std::memcpy(to_values + (before + i) * size, token + shape.kv_heads * size, size * sizeof(float));
      }
    }

    // Queries `from` to `until` of the heads that share one of keys and values.
    void attend(int64_t number, int64_t from, int64_t until) const {
      const int64_t row = number / shape.kv_heads, head = number % shape.kv_heads, before = past(row), size = shape.size;
      const int64_t group = shape.heads / shape.kv_heads, room = up(before + until + 4, 16);
      const int64_t many = (until - from) * group;
      const int64_t turned_keys = many < Isa::kTurned ? 0 : up(before + until, 16);
      scratch.begin(sizeof(float) * (kQueries * (size + room) + size * turned_keys) + 256);
      float* turned = scratch.take<float>(kQueries * size);
      float* scores = scratch.take<float>(kQueries * room);
      const attention::Head of{keys + number * places * size, values + number * places * size};
      float* sixteens = turned_keys ? scratch.take<float>(size * turned_keys) : nullptr;
      if (sixteens) Isa::turn_keys(of, shape, before + until, sixteens);
      for (int64_t done = 0; done < many; done += kQueries) {
        const int64_t count = many - done < kQueries ? many - done : kQueries;
        const float* asked[kQueries] = {};
        float* made[kQueries] = {};
        int64_t seen[kQueries] = {};
        for (int64_t r = 0; r < count; r++) {
          const int64_t i = from + (done + r) / group, of_group = head * group + (done + r) % group;
          const int64_t turn = (before + i) * shape.rotated / 2;
          asked[r] = turned + r * size;
          Isa::rotate_head(given + (row * queries + i) * wide + of_group * size, cosines + turn, sines + turn, shape,
                            turned + r * size);
          made[r] = to + ((row * queries + i) * shape.heads + of_group) * size;
          seen[r] = before + i + 1;
        }
        if (count == 4) Isa::template attend_to<4>(asked, of, sixteens, shape, seen, scores, room, made);
        if (count == 3) Isa::template attend_to<3>(asked, of, sixteens, shape, seen, scores, room, made);
        if (count == 2) Isa::template attend_to<2>(asked, of, sixteens, shape, seen, scores, room, made);
        if (count == 1) Isa::template attend_to<1>(asked, of, sixteens, shape, seen, scores, room, made);
      }
    }
  };

  // `cache`: the first input of it; what it becomes are the outputs from that number on, two for each cache.
  ort::Status* prepare(ort::KernelContext* context, Work* to, int64_t rows, int64_t queries, int64_t wide,
                       const float* given, int cache, const Array& cosines, const Array& sines, float* made) const {
    Work& work = *to;
    Array keys, values, lengths, total;
    Array* inputs[] = {&keys, &values, &lengths, &total};
    for (int i = 0; i < kCache; i++) TRY(read(api, context, cache + i, inputs[i]));
    if (keys.sizes.size() != 4 || keys.sizes != values.sizes || total.count() != 1) return api.fail(kNoFit);
    work.shape = shape;
    work.shape.size = keys.sizes[3];
    work.wide = (shape.heads + 2 * shape.kv_heads) * work.shape.size;
    if (work.shape.size < 1 || work.shape.size % 16 || work.wide != wide || keys.sizes[0] != rows ||
        keys.sizes[1] != shape.kv_heads || lengths.count() != rows) {
      return api.fail(kNoFit);
    }
    if (shape.scale == 0) work.shape.scale = 1.0f / std::sqrt(static_cast<float>(work.shape.size));
    work.shape.rotated = 2 * cosines.sizes[1];
    const int64_t longest = *total.as<int32_t>(), held = keys.sizes[2];
    work.rows = rows;
    work.queries = queries;
    work.longest = longest;
    work.first = longest == queries;
    work.given = given;
    work.lengths = lengths.as<int32_t>();
    work.cosines = cosines.as<float>();
    work.sines = sines.as<float>();
    work.places = longest > held ? longest : held;
    if (work.shape.rotated > work.shape.size || cosines.sizes[0] < longest) {
      return api.fail("the rotation of an attention is for other positions");
    }
    for (int64_t row = 0; row < rows; row++) {
      if (work.past(row) < 0 || work.past(row) > held || work.past(row) + queries > longest) {
        return api.fail("an attention's lengths do not fit its cache");
      }
    }
    work.to = made;
    std::vector<int64_t> sizes = keys.sizes;
    sizes[2] = work.places;
    const size_t number = cache == 1 ? 1 : 3;
    TRY(make(api, context, number, sizes, &work.keys));
    TRY(make(api, context, number + 1, sizes, &work.values));
    work.old_keys = keys.as<float>();
    work.old_values = values.as<float>();
    work.held = held;
    return nullptr;
  }

  // A query of each sequence: what is appended is read by its own task alone.
  ort::Status* one_by_one(ort::KernelContext* context, const Work& work) const {
    const auto task = [&work](int64_t head) { work.append(head), work.attend(head, 0, 1); };
    if (work.heads() * work.longest > kAlone) return share(api, context, work.heads(), task);
    for (int64_t head = 0; head < work.heads(); head++) task(head);
    return nullptr;
  }

  ort::Status* several(ort::KernelContext* context, Work& work) const {
    work.shares = (work.queries + kQueriesOfTask - 1) / kQueriesOfTask;
    return share(api, context, work.heads() * work.shares, [&work](int64_t i) {
      const int64_t from = i % work.shares * kQueriesOfTask, until = from + kQueriesOfTask;
      work.attend(i / work.shares, from, until < work.queries ? until : work.queries);
    });
  }
};

template <typename Kernel>
ort::Status* create_attention(const ort::Operator*, const void* const* table, const ort::KernelInfo* info, void** made) {
  auto kernel = std::make_unique<Kernel>();
  kernel->api = ort::Api(table);
  TRY(kernel->api.attribute(info, "num_heads", &kernel->shape.heads));
  TRY(kernel->api.attribute(info, "kv_num_heads", &kernel->shape.kv_heads));
  TRY(kernel->api.attribute(info, "scale", &kernel->shape.scale));
  if (kernel->shape.kv_heads < 1 || kernel->shape.heads < 1 || kernel->shape.heads % kernel->shape.kv_heads) {
    return kernel->api.fail("heads of queries are a multiple of those of keys");
  }
  *made = kernel.release();
  return nullptr;
}

template <typename Kernel>
ort::Operator describe(const char* (*name)(const ort::Operator*)) {
  ort::Operator op{};
  op.version = ort::kVersion;
  op.name = name;
  op.provider = [](const ort::Operator*) -> const char* { return "CPUExecutionProvider"; };
  op.output_type = [](const ort::Operator*, size_t) { return ort::kFloat; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_kind = [](const ort::Operator*, size_t) { return 0; };
  op.output_kind = [](const ort::Operator*, size_t) { return 0; };
  op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.compute = [](void* kernel, ort::KernelContext* context) {
    try {
      return static_cast<Kernel*>(kernel)->run(context);
    } catch (const std::bad_alloc&) {
      return static_cast<Kernel*>(kernel)->api.fail(kNoMemory);
    }
  };
  op.since = [](const ort::Operator*) { return 1; };
  op.until = [](const ort::Operator*) { return 0x7fffffff; };
  return op;
}

template <typename Kernel, typename Of>
ort::Operator describe_product(const char* (*name)(const ort::Operator*)) {
  ort::Operator op = describe<Kernel>(name);
  op.input_type = [](const ort::Operator*, size_t number) {
    if (number < Of::first || number % 2 == 0) return ort::kFloat;
    return Kernel::kBytes ? ort::kInt8 : ort::kUint8;
  };
  op.input_count = [](const ort::Operator*) -> size_t { return Of::first + 2 * Of::matrices; };
  op.output_count = [](const ort::Operator*) -> size_t { return (Of::gated ? 1 : Of::matrices) + (Of::skips ? 1 : 0); };
  op.create = create<Kernel, Of>;
  return op;
}

template <typename Kernel>
ort::Operator describe_attention(const char* (*name)(const ort::Operator*)) {
  ort::Operator op = describe<Kernel>(name);
  op.input_type = [](const ort::Operator*, size_t number) {
    if (number == 0 || number >= Kernel::first) return ort::kFloat;
    if (number == 1 + 2 * Kernel::kCache) return ort::kInt64;  // how a mixed run is split
    return (number - 1) % Kernel::kCache < 2 ? ort::kFloat : ort::kInt32;
  };
  op.input_count = [](const ort::Operator*) -> size_t { return Kernel::first + 2; };
  op.output_count = [](const ort::Operator*) -> size_t { return Kernel::first > 1 + Kernel::kCache ? 5 : 3; };
  op.create = create_attention<Kernel>;
  return op;
}

#define NAME(text) [](const ort::Operator*) -> const char* { return text; }

template <typename Isa>
bool add_products(const ort::Api& api, ort::Domain* to) {
  using Bytes = Eight<Isa>;
  static const ort::Operator all[] = {
      describe_product<Bytes, Form<1, false, false>>(NAME("RowLinear")),
      describe_product<Bytes, Form<2, false, false>>(NAME("RowLinear2")),
      describe_product<Bytes, Form<3, false, false>>(NAME("RowLinear3")),
      describe_product<Bytes, Form<1, true, false>>(NAME("SkipRowLinear")),
      describe_product<Bytes, Form<2, true, true>>(NAME("SkipGatedRowLinear")),
  };
  return std::all_of(std::begin(all), std::end(all), [&](const auto& op) { return !api.add(to, &op); });
}

template <typename Isa>
bool add_others(const ort::Api& api, ort::Domain* to) {
  using Blocks = Four<Isa>;
  static const ort::Operator all[] = {
      describe_product<Blocks, Form<1, false, false>>(NAME("BlockLinear")),
      describe_product<Blocks, Form<1, true, false>>(NAME("SkipBlockLinear")),
      describe_product<Blocks, Form<2, true, true>>(NAME("SkipGatedBlockLinear")),
      describe_attention<Attention<Isa, false>>(NAME("RotaryAttention")),
      describe_attention<Attention<Isa, true>>(NAME("MixedAttention")),
  };
  return std::all_of(std::begin(all), std::end(all), [&](const auto& op) { return !api.add(to, &op); });
}

template <typename Isa, bool Products>
ort::Domain* domain(const ort::Api& api) {
  static ort::Domain* kept = [&] {
    ort::Domain* made = nullptr;
    if (api.new_domain("flink_llm", &made)) return static_cast<ort::Domain*>(nullptr);
    const bool added = add_others<Isa>(api, made) && (!Products || add_products<Isa>(api, made));
    return added ? made : static_cast<ort::Domain*>(nullptr);
  }();
  return kept;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int flink_llm_kernels_usable() { return way(); }

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                  const ort::ApiBase* base) {
  const Way by = way();
  if (by == kNone) return nullptr;
  const void* const* table = base->get_api(ort::kVersion);
  if (!table) return nullptr;  // an ONNX Runtime before 1.18
  const ort::Api api(table);
  ort::Domain* made = by == kAvx2     ? domain<avx2::Isa, true>(api)
                      : by == kAvx512 ? domain<avx512::Isa, true>(api)
                                      : domain<avx512::Isa, false>(api);
  return made ? api.add(options, made) : api.fail("the operators could not be registered");
}

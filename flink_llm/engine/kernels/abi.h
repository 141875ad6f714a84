// What this library uses of ONNX Runtime's C interface, whose layout is fixed: functions are only ever added
// behind the others. Numbers are places in the table of functions (onnxruntime_c_api.h, struct OrtApi).
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;

constexpr uint32_t kVersion = 18;  // of the interface: the oldest that has all of what is below

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

enum Type { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };

// One operator, as OrtCustomOp. ONNX Runtime reads of it what its `version` had.
struct Operator {
  uint32_t version;
  void* create_kernel_v1;
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  Type (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  Type (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void* compute_v1;
  void (*destroy)(void* kernel);
  int (*input_kind)(const Operator*, size_t);
  int (*output_kind)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*least_inputs)(const Operator*);
  int (*same_inputs)(const Operator*);
  int (*least_outputs)(const Operator*);
  int (*same_outputs)(const Operator*);
  Status* (*create)(const Operator*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, KernelContext*);
  Status* (*infer)(const Operator*, void*);
  int (*since)(const Operator*);
  int (*until)(const Operator*);
  void* in_place[4];
};

class Api {
 public:
  Api() = default;
  explicit Api(const void* const* table) : table_(table) {}
  Status* fail(const char* message) const { return at<Status*(int, const char*)>(0)(1, message); }
  Status* new_domain(const char* name, Domain** made) const { return at<Status*(const char*, Domain**)>(26)(name, made); }
  Status* add(Domain* domain, const Operator* op) const { return at<Status*(Domain*, const Operator*)>(27)(domain, op); }
  Status* add(SessionOptions* options, Domain* domain) const {
    return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* data(const Value* value, void** found) const { return at<Status*(const Value*, void**)>(51)(value, found); }
  Status* rank(const Shape* shape, size_t* found) const { return at<Status*(const Shape*, size_t*)>(61)(shape, found); }
  Status* sizes(const Shape* shape, int64_t* found, size_t count) const {
    return at<Status*(const Shape*, int64_t*, size_t)>(62)(shape, found, count);
  }
  Status* shape(const Value* value, Shape** found) const { return at<Status*(const Value*, Shape**)>(65)(value, found); }
  Status* attribute(const KernelInfo* info, const char* name, float* found) const {
    return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, found);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* found) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, found);
  }
  Status* input(const KernelContext* context, size_t number, const Value** found) const {
    return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, number, found);
  }
  Status* output(KernelContext* context, size_t number, const int64_t* sizes, size_t rank, Value** found) const {
    return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, number, sizes, rank, found);
  }
  void release(Shape* shape) const { at<void(Shape*)>(99)(shape); }
  Status* constant(const KernelInfo* info, size_t number, int* is_constant, const Value** found) const {
    return at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, number, is_constant, found);
  }
  Status* parallel(const KernelContext* context, void (*task)(void*, size_t), size_t count, void* data) const {
    return at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, task, count, 0, data);
  }

 private:
  template <typename F>
  F* at(size_t place) const {
    return reinterpret_cast<F*>(const_cast<void*>(table_[place]));
  }
  const void* const* table_ = nullptr;
};

}  // namespace ort

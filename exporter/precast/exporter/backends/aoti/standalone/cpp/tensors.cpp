// The part of AOTInductor's C ABI (torch/csrc/inductor/aoti_torch/c/shim.h) that lowered programs call: tensors'
// metadata and memory. What it does not cover is an undefined symbol when the library is linked, never a wrong answer.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "standalone.h"

#define ABI extern "C"

using precast::MAX_DIMS, precast::Status, precast::Storage, precast::Tensor;

namespace {

// Blocks are kept for the next step, which asks for the same sizes again: KEPT_BYTES in all at most. Where they were of
// other sizes, as after a prompt of another length, all are let go.
class Blocks {
 public:
  static constexpr size_t KEPT_BYTES = 32 << 20, ALIGNMENT = 64;

  char* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.find(bytes);
      if (found != free_.end() && !found->second.empty()) {
        char* block = found->second.back();
        found->second.pop_back();
        kept_ -= bytes;
        return block;
      }
    }
    void* block = std::aligned_alloc(ALIGNMENT, bytes);
    if (block == nullptr) throw std::bad_alloc();
    return static_cast<char*>(block);
  }

  void give_back(char* block, size_t bytes) {
    if (bytes > KEPT_BYTES) return std::free(block);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_ + bytes > KEPT_BYTES) let_go();
    free_[bytes].push_back(block);
    kept_ += bytes;
  }

  static size_t round_up(size_t bytes) { return std::max(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT); }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<char*>> free_;
  size_t kept_ = 0;

  void let_go() {
    for (auto& [bytes, blocks] : free_)
      for (char* block : blocks) std::free(block);
    free_.clear();
    kept_ = 0;
  }
};

// Never destroyed: other threads may be at work when the process ends.
Blocks& blocks = *new Blocks;

thread_local std::string last_failure;

Storage* new_storage(size_t bytes) {
  const size_t rounded = Blocks::round_up(bytes);
  return new Storage{{}, blocks.take(rounded), rounded, true, {1}};
}

Storage* borrow(void* data, size_t bytes) {
  return new Storage{{}, static_cast<char*>(data), bytes, false, {1}};
}

Storage* share(Storage* storage) {
  storage->references.fetch_add(1, std::memory_order_relaxed);
  return storage;
}

void release(Storage* storage) {
  if (storage->references.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (storage->owned) blocks.give_back(storage->data, storage->bytes);
  delete storage;
}

// The elements from the first to the last that these sizes and strides reach.
int64_t span_of(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t last = 0;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

Tensor new_tensor(
    Storage* storage, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype) {
  auto tensor = new AtenTensorOpaque;
  tensor->storage = storage, tensor->dims = dims, tensor->offset = offset, tensor->dtype = dtype;
  std::copy(sizes, sizes + dims, tensor->sizes);
  std::copy(strides, strides + dims, tensor->strides);
  return tensor;
}

Status check_dims(const char* call, int64_t dims) {
  return dims <= MAX_DIMS ? 0 : precast::fail(call, "a tensor has more than eight dimensions");
}

// Copies elements of one size, whatever the strides, the last dimension innermost.
template <typename Element>
void copy_elements(
    int64_t d, int64_t dims, const int64_t* sizes, const int64_t* to_strides, const int64_t* from_strides, Element* to,
    const Element* from) {
  if (d == dims) {
    *to = *from;
    return;
  }
  if (d + 1 == dims && to_strides[d] == 1 && from_strides[d] == 1) {
    std::copy(from, from + sizes[d], to);
    return;
  }
  for (int64_t i = 0; i < sizes[d]; ++i)
    copy_elements(d + 1, dims, sizes, to_strides, from_strides, to + i * to_strides[d], from + i * from_strides[d]);
}

void copy_bytes(const AtenTensorOpaque* to, const AtenTensorOpaque* from) {
  const auto copy = [&](auto* as) {
    using Element = std::remove_pointer_t<decltype(as)>;
    copy_elements(
        0, to->dims, to->sizes, to->strides, from->strides, reinterpret_cast<Element*>(precast::data_of(to)),
        reinterpret_cast<const Element*>(precast::data_of(from)));
  };
  switch (precast::element_size(to->dtype)) {
    case 1: return copy(static_cast<uint8_t*>(nullptr));
    case 2: return copy(static_cast<uint16_t*>(nullptr));
    case 4: return copy(static_cast<uint32_t*>(nullptr));
    default: return copy(static_cast<uint64_t*>(nullptr));
  }
}

// Strides without gaps, in the order that dimensions have: as PyTorch's memory format "preserve".
void dense_strides(const AtenTensorOpaque* tensor, int64_t* strides) {
  int64_t order[MAX_DIMS], next = 1;
  std::iota(order, order + tensor->dims, 0);
  std::stable_sort(order, order + tensor->dims, [&](int64_t a, int64_t b) {
    return tensor->strides[a] > tensor->strides[b];
  });
  for (int64_t i = tensor->dims - 1; i >= 0; --i) strides[order[i]] = next, next *= tensor->sizes[order[i]];
}

// Whether the elements fill a piece of memory, in whatever order.
bool is_dense(const AtenTensorOpaque* tensor) {
  int64_t strides[MAX_DIMS];
  dense_strides(tensor, strides);
  for (int64_t d = 0; d < tensor->dims; ++d)
    if (tensor->sizes[d] > 1 && tensor->strides[d] != strides[d]) return false;
  return true;
}

Status clone(Tensor tensor, const int64_t* strides, Tensor* made) {
  const int64_t bytes =
      span_of(tensor->dims, tensor->sizes, strides) * static_cast<int64_t>(precast::element_size(tensor->dtype));
  *made = new_tensor(new_storage(bytes), tensor->dims, tensor->sizes, strides, 0, tensor->dtype);
  copy_bytes(*made, tensor);
  return 0;
}

}  // namespace

namespace precast {

size_t element_size(int32_t dtype) {
  switch (dtype) {
    case UINT8: case INT8: case BOOL: return 1;
    case INT16: case FLOAT16: case BFLOAT16: return 2;
    case INT32: case FLOAT32: return 4;
    default: return 8;
  }
}

int64_t count_of(const AtenTensorOpaque* tensor) {
  int64_t count = 1;
  for (int64_t d = 0; d < tensor->dims; ++d) count *= tensor->sizes[d];
  return count;
}

Status fail(const char* call, const char* why) {
  last_failure = std::string(call) + ": " + why;
  return 1;
}

std::string take_failure() { return std::exchange(last_failure, {}); }

void forget_blocks() { new (&blocks) Blocks; }

}  // namespace precast

// ------------------------------------------------------------------ constants

ABI int32_t aoti_torch_device_type_cpu() { return 0; }
ABI int32_t aoti_torch_device_type_cuda() { return 1; }
ABI int32_t aoti_torch_layout_strided() { return 0; }
ABI int32_t aoti_torch_dtype_uint8() { return precast::UINT8; }
ABI int32_t aoti_torch_dtype_int8() { return precast::INT8; }
ABI int32_t aoti_torch_dtype_int16() { return precast::INT16; }
ABI int32_t aoti_torch_dtype_int32() { return precast::INT32; }
ABI int32_t aoti_torch_dtype_int64() { return precast::INT64; }
ABI int32_t aoti_torch_dtype_float16() { return precast::FLOAT16; }
ABI int32_t aoti_torch_dtype_float32() { return precast::FLOAT32; }
ABI int32_t aoti_torch_dtype_float64() { return precast::FLOAT64; }
ABI int32_t aoti_torch_dtype_bool() { return precast::BOOL; }
ABI int32_t aoti_torch_dtype_bfloat16() { return precast::BFLOAT16; }
ABI size_t aoti_torch_dtype_element_size(int32_t dtype) { return precast::element_size(dtype); }
ABI bool aoti_torch_grad_mode_is_enabled() { return false; }
ABI void aoti_torch_grad_mode_set_enabled(bool) {}

ABI void aoti_torch_check(bool holds, const char* function, const char*, uint32_t, const char* message) {
  if (!holds) throw std::runtime_error(std::string(function) + ": " + (message ? message : "a check failed"));
}

// ------------------------------------------------------------------ metadata

ABI Status aoti_torch_get_data_ptr(Tensor tensor, void** found) { return *found = precast::data_of(tensor), 0; }
ABI Status aoti_torch_get_storage_size(Tensor tensor, int64_t* found) { return *found = tensor->storage->bytes, 0; }
ABI Status aoti_torch_get_storage_offset(Tensor tensor, int64_t* found) { return *found = tensor->offset, 0; }
ABI Status aoti_torch_get_dim(Tensor tensor, int64_t* found) { return *found = tensor->dims, 0; }
ABI Status aoti_torch_get_numel(Tensor tensor, int64_t* found) { return *found = precast::count_of(tensor), 0; }
ABI Status aoti_torch_get_sizes(Tensor tensor, int64_t** found) { return *found = tensor->sizes, 0; }
ABI Status aoti_torch_get_strides(Tensor tensor, int64_t** found) { return *found = tensor->strides, 0; }
ABI Status aoti_torch_get_dtype(Tensor tensor, int32_t* found) { return *found = tensor->dtype, 0; }
ABI Status aoti_torch_get_device_type(Tensor, int32_t* found) { return *found = 0, 0; }
ABI Status aoti_torch_get_device_index(Tensor, int32_t* found) { return *found = 0, 0; }

ABI Status aoti_torch_get_size(Tensor tensor, int64_t d, int64_t* found) {
  if (d < 0 || d >= tensor->dims) return precast::fail(__func__, "there is no such dimension");
  return *found = tensor->sizes[d], 0;
}

ABI Status aoti_torch_get_stride(Tensor tensor, int64_t d, int64_t* found) {
  if (d < 0 || d >= tensor->dims) return precast::fail(__func__, "there is no such dimension");
  return *found = tensor->strides[d], 0;
}

// ------------------------------------------------------------------ tensors

ABI Status aoti_torch_delete_tensor_object(Tensor tensor) {
  if (tensor == nullptr) return 0;
  release(tensor->storage);
  delete tensor;
  return 0;
}

ABI Status aoti_torch_new_tensor_handle(Tensor tensor, Tensor* made) {
  *made = new AtenTensorOpaque(*tensor);
  share(tensor->storage);
  return 0;
}

ABI Status aoti_torch_empty_strided(
    int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t, Tensor* made) {
  if (device != 0) return precast::fail(__func__, "memory of another device than the CPU");
  if (Status status = check_dims(__func__, dims)) return status;
  const size_t bytes = span_of(dims, sizes, strides) * precast::element_size(dtype);
  *made = new_tensor(new_storage(bytes), dims, sizes, strides, 0, dtype);
  return 0;
}

// `offset` is an increment on the tensor's own.
ABI Status aoti_torch__reinterpret_tensor(
    Tensor tensor, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, Tensor* made) {
  if (Status status = check_dims(__func__, dims)) return status;
  const int64_t begin = tensor->offset + offset, end = begin + span_of(dims, sizes, strides);
  if (begin < 0 || end * precast::element_size(tensor->dtype) > tensor->storage->bytes)
    return precast::fail(__func__, "a view reaches beyond its tensor's memory");
  *made = new_tensor(share(tensor->storage), dims, sizes, strides, begin, tensor->dtype);
  return 0;
}

ABI Status aoti_torch_create_tensor_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t,
    int32_t, Tensor* made) {
  if (Status status = check_dims(__func__, dims)) return status;
  const size_t bytes = (offset + span_of(dims, sizes, strides)) * precast::element_size(dtype);
  *made = new_tensor(borrow(data, bytes), dims, sizes, strides, offset, dtype);
  return 0;
}

ABI Status aoti_torch_create_tensor_from_blob_v2(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device, int32_t index, Tensor* made, int32_t layout, const uint8_t*, int64_t) {
  if (layout != 0) return precast::fail(__func__, "a layout of another library");
  return aoti_torch_create_tensor_from_blob(data, dims, sizes, strides, offset, dtype, device, index, made);
}

ABI Status aoti_torch_clone_preserve_strides(Tensor tensor, Tensor* made) {
  return clone(tensor, tensor->strides, made);
}

ABI Status aoti_torch_clone(Tensor tensor, Tensor* made) {
  int64_t strides[MAX_DIMS];
  dense_strides(tensor, strides);
  return clone(tensor, strides, made);
}

ABI Status aoti_torch_copy_(Tensor to, Tensor from, int32_t) {
  if (to->dtype != from->dtype || to->dims != from->dims || !std::equal(to->sizes, to->sizes + to->dims, from->sizes))
    return precast::fail(__func__, "tensors of different dtypes or sizes");
  copy_bytes(to, from);
  return 0;
}

ABI Status aoti_torch_zero_(Tensor tensor) {
  if (!is_dense(tensor)) return precast::fail(__func__, "a tensor with gaps");
  std::memset(precast::data_of(tensor), 0, precast::count_of(tensor) * precast::element_size(tensor->dtype));
  return 0;
}

ABI Status aoti_torch_assign_tensors_out(Tensor from, Tensor* made) { return aoti_torch_new_tensor_handle(from, made); }

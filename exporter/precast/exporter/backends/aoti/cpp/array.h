// Tensors as libraries are given them: by the runtime (precast/runtime/engines/aoti.py), and by each other.
#ifndef PRECAST_ARRAY
#define PRECAST_ARRAY
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace precast {
constexpr int MAX_DIMS = 8;
}

// `dtype` is a number of c10/core/ScalarType.h; `strides` count elements.
struct PrecastArray {
  void* data;
  int32_t dtype, dims;
  int64_t sizes[precast::MAX_DIMS], strides[precast::MAX_DIMS];
};

namespace precast {

// An array whose last dimension is innermost, without gaps.
inline PrecastArray dense(const void* data, int32_t dtype, std::initializer_list<int64_t> sizes) {
  PrecastArray array{const_cast<void*>(data), dtype, static_cast<int32_t>(sizes.size()), {}, {}};
  std::copy(sizes.begin(), sizes.end(), array.sizes);
  int64_t stride = 1;
  for (int32_t d = array.dims - 1; d >= 0; --d) {
    array.strides[d] = stride;
    stride *= array.sizes[d];
  }
  return array;
}

}  // namespace precast
#endif

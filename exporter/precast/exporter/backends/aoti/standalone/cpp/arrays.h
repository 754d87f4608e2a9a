// Arrays of a caller as tensors of AOTInductor's C ABI, for what calls a program that it compiled.
#ifndef PRECAST_ARRAYS
#define PRECAST_ARRAYS
#include <torch/csrc/inductor/aoti_runtime/interface.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../../cpp/array.h"

namespace precast {

inline void check(AOTIRuntimeError error, const char* what) {
  if (error == 0) return;
  const char* said = nullptr;
  AOTInductorGetLastError(&said);
  throw std::runtime_error(said != nullptr && *said != 0 ? said : what);
}

// Tensors that are deleted at the end of a block. A graph that returns a tensor twice returns its handle twice.
struct Tensors {
  std::vector<AtenTensorHandle> all;

  explicit Tensors(size_t count) : all(count, nullptr) {}
  ~Tensors() {
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    for (AtenTensorHandle each : all) aoti_torch_delete_tensor_object(each);
  }
};

inline AtenTensorHandle wrap(const PrecastArray& array) {
  AtenTensorHandle made = nullptr;
  if (aoti_torch_create_tensor_from_blob(
          array.data, array.dims, array.sizes, array.strides, 0, array.dtype, 0, 0, &made) != 0)
    throw std::runtime_error("an array cannot be wrapped");
  return made;
}

inline void copy_out(AtenTensorHandle from, const PrecastArray& to) {
  Tensors target(1);
  target.all[0] = wrap(to);
  if (aoti_torch_copy_(target.all[0], from, 0) != 0)
    throw std::runtime_error("an output has another dtype or shape than the artifact says");
}

}  // namespace precast
#endif

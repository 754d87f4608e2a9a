// What the pieces of a library that stands alone share: tensors as AOTInductor's C ABI knows them, and threads.
//
// Everything here is hidden (-fvisibility=hidden): within a process that has PyTorch loaded, a library still calls its
// own functions, not PyTorch's of the same names.
#ifndef PRECAST_STANDALONE
#define PRECAST_STANDALONE
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <utility>

#include "../../cpp/array.h"

namespace precast {

// Below this many multiply-adds, waking threads costs more than it saves.
constexpr int64_t MIN_PARALLEL_MACS = 1 << 15;

// Numbers of dtypes as in c10/core/ScalarType.h.
enum Dtype : int32_t {
  UINT8 = 0, INT8 = 1, INT16 = 2, INT32 = 3, INT64 = 4, FLOAT16 = 5, FLOAT32 = 6, FLOAT64 = 7, BOOL = 11, BFLOAT16 = 15
};

// Memory of the small objects that every step makes by the hundred, kept by each thread for its next ones: malloc was
// most of what it cost to call a layer.
template <typename Object>
class Kept {
 public:
  static void* operator new(size_t bytes) {
    List& list = list_;
    if (list.first == nullptr) return ::operator new(std::max(bytes, sizeof(Link)));
    Link* const found = list.first;
    list.first = found->next;
    --list.count;
    return found;
  }

  static void operator delete(void* memory) {
    List& list = list_;
    if (list.count >= MOST) return ::operator delete(memory);
    list.first = new (memory) Link{list.first};
    ++list.count;
  }

 private:
  static constexpr int MOST = 1024;

  struct Link {
    Link* next;
  };

  struct List {
    Link* first = nullptr;
    int count = 0;

    ~List() {
      while (first != nullptr) ::operator delete(std::exchange(first, first->next));
      count = MOST;  // What is deleted after this is not kept.
    }
  };

  static inline thread_local List list_;
};

// Memory that tensors share: a block of our own, or the caller's.
struct Storage : Kept<Storage> {
  char* data;
  size_t bytes;
  bool owned;
  std::atomic<int64_t> references;
};

}  // namespace precast

// The opaque tensor of the C ABI. `offset` and `strides` count elements.
struct AtenTensorOpaque : precast::Kept<AtenTensorOpaque> {
  precast::Storage* storage;
  int64_t sizes[precast::MAX_DIMS], strides[precast::MAX_DIMS];
  int64_t dims, offset;
  int32_t dtype;
};

namespace precast {

using Tensor = AtenTensorOpaque*;
using Status = int32_t;  // 0: success

size_t element_size(int32_t dtype);

inline char* data_of(const AtenTensorOpaque* tensor) {
  return tensor->storage->data + tensor->offset * static_cast<int64_t>(element_size(tensor->dtype));
}

int64_t count_of(const AtenTensorOpaque* tensor);

// Remembers why a call failed, for the runtime to read, and returns the status of a failure.
Status fail(const char* call, const char* why);

// What the last failure of this thread was, once.
std::string take_failure();

// On how many threads the caller's parallel regions run from now on.
void set_threads(int count);

// In the child of a fork, where no other thread is: forgets what these held.
void forget_blocks();

}  // namespace precast
#endif

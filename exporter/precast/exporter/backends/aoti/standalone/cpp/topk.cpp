// The largest or smallest numbers of a dimension, as mixtures choose their experts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "standalone.h"

#define ABI extern "C"

using namespace precast;

ABI Status aoti_torch_empty_strided(
    int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t index,
    Tensor* made);

namespace {

template <typename Key>
struct Ranked {
  Key key;
  int64_t index;
};

// A number as one that can be compared without loss.
template <typename Key>
Key read(const char* from, int32_t dtype) {
  const auto as = [from](auto value) {
    std::memcpy(&value, from, sizeof(value));
    return static_cast<Key>(value);
  };
  switch (dtype) {
    case FLOAT64: return as(double());
    case INT64: return as(int64_t());
    case INT32: return as(int32_t());
    case INT16: return as(int16_t());
    case INT8: return as(int8_t());
    case UINT8: case BOOL: return as(uint8_t());
    default: return static_cast<Key>(to_float(from, dtype));
  }
}

// One row of x, of `count` numbers: the first `k` by rank. As in PyTorch NaN counts as larger than any number; of equal
// ones the first comes first.
template <typename Key>
void rank_row(const char* x, int64_t step, int64_t count, int32_t dtype, bool largest, int64_t k,
              std::vector<Ranked<Key>>& ranked) {
  ranked.resize(count);
  for (int64_t i = 0; i < count; ++i) ranked[i] = {read<Key>(x + i * step, dtype), i};
  const auto is_larger = [](const Key& a, const Key& b) {
    const bool a_is_nan = a != a, b_is_nan = b != b;
    return a_is_nan ? !b_is_nan : a > b;
  };
  std::partial_sort(ranked.begin(), ranked.begin() + k, ranked.end(), [&](const auto& a, const auto& b) {
    const bool before = largest ? is_larger(a.key, b.key) : is_larger(b.key, a.key);
    const bool after = largest ? is_larger(b.key, a.key) : is_larger(a.key, b.key);
    return before || (!after && a.index < b.index);
  });
}

template <typename Key>
void choose(const AtenTensorOpaque* x, int64_t dim, bool largest, Tensor values, Tensor indices) {
  const int64_t bytes = element_size(x->dtype), count = x->sizes[dim], k = values->sizes[dim];
  const int64_t step = x->strides[dim] * bytes, made_step = values->strides[dim], rows = count_of(x) / std::max<int64_t>(count, 1);
  char* const found = data_of(values);
  int64_t* const places = reinterpret_cast<int64_t*>(data_of(indices));
  std::vector<Ranked<Key>> ranked;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t from = 0, to = 0, rest = row;
    for (int64_t d = x->dims - 1; d >= 0; --d) {
      if (d == dim) continue;
      from += rest % x->sizes[d] * x->strides[d], to += rest % x->sizes[d] * values->strides[d];
      rest /= x->sizes[d];
    }
    const char* const begin = data_of(x) + from * bytes;
    rank_row<Key>(begin, step, count, x->dtype, largest, k, ranked);
    for (int64_t i = 0; i < k; ++i) {
      std::memcpy(found + (to + i * made_step) * bytes, begin + ranked[i].index * step, bytes);
      places[to + i * made_step] = ranked[i].index;
    }
  }
}

}  // namespace

ABI Status aoti_torch_cpu_topk(
    Tensor x, int64_t k, int64_t dim, int32_t largest, int32_t, Tensor* values, Tensor* indices) {
  if (dim < 0) dim += x->dims;
  if (dim < 0 || dim >= x->dims || k < 0 || k > x->sizes[dim]) return fail(__func__, "more numbers than there are");
  int64_t sizes[MAX_DIMS], strides[MAX_DIMS], next = 1;
  std::copy(x->sizes, x->sizes + x->dims, sizes);
  sizes[dim] = k;
  for (int64_t d = x->dims - 1; d >= 0; --d) strides[d] = next, next *= std::max<int64_t>(sizes[d], 1);
  if (Status status = aoti_torch_empty_strided(x->dims, sizes, strides, x->dtype, 0, 0, values)) return status;
  if (Status status = aoti_torch_empty_strided(x->dims, sizes, strides, INT64, 0, 0, indices)) return status;
  if (is_float(x->dtype) || x->dtype == FLOAT64)
    choose<double>(x, dim, largest != 0, *values, *indices);
  else
    choose<int64_t>(x, dim, largest != 0, *values, *indices);
  return 0;
}

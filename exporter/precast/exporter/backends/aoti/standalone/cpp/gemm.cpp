// Matrix products for prompts: what Inductor calls as mm, addmm and bmm.
//
// A thread takes a panel of NR columns of b at a time, packs it so that it is read in one stream, and multiplies all
// rows of a with it, MR at a time: their sums fit into registers (Goto and van de Geijn 2008, "Anatomy of
// High-Performance Matrix Multiplication"). All sums are float32, to which packing converts. A few rows are multiplied
// with a weight as it lies.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "numbers.h"
#include "standalone.h"

#define ABI extern "C"

using namespace precast;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#else
constexpr int LANES = 8, VECTORS = 2;
#endif
constexpr int MR = 6, NR = LANES * VECTORS;
// Rows of a panel: 128 KiB, which stay in the second cache.
constexpr int64_t DEPTH = 512;

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// A matrix whose elements may lie anyhow.
struct Matrix {
  const char* data;
  int64_t rows, columns, row_stride, column_stride;
  int32_t dtype;

  const char* at(int64_t row, int64_t column) const {
    return data + (row * row_stride + column * column_stride) * static_cast<int64_t>(element_size(dtype));
  }
};

// Copies `count` elements, `stride` apart, to float32.
void gather(float* to, const char* from, int64_t count, int64_t stride, int32_t dtype) {
  const int64_t step = stride * static_cast<int64_t>(element_size(dtype));
  if (dtype == FLOAT32 && stride == 1) {
    std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == BFLOAT16 && stride == 1) {
    const auto bits = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(to + i, &wide, sizeof(float));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from + i * step, dtype);
  }
}

// ------------------------------------------------------------------ float32

// sums [ROWS, NR] += a [ROWS, depth] panel [depth, NR].
template <int ROWS>
void multiply_tile(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* sums) {
  Vec tile[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) tile[r][v] = *reinterpret_cast<const Vec*>(sums + r * NR + v * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const Vec*>(panel + k * NR + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const float x = a[r * a_stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) tile[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vec*>(sums + r * NR + v * LANES) = tile[r][v];
}

// A step of a transposition: of two rows that are SIZE apart, what lies beside the diagonal of blocks of that size
// changes places.
template <int SIZE>
void swap_across(Vec& upper, Vec& lower) {
  typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));
  // The second row's lanes are counted from LANES on.
  Lanes up, down;
  for (int i = 0; i < LANES; ++i) {
    up[i] = i & SIZE ? LANES + i - SIZE : i;
    down[i] = i & SIZE ? LANES + i : i + SIZE;
  }
  const Vec above = __builtin_shuffle(upper, lower, up);
  lower = __builtin_shuffle(upper, lower, down);
  upper = above;
}

template <int SIZE>
void transpose_blocks(Vec (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & SIZE)) swap_across<SIZE>(rows[i], rows[i + SIZE]);
  if constexpr (SIZE > 1) transpose_blocks<SIZE / 2>(rows);
}

// A square of a weight [N, K], LANES of each, written as [K, NR].
void transpose_square(const float* from, int64_t stride, float* to) {
  Vec rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = *reinterpret_cast<const Vec*>(from + i * stride);
  transpose_blocks<LANES / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) *reinterpret_cast<Vec*>(to + i * NR) = rows[i];
}

// The same of `columns` times `depth` numbers that may lie anyhow.
void transpose_anyhow(const Matrix& b, int64_t k, int64_t first, int64_t depth, int64_t columns, float* to) {
  float square[LANES][LANES];
  for (int64_t c = 0; c < columns; ++c) gather(square[c], b.at(k, first + c), depth, b.row_stride, b.dtype);
  for (int64_t r = 0; r < depth; ++r)
    for (int64_t c = 0; c < columns; ++c) to[r * NR + c] = square[c][r];
}

// Packs columns `first` to `first + count` of b, rows `k` to `k + depth`, with zeros up to NR columns.
void pack_panel(const Matrix& b, int64_t first, int64_t count, int64_t k, int64_t depth, float* to) {
  if (count < NR) std::memset(to, 0, depth * NR * sizeof(float));
  if (b.column_stride == 1) {
    for (int64_t i = 0; i < depth; ++i) gather(to + i * NR, b.at(k + i, first), count, 1, b.dtype);
    return;
  }
  // A weight [N, K] seen from its other side: squares of it, which are read along k.
  const bool is_weight = b.dtype == FLOAT32 && b.row_stride == 1;
  for (int64_t n = 0; n < count; n += LANES)
    for (int64_t i = 0; i < depth; i += LANES) {
      const int64_t rows = std::min<int64_t>(LANES, depth - i), columns = std::min<int64_t>(LANES, count - n);
      float* const square = to + i * NR + n;
      if (is_weight && rows == LANES && columns == LANES)
        transpose_square(reinterpret_cast<const float*>(b.at(k + i, first + n)), b.column_stride, square);
      else
        transpose_anyhow(b, k + i, first + n, rows, columns, square);
    }
}

template <int ROWS>
void multiply_rows(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth, float* sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return multiply_rows<ROWS - 1>(rows, a, a_stride, panel, depth, sums);
  }
  multiply_tile<ROWS>(a, a_stride, panel, depth, sums);
}

// ------------------------------------------------------------------ few rows

// Up to so many rows a weight is not packed, which would take longer than multiplying them.
constexpr int64_t FEW_ROWS = 8;
// The tile of dot products whose sums fit into registers.
constexpr int DOT_ROWS = LANES == 16 ? 4 : 3, DOT_COLUMNS = 4;
static_assert(NR % DOT_COLUMNS == 0);

// Replaces each of LANES vectors by the sum of its lanes, which is the lane of its number in the result.
Vec sum_lanes(Vec (&each)[LANES]) {
  transpose_blocks<LANES / 2>(each);
#pragma GCC unroll 16
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) each[i] += each[i + half];
  return each[0];
}

// sums [ROWS, NR] of DOT_COLUMNS columns = a [ROWS, depth] times rows of a weight, w [DOT_COLUMNS, depth].
template <int ROWS>
void dot_tile(const float* a, int64_t a_stride, const float* w, int64_t w_stride, int64_t depth, float* sums) {
  // As many as whole groups of LANES.
  constexpr int COUNT = (ROWS * DOT_COLUMNS + LANES - 1) / LANES * LANES;
  Vec tile[COUNT] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Vec column[DOT_COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < DOT_COLUMNS; ++c) column[c] = *reinterpret_cast<const Vec*>(w + c * w_stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = *reinterpret_cast<const Vec*>(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < DOT_COLUMNS; ++c) tile[r * DOT_COLUMNS + c] += x * column[c];
    }
  }
  float found[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; i += LANES) {
    Vec some[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) some[j] = tile[i + j];
    *reinterpret_cast<Vec*>(found + i) = sum_lanes(some);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < DOT_COLUMNS; ++c) {
      float sum = found[r * DOT_COLUMNS + c];
      for (int64_t rest = k; rest < depth; ++rest) sum += a[r * a_stride + rest] * w[c * w_stride + rest];
      sums[r * NR + c] = sum;
    }
}

template <int ROWS>
void dot_rows(
    int64_t rows, const float* a, int64_t a_stride, const float* w, int64_t w_stride, int64_t depth, float* sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return dot_rows<ROWS - 1>(rows, a, a_stride, w, w_stride, depth, sums);
  }
  dot_tile<ROWS>(a, a_stride, w, w_stride, depth, sums);
}

// c = alpha * a b + beta * added, which is c's size or broadcast by strides of 0.
struct Product {
  Matrix a, b, c, added;
  float alpha, beta;

  // Columns `first` to `first + NR`, rows `begin` to `end`. `space` holds a panel, sums and rows of a.
  void compute(int64_t first, int64_t begin, int64_t end, float* space) const {
    const int64_t count = std::min<int64_t>(NR, b.columns - first), rows = end - begin;
    float *panel = space, *sums = panel + DEPTH * NR, *buffer = sums + round_rows(rows) * NR;
    if (takes_dots() && count % DOT_COLUMNS == 0)
      multiply_few(first, count, begin, end, sums);
    else
      multiply_packed(first, count, begin, end, panel, sums, buffer);
    for (int64_t r = 0; r < rows; ++r) store_row(begin + r, first, count, sums + r * NR);
  }

  static int64_t round_rows(int64_t rows) { return (rows + MR - 1) / MR * MR; }
  static int64_t space_for(int64_t rows) { return DEPTH * NR + round_rows(rows) * NR + MR * DEPTH; }

 private:
  // Few rows of numbers that lie along k, as those of a weight do.
  bool takes_dots() const {
    const bool along_k = a.column_stride == 1 && b.row_stride == 1;
    return a.rows <= FEW_ROWS && along_k && a.dtype == FLOAT32 && b.dtype == FLOAT32;
  }

  void multiply_few(int64_t first, int64_t count, int64_t begin, int64_t end, float* sums) const {
    const int64_t rows = end - begin, tiles = (rows + DOT_ROWS - 1) / DOT_ROWS;
    for (int64_t n = 0; n < count; n += DOT_COLUMNS)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = rows * tile / tiles, next = rows * (tile + 1) / tiles;
        dot_rows<DOT_ROWS>(next - r, reinterpret_cast<const float*>(a.at(begin + r, 0)), a.row_stride,
                           reinterpret_cast<const float*>(b.at(0, first + n)), b.column_stride, a.columns,
                           sums + r * NR + n);
      }
  }

  void multiply_packed(
      int64_t first, int64_t count, int64_t begin, int64_t end, float* panel, float* sums, float* buffer) const {
    const int64_t rows = end - begin;
    std::fill(sums, sums + rows * NR, 0.0f);
    for (int64_t k = 0; k < a.columns; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, a.columns - k);
      pack_panel(b, first, count, k, depth, panel);
      // Tiles of much the same height: a low one for the rest would take as long as a high one.
      const int64_t tiles = (rows + MR - 1) / MR;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t r = rows * tile / tiles, next = rows * (tile + 1) / tiles;
        multiply_block(begin + r, next - r, k, depth, panel, sums + r * NR, buffer);
      }
    }
  }

  void multiply_block(
      int64_t row, int64_t rows, int64_t k, int64_t depth, const float* panel, float* sums, float* buffer) const {
    if (a.dtype == FLOAT32 && a.column_stride == 1)
      return multiply_rows<MR>(rows, reinterpret_cast<const float*>(a.at(row, k)), a.row_stride, panel, depth, sums);
    for (int64_t r = 0; r < rows; ++r) gather(buffer + r * DEPTH, a.at(row + r, k), depth, a.column_stride, a.dtype);
    multiply_rows<MR>(rows, buffer, DEPTH, panel, depth, sums);
  }

  void store_row(int64_t row, int64_t first, int64_t count, const float* sums) const {
    char* to = const_cast<char*>(c.at(row, first));
    const int64_t step = c.column_stride * static_cast<int64_t>(element_size(c.dtype));
    if (c.dtype == FLOAT32 && c.column_stride == 1) {
      float* const out = reinterpret_cast<float*>(to);
      if (beta == 0.0f && alpha == 1.0f) {
        std::memcpy(out, sums, count * sizeof(float));
        return;
      }
      if (beta == 0.0f || (added.dtype == FLOAT32 && added.column_stride == 1)) {
        const float* const plus = beta == 0.0f ? sums : reinterpret_cast<const float*>(added.at(row, first));
#pragma omp simd
        for (int64_t n = 0; n < count; ++n) out[n] = alpha * sums[n] + beta * plus[n];
        return;
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      float sum = alpha * sums[n];
      if (beta != 0.0f) sum += beta * to_float(added.at(row, first + n), added.dtype);
      from_float(to + n * step, sum, c.dtype);
    }
  }
};

// Rows that a task computes at most: many, so that a panel is packed seldom.
constexpr int64_t MAX_ROWS = 192;

struct Free {
  void operator()(float* space) const { std::free(space); }
};

void multiply(const std::vector<Product>& products) {
  if (products.empty() || products[0].a.rows == 0) return;
  const Product& shape = products[0];
  const int64_t panels = (shape.b.columns + NR - 1) / NR, blocks = (shape.a.rows + MAX_ROWS - 1) / MAX_ROWS;
  const int64_t block = Product::round_rows((shape.a.rows + blocks - 1) / blocks);
  const int64_t tasks = products.size() * panels * blocks;
  const int64_t macs = products.size() * shape.a.rows * shape.a.columns * shape.b.columns;
#pragma omp parallel if (macs >= MIN_PARALLEL_MACS)
  {
    const size_t bytes = Product::space_for(block) * sizeof(float);
    std::unique_ptr<float[], Free> space(static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t begin = task % blocks * block;
      products[task / (panels * blocks)].compute(
          task / blocks % panels * NR, begin, std::min(begin + block, shape.a.rows), space.get());
    }
  }
}

// The last two dimensions of a tensor, of the batch `index`.
Matrix matrix_of(const AtenTensorOpaque* tensor, int64_t index) {
  const int64_t d = tensor->dims - 2;
  Matrix made{data_of(tensor), tensor->sizes[d], tensor->sizes[d + 1], tensor->strides[d],
              tensor->strides[d + 1], tensor->dtype};
  if (d == 1) made.data += index * tensor->strides[0] * static_cast<int64_t>(element_size(tensor->dtype));
  return made;
}

// What is added to a matrix of such a size, of fewer dimensions or of size 1 where it is broadcast.
Matrix broadcast(const AtenTensorOpaque* tensor, int64_t index, int64_t rows, int64_t columns) {
  const auto stride = [&](int64_t from_last) {
    const int64_t d = tensor->dims - 1 - from_last;
    return d < 0 || tensor->sizes[d] == 1 ? 0 : tensor->strides[d];
  };
  Matrix made{data_of(tensor), rows, columns, stride(1), stride(0), tensor->dtype};
  made.data += index * stride(2) * static_cast<int64_t>(element_size(tensor->dtype));
  return made;
}

// out = alpha * a b + beta * added, for matrices or batches of them.
Status multiply(
    const char* call, int64_t dims, Tensor out, Tensor a, Tensor b, Tensor added, double beta, double alpha) {
  if (a->dims != dims || b->dims != dims || out->dims != dims) return fail(call, "not so many dimensions");
  if (!is_float(a->dtype) || !is_float(b->dtype) || !is_float(out->dtype) || (added && !is_float(added->dtype)))
    return fail(call, "a product of numbers that are no floats");
  const int64_t batch = dims == 3 ? out->sizes[0] : 1, d = dims - 2;
  const bool same_batch = dims == 2 || (a->sizes[0] == batch && b->sizes[0] == batch);
  const bool fits = a->sizes[d + 1] == b->sizes[d] && out->sizes[d] == a->sizes[d] && out->sizes[d + 1] == b->sizes[d + 1];
  if (!same_batch || !fits) return fail(call, "matrices whose sizes do not fit");
  std::vector<Product> products;
  for (int64_t index = 0; index < batch; ++index) {
    const Matrix c = matrix_of(out, index);
    const Matrix plus = added ? broadcast(added, index, c.rows, c.columns) : c;
    products.push_back({matrix_of(a, index), matrix_of(b, index), c, plus, static_cast<float>(alpha),
                        added ? static_cast<float>(beta) : 0.0f});
  }
  multiply(products);
  return 0;
}

}  // namespace

ABI Status aoti_torch_cpu_mm_out(Tensor out, Tensor a, Tensor b) {
  return multiply(__func__, 2, out, a, b, nullptr, 0, 1);
}

ABI Status aoti_torch_cpu_bmm_out(Tensor out, Tensor a, Tensor b) {
  return multiply(__func__, 3, out, a, b, nullptr, 0, 1);
}

ABI Status aoti_torch_cpu_addmm_out(Tensor out, Tensor added, Tensor a, Tensor b, double beta, double alpha) {
  return multiply(__func__, 2, out, a, b, added, beta, alpha);
}

ABI Status aoti_torch_cpu_baddbmm_out(Tensor out, Tensor added, Tensor a, Tensor b, double beta, double alpha) {
  return multiply(__func__, 3, out, a, b, added, beta, alpha);
}

// GEMM with quantized weights, for many rows of input: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Codes less their zero points are widened to integers of 16 bits, and so is x rounded, with one scale per block of a
// row, as for GEMV. An instruction then multiplies two of each and adds them up: twice as much as in float32, and no
// matrix of numbers is written and read again. A thread takes a panel of outputs at a time, lays it so that it is read
// in one stream, and multiplies all rows with it, MR at a time: their sums fit into registers.
#ifndef PRECAST_QUANTIZED_GEMM
#define PRECAST_QUANTIZED_GEMM
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace precast {

typedef uint32_t Words __attribute__((vector_size(4 * LANES), may_alias));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES), may_alias));

// sum += a[0] * b[0] + a[1] * b[1] in each lane, for pairs of integers of 16 bits; `pair` is the same b for all.
inline Ints add_pair_products(Ints sum, Ints a, int32_t pair) {
#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(pair));
#elif defined(CPU_CAPABILITY_AVX512)
  return sum + (Ints)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(pair));
#elif defined(CPU_CAPABILITY_AVX2)
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(pair));
#else
  return sum + (a << 16 >> 16) * static_cast<int16_t>(pair) + (a >> 16) * (pair >> 16);
#endif
}

template <int K, int GROUP, int BITS, bool ZEROS>
struct QuantizedGemm : QuantizedWeight<K, GROUP, BITS, ZEROS> {
  using Base = QuantizedWeight<K, GROUP, BITS, ZEROS>;
  static constexpr int GROUPS = Base::GROUPS;
  // A block has one scale of x and one of a weight. Its sums stay within 31 bits: 128 * 255 * 32767 < 2^31.
  static constexpr int BLOCK = GROUPS == 1 ? 128 : GROUP <= 128 ? GROUP : std::gcd(GROUP, 128);
  static constexpr int BLOCKS = (K + BLOCK - 1) / BLOCK, WIDTH = BLOCKS * BLOCK, PAIRS = BLOCK / 2;
  static constexpr int BLOCK_BYTES = BLOCK * BITS / 8;
  static_assert(BLOCK_BYTES % 4 == 0);
  static constexpr float MAX_INTEGER = 32766;  // since the division below may round up

  static constexpr int MR = 6, VECTORS = LANES == 16 ? 4 : 2, PANEL = VECTORS * LANES;
  // Blocks of a panel that are laid out at a time: 128 KiB or less, which stay in the second cache.
  static constexpr int CHUNK = 1024 / BLOCK;
  // Rows that a task computes at most, a multiple of MR: many, so that a panel is laid out seldom.
  static constexpr int64_t MAX_ROWS = 42 * MR;

  // Rows of x as integers, with their scales.
  struct Input {
    std::unique_ptr<int16_t[]> integers;  // [rows, WIDTH]
    std::unique_ptr<float[]> scales;      // [rows, BLOCKS]

    explicit Input(int64_t rows) : integers(new int16_t[rows * WIDTH]), scales(new float[rows * BLOCKS]) {}

    void round_row(int64_t row, const float* x) {
      for (int b = 0; b < BLOCKS; ++b) {
        float block[BLOCK];
        for (int i = 0; i < BLOCK; ++i) block[i] = b * BLOCK + i < K ? x[b * BLOCK + i] : 0.0f;
        float largest = 0, nonfinite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : nonfinite)
        for (int i = 0; i < BLOCK; ++i) {
          largest = std::max(largest, std::abs(block[i]));
          nonfinite += block[i] * 0.0f;  // NaN where an input is infinite or NaN: the output has to be NaN, too.
        }
        const float inverse = largest > 1e-30f ? MAX_INTEGER / largest : 0.0f;
        scales[row * BLOCKS + b] = largest / MAX_INTEGER + nonfinite;
        int16_t* to = integers.get() + row * WIDTH + b * BLOCK;
        for (int i = 0; i < BLOCK; ++i) to[i] = static_cast<int16_t>(round_to_int(block[i] * inverse));
      }
    }
  };

  // What a thread works in.
  struct alignas(64) Space {
    Ints panel[CHUNK * PAIRS * VECTORS];
    float scales[CHUNK * PANEL], sums[MAX_ROWS * PANEL];
  };

  void multiply(float* y, const Input& input, int64_t begin, int64_t end, int64_t first, Space& space) const {
    const int64_t count = std::min<int64_t>(PANEL, this->outputs - first);
    std::fill(space.sums, space.sums + (end - begin) * PANEL, 0.0f);
    for (int from = 0; from < BLOCKS; from += CHUNK) {
      const int blocks = std::min(CHUNK, BLOCKS - from);
      for (int b = 0; b < blocks; ++b)
        lay_out_block(from + b, first, count, space.panel + b * PAIRS * VECTORS, space.scales + b * PANEL);
      for (int64_t row = begin; row < end; row += MR)
        multiply_rows(
            std::min<int64_t>(MR, end - row), input, row, from, blocks, space, space.sums + (row - begin) * PANEL);
    }
    for (int64_t row = begin; row < end; ++row) {
      const float* sums = space.sums + (row - begin) * PANEL;
      float* to = y + row * this->outputs + first;
      for (int64_t n = 0; n < count; ++n) to[n] = GROUPS == 1 ? sums[n] * this->scales[first + n] : sums[n];
    }
  }

 private:
  // Write codes less zero points as pairs along k, an output per lane, and the scales of the block.
  void lay_out_block(int block, int64_t first, int64_t count, Ints* panel, float* scales) const {
    uint32_t words[BLOCK_BYTES / 4][PANEL];
    int32_t zeros[PANEL];
    for (int64_t n = 0; n < PANEL; ++n) {
      const bool is_there = n < count;
      const int group = GROUPS == 1 ? 0 : block * BLOCK / GROUP;
      const int zero = is_there ? static_cast<int>(this->zero(first + n, group)) : 0;
      zeros[n] = zero | zero << 16;
      scales[n] = is_there && GROUPS > 1 ? this->scales[(first + n) * GROUPS + group] : 0.0f;
      const int64_t bytes = is_there ? std::min<int64_t>(BLOCK_BYTES, Base::BYTES - block * BLOCK_BYTES) : 0;
      uint8_t rest[BLOCK_BYTES];
      const uint8_t* from = this->codes + (first + n) * Base::BYTES + block * BLOCK_BYTES;
      if (bytes < BLOCK_BYTES) {
        std::memset(rest, 0, BLOCK_BYTES);
        if (bytes > 0) std::memcpy(rest, from, bytes);
        from = rest;
      }
      for (int i = 0; i < BLOCK_BYTES / 4; ++i) std::memcpy(&words[i][n], from + 4 * i, 4);
    }
    for (int i = 0; i < BLOCK_BYTES / 4; ++i)
      for (int v = 0; v < VECTORS; ++v) {
        const Words four = *reinterpret_cast<const Words*>(words[i] + v * LANES);
        const Shorts zero = *reinterpret_cast<const Shorts*>(zeros + v * LANES);
        if constexpr (BITS == 8) {
          panel[(2 * i) * VECTORS + v] = (Ints)((Shorts)((four & 0xff) | (four & 0xff00) << 8) - zero);
          panel[(2 * i + 1) * VECTORS + v] = (Ints)((Shorts)((four >> 16 & 0xff) | (four >> 8 & 0xff0000)) - zero);
        } else {
          for (int j = 0; j < 4; ++j) {
            const Words two = four >> (8 * j);
            panel[(4 * i + j) * VECTORS + v] = (Ints)((Shorts)((two & 15) | (two & 0xf0) << 12) - zero);
          }
        }
      }
  }

  template <int ROWS>
  static void multiply_tile(const Input& input, int64_t row, int from, int blocks, const Space& space, float* sums) {
    for (int b = 0; b < blocks; ++b) {
      Ints tile[ROWS][VECTORS] = {};
      const int16_t* x = input.integers.get() + row * WIDTH + (from + b) * BLOCK;
      const Ints* panel = space.panel + b * PAIRS * VECTORS;
      for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * WIDTH + 2 * p, sizeof(pair));
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) tile[r][v] = add_pair_products(tile[r][v], panel[p * VECTORS + v], pair);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const float scale = input.scales[(row + r) * BLOCKS + from + b];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          Floats& sum = *reinterpret_cast<Floats*>(sums + r * PANEL + v * LANES);
          Floats found = __builtin_convertvector(tile[r][v], Floats) * scale;
          if constexpr (GROUPS > 1) found *= *reinterpret_cast<const Floats*>(space.scales + b * PANEL + v * LANES);
          sum += found;
        }
      }
    }
  }

  static void multiply_rows(
      int64_t rows, const Input& input, int64_t row, int from, int blocks, const Space& space, float* sums) {
    switch (rows) {
      case 1: return multiply_tile<1>(input, row, from, blocks, space, sums);
      case 2: return multiply_tile<2>(input, row, from, blocks, space, sums);
      case 3: return multiply_tile<3>(input, row, from, blocks, space, sums);
      case 4: return multiply_tile<4>(input, row, from, blocks, space, sums);
      case 5: return multiply_tile<5>(input, row, from, blocks, space, sums);
      default: return multiply_tile<MR>(input, row, from, blocks, space, sums);
    }
  }
};

// So many rows, guesses that are checked say, are multiplied as a step's: nothing is laid out, and each gets the very
// numbers that it gets alone.
constexpr int64_t FEW_ROWS = 16;

// y [rows, outputs]
template <int K, int GROUP, int BITS, bool ZEROS>
void gemm(float* y, const float* x, int64_t rows, const QuantizedGemm<K, GROUP, BITS, ZEROS>& weight) {
  using Weight = QuantizedGemm<K, GROUP, BITS, ZEROS>;
  if (rows == 0) return;
  if (rows <= FEW_ROWS) {
    using Dot = QuantizedDot<K, GROUP, BITS, ZEROS>;
    const Layer<Dot> layers[] = {{x, {{weight.codes, weight.scales, weight.zeros, weight.outputs}}}};
    return gemv<K, Dot>(y, rows, layers);
  }
  typename Weight::Input input(rows);
  const int64_t panels = (weight.outputs + Weight::PANEL - 1) / Weight::PANEL;
  const int64_t parts = (rows + Weight::MAX_ROWS - 1) / Weight::MAX_ROWS;
  const int64_t part = ((rows + parts - 1) / parts + Weight::MR - 1) / Weight::MR * Weight::MR;
#pragma omp parallel if (rows * weight.outputs * K >= MIN_PARALLEL_MACS)
  {
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) input.round_row(row, x + row * K);
    std::unique_ptr<typename Weight::Space> space(new typename Weight::Space);
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < panels * parts; ++task) {
      const int64_t begin = task % parts * part, end = std::min(begin + part, rows);
      if (begin < end) weight.multiply(y, input, begin, end, task / parts * Weight::PANEL, *space);
    }
  }
}

}  // namespace precast
#endif

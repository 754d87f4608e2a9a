// Products of activations and weights of 8 bits: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Rows of x are rounded to bytes without a sign, by one scale and zero point or by a scale per row. An instruction
// multiplies four of them with four codes, and adds them up in 32 bits. Codes lie in panels of outputs, four neighbours
// along k of each output beside each other, as `pack_panels` writes them: a panel is read in one stream, and the sums of
// its codes, which the zero point multiplies, are behind it.
#ifndef PRECAST_INT8_GEMM
#define PRECAST_INT8_GEMM
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace precast {

// sum += the dot product of four bytes without a sign, the same for all lanes, with four codes in each lane. Where pairs
// are multiplied to 16 bits first, these hold them: two codes of one sign are 128 together at most.
inline Ints add_quad_products(Ints sum, int32_t quad, Ints codes) {
#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(quad), (__m512i)codes);
#elif defined(CPU_CAPABILITY_AVX512)
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(quad), (__m512i)codes);
  return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(CPU_CAPABILITY_AVX2) && defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(quad), (__m256i)codes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(quad), (__m256i)codes);
  return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 4; ++i) sum += (codes << (24 - 8 * i) >> 24) * (quad >> (8 * i) & 255);
  return sum;
#endif
}

// How activations are rounded: by one scale and zero point, or, without a scale, by the largest number of each row.
struct Rounding {
  const float* balance;  // [K], multiplies x first, or null
  const float* scale;
  const uint8_t* zero;

  int32_t zero_point() const { return scale ? *zero : 128; }
};

template <int K>
struct Int8Gemm {
  static constexpr int QUADS = (K + 3) / 4, WIDTH = 4 * QUADS;
  static constexpr int PANEL = 64;
  // Outputs and rows whose sums fit into registers, beside what instructions for pairs need.
  static constexpr int VECTORS = LANES == 16 ? 4 : 2, TILE = VECTORS * LANES, MR = LANES == 16 ? 6 : 4;
  static constexpr int64_t PANEL_BYTES = (QUADS + 1) * int64_t{4 * PANEL};
  // Rows that a task computes at most, a multiple of MR.
  static constexpr int64_t MAX_ROWS = 252;
  static_assert(MAX_ROWS % MR == 0);

  const int8_t* panels;  // [ceil(outputs / PANEL), QUADS + 1, PANEL, 4]
  const float* scales;   // [outputs]
  const float* bias;     // [outputs] or null
  int64_t outputs;

  // Rows of x as bytes, with their scales.
  struct Input {
    std::unique_ptr<uint8_t[]> bytes;  // [rows, WIDTH]
    std::unique_ptr<float[]> scales;   // [rows]

    explicit Input(int64_t rows) : bytes(new uint8_t[rows * WIDTH]), scales(new float[rows]) {}

    // In loops of one kind of operation each, which compilers vectorize.
    void round_row(int64_t row, const float* x, const Rounding& how) {
      float shifted[K], largest = 0, nonfinite = 0;
      if (how.balance) {
        for (int k = 0; k < K; ++k) shifted[k] = x[k] * how.balance[k];
        x = shifted;
      }
#pragma omp simd reduction(max : largest) reduction(+ : nonfinite)
      for (int k = 0; k < K; ++k) {
        largest = std::max(largest, std::abs(x[k]));
        nonfinite += x[k] * 0.0f;  // NaN where an input is infinite or NaN: the output has to be NaN, too.
      }
      const float scale = how.scale ? *how.scale : std::max(largest / 127, 1e-30f);
      const float inverse = 1 / scale, lowest = -static_cast<float>(how.zero_point()), highest = 255 + lowest;
      // Within bounds, then to nearest, by a sum that has the integer in its lowest bits.
#pragma omp simd
      for (int k = 0; k < K; ++k) {
        float code = x[k] * inverse;
        code = code > lowest ? code : lowest;
        code = code < highest ? code : highest;
        shifted[k] = code + 12582912.0f;
      }
      uint32_t words[K];
      std::memcpy(words, shifted, sizeof(words));
      const auto zero = static_cast<uint32_t>(how.zero_point());
      uint8_t* to = bytes.get() + row * WIDTH;
#pragma omp simd
      for (int k = 0; k < K; ++k) to[k] = static_cast<uint8_t>(words[k] + zero);
      for (int k = K; k < WIDTH; ++k) to[k] = 0;
      scales[row] = scale + nonfinite;
    }
  };

  // Rows from `begin` to `end` of the tile of outputs that starts at `first`.
  void multiply(float* y, const Input& input, int32_t zero, int64_t begin, int64_t end, int64_t first) const {
    for (int64_t row = begin; row < end; row += MR) {
      switch (std::min<int64_t>(MR, end - row)) {
        case 1: multiply_tile<1>(y, input, zero, row, first); break;
        case 2: multiply_tile<2>(y, input, zero, row, first); break;
        case 3: multiply_tile<3>(y, input, zero, row, first); break;
        case 4: multiply_tile<4>(y, input, zero, row, first); break;
        case 5: multiply_tile<5>(y, input, zero, row, first); break;
        default: multiply_tile<MR>(y, input, zero, row, first);
      }
    }
  }

 private:
  template <int ROWS>
  void multiply_tile(float* y, const Input& input, int32_t zero, int64_t row, int64_t first) const {
    const uint8_t* x = input.bytes.get() + row * WIDTH;
    const int8_t* codes = panels + first / PANEL * PANEL_BYTES + first % PANEL * 4;
    Ints tile[ROWS][VECTORS] = {};
    for (int q = 0; q < QUADS; ++q, codes += 4 * PANEL) {
      prefetch(codes);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        int32_t quad;
        std::memcpy(&quad, x + r * WIDTH + 4 * q, sizeof(quad));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
          tile[r][v] = add_quad_products(tile[r][v], quad, load_ints(codes + 4 * LANES * v));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t begin = first + v * LANES, count = std::min<int64_t>(LANES, outputs - begin);
      if (count <= 0) return;
      float each_scale[LANES] = {}, each_bias[LANES] = {};
      std::copy(scales + begin, scales + begin + count, each_scale);
      if (bias) std::copy(bias + begin, bias + begin + count, each_bias);
      const Floats by = *reinterpret_cast<const Floats*>(each_scale), plus = *reinterpret_cast<const Floats*>(each_bias);
      const Ints offsets = load_ints(codes + 4 * LANES * v) * zero;
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const Floats found = __builtin_convertvector(tile[r][v] - offsets, Floats) * (by * input.scales[row + r]) + plus;
        std::memcpy(y + (row + r) * outputs + begin, &found, count * sizeof(float));
      }
    }
  }

  static Ints load_ints(const int8_t* from) {
    Ints found;
    std::memcpy(&found, from, sizeof(found));
    return found;
  }
};

// y [rows, outputs] for x [rows, K].
template <int K>
void int8_gemm(float* y, const float* x, int64_t rows, const Int8Gemm<K>& weight, const Rounding& how) {
  using Weight = Int8Gemm<K>;
  if (rows == 0) return;
  typename Weight::Input input(rows);
  const int64_t tiles = (weight.outputs + Weight::TILE - 1) / Weight::TILE;
  const int64_t parts = (rows + Weight::MAX_ROWS - 1) / Weight::MAX_ROWS;
  const int64_t part = ((rows + parts - 1) / parts + Weight::MR - 1) / Weight::MR * Weight::MR;
#pragma omp parallel if (rows * weight.outputs * K >= MIN_PARALLEL_MACS)
  {
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) input.round_row(row, x + row * K, how);
#pragma omp for schedule(guided) nowait
    for (int64_t task = 0; task < tiles * parts; ++task) {
      const int64_t begin = task % parts * part, end = std::min(begin + part, rows);
      if (begin < end) weight.multiply(y, input, how.zero_point(), begin, end, task / parts * Weight::TILE);
    }
  }
}

}  // namespace precast
#endif

// GEMV kernels, weights times a few rows of input: y[r, n] = sum over k of x[r, k] * w[n, k].
//
// A decode step reads every weight once, so its speed is that of memory. A thread takes runs of outputs, shorter ones
// towards the end so that none waits for another for long, and reads their weights in one sequential stream: four
// streams are half as fast.
#ifndef PRECAST_GEMV
#define PRECAST_GEMV
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PRECAST_GEMV_VNNI
#endif

namespace precast {

// Rows multiplied per pass over the weights.
constexpr int MAX_ROWS_PER_PASS = 8;

// ------------------------------------------------------------------ float weights

template <typename T, int K>
struct FloatWeight {
  struct Input {
    const float* x;
    explicit Input(const float* from) : x(from) {}
  };

  const T* weight;
  int64_t outputs;

  float output(const Input& input, int64_t n) const {
    return dot<T, K>(input.x, weight + n * K);
  }
};

// ------------------------------------------------------------------ quantized weights

// w = scale * (code - zero), in groups of GROUP along a row. A byte holds two codes of 4 bits, the even one in its low
// half. Without ZEROS the zero point is the middle code (symmetric).
template <int K, int GROUP, int BITS, bool ZEROS>
struct QuantizedWeight {
  static constexpr int GROUPS = K / GROUP, BYTES = K * BITS / 8, ZERO_BYTES = (GROUPS * BITS + 7) / 8;
  static_assert(K % GROUP == 0 && (BITS == 8 || GROUP % 2 == 0));

  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;
  int64_t outputs;

  float zero(int64_t n, int index) const {
    if constexpr (!ZEROS) return 1 << (BITS - 1);
    const uint8_t* bytes = zeros + n * ZERO_BYTES;
    return BITS == 8 ? bytes[index] : bytes[index / 2] >> (index % 2 * 4) & 15;
  }
};

// Dot products in float32.
template <int K, int GROUP, int BITS, bool ZEROS>
struct FloatDot : QuantizedWeight<K, GROUP, BITS, ZEROS> {
  using Base = QuantizedWeight<K, GROUP, BITS, ZEROS>;

  // A row of x in the order in which a group's codes are unpacked, and the sum of each group.
  struct Input {
    float x[K], sums[Base::GROUPS];

    explicit Input(const float* from) {
      for (int g = 0; g < Base::GROUPS; ++g) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; ++i) sum += from[g * GROUP + i];
        sums[g] = sum;
        for (int i = 0; i < GROUP; ++i)
          x[g * GROUP + (BITS == 8 ? i : i % 2 * (GROUP / 2) + i / 2)] = from[g * GROUP + i];
      }
    }
  };

  float output(const Input& input, int64_t n) const {
    float sum = 0;
    for (int g = 0; g < Base::GROUPS; ++g) {
      const float product = group_dot(input.x + g * GROUP, this->codes + n * Base::BYTES + g * GROUP * BITS / 8);
      sum += this->scales[n * Base::GROUPS + g] * (product - this->zero(n, g) * input.sums[g]);
    }
    return sum;
  }

  static float group_dot(const float* x, const uint8_t* codes) {
    if constexpr (BITS == 8) return dot<uint8_t, GROUP>(x, codes);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < GROUP / 2; ++i) sum += x[i] * (codes[i] & 15) + x[GROUP / 2 + i] * (codes[i] >> 4);
    return sum;
  }
};

#ifdef PRECAST_GEMV_VNNI

// Dot products in integers by AVX-512 VNNI, which multiplies 64 codes by 64 digits per instruction: x is rounded to
// integers of 24 bits, the precision of a float, with one scale per block, and split into three digits of 8 bits. A
// block is as many codes as 64 bytes hold.
template <int K, int GROUP, int BITS, bool ZEROS>
struct VnniDot : QuantizedWeight<K, GROUP, BITS, ZEROS> {
  using Base = QuantizedWeight<K, GROUP, BITS, ZEROS>;
  static constexpr int GROUPS = Base::GROUPS, CODES_PER_BYTE = 8 / BITS;
  static constexpr int BLOCK = 64 * CODES_PER_BYTE, BLOCKS = (K + BLOCK - 1) / BLOCK;
  // Neighbours within a block that have one scale.
  static constexpr int CODES_PER_SCALE = GROUPS == 1 ? BLOCK : GROUP % BLOCK == 0 ? BLOCK : GROUP;
  static constexpr int SCALES_PER_BLOCK = BLOCK / CODES_PER_SCALE;
  static constexpr bool FITS = CODES_PER_SCALE * BITS >= 64 && BLOCK % CODES_PER_SCALE == 0;
  static constexpr int DIGITS = 3;
  // A little less than three digits can hold, since the division below may round up.
  static constexpr float MAX_INTEGER = (127 * 256 + 126) * 256;

  struct alignas(64) Input {
    int8_t digits[BLOCKS][DIGITS][BLOCK];  // the highest first
    float scales[BLOCKS], sums[(GROUPS + 15) / 16 * 16 + SCALES_PER_BLOCK];

    explicit Input(const float* x) {
      std::fill(std::begin(sums), std::end(sums), 0.0f);
      for (int b = 0; b < BLOCKS; ++b) {
        float block[BLOCK];
        for (int i = 0; i < BLOCK; ++i) block[i] = b * BLOCK + i < K ? x[b * BLOCK + i] : 0.0f;
        split_digits(block, b);
      }
    }

    void split_digits(const float* block, int b) {
      float largest = 0, nonfinite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : nonfinite)
      for (int i = 0; i < BLOCK; ++i) {
        largest = std::max(largest, std::abs(block[i]));
        nonfinite += block[i] * 0.0f;  // NaN where an input is infinite or NaN: the output has to be NaN, too.
      }
      const float inverse = largest > 1e-30f ? MAX_INTEGER / largest : 0.0f;
      scales[b] = largest / MAX_INTEGER + nonfinite;
      int32_t integers[BLOCK];
      for (int i = 0; i < BLOCK; ++i) integers[i] = static_cast<int32_t>(std::nearbyint(block[i] * inverse));
      for (int part = 0; part < CODES_PER_BYTE; ++part) {
        int8_t* to = digits[b][0] + part * 64;
        for (int i = 0; i < 64; ++i) {
          const int32_t low = integers[i * CODES_PER_BYTE + part], middle = (low + 128) >> 8;
          to[i + 2 * BLOCK] = static_cast<int8_t>(low);
          to[i + BLOCK] = static_cast<int8_t>(middle);
          to[i] = static_cast<int8_t>((middle + 128) >> 8);
        }
      }
      for (int s = 0; s < SCALES_PER_BLOCK; ++s) {
        int32_t sum = 0;
        for (int i = 0; i < CODES_PER_SCALE; ++i) sum += integers[s * CODES_PER_SCALE + i];
        sums[GROUPS == 1 ? 0 : b * BLOCK / GROUP + s] += sum * scales[b];
      }
    }
  };

  float output(const Input& input, int64_t n) const {
    const uint8_t* from = this->codes + n * Base::BYTES;
    const float* scales = this->scales + n * GROUPS;
    __m512 sums = _mm512_setzero_ps();
    for (int b = 0; b < BLOCKS; ++b)
      sums = _mm512_fmadd_ps(block_dot(input, from + b * 64, b), block_scales(scales, input.scales[b], b), sums);
    if constexpr (GROUPS == 1) return scales[0] * (_mm512_reduce_add_ps(sums) - this->zero(n, 0) * input.sums[0]);
    for (int g = 0; g < GROUPS; g += 16) {
      const __m512 chunk = _mm512_maskz_loadu_ps(mask_first(GROUPS - g), scales + g);
      sums = _mm512_fnmadd_ps(_mm512_mul_ps(chunk, load_zeros(n, g)), _mm512_loadu_ps(input.sums + g), sums);
    }
    return _mm512_reduce_add_ps(sums);
  }

  // A mask of the first `count` of sixteen lanes.
  static constexpr __mmask16 mask_first(int count) {
    return count >= 16 ? 0xffff : (1 << count) - 1;
  }

  // Dot products of a block, one per 4 * CODES_PER_BYTE neighbours.
  static __m512 block_dot(const Input& input, const uint8_t* from, int b) {
    constexpr int REST = K % BLOCK * BITS / 8;
    const bool is_whole = REST == 0 || b + 1 < BLOCKS;
    const __m512i bytes = is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << REST) - 1, from);
    const auto times = [&](__m512i sum, int digit) { return dot_digit(sum, bytes, input.digits[b][digit]); };
    const __m512i highest = _mm512_slli_epi32(times(_mm512_setzero_si512(), 0), 8);
    // Sums over 8 codes below 16 have room for all digits.
    if constexpr (BITS == 4) return _mm512_cvtepi32_ps(times(_mm512_slli_epi32(times(highest, 1), 8), 2));
    const __m512 high = _mm512_cvtepi32_ps(times(highest, 1));
    return _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(times(_mm512_setzero_si512(), 2)));
  }

  // Add the dot products of 64 bytes of codes with one digit of x.
  static __m512i dot_digit(__m512i sum, __m512i bytes, const int8_t* digits) {
    if constexpr (BITS == 8) return _mm512_dpbusd_epi32(sum, bytes, _mm512_load_si512(digits));
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i even = _mm512_and_si512(bytes, low), odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(digits));
    return _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(digits + 64));
  }

  // The scale of each of a block's sixteen sums.
  static __m512 block_scales(const float* scales, float input_scale, int b) {
    if constexpr (GROUPS == 1) return _mm512_set1_ps(input_scale);
    if constexpr (SCALES_PER_BLOCK == 1) return _mm512_set1_ps(input_scale * scales[b * BLOCK / GROUP]);
    alignas(64) int32_t lane_scale[16];
    for (int lane = 0; lane < 16; ++lane) lane_scale[lane] = lane * 4 * CODES_PER_BYTE / CODES_PER_SCALE;
    const __mmask16 mask = mask_first(std::min(SCALES_PER_BLOCK, GROUPS - b * SCALES_PER_BLOCK));
    const __m512 found = _mm512_maskz_loadu_ps(mask, scales + b * SCALES_PER_BLOCK);
    return _mm512_mul_ps(_mm512_set1_ps(input_scale), _mm512_permutexvar_ps(_mm512_load_si512(lane_scale), found));
  }

  __m512 load_zeros(int64_t n, int begin) const {
    if constexpr (!ZEROS) return _mm512_set1_ps(1 << (BITS - 1));
    const uint8_t* from = this->zeros + n * Base::ZERO_BYTES + begin * BITS / 8;
    __m128i codes = _mm_maskz_loadu_epi8(mask_first((std::min(16, GROUPS - begin) * BITS + 7) / 8), from);
    if constexpr (BITS == 4) {
      const __m128i low = _mm_set1_epi8(15);
      codes = _mm_unpacklo_epi8(_mm_and_si128(codes, low), _mm_and_si128(_mm_srli_epi16(codes, 4), low));
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  }
};

template <int K, int GROUP, int BITS, bool ZEROS>
using QuantizedDot = std::conditional_t<
    VnniDot<K, GROUP, BITS, ZEROS>::FITS, VnniDot<K, GROUP, BITS, ZEROS>, FloatDot<K, GROUP, BITS, ZEROS>>;
#else
template <int K, int GROUP, int BITS, bool ZEROS>
using QuantizedDot = FloatDot<K, GROUP, BITS, ZEROS>;
#endif

// ------------------------------------------------------------------ several layers, on all threads

template <typename Weight>
struct Layer {
  const float* x;
  Weight weight;
};

// x [count, K] of each layer -> its y [count, outputs], concatenated.
template <int K, typename Weight, int LAYERS>
void gemv(float* y, int64_t count, const Layer<Weight> (&layers)[LAYERS]) {
  using Input = typename Weight::Input;
  int64_t work = 0;
  for (const auto& layer : layers) work += count * K * layer.weight.outputs;
#pragma omp parallel if (work >= MIN_PARALLEL_MACS)
  {
    alignas(Input) char space[sizeof(Input) * MAX_ROWS_PER_PASS];
    auto inputs = reinterpret_cast<Input*>(space);
    float* to = y;
    for (int i = 0; i < LAYERS; ++i) {
      const Weight& weight = layers[i].weight;
      for (int64_t start = 0; start < count; start += MAX_ROWS_PER_PASS) {
        const int64_t pass = std::min<int64_t>(MAX_ROWS_PER_PASS, count - start);
        if (i == 0 || count > MAX_ROWS_PER_PASS || layers[i].x != layers[i - 1].x)
          for (int64_t r = 0; r < pass; ++r) new (inputs + r) Input(layers[i].x + (start + r) * K);
#pragma omp for schedule(guided, 64) nowait
        for (int64_t n = 0; n < weight.outputs; ++n)
          for (int64_t r = 0; r < pass; ++r) to[(start + r) * weight.outputs + n] = weight.output(inputs[r], n);
      }
      to += count * weight.outputs;
    }
  }
}

}  // namespace precast
#endif

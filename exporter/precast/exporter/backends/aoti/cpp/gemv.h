// GEMV kernels, weights times a few rows of input: y[r, n] = sum over k of x[r, k] * w[n, k].
//
// A decode step reads every weight once, so its speed is that of memory. A thread takes runs of outputs, shorter ones
// towards the end so that none waits for another for long, and reads their weights in one sequential stream: four
// streams are half as fast.
#ifndef PRECAST_GEMV
#define PRECAST_GEMV
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PRECAST_GEMV_VNNI
#endif

namespace precast {

// Rows multiplied per pass over the weights, and those that share what is read and unpacked of one.
constexpr int MAX_ROWS_PER_PASS = 8, ROWS_TOGETHER = 4;

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
// integers of 16 bits, with one scale per block, and split into two digits of 8 bits: off by 2^-16 of the block's largest
// number at most, where codes of 8 bits are off by 2^-8. A block is as many codes as 64 bytes hold.
template <int K, int GROUP, int BITS, bool ZEROS>
struct VnniDot : QuantizedWeight<K, GROUP, BITS, ZEROS> {
  using Base = QuantizedWeight<K, GROUP, BITS, ZEROS>;
  static constexpr int GROUPS = Base::GROUPS, CODES_PER_BYTE = 8 / BITS;
  static constexpr int BLOCK = 64 * CODES_PER_BYTE, BLOCKS = (K + BLOCK - 1) / BLOCK;
  // Neighbours within a block that have one scale.
  static constexpr int CODES_PER_SCALE = GROUPS == 1 ? BLOCK : GROUP % BLOCK == 0 ? BLOCK : GROUP;
  static constexpr int SCALES_PER_BLOCK = BLOCK / CODES_PER_SCALE;
  static constexpr bool FITS = CODES_PER_SCALE * BITS >= 64 && BLOCK % CODES_PER_SCALE == 0;
  static constexpr int DIGITS = 2;
  // A little less than two digits can hold, since the division below may round up.
  static constexpr float MAX_INTEGER = 127 * 256 + 126;

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
      for (int i = 0; i < BLOCK; ++i) integers[i] = round_to_int(block[i] * inverse);
      for (int part = 0; part < CODES_PER_BYTE; ++part) {
        int8_t* to = digits[b][0] + part * 64;
        for (int i = 0; i < 64; ++i) {
          const int32_t low = integers[i * CODES_PER_BYTE + part];
          to[i + BLOCK] = static_cast<int8_t>(low);
          to[i] = static_cast<int8_t>((low + 128) >> 8);
        }
      }
      for (int s = 0; s < SCALES_PER_BLOCK; ++s) {
        int32_t sum = 0;
        for (int i = 0; i < CODES_PER_SCALE; ++i) sum += integers[s * CODES_PER_SCALE + i];
        sums[GROUPS == 1 ? 0 : b * BLOCK / GROUP + s] += sum * scales[b];
      }
    }
  };

  // Output n of ROWS inputs, each `stride` numbers after the one before.
  template <int ROWS>
  void outputs_of(const Input* inputs, int64_t n, float* to, int64_t stride) const {
    const uint8_t* from = this->codes + n * Base::BYTES;
    const float* scales = this->scales + n * GROUPS;
    __m512 sums[ROWS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int b = 0; b < BLOCKS; ++b) {
      prefetch(from + b * 64);
      const Codes codes(from + b * 64, b);
      const __m512 block = block_scales(scales, b);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(inputs[r].scales[b]), block);
        sums[r] = _mm512_fmadd_ps(codes.dot(inputs[r].digits[b]), scale, sums[r]);
      }
    }
    for (int g = 0; GROUPS > 1 && g < GROUPS; g += 16) {
      const __m512 chunk = _mm512_maskz_loadu_ps(mask_first(GROUPS - g), scales + g);
      const __m512 offsets = _mm512_mul_ps(chunk, load_zeros(n, g));
      for (int r = 0; r < ROWS; ++r)
        sums[r] = _mm512_fnmadd_ps(offsets, _mm512_loadu_ps(inputs[r].sums + g), sums[r]);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float sum = _mm512_reduce_add_ps(sums[r]);
      to[r * stride] = GROUPS == 1 ? scales[0] * (sum - this->zero(n, 0) * inputs[r].sums[0]) : sum;
    }
  }

  // A mask of the first `count` of sixteen lanes.
  static constexpr __mmask16 mask_first(int count) {
    return count >= 16 ? 0xffff : (1 << count) - 1;
  }

  // The codes of a block, one to a byte.
  struct Codes {
    __m512i parts[CODES_PER_BYTE];

    Codes(const uint8_t* from, int b) {
      constexpr int REST = K % BLOCK * BITS / 8;
      const bool is_whole = REST == 0 || b + 1 < BLOCKS;
      const __m512i bytes = is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << REST) - 1, from);
      const __m512i low = _mm512_set1_epi8(15);
      parts[0] = BITS == 8 ? bytes : _mm512_and_si512(bytes, low);
      if constexpr (BITS == 4) parts[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    }

    // Dot products with the digits of x, one per 4 * CODES_PER_BYTE neighbours.
    __m512 dot(const int8_t (&digits)[DIGITS][BLOCK]) const {
      __m512i sum = _mm512_setzero_si512();
      for (int digit = 0; digit < DIGITS; ++digit) {
        if (digit) sum = _mm512_slli_epi32(sum, 8);
        for (int part = 0; part < CODES_PER_BYTE; ++part)
          sum = _mm512_dpbusd_epi32(sum, parts[part], _mm512_load_si512(digits[digit] + part * 64));
      }
      return _mm512_cvtepi32_ps(sum);
    }
  };

  // The scale of each of a block's sixteen sums, but for that of x.
  static __m512 block_scales(const float* scales, int b) {
    if constexpr (GROUPS == 1) return _mm512_set1_ps(1.0f);
    if constexpr (SCALES_PER_BLOCK == 1) return _mm512_set1_ps(scales[b * BLOCK / GROUP]);
    alignas(64) int32_t lane_scale[16];
    for (int lane = 0; lane < 16; ++lane) lane_scale[lane] = lane * 4 * CODES_PER_BYTE / CODES_PER_SCALE;
    const __mmask16 mask = mask_first(std::min(SCALES_PER_BLOCK, GROUPS - b * SCALES_PER_BLOCK));
    const __m512 found = _mm512_maskz_loadu_ps(mask, scales + b * SCALES_PER_BLOCK);
    return _mm512_permutexvar_ps(_mm512_load_si512(lane_scale), found);
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
using IntegerDot = VnniDot<K, GROUP, BITS, ZEROS>;

#elif defined(__AVX2__)

// Dot products in integers of 16 bits: x is rounded to them, with one scale per block, and codes are widened to them;
// two products at a time go into a sum of 32 bits. Off by 2^-16 of the block's largest number at most, and half as many
// instructions as widening codes to floats.
template <int K, int GROUP, int BITS, bool ZEROS>
struct MaddDot : QuantizedWeight<K, GROUP, BITS, ZEROS> {
  using Base = QuantizedWeight<K, GROUP, BITS, ZEROS>;
  static constexpr int GROUPS = Base::GROUPS, CODES_PER_BYTE = 8 / BITS;
  static constexpr int STEP = 16 * CODES_PER_BYTE;  // codes of 16 bytes
  static constexpr int BLOCK = GROUPS == 1 ? 64 : GROUP % 64 == 0 ? 64 : STEP, BLOCKS = (K + BLOCK - 1) / BLOCK;
  static constexpr bool FITS = GROUPS == 1 || GROUP % BLOCK == 0;
  static constexpr float MAX_INTEGER = 32766;  // since the division below may round up

  struct alignas(32) Input {
    int16_t integers[BLOCKS * BLOCK];  // in the order in which codes are unpacked
    float scales[BLOCKS], sums[(GROUPS + 15) / 16 * 16];

    explicit Input(const float* x) {
      std::fill(std::begin(sums), std::end(sums), 0.0f);
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
        scales[b] = largest / MAX_INTEGER + nonfinite;
        int32_t rounded[BLOCK], sum = 0;
        for (int i = 0; i < BLOCK; ++i) rounded[i] = round_to_int(block[i] * inverse);
        for (int i = 0; i < BLOCK; ++i) sum += rounded[i];
        for (int i = 0; i < BLOCK; ++i) {
          const int within = i % STEP, part = within % CODES_PER_BYTE;
          integers[b * BLOCK + i - within + part * 16 + within / CODES_PER_BYTE] = static_cast<int16_t>(rounded[i]);
        }
        sums[GROUPS == 1 ? 0 : b * BLOCK / GROUP] += sum * scales[b];
      }
    }
  };

  // Output n of ROWS inputs, each `stride` numbers after the one before.
  template <int ROWS>
  void outputs_of(const Input* inputs, int64_t n, float* to, int64_t stride) const {
    constexpr int WHOLE = K / BLOCK;
    const uint8_t* from = this->codes + n * Base::BYTES;
    const float* scales = this->scales + n * GROUPS;
    __m256 sums[ROWS];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int b = 0; b < WHOLE; ++b) add_block(inputs, from + b * BLOCK / CODES_PER_BYTE, scales, b, sums);
    if constexpr (WHOLE < BLOCKS) {
      uint8_t rest[BLOCK / CODES_PER_BYTE] = {};
      std::memcpy(rest, from + WHOLE * BLOCK / CODES_PER_BYTE, Base::BYTES - WHOLE * BLOCK / CODES_PER_BYTE);
      add_block(inputs, rest, scales, WHOLE, sums);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float sum = reduce_eight(sums[r]);
      to[r * stride] = GROUPS == 1 ? scales[0] * (sum - this->zero(n, 0) * inputs[r].sums[0])
                                   : sum - offsets(inputs[r], scales, n);
    }
  }

  static float reduce_eight(__m256 each) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }

  // Add the dot products of a block, times its scales, for each input.
  template <int ROWS>
  static void add_block(const Input* inputs, const uint8_t* from, const float* scales, int b, __m256 (&sums)[ROWS]) {
    prefetch(from);
    __m256i found[ROWS];
    for (auto& each : found) each = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK; i += STEP) {
      const __m256i bytes = _mm256_cvtepu8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i / CODES_PER_BYTE)));
      const auto add = [&](__m256i codes, int part) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const auto x = reinterpret_cast<const __m256i*>(inputs[r].integers + b * BLOCK + i + part * 16);
          found[r] = _mm256_add_epi32(found[r], _mm256_madd_epi16(codes, _mm256_load_si256(x)));
        }
      };
      if constexpr (BITS == 8) {
        add(bytes, 0);
      } else {
        add(_mm256_and_si256(bytes, _mm256_set1_epi16(15)), 0);
        add(_mm256_srli_epi16(bytes, 4), 1);
      }
    }
    const float block = GROUPS == 1 ? 1.0f : scales[b * BLOCK / GROUP];
    for (int r = 0; r < ROWS; ++r)
      sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found[r]), _mm256_set1_ps(inputs[r].scales[b] * block), sums[r]);
  }

  // The sum of all groups' scale * zero * sum of x.
  float offsets(const Input& input, const float* scales, int64_t n) const {
    float zeros[(GROUPS + 1) / 2 * 2];
    if constexpr (!ZEROS) {
      std::fill(std::begin(zeros), std::end(zeros), static_cast<float>(1 << (BITS - 1)));
    } else {
      const uint8_t* from = this->zeros + n * Base::ZERO_BYTES;
      for (int i = 0; i < Base::ZERO_BYTES; ++i) {
        if constexpr (BITS == 8) zeros[i] = from[i];
        else zeros[2 * i] = from[i] & 15, zeros[2 * i + 1] = from[i] >> 4;
      }
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int g = 0; g < GROUPS; ++g) sum += scales[g] * zeros[g] * input.sums[g];
    return sum;
  }
};

template <int K, int GROUP, int BITS, bool ZEROS>
using IntegerDot = MaddDot<K, GROUP, BITS, ZEROS>;
#endif

#if defined(PRECAST_GEMV_VNNI) || defined(__AVX2__)
template <int K, int GROUP, int BITS, bool ZEROS>
using QuantizedDot = std::conditional_t<
    IntegerDot<K, GROUP, BITS, ZEROS>::FITS, IntegerDot<K, GROUP, BITS, ZEROS>, FloatDot<K, GROUP, BITS, ZEROS>>;
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

// Output n of each of `count` inputs.
template <typename Weight>
void multiply_rows(const Weight& weight, const typename Weight::Input* inputs, int64_t count, int64_t n, float* to) {
  int64_t r = 0;
  if constexpr (requires { weight.template outputs_of<ROWS_TOGETHER>(inputs, n, to, 1); }) {
    for (; r + ROWS_TOGETHER <= count; r += ROWS_TOGETHER)
      weight.template outputs_of<ROWS_TOGETHER>(inputs + r, n, to + r * weight.outputs, weight.outputs);
    for (; r < count; ++r) weight.template outputs_of<1>(inputs + r, n, to + r * weight.outputs, weight.outputs);
  } else {
    for (; r < count; ++r) to[r * weight.outputs] = weight.output(inputs[r], n);
  }
}

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
          multiply_rows(weight, inputs, pass, n, to + start * weight.outputs + n);
      }
      to += count * weight.outputs;
    }
  }
}

}  // namespace precast
#endif

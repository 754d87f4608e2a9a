// Products of a few rows with weights: y[r, n] = sum over k of x[r, k] * w[n, k].
//
// A decode step reads every weight once, so what counts is to read them as fast as memory gives them. A thread takes
// runs of outputs, shorter ones towards the end so that none waits for another for long, and reads their weights from
// the first byte to the last, in one stream: four streams are half as fast.
#ifndef PRECAST_ROWS
#define PRECAST_ROWS
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PRECAST_ROWS_DIGITS
#endif

namespace precast {

// So many rows are taken in one reading of the weights.
constexpr int TOGETHER = 8;

// ------------------------------------------------------------------ weights that are numbers

template <typename T, int K>
struct Numbers {
  struct Row {
    const float* x;
    explicit Row(const float* from) : x(from) {}
  };

  const T* weight;
  int64_t outputs;

  float output(const Row& row, int64_t n) const {
    return dot<T, K>(row.x, weight + n * K);
  }
};

// ------------------------------------------------------------------ weights that are codes

// scale * (code - zero), in groups of GROUP along a row. Codes of 4 bits lie two to a byte, the even one in its low
// half. Where no zeros are given, the zero is the middle of the codes.
template <int K, int GROUP, int BITS, bool ZEROS>
struct Grid {
  static constexpr int GROUPS = K / GROUP, BYTES = K * BITS / 8, ZERO_BYTES = (GROUPS * BITS + 7) / 8;
  static_assert(K % GROUP == 0 && (BITS == 8 || GROUP % 2 == 0));

  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;
  int64_t outputs;

  float zero(int64_t n, int group) const {
    if constexpr (!ZEROS) return 1 << (BITS - 1);
    const uint8_t* of = zeros + n * ZERO_BYTES;
    return BITS == 8 ? of[group] : of[group / 2] >> (group % 2 * 4) & 15;
  }
};

template <int K, int GROUP, int BITS, bool ZEROS>
struct InFloat : Grid<K, GROUP, BITS, ZEROS> {
  using Base = Grid<K, GROUP, BITS, ZEROS>;

  // A row in the order in which a group's codes come out of their bytes.
  struct Row {
    float x[K], sums[Base::GROUPS];

    explicit Row(const float* from) {
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

  float output(const Row& row, int64_t n) const {
    float sum = 0;
    for (int g = 0; g < Base::GROUPS; ++g) {
      const float products = group(row.x + g * GROUP, this->codes + n * Base::BYTES + g * GROUP * BITS / 8);
      sum += this->scales[n * Base::GROUPS + g] * (products - this->zero(n, g) * row.sums[g]);
    }
    return sum;
  }

  static float group(const float* x, const uint8_t* codes) {
    if constexpr (BITS == 8) return dot<uint8_t, GROUP>(x, codes);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < GROUP / 2; ++i) sum += x[i] * (codes[i] & 15) + x[GROUP / 2 + i] * (codes[i] >> 4);
    return sum;
  }
};

#ifdef PRECAST_ROWS_DIGITS

// The same in whole numbers, for an instruction that multiplies 64 codes by 64 digits: a row as numbers of 24 bits, as
// many as a float has, with a scale for each block, in three digits of 8 bits. A block is what 64 bytes hold of codes.
template <int K, int GROUP, int BITS, bool ZEROS>
struct InDigits : Grid<K, GROUP, BITS, ZEROS> {
  using Base = Grid<K, GROUP, BITS, ZEROS>;
  static constexpr int GROUPS = Base::GROUPS, PARTS = 8 / BITS, BLOCK = 64 * PARTS, BLOCKS = (K + BLOCK - 1) / BLOCK;
  // Of a block's codes, so many share a scale.
  static constexpr int SHARE = GROUPS == 1 ? BLOCK : GROUP % BLOCK == 0 ? BLOCK : GROUP, SHARES = BLOCK / SHARE;
  static constexpr bool FITS = SHARE * BITS >= 64 && BLOCK % SHARE == 0;
  static constexpr int DIGITS = 3;
  // A little less than three digits can hold, for what the division below rounds up.
  static constexpr float LARGEST = (127 * 256 + 126) * 256;

  struct alignas(64) Row {
    int8_t digits[BLOCKS][DIGITS][BLOCK];  // the highest first
    float scales[BLOCKS], sums[(GROUPS + 15) / 16 * 16 + SHARES];

    explicit Row(const float* x) {
      std::fill(std::begin(sums), std::end(sums), 0.0f);
      for (int b = 0; b < BLOCKS; ++b) {
        float block[BLOCK];
        for (int i = 0; i < BLOCK; ++i) block[i] = b * BLOCK + i < K ? x[b * BLOCK + i] : 0.0f;
        take(block, b);
      }
    }

    void take(const float* block, int b) {
      float most = 0, odd = 0;
#pragma omp simd reduction(max : most) reduction(+ : odd)
      for (int i = 0; i < BLOCK; ++i) {
        most = std::max(most, std::abs(block[i]));
        odd += block[i] * 0.0f;  // Not zero where one is infinite or no number: nor may a sum be one then.
      }
      const float inverse = most > 1e-30f ? LARGEST / most : 0.0f;
      scales[b] = most / LARGEST + odd;
      int32_t whole[BLOCK];
      for (int i = 0; i < BLOCK; ++i) whole[i] = static_cast<int32_t>(std::nearbyint(block[i] * inverse));
      for (int part = 0; part < PARTS; ++part) {
        int8_t* to = digits[b][0] + part * 64;
        for (int i = 0; i < 64; ++i) {
          const int32_t low = whole[i * PARTS + part], middle = (low + 128) >> 8;
          to[i + 2 * BLOCK] = static_cast<int8_t>(low);
          to[i + BLOCK] = static_cast<int8_t>(middle);
          to[i] = static_cast<int8_t>((middle + 128) >> 8);
        }
      }
      for (int s = 0; s < SHARES; ++s) {
        int32_t sum = 0;
        for (int i = 0; i < SHARE; ++i) sum += whole[s * SHARE + i];
        sums[GROUPS == 1 ? 0 : b * BLOCK / GROUP + s] += sum * scales[b];
      }
    }
  };

  float output(const Row& row, int64_t n) const {
    const uint8_t* from = this->codes + n * Base::BYTES;
    const float* scales = this->scales + n * GROUPS;
    __m512 sums = _mm512_setzero_ps();
    for (int b = 0; b < BLOCKS; ++b)
      sums = _mm512_fmadd_ps(products(row, from + b * 64, b), block_scales(scales, row.scales[b], b), sums);
    if constexpr (GROUPS == 1) return scales[0] * (_mm512_reduce_add_ps(sums) - this->zero(n, 0) * row.sums[0]);
    for (int g = 0; g < GROUPS; g += 16) {
      const __m512 some = _mm512_maskz_loadu_ps(first(GROUPS - g), scales + g);
      sums = _mm512_fnmadd_ps(_mm512_mul_ps(some, sixteen_zeros(n, g)), _mm512_loadu_ps(row.sums + g), sums);
    }
    return _mm512_reduce_add_ps(sums);
  }

  // A mask of the first so many of sixteen.
  static constexpr __mmask16 first(int count) {
    return count >= 16 ? 0xffff : (1 << count) - 1;
  }

  // A block's codes times its numbers, in sums of 4 * PARTS neighbours.
  static __m512 products(const Row& row, const uint8_t* from, int b) {
    constexpr int REST = K % BLOCK * BITS / 8;
    const bool is_whole = REST == 0 || b + 1 < BLOCKS;
    const __m512i bytes = is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ull << REST) - 1, from);
    const auto times = [&](__m512i sum, int digit) { return part_products(sum, bytes, row.digits[b][digit]); };
    const __m512i highest = _mm512_slli_epi32(times(_mm512_setzero_si512(), 0), 8);
    // Sums of 8 codes below 16 have room for all digits.
    if constexpr (BITS == 4) return _mm512_cvtepi32_ps(times(_mm512_slli_epi32(times(highest, 1), 8), 2));
    const __m512 high = _mm512_cvtepi32_ps(times(highest, 1));
    return _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(times(_mm512_setzero_si512(), 2)));
  }

  static __m512i part_products(__m512i sum, __m512i bytes, const int8_t* digits) {
    if constexpr (BITS == 8) return _mm512_dpbusd_epi32(sum, bytes, _mm512_load_si512(digits));
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i even = _mm512_and_si512(bytes, low), odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(digits));
    return _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(digits + 64));
  }

  // What the sums of a block's products are to be multiplied with.
  static __m512 block_scales(const float* scales, float row, int b) {
    if constexpr (GROUPS == 1) return _mm512_set1_ps(row);
    if constexpr (SHARES == 1) return _mm512_set1_ps(row * scales[b * BLOCK / GROUP]);
    alignas(64) int32_t of[16];
    for (int lane = 0; lane < 16; ++lane) of[lane] = lane * 4 * PARTS / SHARE;
    const __m512 some = _mm512_maskz_loadu_ps(first(std::min(SHARES, GROUPS - b * SHARES)), scales + b * SHARES);
    return _mm512_mul_ps(_mm512_set1_ps(row), _mm512_permutexvar_ps(_mm512_load_si512(of), some));
  }

  __m512 sixteen_zeros(int64_t n, int group) const {
    if constexpr (!ZEROS) return _mm512_set1_ps(1 << (BITS - 1));
    const uint8_t* from = this->zeros + n * Base::ZERO_BYTES + group * BITS / 8;
    __m128i codes = _mm_maskz_loadu_epi8(first((std::min(16, GROUPS - group) * BITS + 7) / 8), from);
    if constexpr (BITS == 4) {
      const __m128i low = _mm_set1_epi8(15);
      codes = _mm_unpacklo_epi8(_mm_and_si128(codes, low), _mm_and_si128(_mm_srli_epi16(codes, 4), low));
    }
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  }
};

template <int K, int GROUP, int BITS, bool ZEROS>
using Codes = std::conditional_t<
    InDigits<K, GROUP, BITS, ZEROS>::FITS, InDigits<K, GROUP, BITS, ZEROS>, InFloat<K, GROUP, BITS, ZEROS>>;
#else
template <int K, int GROUP, int BITS, bool ZEROS>
using Codes = InFloat<K, GROUP, BITS, ZEROS>;
#endif

// ------------------------------------------------------------------ all rows, all layers, all threads

template <typename Weight>
struct Layer {
  const float* x;
  Weight weight;
};

// x [count, K] of each layer -> its y [count, outputs], one behind the other.
template <int K, typename Weight, int LAYERS>
void products(float* y, int64_t count, const Layer<Weight> (&layers)[LAYERS]) {
  using Row = typename Weight::Row;
  int64_t work = 0;
  for (const auto& layer : layers) work += count * K * layer.weight.outputs;
#pragma omp parallel if (work >= WORTH)
  {
    alignas(Row) char space[sizeof(Row) * TOGETHER];
    auto rows = reinterpret_cast<Row*>(space);
    float* to = y;
    for (int i = 0; i < LAYERS; ++i) {
      const Weight& weight = layers[i].weight;
      for (int64_t start = 0; start < count; start += TOGETHER) {
        const int64_t some = std::min<int64_t>(TOGETHER, count - start);
        if (i == 0 || count > TOGETHER || layers[i].x != layers[i - 1].x)
          for (int64_t r = 0; r < some; ++r) new (rows + r) Row(layers[i].x + (start + r) * K);
#pragma omp for schedule(guided, 64) nowait
        for (int64_t n = 0; n < weight.outputs; ++n)
          for (int64_t r = 0; r < some; ++r) to[(start + r) * weight.outputs + n] = weight.output(rows[r], n);
      }
      to += count * weight.outputs;
    }
  }
}

}  // namespace precast
#endif

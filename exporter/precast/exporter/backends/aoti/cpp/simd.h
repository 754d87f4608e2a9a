// SIMD helpers of the kernels: loads with conversion to float32, reductions, dot products. Sizes are compile-time
// constants.
#ifndef PRECAST_SIMD
#define PRECAST_SIMD
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>

namespace precast {

// Inductor turns the compiler's loop vectorizer off, since its own loops are vectorized already. Ours are not.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")
#endif

// Below this many multiply-adds, waking threads costs more than it saves.
constexpr int64_t MIN_PARALLEL_MACS = 1 << 15;

using Vec = at::vec::Vectorized<float>;
constexpr int LANES = Vec::size();
typedef int32_t Ints __attribute__((vector_size(4 * LANES), may_alias));
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Ask for the memory AHEAD bytes behind what is read now, in one stream: a processor by itself looks ahead no further than
// to the end of a page. Beyond the end of an array it does nothing.
constexpr int AHEAD = 4096, LINE = 64;
inline void prefetch(const void* from) {
  __builtin_prefetch(static_cast<const char*>(from) + AHEAD);
}

// The nearest integer; 0 for NaN, for which there is none.
inline int32_t round_to_int(float value) {
  const float rounded = std::nearbyint(value);
  return rounded == rounded ? static_cast<int32_t>(rounded) : 0;
}

// Load LANES numbers as float32.
template <typename T>
Vec load_vec(const T* from) {
  if constexpr (std::is_same_v<T, float>) return Vec::loadu(from);
  else return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, LANES));
}

#ifdef CPU_CAPABILITY_AVX2
// loadu() of fewer numbers than a whole vector clears a buffer, copies them there and loads all of it, which waits for
// these stores: ten times as long as a load of LANES numbers alone.
inline Vec load_vec(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline Vec load_vec(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline Vec load_vec(const at::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline Vec load_vec(const at::BFloat16* from) {
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
}
#endif

// COUNT numbers to float32.
template <typename T, int COUNT>
void to_floats(float* to, const T* from) {
  constexpr int WHOLE = COUNT - COUNT % LANES;
  for (int at = 0; at < WHOLE; at += LANES) load_vec(from + at).store(to + at);
  for (int at = WHOLE; at < COUNT; ++at) to[at] = static_cast<float>(from[at]);
}

// COUNT numbers from float32.
template <int COUNT>
void from_floats(float* to, const float* from) {
  std::copy(from, from + COUNT, to);
}

template <int COUNT>
void from_floats(at::BFloat16* to, const float* from) {
  constexpr int AT_ONCE = 2 * LANES, WHOLE = COUNT - COUNT % AT_ONCE;
  for (int at = 0; at < WHOLE; at += AT_ONCE) {
    const Vec low = Vec::loadu(from + at), high = Vec::loadu(from + at + LANES);
#ifdef __AVX512BF16__
    _mm512_storeu_si512(to + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
#else
    at::vec::convert_from_float<at::BFloat16>(low, high).store(to + at);
#endif
  }
  for (int at = WHOLE; at < COUNT; ++at) to[at] = from[at];
}

#ifdef CPU_CAPABILITY_AVX512
inline float reduce_sum(Vec each) { return _mm512_reduce_add_ps(each); }
inline float reduce_max(Vec each) { return _mm512_reduce_max_ps(each); }
#else
inline float reduce_sum(Vec each) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, each);
}
inline float reduce_max(Vec each) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, each);
}
#endif

// Dot product of x and w, in several independent chains of additions, so that none waits for another.
template <typename T, int COUNT>
float dot(const float* x, const T* w) {
  constexpr int CHAINS = 4, WHOLE = COUNT - COUNT % LANES;
  Vec chains[CHAINS] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int at = 0;
  for (; at + CHAINS * LANES <= WHOLE; at += CHAINS * LANES)
    for (int i = 0; i < CHAINS; ++i) {
      if (i * LANES * sizeof(T) % LINE == 0) prefetch(w + at + i * LANES);
      chains[i] = at::vec::fmadd(Vec::loadu(x + at + i * LANES), load_vec(w + at + i * LANES), chains[i]);
    }
  for (; at < WHOLE; at += LANES) chains[0] = at::vec::fmadd(Vec::loadu(x + at), load_vec(w + at), chains[0]);
  float sum = reduce_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
  for (; at < COUNT; ++at) sum += x[at] * static_cast<float>(w[at]);
  return sum;
}

// sum += weights[0] * rows[0] + weights[1] * rows[1] + …, for ROWS consecutive rows.
template <typename T, int COUNT, int ROWS>
void add_weighted_rows(float* sum, const float* weights, const T* rows) {
  constexpr int WHOLE = COUNT - COUNT % LANES;
  for (int at = 0; at < WHOLE; at += LANES) {
    Vec here = Vec::loadu(sum + at);
    for (int r = 0; r < ROWS; ++r) here = at::vec::fmadd(Vec(weights[r]), load_vec(rows + r * COUNT + at), here);
    here.store(sum + at);
  }
  for (int at = WHOLE; at < COUNT; ++at)
    for (int r = 0; r < ROWS; ++r) sum[at] += weights[r] * static_cast<float>(rows[r * COUNT + at]);
}

}  // namespace precast
#endif

// Calls the pieces of libraries that stand alone as compiled code does, for tests/exporter/test_standalone.py.
#include <omp.h>

#include <cstdint>
#include <cstring>
#include <vector>

typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));

#define FUNCTIONS(DO) \
  DO(exp, _u10) DO(tanh, _u10) DO(erf, _u10) DO(log, _u10) DO(sin, _u35) DO(cos, _u35) DO(log1p, _u10) DO(expm1, _u10)
#define DECLARE(name, digits)                          \
  extern "C" Eight Sleef_##name##f8##digits(Eight);    \
  extern "C" Sixteen Sleef_##name##f16##digits(Sixteen);
FUNCTIONS(DECLARE)

// y = name(x) for `count` numbers, a multiple of the lanes.
template <typename Vector>
void apply(Vector (*function)(Vector), const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += sizeof(Vector) / sizeof(float)) {
    Vector each;
    std::memcpy(&each, x + i, sizeof(each));
    each = function(each);
    std::memcpy(y + i, &each, sizeof(each));
  }
}

#if defined(__AVX512F__)
#define CALL_SIXTEEN(name, digits) apply(Sleef_##name##f16##digits, x, y, count)
#else
#define CALL_SIXTEEN(name, digits) return false
#endif

extern "C" bool call_function(const char* wanted, int lanes, const float* x, float* y, int64_t count) {
#define CALL(name, digits)                                     \
  if (std::strcmp(wanted, #name) == 0) {                       \
    if (lanes == 8) apply(Sleef_##name##f8##digits, x, y, count); \
    else CALL_SIXTEEN(name, digits);                           \
    return true;                                               \
  }
  FUNCTIONS(CALL)
  return false;
}

// How often each of `count` iterations ran, in loops of every schedule, after one another in one region.
extern "C" void run_loops(int64_t count, int threads, int32_t* ran) {
  omp_set_num_threads(threads);
#pragma omp parallel
  {
    for (int turn = 0; turn < 30; ++turn) {
#pragma omp for schedule(dynamic, 3) nowait
      for (int64_t i = 0; i < count; ++i) __atomic_fetch_add(ran + i, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(guided, 2) nowait
      for (int64_t i = count - 1; i >= 0; i -= 2) __atomic_fetch_add(ran + i, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(guided)
      for (int64_t i = count - 2; i >= 0; i -= 2) __atomic_fetch_add(ran + i, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) __atomic_fetch_add(ran + i, 1, __ATOMIC_RELAXED);
    }
  }
}

// What each thread saw behind a barrier: the sum of what all had written before it; and how often `single` ran.
extern "C" int64_t run_barriers(int rounds, int threads) {
  omp_set_num_threads(threads);
  std::vector<int64_t> written(threads, 0);
  int64_t wrong = 0;
  int32_t singles = 0;
#pragma omp parallel
  {
    const int own = omp_get_thread_num(), count = omp_get_num_threads();
    for (int64_t round = 1; round <= rounds; ++round) {
      written[own] = round;
#pragma omp barrier
      int64_t sum = 0;
      for (int t = 0; t < count; ++t) sum += written[t];
      if (sum != round * count) __atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED);
#pragma omp barrier
    }
#pragma omp single nowait
    __atomic_fetch_add(&singles, 1, __ATOMIC_RELAXED);
  }
  return singles == 1 ? wrong : -1;
}

// Regions within regions, and many short ones: how often each part ran.
extern "C" int64_t run_regions(int count, int threads) {
  omp_set_num_threads(threads);
  int64_t ran = 0;
  for (int i = 0; i < count; ++i) {
#pragma omp parallel
    {
      __atomic_fetch_add(&ran, omp_get_thread_num() + 1, __ATOMIC_RELAXED);
#pragma omp parallel
      if (omp_get_num_threads() != 1) __atomic_fetch_add(&ran, 1 << 30, __ATOMIC_RELAXED);
    }
  }
  return ran;
}

// Collectives between processes of one machine, which run the same library over their own parts of the weights: all
// read what each has written into memory that they share. The runtime makes that memory, lays it out by these rules
// (precast/runtime/distributed/shared_memory.py), and tells each process its number.
//
//   int32 ranks, int32 stopped, int64 bytes of a chunk        the first 64 bytes; `stopped` is set by whoever gives up
//   int64 turn of each rank                                   64 bytes each
//   float chunk[2][ranks]                                     from byte 4096; the collectives take turns in the two
//
// A rank that has written its chunk of turn t may write that of t + 1, which lies elsewhere, and waits before t + 2
// until all others have written t + 1, having read t.
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "standalone.h"

namespace {

constexpr int64_t LINE = 64, FIRST_CHUNK = 4096;
// So many looks before the core is given up: longer than ranks differ in a step as a rule.
constexpr int64_t SPINS = 20000;
constexpr int64_t LOOKS_PER_CLOCK = 1024;

struct Header {
  int32_t ranks;
  std::atomic<int32_t> stopped;
  int64_t chunk_bytes;
};

char* memory = nullptr;
int32_t own_rank = 0;
double patience = 0;

Header& header() { return *reinterpret_cast<Header*>(memory); }

std::atomic<int64_t>& turn_of(int32_t rank) {
  return *reinterpret_cast<std::atomic<int64_t>*>(memory + LINE * (1 + rank));
}

float* chunk_of(int64_t turn, int32_t rank) {
  const int64_t index = (turn & 1) * header().ranks + rank;
  return reinterpret_cast<float*>(memory + FIRST_CHUNK + index * header().chunk_bytes);
}

double now() {
  timespec found;
  clock_gettime(CLOCK_MONOTONIC, &found);
  return static_cast<double>(found.tv_sec) + 1e-9 * static_cast<double>(found.tv_nsec);
}

[[noreturn]] void give_up(const std::string& why) {
  precast::fail("a collective", why.c_str());
  throw std::runtime_error(why);
}

void rest(int64_t looks) {
  if (looks > SPINS) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_for(int32_t rank, int64_t turn) {
  double began = 0;
  for (int64_t looks = 0; turn_of(rank).load(std::memory_order_acquire) < turn; ++looks) {
    rest(looks);
    if (looks % LOOKS_PER_CLOCK != LOOKS_PER_CLOCK - 1) continue;
    if (header().stopped.load(std::memory_order_acquire) != 0) give_up("another rank has ended");
    if (began == 0) began = now();
    if (now() - began > patience) {
      give_up("rank " + std::to_string(rank) + " did not come within " + std::to_string(static_cast<int>(patience)) +
              " seconds");
    }
  }
}

// Shows `count` numbers to all ranks, and calls `read` once all have shown theirs.
template <typename Read>
void exchange(const float* x, int64_t count, int32_t ranks, Read read) {
  if (memory == nullptr || header().ranks != ranks) {
    give_up("this code is for " + std::to_string(ranks) + " ranks, and was given other ones");
  }
  const int64_t most = header().chunk_bytes / static_cast<int64_t>(sizeof(float));
  for (int64_t begin = 0; begin < count; begin += most) {
    const int64_t size = std::min(most, count - begin);
    const int64_t turn = turn_of(own_rank).load(std::memory_order_relaxed) + 1;
    std::memcpy(chunk_of(turn, own_rank), x + begin, size * sizeof(float));
    turn_of(own_rank).store(turn, std::memory_order_release);
    for (int32_t rank = 0; rank < ranks; ++rank) wait_for(rank, turn);
    read(turn, begin, size);
  }
}

}  // namespace

// Which rank this process is, in which memory, and how many seconds it waits for others.
extern "C" __attribute__((visibility("default"))) void precast_join_ranks(char* shared, int32_t rank, double seconds) {
  memory = shared;
  own_rank = rank;
  patience = seconds;
}

// The sum over the parts of `count` numbers, in the order of the ranks, so that all have the same bits.
extern "C" void ranks_all_reduce(const float* x, float* y, int64_t count, int32_t ranks, int32_t copies) {
  exchange(x, count, ranks, [&](int64_t turn, int64_t begin, int64_t size) {
    std::memcpy(y + begin, chunk_of(turn, 0), size * sizeof(float));
    for (int32_t rank = copies; rank < ranks; rank += copies) {
      const float* const other = chunk_of(turn, rank);
      for (int64_t i = 0; i < size; ++i) y[begin + i] += other[i];
    }
  });
}

// The parts of each row of `width` numbers side by side.
extern "C" void ranks_all_gather(
    const float* x, float* y, int64_t rows, int64_t width, int32_t ranks, int32_t copies) {
  const int64_t whole = width * (ranks / copies);
  exchange(x, rows * width, ranks, [&](int64_t turn, int64_t begin, int64_t size) {
    for (int32_t rank = 0; rank < ranks; rank += copies) {
      const float* other = chunk_of(turn, rank);
      for (int64_t i = begin; i < begin + size;) {
        const int64_t row = i / width, column = i % width, run = std::min(width - column, begin + size - i);
        std::memcpy(y + row * whole + rank / copies * width + column, other, run * sizeof(float));
        other += run;
        i += run;
      }
    }
  });
}

extern "C" int64_t ranks_own_number() { return own_rank; }

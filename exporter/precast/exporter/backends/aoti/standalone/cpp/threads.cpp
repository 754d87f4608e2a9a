// The threads of a library that stands alone: what GCC's OpenMP code calls (libgomp's ABI), on a team of our own.
//
// Two things differ from libgomp. A thread that waits spins for a moment only, then sleeps. And nobody waits for a
// thread that has not begun: whoever is done first takes the part of one whom a busy machine keeps from running, so
// that neighbours do not slow a step tenfold. (At a barrier within a region, a thread does have to come.)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "standalone.h"

#define ABI extern "C"

namespace {

// So many looks, of 10 to 50 ns each, before a thread sleeps: more than there is between two regions of a step.
constexpr int SPINS = 4000;
// Loops with a schedule, or single blocks, of one region; any further ones are divided evenly.
constexpr int MAX_LOOPS = 64;
constexpr int MAX_THREADS = 256;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A number that threads wait for: by spinning, then asleep.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void raise() {
    value_.fetch_add(1);
    if (sleepers_.load() != 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void wait_while(uint32_t old) {
    for (int spin = 0; spin < SPINS; ++spin) {
      if (value() != old) return;
      relax();
    }
    sleepers_.fetch_add(1);
    while (value_.load() == old) futex(FUTEX_WAIT_PRIVATE, old);
    sleepers_.fetch_sub(1);
  }

 private:
  std::atomic<uint32_t> value_{0}, sleepers_{0};

  void futex(int operation, uint32_t argument) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), operation, argument, nullptr, nullptr, 0);
  }
};

// A loop whose iterations are handed out while it runs; or a block for one thread.
struct Loop {
  enum { FRESH, BEGUN, READY };

  std::atomic<int32_t> state;
  std::atomic<int64_t> next;
  int64_t end, step, chunk;
  bool guided;

  // Whether the caller is the first to come; others wait until it has called open().
  bool arrive() {
    int32_t fresh = FRESH;
    if (state.compare_exchange_strong(fresh, BEGUN)) return true;
    while (state.load(std::memory_order_acquire) != READY) relax();
    return false;
  }

  void open() { state.store(READY, std::memory_order_release); }

  // The next iterations, fewer towards the end where `guided`.
  bool take(int threads, long* begin, long* until) {
    for (int64_t at = next.load(std::memory_order_relaxed);;) {
      const int64_t left = (end - at + step - (step > 0 ? 1 : -1)) / step;
      if (left <= 0) return false;
      const int64_t share = guided ? std::max(chunk, (left + 2 * threads - 1) / (2 * threads)) : chunk;
      const int64_t to = at + std::min(share, left) * step;
      if (!next.compare_exchange_weak(at, to, std::memory_order_relaxed)) continue;
      *begin = at, *until = step > 0 ? std::min(to, end) : std::max(to, end);
      return true;
    }
  }
};

// `run(data)` is to be called once as each of `threads` threads.
struct Region {
  void (*run)(void*) = nullptr;
  void* data = nullptr;
  int threads = 1;
  std::atomic<int32_t> at_barrier{0};
  Signal barrier;
  Loop loops[MAX_LOOPS]{};
};

// As which thread of which region the caller runs, how many loops and blocks it has come to, and which loop it is in.
struct Place {
  Region* region = nullptr;
  int thread = 0, constructs = 0;
  Loop* loop = nullptr;
};

thread_local Place place;
thread_local int wanted_threads = 0;

class Team {
 public:
  // Runs a region on so many threads; on the caller alone where the team is at work for another.
  void run(void (*work)(void*), void* data, int threads) {
    threads = std::min(threads, MAX_THREADS);
    std::unique_lock<std::mutex> turn(mutex_, std::defer_lock);
    if (threads <= 1 || place.region != nullptr || !turn.try_lock()) return run_alone(work, data);
    threads = std::min(threads, 1 + start_helpers(threads - 1));
    if (threads == 1) return run_alone(work, data);
    region_.run = work, region_.data = data, region_.threads = threads;
    const uint32_t finished_before = finished_.value();
    region_.at_barrier.store(0, std::memory_order_relaxed);
    for (Loop& loop : region_.loops) loop.state.store(Loop::FRESH, std::memory_order_relaxed);
    offered_.store(static_cast<uint64_t>(threads) << 32 | 1, std::memory_order_release);
    work_.raise();
    execute(0);
    execute_offered();
    for (uint32_t now; (now = finished_.value()) != finished_before + threads;) finished_.wait_while(now);
  }

  // In the child of a fork there are no other threads.
  void forget() { new (this) Team; }

 private:
  std::mutex mutex_;
  Region region_;
  Signal work_, finished_;  // regions that were offered, parts that were finished
  std::atomic<uint64_t> offered_{0};  // the region's threads, and how many of their parts have been taken
  int helpers_ = 0;

  static void run_alone(void (*work)(void*), void* data) {
    Region alone;
    const Place before = place;
    place = Place{&alone};
    work(data);
    place = before;
  }

  void execute(int thread) {
    const Place before = place;
    place = Place{&region_, thread};
    region_.run(region_.data);
    place = before;
    finished_.raise();
  }

  // Whoever takes a part holds the region: it lasts until all parts are finished.
  void execute_offered() {
    for (uint64_t offered = offered_.load(std::memory_order_acquire);;) {
      const int taken = static_cast<int>(offered), threads = static_cast<int>(offered >> 32);
      if (taken >= threads) return;
      if (!offered_.compare_exchange_weak(offered, offered + 1, std::memory_order_acq_rel)) continue;
      execute(taken);
      offered = offered_.load(std::memory_order_acquire);
    }
  }

  // Helpers, so many or as many as the system allows.
  int start_helpers(int count) {
    if (helpers_ >= count) return helpers_;
    // Signals are for the threads of the program: helpers inherit that they are blocked.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    try {
      for (; helpers_ < count; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return helpers_;
  }

  void help() {
    for (;;) {
      const uint32_t seen = work_.value();
      execute_offered();
      work_.wait_while(seen);
    }
  }
};

// Never destroyed: its threads run until the process ends.
Team* const team = new Team;

void forget_in_child() {
  team->forget();
  precast::forget_blocks();
}

const int registered = pthread_atfork(nullptr, nullptr, forget_in_child);

int max_threads() {
  if (place.region != nullptr) return std::max(1, place.region->threads);
  if (wanted_threads > 0) return wanted_threads;
  cpu_set_t cores;
  CPU_ZERO(&cores);
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? std::max(1, CPU_COUNT(&cores)) : 1;
}

bool start_loop(bool guided, long begin, long end, long step, long chunk, long* from, long* until) {
  if (place.region == nullptr) {
    place.loop = nullptr;
    *from = begin, *until = end;
    return step > 0 ? begin < end : begin > end;
  }
  Region& region = *place.region;
  if (place.constructs >= MAX_LOOPS) {
    const int64_t count = (end - begin + step - (step > 0 ? 1 : -1)) / step;
    const int64_t first = count * place.thread / region.threads, last = count * (place.thread + 1) / region.threads;
    place.loop = nullptr;
    *from = begin + first * step, *until = last == count ? end : begin + last * step;
    return first < last;
  }
  Loop& loop = region.loops[place.constructs++];
  if (loop.arrive()) {
    loop.next.store(begin, std::memory_order_relaxed);
    loop.end = end, loop.step = step, loop.chunk = std::max(1L, chunk), loop.guided = guided;
    loop.open();
  }
  place.loop = &loop;
  return loop.take(region.threads, from, until);
}

}  // namespace

namespace precast {

void set_threads(int count) { wanted_threads = count; }

}  // namespace precast

// ------------------------------------------------------------------ OpenMP's functions

ABI int omp_get_thread_num() { return place.region ? place.thread : 0; }
ABI int omp_get_num_threads() { return place.region ? place.region->threads : 1; }
ABI int omp_get_max_threads() { return max_threads(); }
ABI void omp_set_num_threads(int count) { wanted_threads = count; }
ABI int omp_in_parallel() { return place.region && place.region->threads > 1; }
ABI int omp_get_level() { return place.region != nullptr; }

// ------------------------------------------------------------------ what GCC makes of pragmas (libgomp/libgomp_g.h)

ABI void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  team->run(run, data, threads ? static_cast<int>(threads) : max_threads());
}

ABI void GOMP_barrier() {
  Region* region = place.region;
  if (region == nullptr || region->threads == 1) return;
  const uint32_t round = region->barrier.value();
  if (region->at_barrier.fetch_add(1, std::memory_order_acq_rel) + 1 == region->threads) {
    region->at_barrier.store(0, std::memory_order_relaxed);
    region->barrier.raise();
  } else {
    region->barrier.wait_while(round);
  }
}

ABI bool GOMP_single_start() {
  if (place.region == nullptr || place.region->threads == 1) return true;
  if (place.constructs >= MAX_LOOPS) return place.thread == 0;
  Loop& block = place.region->loops[place.constructs++];
  const bool is_first = block.arrive();
  if (is_first) block.open();
  return is_first;
}

ABI void GOMP_loop_end_nowait() {}
ABI void GOMP_loop_end() { GOMP_barrier(); }

#define LOOP(name, guided)                                                                               \
  ABI bool GOMP_loop_##name##_start(long begin, long end, long step, long chunk, long* from, long* until) { \
    return start_loop(guided, begin, end, step, chunk, from, until);                                     \
  }                                                                                                      \
  ABI bool GOMP_loop_##name##_next(long* from, long* until) {                                            \
    return place.loop != nullptr && place.loop->take(place.region->threads, from, until);                \
  }

LOOP(dynamic, false)
LOOP(nonmonotonic_dynamic, false)
LOOP(guided, true)
LOOP(nonmonotonic_guided, true)

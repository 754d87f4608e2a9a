// Attention of prompts, of any length after any past, to the rows of the caches.
//
// Blocks of keys that no token of a block of queries sees are left out: for a prompt without a past that is half of
// them. No matrix of scores is larger than a block (Dao et al. 2022, FlashAttention).
#ifndef PRECAST_PROMPT
#define PRECAST_PROMPT

namespace precast {

// Registers hold a tile of so many rows and vectors.
constexpr int TILE = 6, VECTORS = LANES == 16 ? 4 : 2;

constexpr int64_t up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// How numbers are multiplied: DEEP neighbours of a row of `a` with as many rows of `b`, whose numbers lie in turn.
struct InFloat32 {
  using Number = float;
  static constexpr int DEEP = 1;

  static Vec load(const Number* b) { return Vec::loadu(b); }
  static Vec repeated(const Number* a) { return Vec(*a); }
  static Vec added(Vec sum, Vec a, Vec b) { return at::vec::fmadd(a, b, sum); }
};

#ifdef __AVX512BF16__
struct InBfloat16 {
  using Number = at::BFloat16;
  static constexpr int DEEP = 2;

  static __m512bh load(const Number* b) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)); }
  static __m512bh repeated(const Number* a) {
    int32_t both;
    std::memcpy(&both, a, sizeof(both));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
  }
  static Vec added(Vec sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
using InBfloat16 = InFloat32;  // Exact, and as fast as it gets here.
#endif

// c [TILE, V vectors] (+)= a [TILE, depth] b [depth, V vectors], where rows lie so far apart.
template <typename In, bool MORE, int V>
inline void tile(
    const typename In::Number* a, int64_t a_apart, const typename In::Number* b, int64_t b_apart, float* c,
    int64_t c_apart, int depth) {
  Vec sums[TILE][V];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = MORE ? Vec::loadu(c + r * c_apart + v * LANES) : Vec(0.0f);
  for (int k = 0; k < depth; k += In::DEEP) {
    decltype(In::load(b)) row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = In::load(b + k * b_apart + v * LANES * In::DEEP);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const auto x = In::repeated(a + r * a_apart + k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = In::added(sums[r][v], x, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v].store(c + r * c_apart + v * LANES);
}

// c [rows, WIDTH] (+)= a [rows, depth] b [depth, WIDTH]; rows a multiple of TILE, WIDTH of LANES.
template <typename In, bool MORE, int WIDTH>
void multiply(
    const typename In::Number* a, int64_t a_apart, const typename In::Number* b, float* c, int64_t rows, int depth) {
  constexpr int WIDE = VECTORS * LANES, WHOLE = WIDTH / WIDE * WIDE;
  for (int64_t r = 0; r < rows; r += TILE) {
    for (int at = 0; at < WHOLE; at += WIDE)
      tile<In, MORE, VECTORS>(a + r * a_apart, a_apart, b + at * In::DEEP, WIDTH, c + r * WIDTH + at, WIDTH, depth);
    for (int at = WHOLE; at < WIDTH; at += LANES)
      tile<In, MORE, 1>(a + r * a_apart, a_apart, b + at * In::DEEP, WIDTH, c + r * WIDTH + at, WIDTH, depth);
  }
}

enum class Mask { causal, window, chunk };

template <typename In, typename T, int GROUP, int KEY, int VALUE>
struct Prompt {
  using Number = typename In::Number;
  static constexpr int KEYS = 64;  // in a block
  static constexpr int QUERIES = up(std::max(24, 192 / GROUP), TILE);  // at most, of each head
  static constexpr int DEPTH = up(KEY, In::DEEP), WIDTH = up(VALUE, LANES);

  const T *keys, *values;
  int64_t batch, heads, capacity, length;
  const int32_t *past, *fresh;  // tokens in the caches before, and new ones that are no padding, [batch]
  Mask mask;
  int64_t window;
  float softcap;
  const float* sinks;

  // What one thread works with.
  struct alignas(64) Space {
    Number q[GROUP * QUERIES][DEPTH], keys[DEPTH * KEYS], shares[GROUP * QUERIES][KEYS], values[KEYS * WIDTH];
    float scores[GROUP * QUERIES][KEYS], sums[GROUP * QUERIES][WIDTH];
    float most[GROUP * QUERIES], total[GROUP * QUERIES];
  };

  // The first position that a token at `position` sees.
  int64_t from(int64_t position) const {
    if (mask == Mask::window) return std::max<int64_t>(0, position - window + 1);
    return mask == Mask::chunk ? position / window * window : 0;
  }

  // Queries `first` to `first + count` of the heads that share a cache.
  void look(int64_t pair, int64_t first, int64_t count, const float* q, float* y, Space& space) const {
    const int64_t row = pair / heads, before = past[row] + first;
    const int64_t real = std::min(count, fresh[row] - first), each = up(std::max<int64_t>(real, 0), TILE);
    take(pair, first, real, each, q, space);
    const int64_t end = std::min(before + real, capacity);
    for (int64_t key = from(before) / KEYS * KEYS; key < end && real > 0; key += KEYS) {
      const int some = static_cast<int>(std::min<int64_t>(KEYS, end - key));
      pack(pair, key, some, space);
      multiply<In, false, KEYS>(space.q[0], DEPTH, space.keys, space.scores[0], GROUP * each, DEPTH);
      for (int64_t r = 0; r < GROUP * each; ++r) weigh(before + r % each, key, some, r, space);
      multiply<In, true, WIDTH>(space.shares[0], KEYS, space.values, space.sums[0], GROUP * each, some);
    }
    give(pair, first, count, real, each, y, space);
  }

  // Each head's queries, up to whole tiles.
  void take(int64_t pair, int64_t first, int64_t real, int64_t each, const float* q, Space& space) const {
    for (int64_t r = 0; r < GROUP * each; ++r) {
      space.most[r] = LOWEST, space.total[r] = 0;
      std::fill(space.sums[r], space.sums[r] + WIDTH, 0.0f);
      const float* at = q + ((pair * GROUP + r / each) * length + first + r % each) * KEY;
      std::fill(space.q[r], space.q[r] + DEPTH, Number(0.0f));
      if (r % each < real) put<KEY>(space.q[r], at);
    }
  }

  // Keys, one column each, and values; where there are no more of them, zeros.
  void pack(int64_t pair, int64_t key, int some, Space& space) const {
    const T *k = keys + (pair * capacity + key) * KEY, *v = values + (pair * capacity + key) * VALUE;
    for (int i = 0; i < KEYS; ++i) {
      Number row[DEPTH] = {};
      if (i < some) numbers<KEY>(row, k + i * KEY);
      for (int d = 0; d < DEPTH; d += In::DEEP)
        std::memcpy(space.keys + d * KEYS + i * In::DEEP, row + d, In::DEEP * sizeof(Number));
    }
    for (int i = 0; i < KEYS; i += In::DEEP) {
      Number rows[In::DEEP][WIDTH] = {};
      for (int next = 0; next < In::DEEP && i + next < some; ++next) numbers<VALUE>(rows[next], v + (i + next) * VALUE);
      for (int d = 0; d < WIDTH; ++d)
        for (int next = 0; next < In::DEEP; ++next) space.values[i * WIDTH + d * In::DEEP + next] = rows[next][d];
    }
  }

  template <int COUNT>
  static void numbers(Number* to, const T* from) {
    float floats[COUNT];
    in_floats<T, COUNT>(floats, from);
    put<COUNT>(to, floats);
  }

  // Scores of a row become its shares, and sums so far shrink to them.
  void weigh(int64_t position, int64_t key, int some, int64_t r, Space& space) const {
    const int begin = static_cast<int>(std::clamp<int64_t>(from(position) - key, 0, some));
    const int end = static_cast<int>(std::clamp<int64_t>(position + 1 - key, begin, some));
    float* scores = space.scores[r];
    if (begin == end) {
      std::fill(space.shares[r], space.shares[r] + KEYS, Number(0.0f));
      return;
    }
    if (softcap)
      for (int i = begin; i < end; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
    std::fill(scores, scores + begin, LOWEST);
    std::fill(scores + end, scores + KEYS, LOWEST);
    Vec highest(space.most[r]), total(0.0f);
    for (int i = 0; i < KEYS; i += LANES) highest = at::vec::maximum(highest, Vec::loadu(scores + i));
    const float most = most_of(highest);
    if (most > space.most[r]) {
      const float shrunk = std::exp(space.most[r] - most);
      space.total[r] *= shrunk;
      for (int d = 0; d < WIDTH; ++d) space.sums[r][d] *= shrunk;
      space.most[r] = most;
    }
    for (int i = 0; i < KEYS; i += LANES) {
      const Vec shares = (Vec::loadu(scores + i) - Vec(most)).exp_u20();
      shares.store(scores + i);
      total = total + shares;
    }
    space.total[r] += sum_of(total);
    put<KEYS>(space.shares[r], scores);
  }

  void give(int64_t pair, int64_t first, int64_t count, int64_t real, int64_t each, float* y, const Space& space) const {
    for (int g = 0; g < GROUP; ++g) {
      const int64_t head = pair * GROUP + g;
      for (int64_t i = 0; i < count; ++i) {
        float* to = y + (head * length + first + i) * VALUE;
        const int64_t r = g * each + i;
        if (i >= real) {
          std::fill(to, to + VALUE, 0.0f);
          continue;
        }
        const float sink = sinks ? std::exp(sinks[head % (heads * GROUP)] - space.most[r]) : 0.0f;
        for (int d = 0; d < VALUE; ++d) to[d] = space.sums[r][d] / (space.total[r] + sink);
      }
    }
  }
};

// q [batch, heads * GROUP, length, KEY], scaled -> y [batch, heads * GROUP, length, VALUE]; zeros for what is padding.
template <typename In, typename T, int GROUP, int KEY, int VALUE>
void attend(const Prompt<In, T, GROUP, KEY, VALUE>& prompt, const float* q, float* y) {
  using Kind = Prompt<In, T, GROUP, KEY, VALUE>;
  const int64_t pairs = prompt.batch * prompt.heads, shares = 4 * omp_get_max_threads();
  // Enough blocks for all threads, however short the prompt.
  const int64_t size = std::clamp<int64_t>(up(prompt.length * pairs / shares, TILE), TILE, Kind::QUERIES);
  const int64_t blocks = (prompt.length + size - 1) / size;
  int64_t keys = 0;
  for (int64_t row = 0; row < prompt.batch; ++row) keys += prompt.heads * (prompt.past[row] + prompt.fresh[row]);
#pragma omp parallel if (keys * GROUP * prompt.length * (KEY + VALUE) >= WORTH)
  {
    std::unique_ptr<typename Kind::Space> space(new typename Kind::Space);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * pairs; ++task) {
      // The longest first.
      const int64_t first = (blocks - 1 - task / pairs) * size;
      prompt.look(task % pairs, first, std::min(size, prompt.length - first), q, y, *space);
    }
  }
}

}  // namespace precast
#endif

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

// c [TILE, V vectors] (+)= a [TILE, depth] b [depth, V vectors], where rows lie so far apart.
template <bool MORE, int V>
inline void tile(const float* a, int64_t a_apart, const float* b, int64_t b_apart, float* c, int64_t c_apart, int depth) {
  Vec sums[TILE][V];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = MORE ? Vec::loadu(c + r * c_apart + v * LANES) : Vec(0.0f);
  for (int k = 0; k < depth; ++k) {
    Vec row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Vec::loadu(b + k * b_apart + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const Vec x(a[r * a_apart + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = at::vec::fmadd(x, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v].store(c + r * c_apart + v * LANES);
}

// c [rows, WIDTH] (+)= a [rows, depth] b [depth, WIDTH]; rows a multiple of TILE, WIDTH of LANES.
template <bool MORE, int WIDTH>
void multiply(const float* a, int64_t a_apart, const float* b, float* c, int64_t rows, int depth) {
  constexpr int WIDE = VECTORS * LANES, WHOLE = WIDTH / WIDE * WIDE;
  for (int64_t r = 0; r < rows; r += TILE) {
    for (int at = 0; at < WHOLE; at += WIDE)
      tile<MORE, VECTORS>(a + r * a_apart, a_apart, b + at, WIDTH, c + r * WIDTH + at, WIDTH, depth);
    for (int at = WHOLE; at < WIDTH; at += LANES)
      tile<MORE, 1>(a + r * a_apart, a_apart, b + at, WIDTH, c + r * WIDTH + at, WIDTH, depth);
  }
}

enum class Mask { causal, window, chunk };

template <typename T, int GROUP, int KEY, int VALUE>
struct Prompt {
  static constexpr int KEYS = 64;  // in a block
  static constexpr int QUERIES = up(std::max(24, 96 / GROUP), TILE);  // at most, of each head
  static constexpr int WIDTH = up(VALUE, LANES);

  const T *keys, *values;
  int64_t batch, heads, capacity, length;
  const int32_t *past, *fresh;  // tokens in the caches before, and new ones that are no padding, [batch]
  Mask mask;
  int64_t window;
  float softcap;
  const float* sinks;

  // What one thread works with.
  struct alignas(64) Space {
    float q[GROUP * QUERIES][KEY], scores[GROUP * QUERIES][KEYS], sums[GROUP * QUERIES][WIDTH];
    float keys[KEY][KEYS], values[KEYS][WIDTH], most[GROUP * QUERIES], total[GROUP * QUERIES];
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
      multiply<false, KEYS>(space.q[0], KEY, space.keys[0], space.scores[0], GROUP * each, KEY);
      for (int64_t r = 0; r < GROUP * each; ++r) weigh(before + r % each, key, some, r, space);
      multiply<true, WIDTH>(space.scores[0], KEYS, space.values[0], space.sums[0], GROUP * each, some);
    }
    give(pair, first, count, real, each, y, space);
  }

  // Each head's queries, up to whole tiles.
  void take(int64_t pair, int64_t first, int64_t real, int64_t each, const float* q, Space& space) const {
    for (int64_t r = 0; r < GROUP * each; ++r) {
      space.most[r] = LOWEST, space.total[r] = 0;
      std::fill(space.sums[r], space.sums[r] + WIDTH, 0.0f);
      const float* at = q + ((pair * GROUP + r / each) * length + first + r % each) * KEY;
      if (r % each < real) std::copy(at, at + KEY, space.q[r]);
      else std::fill(space.q[r], space.q[r] + KEY, 0.0f);
    }
  }

  // Keys, one column each, and values.
  void pack(int64_t pair, int64_t key, int some, Space& space) const {
    const T *k = keys + (pair * capacity + key) * KEY, *v = values + (pair * capacity + key) * VALUE;
    for (int i = 0; i < KEYS; ++i)
      for (int d = 0; d < KEY; ++d) space.keys[d][i] = i < some ? static_cast<float>(k[i * KEY + d]) : 0.0f;
    for (int i = 0; i < some; ++i)
      for (int d = 0; d < WIDTH; ++d) space.values[i][d] = d < VALUE ? static_cast<float>(v[i * VALUE + d]) : 0.0f;
  }

  // Scores of a row become their exponentials, and sums so far shrink to them.
  void weigh(int64_t position, int64_t key, int some, int64_t r, Space& space) const {
    const int begin = static_cast<int>(std::clamp<int64_t>(from(position) - key, 0, some));
    const int end = static_cast<int>(std::clamp<int64_t>(position + 1 - key, begin, some));
    float* scores = space.scores[r];
    if (softcap)
      for (int i = begin; i < end; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
    float most = space.most[r];
    for (int i = begin; i < end; ++i) most = std::max(most, scores[i]);
    if (most > space.most[r]) {
      const float shrunk = std::exp(space.most[r] - most);
      space.total[r] *= shrunk;
      for (int d = 0; d < WIDTH; ++d) space.sums[r][d] *= shrunk;
      space.most[r] = most;
    }
    for (int i = 0; i < KEYS; i += LANES) (Vec::loadu(scores + i) - Vec(most)).exp().store(scores + i);
    std::fill(scores, scores + begin, 0.0f);
    std::fill(scores + end, scores + KEYS, 0.0f);
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < KEYS; ++i) total += scores[i];
    space.total[r] += total;
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
template <typename T, int GROUP, int KEY, int VALUE>
void attend(const Prompt<T, GROUP, KEY, VALUE>& prompt, const float* q, float* y) {
  using Kind = Prompt<T, GROUP, KEY, VALUE>;
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

// Attention of many queries per slot: of a prompt's tokens to the caches, or of all tokens to all, as in an encoder.
//
// No matrix of scores is larger than a block (Dao et al. 2022, FlashAttention). Blocks of keys that are masked for a
// whole block of queries are skipped: half of all blocks for a first prompt. A "pair" is a slot and one of its key heads.
#ifndef PRECAST_BLOCKED_ATTENTION
#define PRECAST_BLOCKED_ATTENTION

namespace precast {

// The tile of rows and vectors that fits into registers.
constexpr int TILE = 6, VECTORS = LANES == 16 ? 4 : 2;

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Fused multiply-add of one number format: K_STEP neighbours in a row of `a` times as many interleaved rows of `b`.
struct Float32Fma {
  using Number = float;
  static constexpr int K_STEP = 1;

  static Vec load(const Number* b) { return Vec::loadu(b); }
  static Vec broadcast(const Number* a) { return Vec(*a); }
  static Vec fma(Vec sum, Vec a, Vec b) { return at::vec::fmadd(a, b, sum); }
};

#ifdef __AVX512BF16__
struct Bfloat16Fma {
  using Number = at::BFloat16;
  static constexpr int K_STEP = 2;

  static __m512bh load(const Number* b) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)); }
  static __m512bh broadcast(const Number* a) {
    int32_t both;
    std::memcpy(&both, a, sizeof(both));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
  }
  static Vec fma(Vec sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#else
using Bfloat16Fma = Float32Fma;  // Exact, and the fastest without bfloat16 instructions.
#endif

// c [TILE, V vectors] (+)= a [TILE, depth] b [depth, V vectors]; strides are between rows.
template <typename Fma, bool ACCUMULATE, int V>
inline void multiply_tile(
    const typename Fma::Number* a, int64_t a_stride, const typename Fma::Number* b, int64_t b_stride, float* c,
    int64_t c_stride, int depth) {
  Vec sums[TILE][V];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = ACCUMULATE ? Vec::loadu(c + r * c_stride + v * LANES) : Vec(0.0f);
  for (int k = 0; k < depth; k += Fma::K_STEP) {
    decltype(Fma::load(b)) row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = Fma::load(b + k * b_stride + v * LANES * Fma::K_STEP);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) {
      const auto x = Fma::broadcast(a + r * a_stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = Fma::fma(sums[r][v], x, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v].store(c + r * c_stride + v * LANES);
}

// c [rows, WIDTH] (+)= a [rows, depth] b [depth, WIDTH]; rows a multiple of TILE, WIDTH of LANES.
template <typename Fma, bool ACCUMULATE, int WIDTH>
void multiply(
    const typename Fma::Number* a, int64_t a_stride, const typename Fma::Number* b, float* c, int64_t rows, int depth) {
  constexpr int TILE_WIDTH = VECTORS * LANES, WHOLE = WIDTH / TILE_WIDTH * TILE_WIDTH;
  for (int64_t r = 0; r < rows; r += TILE) {
    for (int at = 0; at < WHOLE; at += TILE_WIDTH)
      multiply_tile<Fma, ACCUMULATE, VECTORS>(
          a + r * a_stride, a_stride, b + at * Fma::K_STEP, WIDTH, c + r * WIDTH + at, WIDTH, depth);
    for (int at = WHOLE; at < WIDTH; at += LANES)
      multiply_tile<Fma, ACCUMULATE, 1>(
          a + r * a_stride, a_stride, b + at * Fma::K_STEP, WIDTH, c + r * WIDTH + at, WIDTH, depth);
  }
}

enum class Mask { causal, window, chunk, none };

// Numbers that are added to scores [batch, query heads, queries, keys]; strides are 0 where they are broadcast.
struct Bias {
  const float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0;
};

template <typename Fma, typename T, int GROUP, int KEY, int VALUE>
struct BlockedAttention {
  using Number = typename Fma::Number;
  static constexpr int KEY_BLOCK = 64;  // keys per block
  static constexpr int QUERY_BLOCK = round_up(std::max(24, 192 / GROUP), TILE);  // queries per block and head, at most
  static constexpr int PADDED_KEY = round_up(KEY, Fma::K_STEP), PADDED_VALUE = round_up(VALUE, LANES);

  const T *keys, *values;
  int64_t batch, heads, capacity, length;
  // Tokens in the caches before, and new ones without padding, [batch]; nullptr where every query attends to every key.
  const int32_t *past_lengths, *new_lengths;
  Mask mask;
  int64_t window;
  float softcap;
  const float* sinks;
  Bias bias = {};

  // Buffers of one thread.
  struct alignas(64) Scratch {
    Number q[GROUP * QUERY_BLOCK][PADDED_KEY], keys[PADDED_KEY * KEY_BLOCK];
    Number probabilities[GROUP * QUERY_BLOCK][KEY_BLOCK], values[KEY_BLOCK * PADDED_VALUE];
    float scores[GROUP * QUERY_BLOCK][KEY_BLOCK], outputs[GROUP * QUERY_BLOCK][PADDED_VALUE];
    float running_max[GROUP * QUERY_BLOCK], sum_exp[GROUP * QUERY_BLOCK];
  };

  // The first cache position that a token at `position` attends to.
  int64_t first_visible(int64_t position) const {
    if (mask == Mask::window) return std::max<int64_t>(0, position - window + 1);
    return mask == Mask::chunk ? position / window * window : 0;
  }

  // The position behind the last one that a token at `position` attends to.
  int64_t end_visible(int64_t position) const {
    return mask == Mask::none ? capacity : std::min(position + 1, capacity);
  }

  int64_t past_length(int64_t slot) const { return past_lengths ? past_lengths[slot] : 0; }
  int64_t new_length(int64_t slot) const { return new_lengths ? new_lengths[slot] : length; }

  // Compute queries `first` to `first + count` of all heads of a pair.
  void attend_block(int64_t pair, int64_t first, int64_t count, const float* q, float* y, Scratch& scratch) const {
    const int64_t slot = pair / heads, before = past_length(slot) + first;
    const int64_t valid = std::min(count, new_length(slot) - first);  // without padding
    const int64_t head_rows = round_up(std::max<int64_t>(valid, 0), TILE);
    load_queries(pair, first, valid, head_rows, q, scratch);
    const int64_t end = end_visible(before + valid - 1);
    for (int64_t key = first_visible(before) / KEY_BLOCK * KEY_BLOCK; key < end && valid > 0; key += KEY_BLOCK) {
      const int block_length = static_cast<int>(std::min<int64_t>(KEY_BLOCK, end - key));
      pack_keys_values(pair, key, block_length, scratch);
      multiply<Fma, false, KEY_BLOCK>(
          scratch.q[0], PADDED_KEY, scratch.keys, scratch.scores[0], GROUP * head_rows, PADDED_KEY);
      for (int64_t r = 0; r < GROUP * head_rows; ++r) {
        if (bias.data && r % head_rows < valid)
          add_bias(pair * GROUP + r / head_rows, first + r % head_rows, key, block_length, scratch.scores[r]);
        online_softmax(before + r % head_rows, key, block_length, r, scratch);
      }
      multiply<Fma, true, PADDED_VALUE>(
          scratch.probabilities[0], KEY_BLOCK, scratch.values, scratch.outputs[0], GROUP * head_rows, block_length);
    }
    store_output(pair, first, count, valid, head_rows, y, scratch);
  }

  // Load the queries of each head, padded to whole tiles, and reset the sums.
  void load_queries(
      int64_t pair, int64_t first, int64_t valid, int64_t head_rows, const float* q, Scratch& scratch) const {
    for (int64_t r = 0; r < GROUP * head_rows; ++r) {
      scratch.running_max[r] = -INFINITY, scratch.sum_exp[r] = 0;
      std::fill(scratch.outputs[r], scratch.outputs[r] + PADDED_VALUE, 0.0f);
      const float* at = q + ((pair * GROUP + r / head_rows) * length + first + r % head_rows) * KEY;
      std::fill(scratch.q[r], scratch.q[r] + PADDED_KEY, Number(0.0f));
      if (r % head_rows < valid) from_floats<KEY>(scratch.q[r], at);
    }
  }

  // Pack a block of keys, one column each, and of values, interleaved for the multiply-add; zeros behind the last.
  void pack_keys_values(int64_t pair, int64_t key, int block_length, Scratch& scratch) const {
    const T *k = keys + (pair * capacity + key) * KEY, *v = values + (pair * capacity + key) * VALUE;
    for (int i = 0; i < KEY_BLOCK; ++i) {
      Number row[PADDED_KEY] = {};
      if (i < block_length) convert_row<KEY>(row, k + i * KEY);
      for (int d = 0; d < PADDED_KEY; d += Fma::K_STEP)
        std::memcpy(scratch.keys + d * KEY_BLOCK + i * Fma::K_STEP, row + d, Fma::K_STEP * sizeof(Number));
    }
    for (int i = 0; i < KEY_BLOCK; i += Fma::K_STEP) {
      Number rows[Fma::K_STEP][PADDED_VALUE] = {};
      for (int next = 0; next < Fma::K_STEP && i + next < block_length; ++next)
        convert_row<VALUE>(rows[next], v + (i + next) * VALUE);
      for (int d = 0; d < PADDED_VALUE; ++d)
        for (int next = 0; next < Fma::K_STEP; ++next)
          scratch.values[i * PADDED_VALUE + d * Fma::K_STEP + next] = rows[next][d];
    }
  }

  template <int COUNT>
  static void convert_row(Number* to, const T* source) {
    float floats[COUNT];
    to_floats<T, COUNT>(floats, source);
    from_floats<COUNT>(to, floats);
  }

  void add_bias(int64_t head, int64_t query, int64_t key, int block_length, float* scores) const {
    const int64_t slot = head / (heads * GROUP);
    const float* from = bias.data + slot * bias.batch_stride + head % (heads * GROUP) * bias.head_stride +
                        query * bias.query_stride + key;
    for (int i = 0; i < block_length; ++i) scores[i] += from[i];
  }

  // Turn a row of scores into exp(score - running max), and rescale the sums so far where the max grows.
  void online_softmax(int64_t position, int64_t key, int block_length, int64_t r, Scratch& scratch) const {
    const int begin = static_cast<int>(std::clamp<int64_t>(first_visible(position) - key, 0, block_length));
    const int end = static_cast<int>(std::clamp<int64_t>(end_visible(position) - key, begin, block_length));
    float* scores = scratch.scores[r];
    if (begin == end) return clear_probabilities(r, scratch);
    if (softcap)
      for (int i = begin; i < end; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
    std::fill(scores, scores + begin, -INFINITY);
    std::fill(scores + end, scores + KEY_BLOCK, -INFINITY);
    Vec block_max(scratch.running_max[r]), sum_exp(0.0f);
    for (int i = 0; i < KEY_BLOCK; i += LANES) block_max = at::vec::maximum(block_max, Vec::loadu(scores + i));
    const float running_max = reduce_max(block_max);
    // So far all is masked by a bias, and the difference of two infinities is no number.
    if (running_max == -INFINITY && std::none_of(scores, scores + KEY_BLOCK, [](float x) { return x != x; }))
      return clear_probabilities(r, scratch);
    if (running_max > scratch.running_max[r]) {
      const float rescale = std::exp(scratch.running_max[r] - running_max);
      scratch.sum_exp[r] *= rescale;
      for (int d = 0; d < PADDED_VALUE; ++d) scratch.outputs[r][d] *= rescale;
      scratch.running_max[r] = running_max;
    }
    for (int i = 0; i < KEY_BLOCK; i += LANES) {
      const Vec probabilities = (Vec::loadu(scores + i) - Vec(running_max)).exp_u20();
      probabilities.store(scores + i);
      sum_exp = sum_exp + probabilities;
    }
    const float block_sum = reduce_sum(sum_exp);
    // A score was no number, or infinite: exp_u20() makes a large number of that.
    if (!(block_sum <= 2 * KEY_BLOCK)) {
      scratch.sum_exp[r] = NAN;
      return clear_probabilities(r, scratch);
    }
    scratch.sum_exp[r] += block_sum;
    from_floats<KEY_BLOCK>(scratch.probabilities[r], scores);
  }

  static void clear_probabilities(int64_t r, Scratch& scratch) {
    std::fill(scratch.probabilities[r], scratch.probabilities[r] + KEY_BLOCK, Number(0.0f));
  }

  // Write the block's output: divided by the sum of exponentials, zeros at padding.
  void store_output(
      int64_t pair, int64_t first, int64_t count, int64_t valid, int64_t head_rows, float* y,
      const Scratch& scratch) const {
    for (int g = 0; g < GROUP; ++g) {
      const int64_t head = pair * GROUP + g;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = head / (heads * GROUP);
        float* to = y + ((slot * length + first + i) * heads * GROUP + head % (heads * GROUP)) * VALUE;
        const int64_t r = g * head_rows + i;
        if (i >= valid) {
          std::fill(to, to + VALUE, 0.0f);
          continue;
        }
        const float sink = sinks ? std::exp(sinks[head % (heads * GROUP)] - scratch.running_max[r]) : 0.0f;
        for (int d = 0; d < VALUE; ++d) to[d] = scratch.outputs[r][d] / (scratch.sum_exp[r] + sink);
      }
    }
  }
};

// q [batch, query heads, length, KEY], scaled -> y [batch, length, query heads, VALUE]; zeros at padding. There are
// heads * GROUP query heads.
template <typename Fma, typename T, int GROUP, int KEY, int VALUE>
void blocked_attention(const BlockedAttention<Fma, T, GROUP, KEY, VALUE>& attention, const float* q, float* y) {
  using Kind = BlockedAttention<Fma, T, GROUP, KEY, VALUE>;
  const int64_t pairs = attention.batch * attention.heads, tasks = 4 * omp_get_max_threads();
  // Small enough blocks to keep all threads busy, however short the prompt.
  const int64_t size = std::clamp<int64_t>(round_up(attention.length * pairs / tasks, TILE), TILE, Kind::QUERY_BLOCK);
  const int64_t blocks = (attention.length + size - 1) / size;
  int64_t keys = 0;
  for (int64_t slot = 0; slot < attention.batch; ++slot)
    keys += attention.heads *
            attention.end_visible(attention.past_length(slot) + attention.new_length(slot) - 1);
#pragma omp parallel if (keys * GROUP * attention.length * (KEY + VALUE) >= MIN_PARALLEL_MACS)
  {
    std::unique_ptr<typename Kind::Scratch> scratch(new typename Kind::Scratch);
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < blocks * pairs; ++task) {
      // The blocks that attend to most keys first.
      const int64_t first = (blocks - 1 - task / pairs) * size;
      attention.attend_block(task % pairs, first, std::min(size, attention.length - first), q, y, *scratch);
    }
  }
}

}  // namespace precast
#endif

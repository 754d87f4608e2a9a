// Decode attention: one new token per slot attends to the keys and values in its caches, which are read once.
//
// The cache positions of all slots and heads, laid end to end, are divided evenly among threads: where heads are fewer
// than threads, several threads take parts of one head. Their partial softmaxes are merged at the end (Dao et al. 2023,
// Flash-Decoding). A "pair" is a slot and one of its key heads.
#ifndef PRECAST_DECODE_ATTENTION
#define PRECAST_DECODE_ATTENTION

namespace precast {

// Partial softmax of the GROUP query heads that share a key head, over some of its cache positions: the largest score,
// the sum of exp(score - max), and the sum of the values weighted by it.
template <int GROUP, int WIDTH>
struct SoftmaxPartial {
  float running_max[GROUP], sum_exp[GROUP], weighted_sum[GROUP][WIDTH];
};

constexpr float LOWEST = -1e30f;

template <typename T, int GROUP, int KEY, int VALUE>
struct Caches {
  using Partial = SoftmaxPartial<GROUP, VALUE>;
  static constexpr int BLOCK = 32;  // cache positions at a time

  const T *keys, *values;
  int64_t batch, heads, capacity, positions;    // of which the first `positions` are attended to
  const float* bias;                            // added to scores, [batch or 1, query heads or 1, positions]
  int64_t bias_batch_stride, bias_head_stride;  // 0 where it is broadcast
  float softcap;                                // 0: none

  // Let the query heads q [GROUP, KEY] of a pair attend to positions `begin` to `end`.
  void attend_range(int64_t pair, const float* q, int64_t begin, int64_t end, Partial& partial) const {
    std::fill(std::begin(partial.running_max), std::end(partial.running_max), LOWEST);
    std::memset(partial.sum_exp, 0, sizeof(partial.sum_exp));
    std::memset(partial.weighted_sum, 0, sizeof(partial.weighted_sum));
    const T *key = keys + pair * capacity * KEY, *value = values + pair * capacity * VALUE;
    for (int64_t position = begin; position < end; position += BLOCK) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK, end - position));
      float probabilities[GROUP][BLOCK];
      for (int g = 0; g < GROUP; ++g)
        for (int r = 0; r < BLOCK; ++r)
          probabilities[g][r] = r < count ? dot<T, KEY>(q + g * KEY, key + (position + r) * KEY) : LOWEST;
      for (int g = 0; g < GROUP; ++g) online_softmax(probabilities[g], bias_of(pair, g) + position, count, g, partial);
      for (int g = 0; g < GROUP; ++g) {
        int r = 0;
        for (; r + 4 <= count; r += 4)
          add_weighted_rows<T, VALUE, 4>(partial.weighted_sum[g], probabilities[g] + r, value + (position + r) * VALUE);
        for (; r < count; ++r)
          add_weighted_rows<T, VALUE, 1>(partial.weighted_sum[g], probabilities[g] + r, value + (position + r) * VALUE);
      }
    }
  }

  const float* bias_of(int64_t pair, int g) const {
    return bias + pair / heads * bias_batch_stride + (pair % heads * GROUP + g) * bias_head_stride;
  }

  // Turn scores into exp(score - running max), and rescale the sums so far where the max grows.
  void online_softmax(float* scores, const float* bias_row, int count, int g, Partial& partial) const {
    if (softcap)
      for (int r = 0; r < count; ++r) scores[r] = softcap * std::tanh(scores[r] / softcap);
    for (int r = 0; r < count; ++r) scores[r] += bias_row[r];
    const float old_max = partial.running_max[g];
    for (int r = 0; r < count; ++r) partial.running_max[g] = std::max(partial.running_max[g], scores[r]);
    if (partial.running_max[g] > old_max) {
      const float rescale = std::exp(old_max - partial.running_max[g]);
      partial.sum_exp[g] *= rescale;
      for (int i = 0; i < VALUE; ++i) partial.weighted_sum[g][i] *= rescale;
    }
    Vec sum_exp(0.0f);
    for (int r = 0; r < BLOCK; r += LANES) {
      const Vec probabilities = (Vec::loadu(scores + r) - Vec(partial.running_max[g])).exp();
      probabilities.store(scores + r);
      sum_exp = sum_exp + probabilities;
    }
    partial.sum_exp[g] += reduce_sum(sum_exp);
    // Positions beyond the last count for nothing, even where no position is visible at all.
    for (int r = count; r < BLOCK; ++r) partial.sum_exp[g] -= scores[r];
  }
};

// Merge the partials of one query head into its output y [WIDTH]. `sink`: a score without a value, or none.
template <int GROUP, int WIDTH>
void merge_partials(const SoftmaxPartial<GROUP, WIDTH>* partials, int64_t count, int g, const float* sink, float* y) {
  float running_max = sink ? *sink : LOWEST;
  for (int64_t p = 0; p < count; ++p) running_max = std::max(running_max, partials[p].running_max[g]);
  float sum_exp = sink ? std::exp(*sink - running_max) : 0.0f;
  std::fill(y, y + WIDTH, 0.0f);
  for (int64_t p = 0; p < count; ++p) {
    const float weight = std::exp(partials[p].running_max[g] - running_max);
    sum_exp += partials[p].sum_exp[g] * weight;
    for (int i = 0; i < WIDTH; ++i) y[i] += partials[p].weighted_sum[g][i] * weight;
  }
  for (int i = 0; i < WIDTH; ++i) y[i] /= sum_exp;
}

// q [batch, heads * GROUP, KEY], scaled -> y [batch, heads * GROUP, VALUE]. `sinks`: one for each query head, or none.
template <typename T, int GROUP, int KEY, int VALUE>
void decode_attention(const Caches<T, GROUP, KEY, VALUE>& caches, const float* q, const float* sinks, float* y) {
  const int64_t pairs = caches.batch * caches.heads, positions = caches.positions, all = pairs * positions;
  // One for each thread's range in each pair: the next in line is of the next pair, thread, or both.
  std::unique_ptr<SoftmaxPartial<GROUP, VALUE>[]> partials(
      new SoftmaxPartial<GROUP, VALUE>[pairs + omp_get_max_threads()]);
  int64_t threads = 1;
#pragma omp parallel if (all * GROUP * (KEY + VALUE) >= MIN_PARALLEL_MACS)
  {
    const int64_t thread = omp_get_thread_num();
#pragma omp single nowait
    threads = omp_get_num_threads();
    const int64_t count = omp_get_num_threads(), begin = all * thread / count, end = all * (thread + 1) / count;
    for (int64_t pair = begin / positions; pair * positions < end; ++pair)
      caches.attend_range(pair, q + pair * GROUP * KEY, std::max<int64_t>(begin - pair * positions, 0),
                          std::min(end - pair * positions, positions), partials[pair + thread]);
  }
  for (int64_t pair = 0, first = 0; pair < pairs; ++pair) {
    while (all * (first + 1) / threads <= pair * positions) ++first;
    int64_t last = first;
    while (all * (last + 1) / threads < (pair + 1) * positions) ++last;
    for (int g = 0; g < GROUP; ++g) {
      const int64_t head = pair * GROUP + g;
      const float* sink = sinks ? sinks + head % (caches.heads * GROUP) : nullptr;
      merge_partials(&partials[pair + first], last - first + 1, g, sink, y + head * VALUE);
    }
  }
}

}  // namespace precast
#endif

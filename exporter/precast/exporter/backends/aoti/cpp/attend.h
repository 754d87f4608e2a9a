// Attention of one new token per row to the keys and values in its caches, which are read once.
//
// All rows of all caches, one behind the other, are shared out evenly: where heads are fewer than threads, several
// threads take parts of one head's rows. What they find is put together at the end (Dao et al. 2023, Flash-Decoding).
#ifndef PRECAST_ATTEND
#define PRECAST_ATTEND

namespace precast {

// What some rows give the GROUP query heads that share them: sums of exp(score - most), alone and times the values.
template <int GROUP, int WIDTH>
struct Part {
  float most[GROUP], total[GROUP], sum[GROUP][WIDTH];
};

constexpr float LOWEST = -1e30f;

template <typename T, int GROUP, int KEY, int VALUE>
struct Caches {
  using Found = Part<GROUP, VALUE>;
  static constexpr int SOME = 32;  // rows are taken at a time

  const T *keys, *values;
  int64_t batch, heads, capacity, rows;  // of which `rows` are looked at
  const float* added;                    // to scores, [batch or 1, query heads or 1, rows]
  int64_t added_batch, added_head;       // strides, 0 where there is but one
  float softcap;                         // 0: none

  // The query heads q [GROUP, KEY] of one cache's rows from `begin` to `end`.
  void look(int64_t pair, const float* q, int64_t begin, int64_t end, Found& found) const {
    std::fill(std::begin(found.most), std::end(found.most), LOWEST);
    std::memset(found.total, 0, sizeof(found.total));
    std::memset(found.sum, 0, sizeof(found.sum));
    const T *key = keys + pair * capacity * KEY, *value = values + pair * capacity * VALUE;
    for (int64_t row = begin; row < end; row += SOME) {
      const int count = static_cast<int>(std::min<int64_t>(SOME, end - row));
      float shares[GROUP][SOME];
      for (int g = 0; g < GROUP; ++g)
        for (int r = 0; r < SOME; ++r) shares[g][r] = r < count ? dot<T, KEY>(q + g * KEY, key + (row + r) * KEY) : LOWEST;
      for (int g = 0; g < GROUP; ++g) weigh(shares[g], added_to(pair, g) + row, count, g, found);
      for (int g = 0; g < GROUP; ++g) {
        int r = 0;
        for (; r + 4 <= count; r += 4) add<T, VALUE, 4>(found.sum[g], shares[g] + r, value + (row + r) * VALUE);
        for (; r < count; ++r) add<T, VALUE, 1>(found.sum[g], shares[g] + r, value + (row + r) * VALUE);
      }
    }
  }

  const float* added_to(int64_t pair, int g) const {
    return added + pair / heads * added_batch + (pair % heads * GROUP + g) * added_head;
  }

  // Scores become their exponentials, beside the largest so far.
  void weigh(float* scores, const float* more, int count, int g, Found& found) const {
    if (softcap)
      for (int r = 0; r < count; ++r) scores[r] = softcap * std::tanh(scores[r] / softcap);
    for (int r = 0; r < count; ++r) scores[r] += more[r];
    const float before = found.most[g];
    for (int r = 0; r < count; ++r) found.most[g] = std::max(found.most[g], scores[r]);
    if (found.most[g] > before) {
      const float shrunk = std::exp(before - found.most[g]);
      found.total[g] *= shrunk;
      for (int i = 0; i < VALUE; ++i) found.sum[g][i] *= shrunk;
    }
    Vec total(0.0f);
    for (int r = 0; r < SOME; r += LANES) {
      const Vec shares = (Vec::loadu(scores + r) - Vec(found.most[g])).exp();
      shares.store(scores + r);
      total = total + shares;
    }
    found.total[g] += sum_of(total);
    // A row beyond the last has no share, even where no row is seen at all.
    for (int r = count; r < SOME; ++r) found.total[g] -= scores[r];
  }
};

// One query head's y [WIDTH] from what was found in all parts of its cache. `sink`: a score without a value, or none.
template <int GROUP, int WIDTH>
void join(const Part<GROUP, WIDTH>* parts, int64_t count, int g, const float* sink, float* y) {
  float most = sink ? *sink : LOWEST;
  for (int64_t p = 0; p < count; ++p) most = std::max(most, parts[p].most[g]);
  float total = sink ? std::exp(*sink - most) : 0.0f;
  std::fill(y, y + WIDTH, 0.0f);
  for (int64_t p = 0; p < count; ++p) {
    const float share = std::exp(parts[p].most[g] - most);
    total += parts[p].total[g] * share;
    for (int i = 0; i < WIDTH; ++i) y[i] += parts[p].sum[g][i] * share;
  }
  for (int i = 0; i < WIDTH; ++i) y[i] /= total;
}

// q [batch, heads * GROUP, KEY], scaled -> y [batch, heads * GROUP, VALUE]. `sinks`: one for each query head, or none.
template <typename T, int GROUP, int KEY, int VALUE>
void attend(const Caches<T, GROUP, KEY, VALUE>& caches, const float* q, const float* sinks, float* y) {
  const int64_t pairs = caches.batch * caches.heads, rows = caches.rows, all = pairs * rows;
  // One for each thread's part of each cache: the next in line belongs to the next cache, thread, or both.
  std::unique_ptr<Part<GROUP, VALUE>[]> found(new Part<GROUP, VALUE>[pairs + omp_get_max_threads()]);
  int64_t threads = 1;
#pragma omp parallel if (all * GROUP * (KEY + VALUE) >= WORTH)
  {
    const int64_t thread = omp_get_thread_num();
#pragma omp single nowait
    threads = omp_get_num_threads();
    const int64_t count = omp_get_num_threads(), begin = all * thread / count, end = all * (thread + 1) / count;
    for (int64_t pair = begin / rows; pair * rows < end; ++pair)
      caches.look(pair, q + pair * GROUP * KEY, std::max<int64_t>(begin - pair * rows, 0),
                  std::min(end - pair * rows, rows), found[pair + thread]);
  }
  for (int64_t pair = 0, first = 0; pair < pairs; ++pair) {
    while (all * (first + 1) / threads <= pair * rows) ++first;
    int64_t last = first;
    while (all * (last + 1) / threads < (pair + 1) * rows) ++last;
    for (int g = 0; g < GROUP; ++g) {
      const int64_t head = pair * GROUP + g;
      const float* sink = sinks ? sinks + head % (caches.heads * GROUP) : nullptr;
      join(&found[pair + first], last - first + 1, g, sink, y + head * VALUE);
    }
  }
}

}  // namespace precast
#endif

// LoRA adapters: to each row of a batch what the adapter of its slot adds, or nothing.
//
// A row of a slot's weights is one of A, then one of B transposed. Both are read once, in order: x times the row of A, and
// that times the row of B into the sum. Threads take runs of tokens, or of the ranks where there are too few tokens.
#ifndef PRECAST_LORA
#define PRECAST_LORA

namespace precast {

// Tokens that share what is read of the weights.
constexpr int TOKENS_TOGETHER = 8;

// sum [count, N] += x [count, K] * A^T * B^T, by `ranks` rows of weights, for at most TOKENS_TOGETHER tokens.
template <int K, int N>
void add_ranks(float* sum, const float* x, const float* weights, int ranks, int64_t count) {
  for (int r = 0; r < ranks; ++r, weights += K + N)
    for (int64_t i = 0; i < count; ++i) {
      const float inner = dot<float, K>(x + i * K, weights);
      add_weighted_rows<float, N, 1>(sum + i * N, &inner, weights + K);
    }
}

// y [B, S, N] = before + what the adapter of each row's slot makes of x [B, S, K]; weights are [slots + 1, R, K + N].
template <int K, int N, int R>
void lora(float* y, const float* before, const float* x, const float* weights, const int64_t* slots, int64_t batch,
          int64_t length) {
  std::copy(before, before + batch * length * N, y);
  for (int64_t b = 0; b < batch; ++b) {
    if (!slots[b]) continue;
    const float* own = weights + slots[b] * R * (K + N);
    const float* from = x + b * length * K;
    float* to = y + b * length * N;
#pragma omp parallel for if (length * R * (K + N) >= MIN_PARALLEL_MACS && length > TOKENS_TOGETHER)
    for (int64_t start = 0; start < length; start += TOKENS_TOGETHER)
      add_ranks<K, N>(to + start * N, from + start * K, own, R, std::min<int64_t>(TOKENS_TOGETHER, length - start));
  }
}

}  // namespace precast
#endif

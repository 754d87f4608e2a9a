// LoRA adapters: to each row of a batch what the adapter of its slot adds, or nothing.
//
// A row of a slot's weights is one of A, then one of B transposed. Threads share what there is to do for a few tokens, all
// of A first and then all of B, and take runs of many tokens.
#ifndef PRECAST_LORA
#define PRECAST_LORA

namespace precast {

// Tokens that share what is read of the weights, and the outputs that a thread takes at a time.
constexpr int TOKENS_TOGETHER = 8, OUTPUTS_TOGETHER = 256;

// sum [count, N] += x [count, K] * A^T * B^T, by all threads, for at most TOKENS_TOGETHER tokens. They share `inner`.
template <int K, int N, int R>
void add_together(float* sum, const float* x, const float* weights, float* inner, int64_t count) {
#pragma omp for
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < count; ++i) inner[i * R + r] = dot<float, K>(x + i * K, weights + r * (K + N));
#pragma omp for
  for (int start = 0; start < N; start += OUTPUTS_TOGETHER) {
    const int end = std::min(N, start + OUTPUTS_TOGETHER), whole = end - (end - start) % LANES;
    for (int64_t i = 0; i < count; ++i) {
      float* to = sum + i * N;
      for (int n = start; n < whole; n += LANES) {
        Vec here = Vec::loadu(to + n);
        for (int r = 0; r < R; ++r)
          here = at::vec::fmadd(Vec(inner[i * R + r]), Vec::loadu(weights + r * (K + N) + K + n), here);
        here.store(to + n);
      }
      for (int n = whole; n < end; ++n)
        for (int r = 0; r < R; ++r) to[n] += inner[i * R + r] * weights[r * (K + N) + K + n];
    }
  }
}

// The same by one thread, which reads the weights in their order.
template <int K, int N, int R>
void add_alone(float* sum, const float* x, const float* weights, int64_t count) {
  for (int r = 0; r < R; ++r, weights += K + N)
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
  if (std::all_of(slots, slots + batch, [](int64_t slot) { return slot == 0; })) return;
  float inner[TOKENS_TOGETHER * R];
#pragma omp parallel if (batch * length * R * (K + N) >= MIN_PARALLEL_MACS)
  for (int64_t b = 0; b < batch; ++b) {
    if (slots[b] == 0) continue;
    const float* own = weights + slots[b] * R * (K + N);
    const float* from = x + b * length * K;
    float* to = y + b * length * N;
    if (length <= TOKENS_TOGETHER) {
      add_together<K, N, R>(to, from, own, inner, length);
      continue;
    }
#pragma omp for
    for (int64_t start = 0; start < length; start += TOKENS_TOGETHER) {
      const int64_t count = std::min<int64_t>(TOKENS_TOGETHER, length - start);
      add_alone<K, N, R>(to + start * N, from + start * K, own, count);
    }
  }
}

}  // namespace precast
#endif

// Quantized weights to a matrix of numbers, for GEMM with many rows.
#ifndef PRECAST_DEQUANTIZE
#define PRECAST_DEQUANTIZE

namespace precast {

// The codes of one group, unpacked to a byte each.
template <int GROUP, int BITS>
struct UnpackedGroup {
  uint8_t codes[GROUP];

  explicit UnpackedGroup(const uint8_t* from) {
    if constexpr (BITS == 8) {
      std::memcpy(codes, from, GROUP);
    } else {
      // Two at a time, in the low halves of two bytes.
      uint16_t pairs[GROUP / 2];
      for (int i = 0; i < GROUP / 2; ++i) pairs[i] = (from[i] | from[i] << 4) & 0x0f0f;
      std::memcpy(codes, pairs, GROUP);
    }
  }
};

// y [outputs, K] = scale * (code - zero)
template <typename T, int K, int GROUP, int BITS, bool ZEROS>
void dequantize(T* y, const QuantizedWeight<K, GROUP, BITS, ZEROS>& weight) {
#pragma omp parallel for if (weight.outputs * K >= MIN_PARALLEL_MACS)
  for (int64_t n = 0; n < weight.outputs; ++n)
    for (int g = 0; g < K / GROUP; ++g) {
      const UnpackedGroup<GROUP, BITS> unpacked(weight.codes + (n * K + g * GROUP) * BITS / 8);
      const float scale = weight.scales[n * (K / GROUP) + g], zero = weight.zero(n, g);
      float values[GROUP];
      constexpr int WHOLE = GROUP - GROUP % LANES;
      for (int i = 0; i < WHOLE; i += LANES)
        ((load_vec(unpacked.codes + i) - Vec(zero)) * Vec(scale)).store(values + i);
      for (int i = WHOLE; i < GROUP; ++i) values[i] = (unpacked.codes[i] - zero) * scale;
      from_floats<GROUP>(y + n * K + g * GROUP, values);
    }
}

}  // namespace precast
#endif

// Weights that are codes as a matrix, for products with many rows.
#ifndef PRECAST_MATRIX
#define PRECAST_MATRIX

namespace precast {

// The codes of one group, a byte each.
template <int GROUP, int BITS>
struct Apart {
  uint8_t codes[GROUP];

  explicit Apart(const uint8_t* from) {
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

// -> y [outputs, K]
template <typename T, int K, int GROUP, int BITS, bool ZEROS>
void matrix(T* y, const Grid<K, GROUP, BITS, ZEROS>& grid) {
#pragma omp parallel for if (grid.outputs * K >= WORTH)
  for (int64_t n = 0; n < grid.outputs; ++n)
    for (int g = 0; g < K / GROUP; ++g) {
      const Apart<GROUP, BITS> apart(grid.codes + (n * K + g * GROUP) * BITS / 8);
      const float scale = grid.scales[n * (K / GROUP) + g], zero = grid.zero(n, g);
      float values[GROUP];
      constexpr int WHOLE = GROUP - GROUP % LANES;
      for (int i = 0; i < WHOLE; i += LANES)
        ((in_float(apart.codes + i) - Vec(zero)) * Vec(scale)).store(values + i);
      for (int i = WHOLE; i < GROUP; ++i) values[i] = (apart.codes[i] - zero) * scale;
      put<GROUP>(y + n * K + g * GROUP, values);
    }
}

}  // namespace precast
#endif

// Numbers of the dtypes that are computed with as float32.
#ifndef PRECAST_NUMBERS
#define PRECAST_NUMBERS
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "standalone.h"

namespace precast {

#if defined(__F16C__)
inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float half_to_float(uint16_t bits) {
  __fp16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return half;
}
inline uint16_t float_to_half(float value) {
  const __fp16 half = value;
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
#endif

inline float to_float(const char* from, int32_t dtype) {
  if (dtype == FLOAT32) {
    float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  if (dtype == BFLOAT16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  return half_to_float(bits);
}

inline void from_float(char* to, float value, int32_t dtype) {
  if (dtype == FLOAT32) {
    std::memcpy(to, &value, sizeof(value));
  } else if (dtype == BFLOAT16) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    // To nearest, to even on a tie; a NaN stays one.
    const uint16_t bits = value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    const uint16_t bits = float_to_half(value);
    std::memcpy(to, &bits, sizeof(bits));
  }
}

inline bool is_float(int32_t dtype) { return dtype == FLOAT32 || dtype == BFLOAT16 || dtype == FLOAT16; }

}  // namespace precast
#endif

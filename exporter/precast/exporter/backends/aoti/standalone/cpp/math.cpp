// The functions over vectors that PyTorch's Vectorized calls by Sleef's names (https://sleef.org): float32, for the
// vectors of AVX2 and AVX-512. Errors are below 2.5 units in the last place in those that models spend time in (of sine
// and cosine near their zeros, below 1e-7 for |x| < 1e9); the others go through libm, number by number.
//
// Coefficients are minimax fits of our own, made with tools/fit_functions.py, to the functions that comments name.
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

template <int N>
struct Types {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef int32_t Integers __attribute__((vector_size(4 * N)));
  typedef uint32_t Words __attribute__((vector_size(4 * N)));
  typedef double Doubles __attribute__((vector_size(8 * N)));
  typedef int64_t Longs __attribute__((vector_size(8 * N)));
};

template <int N> using Floats = typename Types<N>::Floats;
template <int N> using Integers = typename Types<N>::Integers;
template <int N> using Words = typename Types<N>::Words;
template <int N> using Doubles = typename Types<N>::Doubles;
template <int N> using Longs = typename Types<N>::Longs;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <int N>
Floats<N> all(float value) { return value - Floats<N>{}; }

template <int N>
Floats<N> as_floats(Integers<N> bits) { return reinterpret_cast<Floats<N>>(bits); }

template <int N>
Integers<N> as_bits(Floats<N> x) { return reinterpret_cast<Integers<N>>(x); }

template <int N>
Floats<N> absolute(Floats<N> x) { return as_floats<N>(as_bits<N>(x) & 0x7fffffff); }

// The magnitude of one, the sign of the other.
template <int N>
Floats<N> with_sign_of(Floats<N> magnitude, Floats<N> sign) {
  return as_floats<N>((as_bits<N>(magnitude) & 0x7fffffff) | (as_bits<N>(sign) & INT32_MIN));
}

// To the nearest integer, for |x| < 2^22.
template <int N>
Floats<N> nearest(Floats<N> x) {
  constexpr float BIAS = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  return (x + BIAS) - BIAS;
}

// c[0] + c[1] x + …
template <int N, int COUNT>
Floats<N> polynomial(Floats<N> x, const float (&c)[COUNT]) {
  Floats<N> sum = all<N>(c[COUNT - 1]);
#pragma GCC unroll 16
  for (int i = COUNT - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// 2^n for integers -126 <= n <= 127.
template <int N>
Floats<N> power_of_two(Floats<N> n) { return as_floats<N>((__builtin_convertvector(n, Integers<N>) + 127) << 23); }

// exp(n ln 2 + r) = 2^n (1 + r + r^2 P(r)), |r| <= ln 2 / 2.
template <int N>
Floats<N> exponential(Floats<N> x) {
  constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693145752f, LN2_LOW = 1.42860677e-6f;
  const Floats<N> bounded = x > 89.0f ? all<N>(89.0f) : x < -104.0f ? all<N>(-104.0f) : x;
  const Floats<N> n = nearest<N>(bounded * LOG2E), r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
  const Floats<N> p = polynomial<N>(r, {0.50000001f, 0.166665129f, 0.0416661873f, 0.00836959822f, 0.00139517192f});
  const Floats<N> half = nearest<N>(n * 0.5f);  // 2^n itself may be beyond what a float holds
  const Floats<N> y = (p * r * r + r + 1.0f) * power_of_two<N>(half) * power_of_two<N>(n - half);
  return x != x ? x : x > 88.8f ? all<N>(INFINITE) : y;
}

// tanh(x) = x + x^3 P(x^2) near 0, else 1 - 2 / (exp(2x) + 1).
template <int N>
Floats<N> hyperbolic_tangent(Floats<N> x) {
  const Floats<N> size = absolute<N>(x), square = x * x;
  const Floats<N> p =
      polynomial<N>(square, {-0.333332721f, 0.133311528f, -0.0537141073f, 0.0205517192f, -0.00560391378f});
  const Floats<N> large = 1.0f - 2.0f / (exponential<N>(size * 2.0f) + 1.0f);
  const Floats<N> y = size < 0.625f ? size + size * square * p : large;
  return x != x ? x : with_sign_of<N>(y, x);
}

// erf(x) = x + x P(x^2) below 1, else 1 - exp(-Q(x)) with Q(x) = -ln erfc(x).
template <int N>
Floats<N> error_function(Floats<N> x) {
  const Floats<N> size = absolute<N>(x), bounded = size < 3.95f ? size : all<N>(3.95f);
  const Floats<N> near = size + size * polynomial<N>(
      size * size, {0.128379167f, -0.376126258f, 0.112835851f, -0.0268538119f, 0.00518832767f, -0.000801019352f,
                    7.85386099e-05f});
  const Floats<N> exponent = polynomial<N>(
      bounded, {-0.000188036344f, 1.12957841f, 0.633219924f, 0.108418546f, -0.025208238f, 0.00420455532f,
                -0.00044133513f, 2.16867502e-05f});
  const Floats<N> far = size < 3.95f ? 1.0f - exponential<N>(-exponent) : all<N>(1.0f);
  return x != x ? x : with_sign_of<N>(size < 1.0f ? near : far, x);
}

// ln(2^n (1 + f)) = n ln 2 + f - f^2 / 2 + f^3 P(f), sqrt(1/2) <= 1 + f < sqrt(2).
template <int N>
Floats<N> logarithm(Floats<N> x) {
  const Integers<N> is_small = x < 1.17549435e-38f;
  const Floats<N> scaled = is_small ? x * 8388608.0f : x;
  // Less the bits of sqrt(1/2). Those of a negative number wrap around, and are not looked at.
  const Integers<N> shifted = (Integers<N>)((Words<N>)as_bits<N>(scaled) - 0x3f3504f3u);
  const Floats<N> n = __builtin_convertvector((shifted >> 23), Floats<N>) - (is_small ? all<N>(23.0f) : all<N>(0.0f));
  const Floats<N> f = as_floats<N>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const Floats<N> p =
      polynomial<N>(f, {0.333333104f, -0.249999866f, 0.200022266f, -0.166692512f, 0.142186589f, -0.123843431f,
                        0.118729655f, -0.117898352f, 0.0691542441f});
  const Floats<N> y = n * 0.693359375f + (f - 0.5f * f * f + (f * f * f * p + n * -2.12194440e-4f));
  return x == 0.0f ? all<N>(-INFINITE) : x < 0.0f ? all<N>(NAN) : x == INFINITE || x != x ? x : y;
}

// Sine and cosine of r = x - k pi / 2, |r| <= pi / 4. The difference is taken in float64, which positions of any length
// need.
template <int N>
Floats<N> sine_of_quarter(Floats<N> x, int32_t quarters) {
  const Doubles<N> wide = __builtin_convertvector(x, Doubles<N>);
  const Integers<N> is_huge = !(absolute<N>(x) < 1e9f);
  const Doubles<N> half = wide < 0.0 ? Doubles<N>{} - 0.5 : Doubles<N>{} + 0.5;
  const Doubles<N> turns = wide * 0.63661977236758134 + half;  // 2 / pi
  const Longs<N> k = __builtin_convertvector(turns, Longs<N>);
  const Doubles<N> whole = __builtin_convertvector(k, Doubles<N>);
  const Doubles<N> rest = wide - whole * 1.5707963267948966;
  const Floats<N> r = __builtin_convertvector(rest, Floats<N>);
  const Integers<N> quarter = __builtin_convertvector(k, Integers<N>) + quarters;
  const Floats<N> s = r * r;
  const Floats<N> sine =
      r + r * s * polynomial<N>(s, {-0.166666666f, 0.00833332914f, -0.000198392566f, 2.7175645e-06f});
  const Floats<N> cosine = 1.0f - 0.5f * s + s * s * polynomial<N>(s, {0.0416666457f, -0.0013887306f, 2.44312049e-05f});
  Floats<N> y = (quarter & 1) != 0 ? cosine : sine;
  y = (quarter & 2) != 0 ? -y : y;
  if (quarters == 0) y = x == 0.0f ? x : y;
  for (int i = 0; i < N; ++i)
    if (is_huge[i]) y[i] = quarters ? std::cos(x[i]) : std::sin(x[i]);
  return y;
}

template <int N>
Floats<N> sine(Floats<N> x) { return sine_of_quarter<N>(x, 0); }

template <int N>
Floats<N> cosine(Floats<N> x) { return sine_of_quarter<N>(x, 1); }

template <int N, typename Function>
Floats<N> one_by_one(Function function, Floats<N> x) {
  for (int i = 0; i < N; ++i) x[i] = function(x[i]);
  return x;
}

template <int N, typename Function>
Floats<N> one_by_one(Function function, Floats<N> x, Floats<N> y) {
  for (int i = 0; i < N; ++i) x[i] = function(x[i], y[i]);
  return x;
}

}  // namespace

#define FUNCTION(name, digits, N, made)                                                                            \
  extern "C" Floats<N> Sleef_##name##f##N##digits(Floats<N> x) { return made; }
#define FUNCTION_OF_TWO(name, digits, N, made)                                                                     \
  extern "C" Floats<N> Sleef_##name##f##N##digits(Floats<N> x, Floats<N> y) { return made; }
#define BY_LIBM(name, digits, N) FUNCTION(name, digits, N, (one_by_one<N>([](float v) { return std::name(v); }, x)))
#define BY_LIBM_OF_TWO(name, digits, N) \
  FUNCTION_OF_TWO(name, digits, N, (one_by_one<N>([](float v, float w) { return std::name(v, w); }, x, y)))

#define ALL_FUNCTIONS(N)                        \
  FUNCTION(exp, _u10, N, exponential<N>(x))     \
  FUNCTION(tanh, _u10, N, hyperbolic_tangent<N>(x)) \
  FUNCTION(erf, _u10, N, error_function<N>(x))  \
  FUNCTION(log, _u10, N, logarithm<N>(x))       \
  FUNCTION(sin, _u10, N, sine<N>(x))            \
  FUNCTION(sin, _u35, N, sine<N>(x))            \
  FUNCTION(cos, _u10, N, cosine<N>(x))          \
  FUNCTION(cos, _u35, N, cosine<N>(x))          \
  BY_LIBM(exp2, _u10, N)                        \
  BY_LIBM(expm1, _u10, N)                       \
  BY_LIBM(log1p, _u10, N)                       \
  BY_LIBM(log2, _u10, N)                        \
  BY_LIBM(log10, _u10, N)                       \
  BY_LIBM(erfc, _u15, N)                        \
  BY_LIBM(tan, _u10, N)                         \
  BY_LIBM(asin, _u10, N)                        \
  BY_LIBM(acos, _u10, N)                        \
  BY_LIBM(atan, _u10, N)                        \
  BY_LIBM(sinh, _u10, N)                        \
  BY_LIBM(cosh, _u10, N)                        \
  BY_LIBM(asinh, _u10, N)                       \
  BY_LIBM(acosh, _u10, N)                       \
  BY_LIBM(atanh, _u10, N)                       \
  BY_LIBM_OF_TWO(pow, _u10, N)                  \
  BY_LIBM_OF_TWO(atan2, _u10, N)                \
  BY_LIBM_OF_TWO(hypot, _u05, N)                \
  BY_LIBM_OF_TWO(fmod, , N)                     \
  BY_LIBM_OF_TWO(copysign, , N)                 \
  BY_LIBM_OF_TWO(nextafter, , N)

#if defined(__AVX2__)
ALL_FUNCTIONS(8)
#endif
#if defined(__AVX512F__)
ALL_FUNCTIONS(16)
#endif

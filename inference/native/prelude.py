"""C text that every compiled program begins or ends with: functions that C has not, and how the code is called."""

PRELUDE = r"""#include <stdint.h>
#define LN2 0.693147180559945309417232121458
#define PI 3.14159265358979323846264338328
#ifdef VECTOR_MATH
#define VECTOR __attribute__((__simd__("notinbranch")))
#else
#define VECTOR
#endif
#define UNARY(name) VECTOR double name(double); VECTOR float name##f(float);
UNARY(acos) UNARY(acosh) UNARY(asin) UNARY(asinh) UNARY(atan) UNARY(atanh) UNARY(cos) UNARY(cosh) UNARY(erf) UNARY(erfc)
UNARY(exp) UNARY(exp2) UNARY(expm1) UNARY(log) UNARY(log10) UNARY(log1p) UNARY(log2) UNARY(sin) UNARY(sinh) UNARY(tan)
UNARY(tanh)
VECTOR double pow(double, double); VECTOR float powf(float, float);
VECTOR double atan2(double, double); VECTOR float atan2f(float, float);
double sqrt(double), fabs(double), floor(double), ceil(double), rint(double), trunc(double), lgamma_r(double, int*);
float sqrtf(float), fabsf(float), floorf(float), ceilf(float), rintf(float), truncf(float);
static inline double log_gamma(double x) { int sign; return lgamma_r(x, &sign); }
#define EXTREMES(T, f) /* of two, NaN if one is; written so that loops of them vectorise */ \
  static inline T maximum##f(T x, T y) { return __builtin_isunordered(x, y) ? x + y : x > y ? x : y; } \
  static inline T minimum##f(T x, T y) { return __builtin_isunordered(x, y) ? x + y : x < y ? x : y; }
EXTREMES(double, ) EXTREMES(float, f)
static double digamma(double x) {
  if (x == 0) return __builtin_copysign(__builtin_inf(), -x);
  double shift = 0;
  if (x < 0) {
    if (x == floor(x)) return __builtin_nan("");
    shift = -PI / tan(PI * x);
    x = 1 - x;
  }
  for (; x < 12; x += 1) shift -= 1 / x;
  double r = 1 / x, q = r * r;
  return shift + log(x) - r / 2 - q * (1.0 / 12 - q * (1.0 / 120 - q * (1.0 / 252 - q * (1.0 / 240 - q * (1.0 / 132
    - q * (691.0 / 32760 - q / 12))))));
}
static double trigamma(double x) {
  double sign = 1, shift = 0;
  if (x < 0.5) { double s = sin(PI * x); shift = -(PI * PI) / (s * s); x = 1 - x; sign = -1; }
  double sum = 0;
  for (; x < 12; x += 1) sum += 1 / (x * x);
  double r = 1 / x, q = r * r;
  sum += r + q / 2 + r * q * (1.0 / 6 - q * (1.0 / 30 - q * (1.0 / 42 - q * (1.0 / 30 - q * (5.0 / 66
    - q * (691.0 / 2730 - q * 7 / 6))))));
  return sign * (sum + shift);
}
"""

ENTRY = r"""
int64_t pyrometer_call(void** a, void** r, void** c) { return body(a, r, c); }
"""

SAMPLER = r"""
int64_t pyrometer_log_density(uint64_t dim, double* x, double* gradient, double* value, void* user) {
  %sdouble values[%d];
  void *a[1] = {x}, *r[2] = {values, gradient};
  int64_t fault = body(a, r, (void**)user);
  if (fault) return fault;
  double sum = 0, check = 0;
  for (int64_t i = 0; i < %d; i++) sum += values[i];
  for (uint64_t i = 0; i < dim; i++) check += gradient[i] * 0;
  *value = sum;
  check += sum * 0;
  return check == 0 ? 0 : 4;
}
"""

# steps of Adam (Kingma & Ba 2015, arxiv.org/abs/1412.6980) on parameters c[place[p]] with gradients r[source[p]];
# arguments move on by their stride (bytes) at each step. Answers how many steps were taken.
TRAINER = r"""
int64_t pyrometer_adam(int64_t steps, int64_t done, void** arguments, const int64_t* strides, void** r, void** c,
                       int64_t count, const int64_t* place, const int64_t* source, const int64_t* sizes,
                       void** means, void** squares,
                       const double* settings, double* losses, int64_t* fault) {
  const double rate = settings[0], decay1 = settings[1], decay2 = settings[2], epsilon = settings[3];
  void* a[%d];
  for (int64_t step = 0; step < steps; step++) {
    for (int i = 0; i < %d; i++) a[i] = (char*)arguments[i] + step * strides[i];
    if ((*fault = body(a, r, c))) return step;
    losses[step] = *(%s*)r[0];
    if (losses[step] - losses[step] != 0) return step;
    const double t = done + step + 1;
    const double size = rate / (1 - pow(decay1, t)), root = 1 / sqrt(1 - pow(decay2, t));
    for (int64_t p = 0; p < count; p++) {
      %s *restrict w = c[place[p]], *restrict m = means[p], *restrict v = squares[p];
      const %s* restrict g = r[source[p]];
      const %s b1 = decay1, b2 = decay2, s = size, q = root, e = epsilon;
      for (int64_t i = 0; i < sizes[p]; i++) {
        m[i] = b1 * m[i] + (1 - b1) * g[i];
        v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i];
        w[i] -= s * m[i] / (@sqrt(v[i]) * q + e);
      }
    }
  }
  return steps;
}
"""

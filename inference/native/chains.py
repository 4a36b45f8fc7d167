"""Forward-backward over chains of K states in machine code: the sums, and draws of whole paths.

    a_t(j) = e_t(j) sum_i a_{t-1}(i) M_t(i, j),    b_{t-1}(i) = sum_j M_t(i, j) e_t(j) b_t(j)

run in linear space, each row scaled to sum to one. A number that is lost beside the largest of its row must not come
back into weight later on. Where no element of M is below 1e-100 of the largest, it cannot: from each state every other
is reached in one step. Else a sum below `FLOOR` that is not zero by the zeros of the factors sends its chain through
the same recursion in logs, which is ten times as slow. Both run over several chains side by side.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .toolchain import load

LARGEST = 256  # states, whose tables lie on the stack

TEXT = r"""#include <stdint.h>
#include <math.h>
#define K %d
#define LANES 8
#define FLOOR 1e-140
#ifdef VECTOR_MATH
__attribute__((__simd__("notinbranch"))) double exp(double);
#endif
#define MOVE(t, n) ((t) * step + (n) * row)
typedef const double* restrict in;

static double largest(const double* x) {
  double top = -INFINITY;
  for (int k = 0; k < K; k++) if (!(x[k] <= top)) top = x[k];
  return top;
}

static double log_sum(const double* x) {
  double top = largest(x), sum = 0;
  if (!(top > -INFINITY)) return top;
  for (int k = 0; k < K; k++) sum += exp(x[k] - top);
  return top + log(sum);
}

/* exp(seen) with largest element 1 in each row of (R, N, K), and the logs of what that took out of each chain (N) */
void pyrometer_scaled(int64_t R, int64_t N, in seen, double* restrict e, double* restrict scale) {
  for (int64_t n = 0; n < N; n++) scale[n] = 0;
  for (int64_t r = 0; r < R; r++) for (int64_t n = 0; n < N; n++) {
    const double* x = seen + (r * N + n) * K;
    const double top = largest(x), size = __builtin_isfinite(top) ? top : 0;
    scale[n] += size;
    for (int k = 0; k < K; k++) e[(r * N + n) * K + k] = x[k] - size;
  }
  for (int64_t i = 0; i < R * N * K; i++) e[i] = exp(e[i]);
}

/* a_t, normalised, into a (N, T, K), of chains [from, to); log of the whole sum into total (N); lost[n]: see above */
static void forward(int64_t T, int64_t N, int64_t from, int64_t to, int64_t step, int64_t row, int careful, in first,
                    in m, in e, in seen, double* restrict a, double* restrict total, int8_t* restrict lost) {
  double product[LANES];
  for (int64_t t = 0; t < T; t++) for (int64_t n = from; n < to; n++) {
    double u[K], c = 0, *here = a + (n * T + t) * K;
    if (t == 0) {
      const double top = largest(first + n * K);
      for (int j = 0; j < K; j++) u[j] = exp(first[n * K + j] - top);
      if (careful) for (int j = 0; j < K; j++) lost[n] |= u[j] < FLOOR && first[n * K + j] > -INFINITY;
      total[n] = top;
      product[n - from] = 1;
    } else {
      const double *M = m + MOVE(t - 1, n), *before = here - K, *w = e + ((t - 1) * N + n) * K;
      for (int j = 0; j < K; j++) u[j] = 0;
      for (int i = 0; i < K; i++) for (int j = 0; j < K; j++) u[j] += before[i] * M[i * K + j];
      for (int j = 0; j < K; j++) u[j] *= w[j];
      if (careful) for (int j = 0; j < K; j++) if (u[j] < FLOOR && seen[((t - 1) * N + n) * K + j] > -INFINITY)
        for (int i = 0; i < K; i++) lost[n] |= before[i] > 0 && M[i * K + j] > 0;
    }
    for (int j = 0; j < K; j++) c += u[j];
    lost[n] |= !(c > 0);
    const double scale = 1 / c;
    for (int j = 0; j < K; j++) here[j] = u[j] * scale;
    double p = product[n - from] * c;
    if (p < 1e-100 || p > 1e100 || t == T - 1) { total[n] += log(p); p = 1; }
    product[n - from] = p;
  }
}

/* a becomes the state marginals; pairs (N, K, K) those of neighbours, summed over time */
static void backward(int64_t T, int64_t N, int64_t from, int64_t to, int64_t step, int64_t row, int careful, in m, in e,
                     in seen, double* restrict a, double* restrict pairs, int8_t* restrict lost) {
  double b[LANES][K];
  for (int64_t n = from; n < to; n++) {
    for (int k = 0; k < K; k++) b[n - from][k] = 1.0 / K;
    for (int k = 0; k < K * K; k++) pairs[n * K * K + k] = 0;
  }
  for (int64_t t = T - 1; t > 0; t--) for (int64_t n = from; n < to; n++) {
    const double *M = m + MOVE(t - 1, n), *factor = e + ((t - 1) * N + n) * K;
    double *after = b[n - from], *Q = pairs + n * K * K, *here = a + (n * T + t - 1) * K, w[K], v[K], c = 0, s = 0;
    for (int j = 0; j < K; j++) w[j] = factor[j] * after[j];
    for (int i = 0; i < K; i++) {
      v[i] = 0;
      for (int j = 0; j < K; j++) v[i] += M[i * K + j] * w[j];
    }
    if (careful) for (int i = 0; i < K; i++) if (v[i] < FLOOR) for (int j = 0; j < K; j++)
      lost[n] |= after[j] > 0 && M[i * K + j] > 0 && seen[((t - 1) * N + n) * K + j] > -INFINITY;
    for (int i = 0; i < K; i++) { c += v[i]; s += here[i] * v[i]; }
    lost[n] |= !(c > 0 && s > 0);
    const double scale = 1 / c, share = 1 / s;
    for (int i = 0; i < K; i++) {
      const double weight = here[i] * share;
      here[i] = weight * v[i];
      if (step) for (int j = 0; j < K; j++) Q[i * K + j] += weight * M[i * K + j] * w[j];
      else for (int j = 0; j < K; j++) Q[i * K + j] += weight * w[j];
    }
    for (int i = 0; i < K; i++) after[i] = v[i] * scale;
  }
  if (!step && T > 1) for (int64_t n = from; n < to; n++)
    for (int k = 0; k < K * K; k++) pairs[n * K * K + k] *= m[MOVE(0, n) + k];
}

/* the same of one chain, in logs: log a_t into a */
static void log_forward(int64_t T, int64_t N, int64_t n, int64_t step, int64_t row, in first, in log_m, in seen,
                        double* restrict a, double* restrict total) {
  total[n] = 0;
  for (int64_t t = 0; t < T; t++) {
    double x[K], u[K], *here = a + (n * T + t) * K;
    for (int j = 0; j < K; j++) {
      if (t == 0) { u[j] = first[n * K + j]; continue; }
      for (int i = 0; i < K; i++) x[i] = here[i - K] + log_m[MOVE(t - 1, n) + i * K + j];
      u[j] = log_sum(x) + seen[((t - 1) * N + n) * K + j];
    }
    const double size = log_sum(u);
    total[n] += size;
    for (int j = 0; j < K; j++) here[j] = u[j] - (size > -INFINITY ? size : 0);
  }
}

static void log_backward(int64_t T, int64_t N, int64_t n, int64_t step, int64_t row, in log_m, in seen,
                         double* restrict a, double* restrict pairs) {
  double b[K], w[K], v[K], x[K], *Q = pairs + n * K * K;
  for (int k = 0; k < K; k++) b[k] = 0;
  for (int k = 0; k < K * K; k++) Q[k] = 0;
  for (int64_t t = T - 1; t >= 0; t--) {
    double* here = a + (n * T + t) * K;
    for (int i = 0; i < K; i++) x[i] = here[i] + b[i];
    const double size = log_sum(x);
    if (t) {
      const double *M = log_m + MOVE(t - 1, n), *before = here - K;
      for (int j = 0; j < K; j++) w[j] = seen[((t - 1) * N + n) * K + j] + b[j];
      double joint[K * K], top = -INFINITY, sum = 0;
      for (int i = 0; i < K; i++) {
        for (int j = 0; j < K; j++) {
          v[j] = M[i * K + j] + w[j];
          joint[i * K + j] = before[i] + v[j];
          if (!(joint[i * K + j] <= top)) top = joint[i * K + j];
        }
        b[i] = log_sum(v);
      }
      for (int k = 0; k < K * K; k++) sum += joint[k] = exp(joint[k] - top);
      for (int k = 0; k < K * K; k++) Q[k] += joint[k] / sum;
    }
    for (int i = 0; i < K; i++) here[i] = exp(x[i] - size);
    const double scale = largest(b);
    if (scale > -INFINITY) for (int i = 0; i < K; i++) b[i] -= scale;
  }
}

void pyrometer_sums(int64_t T, int64_t N, int64_t step, int64_t row, int64_t mode, in first, in log_m, in m, in seen,
                    in e, double* a, double* pairs, double* total, int8_t* lost) {
  for (int64_t from = 0; from < N; from += LANES) {
    const int64_t to = from + LANES < N ? from + LANES : N;
    for (int64_t n = from; n < to; n++) lost[n] = mode > 1;
    if (mode < 2) {
      forward(T, N, from, to, step, row, mode, first, m, e, seen, a, total, lost);
      if (pairs) backward(T, N, from, to, step, row, mode, m, e, seen, a, pairs, lost);
    }
    for (int64_t n = from; n < to; n++) if (lost[n]) {
      log_forward(T, N, n, step, row, first, log_m, seen, a, total);
      if (pairs) log_backward(T, N, n, step, row, log_m, seen, a, pairs);
    }
  }
}

/* paths z (T, N, S) from uniforms (T, N, S), chosen from the end; a and lost by `pyrometer_sums` without pairs */
void pyrometer_draws(int64_t T, int64_t N, int64_t S, int64_t step, int64_t row, in log_m, in m, in a,
                     const int8_t* lost, in uniform, int64_t* restrict z) {
  for (int64_t t = T - 1; t >= 0; t--) for (int64_t n = 0; n < N; n++) {
    const double* here = a + (n * T + t) * K;
    const int64_t *next = z + ((t + 1) * N + n) * S, last = t == T - 1;
    double share[K][K];  /* cumulative, of the state now given the next */
    for (int j = 0; j < (last ? 1 : K); j++) {
      double x[K], sum = 0;
      for (int i = 0; i < K; i++) {
        if (lost[n]) x[i] = here[i] + (last ? 0 : log_m[MOVE(t, n) + i * K + j]);
        else x[i] = here[i] * (last ? 1 : m[MOVE(t, n) + i * K + j]);
      }
      const double top = lost[n] ? largest(x) : 0;
      for (int i = 0; i < K; i++) share[j][i] = sum += lost[n] ? exp(x[i] - top) : x[i];
    }
    for (int64_t s = 0; s < S; s++) {
      const double *row_of = share[last ? 0 : next[s]], u = uniform[(t * N + n) * S + s] * row_of[K - 1];
      int64_t state = 0;
      for (int i = 0; i < K - 1; i++) state += u >= row_of[i];
      z[(t * N + n) * S + s] = state;
    }
  }
}
"""


class Chains:
    """Chains in memory as the code reads them: factors in logs, `first` (N, K), `moves` (1 or T - 1, 1 or N, K, K) and
    `seen` (T - 1, N, K), and, up to scales, the last two as they are. `kind`: 0 where no move is below 1e-100 of the
    largest, 1 where linear space holds them, 2 where it does not. Raises `CompileError` without a compiler."""

    def __init__(self, first: Tensor, moves: Tensor, seen: Tensor, linear: Tensor, taken: Tensor, kind: int) -> None:
        """linear: exp of `moves` but for factors, whose logs over all steps are `taken` (N)."""
        self.library = _library(first.shape[-1])
        self.T, (self.N, self.K), self.kind = len(seen) + 1, first.shape, kind
        e, scale = seen.new_empty(seen.shape), seen.new_empty(self.N)
        self.factors = [t.contiguous() for t in (first, moves, linear, seen, e)]
        self._call("pyrometer_scaled", seen.shape[:2], (self.factors[3], e, scale))
        self.scale = scale + taken
        steps, rows = moves.shape[:2]
        self.strides = [rows * self.K**2 if steps > 1 else 0, self.K**2 if rows > 1 else 0]
        self.lost = torch.zeros(self.N, dtype=torch.int8)
        self.a = first.new_empty(self.N, self.T, self.K)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """p(z_t | x) (N, T, K), p(z_{t-1}, z_t | x) summed over t (N, K, K), and log p(x) (N)."""
        pairs = self.a.new_empty(self.N, self.K, self.K)
        total = self._run(pairs)
        return self.a, pairs, total

    def draws(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Paths (T, N, S) from uniform numbers (T, N, S), and log p(x) (N); where that is not finite, no paths."""
        total = self._run(None)
        z = torch.zeros(uniform.shape, dtype=torch.long)
        if bool(total.isfinite().all()):
            _, log_m, m, _, _ = self.factors
            self._call("pyrometer_draws", (*uniform.shape, *self.strides), (log_m, m, self.a, self.lost, uniform, z))
        return z, total

    def _run(self, pairs: Tensor | None) -> Tensor:
        total = self.a.new_empty(self.N)
        sizes = self.T, self.N, *self.strides, self.kind
        self._call("pyrometer_sums", sizes, (*self.factors, self.a, pairs, total, self.lost))
        return torch.where(self.lost > 0, total, total + self.scale)

    def _call(self, name: str, sizes: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        getattr(self.library, name)(*map(ctypes.c_int64, sizes), *addresses)


@functools.lru_cache(maxsize=64)
def _library(states: int) -> Any:
    return load(TEXT % states)[0]

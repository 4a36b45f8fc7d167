"""Log densities of numpy or JAX arrays, `xp` being the one or the other: a second hand beside Pyro's distributions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def normal(x: Any, loc: Any, scale: Any, xp: Any) -> Any:
    """log N(x; loc, scale), elementwise."""
    return -0.5 * ((x - loc) / scale) ** 2 - xp.log(scale) - LOG_SQRT_2PI


def half_normal(x: Any, scale: float, xp: Any) -> Any:
    """log of twice N(x; 0, scale), x > 0."""
    return -0.5 * (x / scale) ** 2 - math.log(scale) - LOG_SQRT_2PI + math.log(2)


def half_cauchy(x: Any, scale: float, xp: Any) -> Any:
    """log 2 / (pi scale (1 + (x / scale)^2)), x > 0."""
    return math.log(2 / (math.pi * scale)) - xp.log1p((x / scale) ** 2)


def log_normal(x: Any, loc: float, scale: float, xp: Any) -> Any:
    """log density of exp(N(loc, scale)), x > 0."""
    return normal(xp.log(x), loc, scale, xp) - xp.log(x)


def multivariate_normal(x: Any, covariance: Any, xp: Any) -> Any:
    """log N(x_n; 0, covariance) for every row of x (N, D), or for x (D), through one Cholesky factor."""
    linalg = importlib.import_module("scipy.linalg" if xp is np else "jax.scipy.linalg")
    factor = xp.linalg.cholesky(covariance)
    white = linalg.solve_triangular(factor, x.T, lower=True)  # (D, N) or (D)
    return -0.5 * (white**2).sum(0) - xp.log(xp.diagonal(factor)).sum() - x.shape[-1] * LOG_SQRT_2PI


def bernoulli(x: Any, logits: Any, xp: Any) -> Any:
    """log probability of x in {0, 1}, elementwise."""
    return x * logits - xp.logaddexp(0.0, logits)


def positive(u: dict[str, Any], names: Sequence[str], xp: Any) -> tuple[dict[str, Any], Any]:
    """z, with exp taken of the sites `names`, and log |dz/du|."""
    return {n: xp.exp(v) if n in names else v for n, v in u.items()}, sum(xp.sum(u[n]) for n in names)

"""The g-and-k law: four parameters of a quantile function, easy to simulate and without a density in closed form.

    A, B, g, k ~ U(0, 10),   x_i = A + B (1 + 0.8 tanh(g z_i / 2)) (1 + z_i^2)^k z_i,   z_i ~ N(0, 1),   i = 1..N

g skews, k makes the tails heavy. The density follows from the quantile function Q by finding z with Q(z) = x, for Q
rises: p(x) = phi(z) / Q'(z). The usual test of ABC; here the truth is known as well.

Reference: importance sampling of the four parameters, in logits, from a t law that earlier points were used to place,
at scrambled Sobol points: the mean of 16 scramblings, with its error from how they differ. In numpy, by nothing that
the engines use.

Rayner & MacGillivray 2002, doi:10.1023/A:1013120305780; Allingham, King & Mengersen 2009,
doi:10.1007/s11222-008-9083-x; Owen 1997, doi:10.1137/S0036142994277468 (scrambled points).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from scipy import optimize, special, stats
from scipy.stats import qmc
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference
from pyrometer.inference.simulator import Simulator

from . import _settings

SITES = ("A", "B", "g", "k")
TRUTH = (3.0, 1.0, 2.0, 0.5)
UPPER = 10.0
SKEW = 0.8
FAR = 12.0  # z is sought within


class GAndK(TorchDistribution):
    """x given A, B, g, k. Where it takes |z| > 12 to explain x the density is below 1e-31, and no longer exact."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, A: Tensor, B: Tensor, g: Tensor, k: Tensor) -> None:
        self.parameters = torch.broadcast_tensors(A, B, g, k)
        super().__init__(self.parameters[0].shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GAndK:
        return GAndK(*(p.expand(batch_shape) for p in self.parameters))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        like = self.parameters[0]
        z = torch.randn((*sample_shape, *self.batch_shape), dtype=like.dtype, device=like.device)
        return quantile(z, *self.parameters)

    def log_prob(self, value: Tensor) -> Tensor:
        parameters = self.parameters
        fixed = [p.detach() for p in parameters]
        goal = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        low, high = torch.full_like(goal, -FAR), torch.full_like(goal, FAR)
        for _ in range(14):  # halved until Newton's steps are sure
            middle = (low + high) / 2
            below = quantile(middle, *fixed) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        z = ((low + high) / 2).detach()
        z = z - (quantile(z, *fixed) - goal) / slope(z, *fixed)
        for _ in range(2):  # with the graph: two give z, its first and its second derivatives
            z = z - (quantile(z, *parameters) - goal) / slope(z, *parameters)
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - slope(z, *parameters).log()


def quantile(z: Tensor, A: Tensor, B: Tensor, g: Tensor, k: Tensor) -> Tensor:
    """Q at the normal quantile z."""
    return A + B * (1 + SKEW * torch.tanh(g * z / 2)) * (k * torch.log1p(z.square())).exp() * z


def slope(z: Tensor, A: Tensor, B: Tensor, g: Tensor, k: Tensor) -> Tensor:
    """dQ / dz, which is positive for k >= 0."""
    bend = torch.tanh(g * z / 2)
    square = z.square()
    return (
        B
        * (1 + square) ** k
        * ((1 + SKEW * bend) * (1 + (2 * k + 1) * square) / (1 + square) + SKEW * g * z / 2 * (1 - bend.square()))
    )


def problem(*, num_data: int = 100, simulated: bool = True, seed: int = 0) -> Problem:
    """N draws at A = 3, B = 1, g = 2, k = 1/2, in ascending order.

    simulated  declare the sorted data as a simulator's, without their likelihood: for ABC alone

    Raises `ProblemError` on a setting out of range.
    """
    num_data = _settings.count("num_data", num_data)
    if not isinstance(simulated, bool):
        raise ProblemError(f"simulated={simulated!r}: expected True or False.")
    z = torch.randn(num_data, generator=_settings.generator("seed", seed), dtype=torch.float64)
    x = quantile(z, *(torch.tensor(value, dtype=torch.float64) for value in TRUTH)).sort().values

    def model(x: Tensor) -> None:
        zero = x.new_zeros(())
        law = GAndK(*(pyro.sample(name, dist.Uniform(zero, UPPER)) for name in SITES)).expand(x.shape)
        if simulated:
            pyro.sample("x", Simulator(law.sample().sort(-1).values, event_dim=1), obs=x)
            return
        with pyro.plate("data", x.shape[0]):
            pyro.sample("x", law, obs=x)

    return Problem(model, args=(x,), reference=reference, name="g_and_k")


def octiles(data: Mapping[str, Tensor]) -> Tensor:
    """A summary for ABC, (n, 7), of few numbers that tell most. `ABC(summary=g_and_k.octiles)`."""
    x = data["x"]
    share = torch.arange(1, 8, dtype=x.dtype, device=x.device) / 8
    return torch.quantile(x, share, dim=-1).movedim(0, -1)


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Moments of the four sites and the log evidence; x (N). The model has no parameters."""
    log_z, runs = _integrate(tuple(x.double().tolist()))
    middle = runs.mean(0)

    def error(values: np.ndarray) -> np.ndarray:
        return values.std(0, ddof=1) / math.sqrt(len(values))

    def named(values: np.ndarray) -> dict[str, Tensor]:
        return {site: torch.tensor(float(v), dtype=torch.float64) for site, v in zip(SITES, values, strict=True)}

    # ratios of means, with errors by the delta method
    mean, second = middle[1:5] / middle[0], middle[5:9] / middle[0]
    sd = np.sqrt(second - mean**2)
    of_mean = runs[:, 1:5] - runs[:, :1] * mean
    of_variance = runs[:, 5:9] - runs[:, :1] * second - 2 * mean * of_mean
    return Reference(
        "quadrature",
        mean=named(mean),
        sd=named(sd),
        mean_error=named(error(of_mean) / middle[0]),
        sd_error=named(error(of_variance) / middle[0] / (2 * sd)),
        log_evidence=Evidence(
            torch.tensor(log_z + math.log(middle[0]), dtype=torch.float64),
            torch.tensor(float(error(runs[:, 0]) / middle[0]), dtype=torch.float64),
            "estimate",
        ),
        provenance="importance sampling from a t law at scrambled Sobol points; errors from 16 scramblings",
    )


# -- the same density in numpy, and its integral ---------------------------------------------------------------------


@lru_cache(maxsize=16)
def _integrate(x: tuple[float, ...], scramblings: int = 16, points: int = 1024) -> tuple[float, np.ndarray]:
    """log c, and c^-1 times the integrals of 1, of the sites and of their squares, (scramblings, 9)."""
    data, degrees = np.array(x), 4.0
    start = special.logit(np.array(TRUTH) / UPPER)
    centre = optimize.minimize(lambda eta: -float(_log_joint(eta[None], data)[0]), start, method="Nelder-Mead").x
    root = 0.5 * np.eye(4)

    def weighted(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        u = qmc.Sobol(5, seed=seed).random(count)
        t = special.ndtri(u[:, :4]) / np.sqrt(stats.chi2.ppf(u[:, 4], degrees) / degrees)[:, None]
        eta = centre + t @ root.T
        log_q = stats.multivariate_t.logpdf(t, np.zeros(4), np.eye(4), df=degrees) - np.log(np.diag(root)).sum()
        return eta, _log_joint(eta, data) - log_q

    for stage in range(4):  # tempered at first, so that a poor start keeps its spread
        eta, log_w = weighted(scramblings + stage, points)
        w = special.softmax(log_w * min(1.0, (stage + 1) / 3))
        centre = w @ eta
        root = np.linalg.cholesky((w[:, None] * (eta - centre)).T @ (eta - centre) + 1e-3 * np.eye(4))
    found = [weighted(seed, points) for seed in range(scramblings)]
    top = max(log_w.max() for _, log_w in found)
    rows = []
    for eta, log_w in found:
        theta = UPPER * special.expit(eta)
        values = np.concatenate([np.ones((points, 1)), theta, theta**2], 1)
        rows.append((np.exp(log_w - top)[:, None] * values).mean(0))
    return float(top), np.stack(rows)


def _log_joint(eta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log p(x, theta) with the Jacobian, of logits eta (M, 4), (M)."""
    A, B, g, k = (UPPER * special.expit(eta)).T[:, :, None]
    low, high = np.full((len(eta), len(x)), -FAR), np.full((len(eta), len(x)), FAR)

    def at(z: np.ndarray) -> np.ndarray:
        return A + B * (1 + SKEW * np.tanh(g * z / 2)) * (1 + z**2) ** k * z

    for _ in range(36):
        middle = (low + high) / 2
        below = at(middle) < x
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    z, h = (low + high) / 2, 1e-5
    rise = (at(z + h) - at(z - h)) / (2 * h)
    log_prior = (special.log_expit(eta) + special.log_expit(-eta)).sum(1)
    return (stats.norm.logpdf(z) - np.log(rise)).sum(1) + log_prior

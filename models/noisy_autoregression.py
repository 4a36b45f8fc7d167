"""A noisy autoregression with unknown dynamics: what is seen is a hidden AR(1) under noise of known size.

    a ~ N(0.5, 0.3),   q ~ LogNormal(log 0.5, 0.4)
    z_1 ~ N(0, 1),   z_t ~ N(a z_{t-1}, q^2),   x_t ~ N(z_t, r^2),   t = 1..T

Given (a, q) it is linear and Gaussian; the two are integrated by the trapezoidal rule over the Kalman filter's
evidence, and the z_t by the smoother's moments under the same weights.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, Reference

from . import _settings

A_LOC, A_SCALE, Q_LOC, Q_SCALE = 0.5, 0.3, math.log(0.5), 0.4
REACH, POINTS = 7.0, 121  # of the grid: prior sds to each side, and points along each axis
SMOKE = {"num_steps": 4}  # settings that it joins a smoke test with


def problem(*, num_steps: int = 6, noise: float = 0.8, seed: int = 0) -> Problem:
    """One series of T observations, made at a = 0.8, q = 0.6; the latents are `a`, `q` and z_0 .. z_{T-1}.

    Raises `ProblemError` on a setting out of range.
    """
    steps = _settings.count("num_steps", num_steps, 2)
    r = _settings.number("noise", noise, above=0.0)
    generator = _settings.generator("seed", seed)
    shocks = torch.randn(2, steps, generator=generator, dtype=torch.float64)
    z = [shocks[0, 0]]
    for shock in shocks[0, 1:]:
        z.append(0.8 * z[-1] + 0.6 * shock)

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.new_tensor(A_LOC), A_SCALE))
        q = pyro.sample("q", dist.LogNormal(x.new_tensor(Q_LOC), Q_SCALE))
        z = None
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Normal(x.new_zeros(()), 1.0) if z is None else dist.Normal(a * z, q))
            pyro.sample(f"x_{t}", dist.Normal(z, r), obs=x[t])

    x = torch.stack(z) + r * shocks[1]
    return Problem(model, args=(x,), reference=_reference(x, r), name="noisy_autoregression")


def kalman(x: Tensor, a: Tensor, q: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x | a, q) (G,), and smoothed means and variances (G, T), of a and q (G,) each."""
    m, P = torch.zeros_like(a), torch.ones_like(a)
    log_evidence = torch.zeros_like(a)
    ahead: list[tuple[Tensor, Tensor]] = []
    filtered: list[tuple[Tensor, Tensor]] = []
    for t, seen in enumerate(x):
        if t:
            m, P = a * filtered[-1][0], a.square() * filtered[-1][1] + q.square()
        S = P + r**2
        log_evidence = log_evidence + dist.Normal(m, S.sqrt()).log_prob(seen)
        ahead.append((m, P))
        filtered.append((m + P / S * (seen - m), P * r**2 / S))
    mean, V = filtered[-1]
    smoothed = [(mean, V)]
    for (m_t, V_t), (m_next, P_next) in zip(filtered[-2::-1], ahead[:0:-1], strict=True):
        J = V_t * a / P_next
        mean, V = m_t + J * (mean - m_next), V_t + J.square() * (V - P_next)
        smoothed.append((mean, V))
    means, variances = zip(*smoothed[::-1], strict=True)
    return log_evidence, torch.stack(means, 1), torch.stack(variances, 1)


def _reference(x: Tensor, r: float) -> Reference:
    fine, coarse = _integrate(x, r, POINTS), _integrate(x, r, POINTS // 2 + 1)
    names = ["a", "q", *(f"z_{t}" for t in range(len(x)))]
    error = [(b - c).abs() for b, c in zip(fine, coarse, strict=True)]
    return Reference(
        "quadrature",
        mean=dict(zip(names, fine[0], strict=True)),
        sd=dict(zip(names, fine[1], strict=True)),
        mean_error=dict(zip(names, error[0], strict=True)),
        sd_error=dict(zip(names, error[1], strict=True)),
        log_evidence=Evidence(fine[2], error[2], "estimate"),
        provenance=f"Kalman filter on a {POINTS} x {POINTS} grid of a and log q; error from twice the step",
    )


def _integrate(x: Tensor, r: float, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means and sds of a, q, z_0 .. (2 + T,), and log evidence; errors fall faster than any power of the step."""
    unit = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
    a, log_q = ((loc + scale * unit) for loc, scale in ((A_LOC, A_SCALE), (Q_LOC, Q_SCALE)))
    a, q = (g.flatten() for g in torch.meshgrid(a, log_q.exp(), indexing="ij"))
    log_prior = dist.Normal(0.0, 1.0).log_prob(unit) + (unit[1] - unit[0]).log()
    log_evidence, mean, variance = kalman(x, a, q, r)
    log_joint = log_evidence + (log_prior[:, None] + log_prior).flatten()
    total = torch.logsumexp(log_joint, 0)
    first = torch.cat([a[:, None], q[:, None], mean], 1)
    spread = torch.cat([torch.zeros(len(a), 2, dtype=torch.float64), variance], 1)
    weight = (log_joint - total).exp()
    centre = weight @ first
    return centre, (weight @ (spread + (first - centre).square())).sqrt(), total

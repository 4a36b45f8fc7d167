"""Linear Gaussian state space: a hidden point that moves linearly under noise and is seen through noise.

    z_1 ~ N(0, I_k),   z_t ~ N(A z_{t-1}, diag(q)^2),   x_t ~ N(C z_t, diag(r)^2),   t = 1..T, for each of N sequences

    evidence    the Kalman filter: log p(x) = sum_t log N(x_t; C m_t, C P_t C' + diag(r)^2), m_t, P_t one step ahead
    posterior   the Rauch-Tung-Striebel smoother: J_t = V_t A' P_{t+1}^-1, and backwards
                mean_t = mean_t|t + J_t (mean_{t+1} - m_{t+1}),   V_t|T = V_t|t + J_t (V_{t+1}|T - P_{t+1}) J_t'

Sources: Kalman 1960, doi:10.1115/1.3662552; Rauch, Tung & Striebel 1965, doi:10.2514/3.3166.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, Reference

from . import _settings


def problem(
    *,
    num_data: int = 4,
    num_steps: int = 10,
    latent_dim: int = 1,
    data_dim: int = 1,
    transition_scale: float = 0.5,
    emission_scale: float = 0.7,
    seed: int = 0,
) -> Problem:
    """N sequences of T observations in D dimensions, of a hidden point in k dimensions that turns and shrinks.

    theta is `transition` (k, k), `emission` (D, k), `transition_scale` (k), `emission_scale` (D); it starts at the
    truth. The latents are z_0 .. z_{T-1}, the data x (N, T, D). Raises `ProblemError` on a setting out of range.
    """
    n, steps = _settings.count("num_data", num_data), _settings.count("num_steps", num_steps, 2)
    k, d = _settings.count("latent_dim", latent_dim), _settings.count("data_dim", data_dim)
    q = _settings.number("transition_scale", transition_scale, above=0.0)
    r = _settings.number("emission_scale", emission_scale, above=0.0)
    generator = _settings.generator("seed", seed)
    turn = torch.linalg.matrix_exp(0.4 * (torch.ones(k, k, dtype=torch.float64).triu(1) * 2 - 1 + torch.eye(k)))
    start = {
        "transition": 0.9 * turn / torch.linalg.matrix_norm(turn, 2),
        "emission": torch.eye(d, k, dtype=torch.float64) + 0.2,
        "transition_scale": torch.full((k,), q, dtype=torch.float64),
        "emission_scale": torch.full((d,), r, dtype=torch.float64),
    }

    def model(x: Tensor) -> None:
        A, C = (pyro.param(name, start[name].clone) for name in ("transition", "emission"))
        q, r = (
            pyro.param(name, start[name].clone, constraint=constraints.positive)
            for name in ("transition_scale", "emission_scale")
        )
        with pyro.plate("data", x.shape[0]):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                prior = dist.Normal(torch.zeros_like(q), 1.0) if z is None else dist.Normal(z @ A.T, q)
                z = pyro.sample(f"z_{t}", prior.to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z @ C.T, r).to_event(1), obs=x[:, t])

    x = _make_data(n, steps, start, generator)
    return Problem(model, args=(x,), reference=reference, name="linear_gaussian_ssm")


def _make_data(n: int, steps: int, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    def normal(size: int) -> Tensor:
        return torch.randn(n, size, generator=generator, dtype=torch.float64)

    d, k = theta["emission"].shape
    z, rows = normal(k), []
    for t in range(steps):
        z = z @ theta["transition"].T + theta["transition_scale"] * normal(k) if t else z
        rows.append(z @ theta["emission"].T + theta["emission_scale"] * normal(d))
    return torch.stack(rows, 1)


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Smoothed means and sds, and the evidence of each sequence; x (N, T, D)."""
    A, C, q, r = (
        parameters[name].double() for name in ("transition", "emission", "transition_scale", "emission_scale")
    )
    x = x.double()
    Q, R = q.square().diag(), r.square().diag()
    eye = torch.eye(len(A), dtype=torch.float64)
    m, P = x.new_zeros(len(x), len(A)), eye  # one step ahead; covariances are those of all sequences
    ahead: list[tuple[Tensor, Tensor]] = []
    filtered: list[tuple[Tensor, Tensor]] = []
    log_evidence = x.new_zeros(len(x))
    for t in range(x.shape[1]):
        if t:
            m, P = filtered[-1][0] @ A.T, A @ filtered[-1][1] @ A.T + Q
        S = C @ P @ C.T + R
        log_evidence = log_evidence + dist.MultivariateNormal(m @ C.T, S).log_prob(x[:, t])
        gain = torch.linalg.solve(S, C @ P).T
        left = eye - gain @ C
        ahead.append((m, P))
        # Joseph's form keeps the covariance symmetric
        filtered.append((m + (x[:, t] - m @ C.T) @ gain.T, left @ P @ left.T + gain @ R @ gain.T))
    mean, V = filtered[-1]
    smoothed = [(mean, V)]
    for (m_t, V_t), (m_next, P_next) in zip(filtered[-2::-1], ahead[:0:-1], strict=True):
        J = torch.linalg.solve(P_next, A @ V_t).T
        mean, V = m_t + (mean - m_next) @ J.T, V_t + J @ (V - P_next) @ J.T
        smoothed.append((mean, V))
    smoothed.reverse()
    return Reference(
        "exact",
        mean={f"z_{t}": mean for t, (mean, _) in enumerate(smoothed)},
        sd={f"z_{t}": V.diagonal().sqrt().expand_as(mean) for t, (mean, V) in enumerate(smoothed)},
        log_evidence=Evidence(log_evidence, torch.zeros(()), "exact"),
        provenance="Kalman filter and Rauch-Tung-Striebel smoother",
    )

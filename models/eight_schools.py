"""Eight schools: the hierarchical model whose centred form makes samplers fail.

    mu ~ N(0, 5),   tau ~ HalfCauchy(5),   theta_j ~ N(mu, tau),   y_j ~ N(theta_j, sigma_j)

The non-centred form draws eta_j ~ N(0, 1) and sets theta_j = mu + tau eta_j: the same model in other coordinates.

Reference, one for both forms: theta and mu are integrated out in closed form and tau by quadrature. With
v_j = sigma_j^2 + tau^2, P = 1/25 + sum_j 1/v_j and m = (sum_j y_j / v_j) / P,

    mu | tau, y ~ N(m, 1/P),     log p(y | tau) = sum_j log N(y_j; 0, v_j) + m^2 P / 2 - log(25 P) / 2

and with b_j = tau^2 / v_j, given tau alone,

    theta_j   mean b_j y_j + (1 - b_j) m,    variance sigma_j^2 b_j + (1 - b_j)^2 / P
    eta_j     mean (tau / v_j) (y_j - m),    variance 1 - b_j + (tau / v_j)^2 / P.

The trapezoidal rule in u = log tau converges geometrically, for the integrand is analytic in |Im u| < pi/2 and dies
out exponentially on both sides: halving the step shows that the error is rounding alone.

Source: Rubin (1981), doi:10.3102/10769986006004377; priors as in posteriordb's eight_schools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Problem, ProblemError, Reference

from . import _draws

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
STANDARD_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

MU_SCALE = 5.0
TAU_SCALE = 5.0

BENCH: tuple[dict[str, bool], ...] = ({}, {"centred": True})  # settings that it joins a benchmark with
SMOKE: dict[str, int] = {}  # settings that it joins a smoke test with


def problem(
    *, centred: bool = False, y: Sequence[float] = EFFECTS, sigma: Sequence[float] = STANDARD_ERRORS
) -> Problem:
    """The effects `y` (J) of J >= 2 schools with their standard errors `sigma` (J).

    Raises `ProblemError` where they do not belong together: other lengths, a sigma that is not positive, one school
    only (tau would have no finite variance).
    """
    if not isinstance(centred, bool):
        raise ProblemError(f"centred={centred!r}: expected True or False.")
    effects, errors = _vector("y", y), _vector("sigma", sigma)
    if len(effects) != len(errors) or len(effects) < 2:
        raise ProblemError(f"y and sigma: expected one length J >= 2 for both, got {len(effects)} and {len(errors)}.")
    if not bool((errors > 0).all()):
        raise ProblemError("sigma: every standard error must be positive.")
    return Problem(
        centred_model if centred else non_centred_model,
        args=(effects, errors),
        reference=partial(reference, sites=("mu", "tau", "theta") if centred else ("mu", "tau", "theta", "eta")),
        name=f"eight_schools ({'centred' if centred else 'non-centred'})",
    )


def _vector(setting: str, value: Any) -> Tensor:
    try:
        vector = torch.as_tensor(value, dtype=torch.float64).clone()
    except (TypeError, ValueError) as error:
        raise ProblemError(f"{setting}: expected a list of numbers: {error}.") from error
    if vector.dim() != 1 or not bool(torch.isfinite(vector).all()):
        raise ProblemError(f"{setting}: expected a list of finite numbers, got shape {tuple(vector.shape)}: {value!r}.")
    return vector


def centred_model(y: Tensor, sigma: Tensor) -> None:
    mu, tau = _population(y)
    with pyro.plate("schools", y.shape[0]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred_model(y: Tensor, sigma: Tensor) -> None:
    mu, tau = _population(y)
    with pyro.plate("schools", y.shape[0]):
        eta = pyro.sample("eta", dist.Normal(torch.zeros_like(mu), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _population(y: Tensor) -> tuple[Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), MU_SCALE))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(TAU_SCALE)))
    return mu, tau


def reference(parameters: Mapping[str, Tensor], y: Tensor, sigma: Tensor, sites: Sequence[str]) -> Reference:
    """Moments of `sites` and the log evidence, with errors from twice the step; the model has no parameters."""
    y, sigma = y.double(), sigma.double()
    # e^-40 below and e^40 above the scales of the problem nothing is left, even for J = 2, where tails are heaviest
    centre = math.log(max(TAU_SCALE, float(sigma.max()), float(y.abs().max())))
    u = torch.linspace(centre - 40.0, centre + 40.0, 3201, dtype=torch.float64)
    fine, coarse = _integrate(u, y, sigma), _integrate(u[::2], y, sigma)
    error = {name: (value - coarse[name]).abs() for name, value in fine.items()}
    return Reference(
        "quadrature",
        mean={site: fine[f"{site} mean"] for site in sites},
        sd={site: fine[f"{site} sd"] for site in sites},
        mean_error={site: error[f"{site} mean"] for site in sites},
        sd_error={site: error[f"{site} sd"] for site in sites},
        log_evidence=Evidence(fine["log evidence"], error["log evidence"], "estimate"),
        provenance="theta and mu integrated in closed form, log tau by the trapezoidal rule; error from twice the step",
        draws=Later(lambda: {site: values for site, values in _drawn(u, y, sigma).items() if site in sites}),
    )


def _integrate(u: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """The trapezoidal rule on the grid u = log tau, for all that the reference reports."""
    tau, v, precision, m, log_density = _given_tau(u, y, sigma)
    log_weight = log_density + (u[1] - u[0]).log()
    b = tau[:, None].square() / v
    gain = tau[:, None] / v
    given_tau = {  # mean and variance, (G) or (G, J)
        "mu": (m, 1 / precision),
        "tau": (tau, torch.zeros_like(tau)),
        "theta": (b * y + (1 - b) * m[:, None], sigma.square() * b + (1 - b).square() / precision[:, None]),
        "eta": (gain * (y - m[:, None]), 1 - b + gain.square() / precision[:, None]),
    }
    weight = torch.softmax(log_weight, 0)
    result = {"log evidence": torch.logsumexp(log_weight, 0)}
    for site, (mean, variance) in given_tau.items():
        overall = torch.tensordot(weight, mean, 1)
        spread = torch.tensordot(weight, variance + (mean - overall).square(), 1)
        result |= {f"{site} mean": overall, f"{site} sd": spread.sqrt()}
    return result


def _given_tau(u: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """At u = log tau (G): tau, v (G, J), P, m, and the log density of u and y, in nats."""
    tau = u.exp()
    v = sigma.square() + tau[:, None].square()
    precision = 1 / MU_SCALE**2 + (1 / v).sum(1)
    m = (y / v).sum(1) / precision
    log_density = (
        -0.5 * (y.square() / v + (2 * math.pi * v).log()).sum(1)
        + 0.5 * m.square() * precision
        - 0.5 * (MU_SCALE**2 * precision).log()
        + dist.HalfCauchy(u.new_tensor(TAU_SCALE)).log_prob(tau)
        + u  # d tau = tau du
    )
    return tau, v, precision, m, log_density


def _drawn(u: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Draws of every site, (S) or (S, J): log tau by the grid u (G), then mu given tau, then eta given both."""
    at = _draws.of_grid(torch.softmax(_given_tau(u, y, sigma)[-1], 0))
    tau, v, precision, m, _ = _given_tau(_draws.within_cells(u[at], float(u[1] - u[0])), y, sigma)
    mu = m + _draws.normal(seed=2) / precision.sqrt()
    gain = tau[:, None] / v
    eta = gain * (y - mu[:, None]) + sigma / v.sqrt() * _draws.normal(len(y), seed=3)
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * eta, "eta": eta}

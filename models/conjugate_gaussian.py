"""The smallest latent variable model in which everything is known: two normals in a row.

    z_i ~ N(theta, 1),   x_i ~ N(z_i, 1),   i = 1..N

    posterior   z_i | x_i ~ N((x_i + theta) / 2, 1/2)
    evidence    x_i ~ N(theta, 2)
    learning    theta_ML = mean(x); the M-step is theta = mean of E[z_i]

The guide is amortised, q(z_i) = N(slope x_i + intercept, scale^2), and exact at the starting theta unless
`guide_error` asks for a stated number of nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from scipy.special import lambertw
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Problem, Reference

from . import _draws, _settings

POSTERIOR_SD = math.sqrt(0.5)

BENCH = {"num_data": 50}  # settings that it joins a benchmark with
SMOKE = {"num_data": 20}  # settings that it joins a smoke test with


def problem(
    *,
    num_data: int = 100,
    theta: float = 0.0,
    true_theta: float = 1.0,
    guide_error: float = 0.0,
    seed: int = 0,
) -> Problem:
    """N points from the model at `true_theta`, to be learned from a start at `theta`.

    guide_error  KL(q || p) per datum in nats, of the guide at the starting theta. The guide is made too wide rather
                 than shifted: its importance weights are bounded, so each datum on its own is easy (at 0.09 nats and
                 100 draws the Pareto k-hat stays below 0.1), whereas one weight for 200 data together is hopeless
                 (k-hat about 2).

    Raises `ProblemError` on a setting out of range.
    """
    num_data = _settings.count("num_data", num_data)
    start = _settings.number("theta", theta)
    centre = _settings.number("true_theta", true_theta)
    scale = POSTERIOR_SD * widening(_settings.number("guide_error", guide_error, least=0.0))
    noise = torch.randn(num_data, generator=_settings.generator("seed", seed), dtype=torch.float64)

    def parameter(name: str, value: float, constraint: constraints.Constraint = constraints.real) -> Tensor:
        return pyro.param(name, lambda: torch.tensor(value, dtype=torch.float64), constraint=constraint)

    def model(x: Tensor) -> None:
        theta = parameter("theta", start)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = parameter("slope", 0.5) * x + parameter("intercept", start / 2)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, parameter("scale", scale, constraints.positive)))

    return Problem(
        model,
        args=(centre + math.sqrt(2.0) * noise,),
        guide=guide,
        reference=reference,
        name="conjugate_gaussian",
        m_step=m_step,
    )


def widening(nats: float) -> float:
    """The factor r > 1 on the sd of a normal q with KL(q || p) = (r^2 - 1) / 2 - log r = nats; 1 for none.

    With s = r^2 this is -s exp(-s) = -exp(-1 - 2 nats), so that s is minus the lower branch of Lambert's W.
    """
    return math.sqrt(-lambertw(-math.exp(-1.0 - 2.0 * nats), k=-1).real) if nats > 0 else 1.0


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Posterior and evidence per datum in closed form; x (N)."""
    theta, x = parameters["theta"].double(), x.double()
    mean = (x + theta) / 2
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": torch.full_like(x, POSTERIOR_SD)},
        log_evidence=Evidence(dist.Normal(theta, math.sqrt(2.0)).log_prob(x), torch.zeros(()), "exact"),
        provenance="closed form: z | x is N((x + theta) / 2, 1/2) and x is N(theta, 2)",
        draws=Later(lambda: {"z": mean + POSTERIOR_SD * _draws.normal(*x.shape)}),
    )


def m_step(draws: Mapping[str, Tensor], weights: Tensor, x: Tensor) -> dict[str, Tensor]:
    """theta = mean over data of E[z_i]; draws['z'] and weights (S, N)."""
    return {"theta": (weights * draws["z"]).sum(0).mean()}

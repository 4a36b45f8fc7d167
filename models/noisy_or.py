"""A noisy-or network: hidden causes that switch on observed effects, as diseases do symptoms; exact by enumeration.

    cause_ij ~ Bernoulli(rates_j),   P(effect_ik = 0 | causes) = (1 - leaks_k) prod_j (1 - strengths_jk)^cause_ij

    posterior   the 2^J joint values of the causes of each datum, listed

A present effect makes its causes compete for explaining it, so that they depend on each other in the posterior although
they do not in the prior. Source: Pearl (1988), Probabilistic Reasoning in Intelligent Systems, section 4.3.2; Shwe et
al. (1991), doi:10.1055/s-0038-1634846 (the QMR network).
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings

MOST_CAUSES = 14
RATE, LEAK, EDGES = (
    (0.1, 0.4),
    (0.02, 0.1),
    0.6,
)  # ranges of rates and leaks, and the share of the pairs that are linked


def problem(*, num_data: int = 50, num_causes: int = 4, num_effects: int = 6, seed: int = 0) -> Problem:
    """N data, each with J hidden causes and K effects, simulated from a network drawn with the seed.

    The causes are the sites `cause_0` .. `cause_{J-1}`, (N) each. theta is `rates` (J), `strengths` (J, K) and `leaks`
    (K), which start at the true network's. Raises `ProblemError` on a setting out of range.
    """
    n = _settings.count("num_data", num_data)
    j, k = _settings.count("num_causes", num_causes), _settings.count("num_effects", num_effects)
    if j > MOST_CAUSES:
        raise ProblemError(f"num_causes={j}: at most {MOST_CAUSES}, since their 2^J values are listed.")
    generator = _settings.generator("seed", seed)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    start = {
        "rates": RATE[0] + (RATE[1] - RATE[0]) * uniform(j),
        "strengths": torch.where(uniform(j, k) < EDGES, 0.3 + 0.6 * uniform(j, k), 0.02),
        "leaks": LEAK[0] + (LEAK[1] - LEAK[0]) * uniform(k),
    }
    causes = (uniform(n, j) < start["rates"]).double()
    x = (uniform(n, k) < 1 - silence(causes, start["strengths"], start["leaks"])).double()

    def model(x: Tensor) -> None:
        inside = constraints.unit_interval
        rates = pyro.param("rates", start["rates"].clone, constraint=inside)
        strengths = pyro.param("strengths", start["strengths"].clone, constraint=inside)
        leaks = pyro.param("leaks", start["leaks"].clone, constraint=inside)
        with pyro.plate("data", x.shape[0]):
            quiet = (1 - leaks).log()
            for i in range(j):
                cause = pyro.sample(f"cause_{i}", dist.Bernoulli(rates[i]), infer={"enumerate": "parallel"})
                quiet = quiet + cause[..., None] * torch.log1p(-strengths[i])
            pyro.sample("effects", dist.Bernoulli(-torch.expm1(quiet)).to_event(1), obs=x)

    return Problem(model, args=(x,), reference=reference, name="noisy_or")


def silence(causes: Tensor, strengths: Tensor, leaks: Tensor) -> Tensor:
    """The probability that an effect is absent: causes (..., J) -> (..., K)."""
    return ((1 - leaks).log() + causes @ torch.log1p(-strengths)).exp()


def states(count: int) -> Tensor:
    """All values of `count` bits, (2^count, count), the last changing fastest."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * count).reshape(-1, count)


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """All 2^J values of the causes listed: `log_weights` (2^J, N) hold log p(x_i, causes)."""
    rates, strengths, leaks = (parameters[name].double() for name in ("rates", "strengths", "leaks"))
    listed, x = states(len(rates)), x.double()
    prior = (torch.xlogy(listed, rates) + torch.xlogy(1 - listed, 1 - rates)).sum(1)
    absent = silence(listed, strengths, leaks)[:, None]  # (2^J, 1, K)
    log_weights = prior[:, None] + (torch.xlogy(x, 1 - absent) + torch.xlogy(1 - x, absent)).sum(2)
    mean = torch.softmax(log_weights, 0).T @ listed  # (N, J)
    names = [f"cause_{i}" for i in range(len(rates))]
    return Reference(
        "exact",
        mean=dict(zip(names, mean.T, strict=True)),
        sd=dict(zip(names, (mean * (1 - mean)).sqrt().T, strict=True)),
        log_evidence=Evidence(torch.logsumexp(log_weights, 0), torch.zeros(()), "exact"),
        provenance="enumeration of the causes",
        log_weights=log_weights,
    )

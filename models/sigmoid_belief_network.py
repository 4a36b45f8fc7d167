"""A sigmoid belief network: binary units that switch on binary data through a linear layer; exact by enumeration.

    z_ih ~ Bernoulli(sigmoid(a_h)),   x_id ~ Bernoulli(sigmoid(sum_h W_dh z_ih + b_d))

    posterior   the 2^H joint values of the units of each datum, listed

The guide is a linear recognition network, z_ih ~ Bernoulli(sigmoid(A x_i + c)), whose units are independent given x:
its bound on the evidence is not tight. Source: Neal (1992), doi:10.1016/0004-3702(92)90065-6; Mnih & Gregor (2014),
arXiv:1402.0030.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings
from .noisy_or import states

MOST_UNITS = 14


def problem(
    *, num_data: int = 100, data_dim: int = 8, latent_dim: int = 4, num_test: int = 0, seed: int = 0
) -> Problem:
    """N binary data of D entries, from a network of H units drawn with the seed; `num_test` more are held out.

    The site z is (N, H). theta is `W` (D, H), `a` (H) and `b` (D), which start at a small random W, at zero and at
    the log odds of the data's means; phi is `A` (H, D) and `c` (H), at zero. Raises `ProblemError` on a setting out of
    range.
    """
    n, d = _settings.count("num_data", num_data), _settings.count("data_dim", data_dim)
    h, num_test = _settings.count("latent_dim", latent_dim), _settings.count("num_test", num_test, 0)
    if h > MOST_UNITS:
        raise ProblemError(f"latent_dim={h}: at most {MOST_UNITS}, since their 2^H values are listed.")
    generator = _settings.generator("seed", seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    coins = lambda p: (torch.rand(p.shape, generator=generator, dtype=torch.float64) < p).double()  # noqa: E731
    true_z = coins(torch.full((n, h), 0.4))
    true_W = 2 * normal(h, d)
    x = coins((true_z @ true_W - 1).sigmoid())
    share = (x.sum(0) + 1) / (n + 2)
    start = {"W": 0.5 * normal(d, h), "a": torch.zeros(h, dtype=torch.float64), "b": share.log() - (1 - share).log()}

    def model(x: Tensor) -> None:
        W, a, b = (pyro.param(name, value.clone) for name, value in start.items())
        with pyro.plate("data", x.shape[0], dim=-1):
            with pyro.plate("units", h, dim=-2):
                z = pyro.sample("z", dist.Bernoulli(logits=a[:, None]))  # (H, N)
            pyro.sample("x", dist.Bernoulli(logits=z.mT @ W.T + b).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        A = pyro.param("A", lambda: x.new_zeros(h, d))
        c = pyro.param("c", lambda: x.new_zeros(h))
        with pyro.plate("data", x.shape[0], dim=-1), pyro.plate("units", h, dim=-2):
            pyro.sample("z", dist.Bernoulli(logits=A @ x.T + c[:, None]))

    test = coins((coins(torch.full((num_test, h), 0.4)) @ true_W - 1).sigmoid())
    held_out = (test,) if num_test else None
    return Problem(model, args=(x,), guide=guide, reference=reference, name="sigmoid_belief_network", held_out=held_out)


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """All 2^H values of the units listed: `log_weights` (2^H, N) hold log p(x_i, z)."""
    W, a, b = (parameters[name].double() for name in ("W", "a", "b"))
    listed, x = states(len(a)), x.double()
    prior = (listed * a + logsigmoid(-a)).sum(1)  # log sigmoid(a) = a + log sigmoid(-a)
    logits = (listed @ W.T + b)[:, None]  # (2^H, 1, D)
    log_weights = prior[:, None] + (x * logits + logsigmoid(-logits)).sum(2)
    mean = torch.softmax(log_weights, 0).T @ listed
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": (mean * (1 - mean)).sqrt()},
        log_evidence=Evidence(torch.logsumexp(log_weights, 0), torch.zeros(()), "exact"),
        provenance="enumeration of z",
        log_weights=log_weights,
    )

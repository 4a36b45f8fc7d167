"""Variational autoencoders on handwritten digits: continuous latents, neural decoder, amortised guide.

    z_i ~ N(0, I_k),   x_i ~ Bernoulli(logits = decoder(z_i))   or   x_i ~ N(decoder(z_i), scale^2 I)
    q(z_i | x_i) = N(loc, diag(sd)^2) with (loc, sd) = encoder(x_i)

Written as in Pyro's tutorial, in float32: networks are registered by `pyro.module`; `scale` is a `pyro.param`.
With k <= 2 a grid over z gives the truth for every datum, at any theta.

Data: the 1,797 digits of 8 x 8 pixels (0..16) that come with scikit-learn, from the test part of "Optical Recognition
of Handwritten Digits", doi:10.24432/C50P49. For a Bernoulli likelihood they are made binary by a named rule:

    'threshold'    pixel > 7.5
    'stochastic'   1 with probability pixel / 16, drawn once

Source: Kingma and Welling (2014), arXiv:1312.6114.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Problem, ProblemError, Reference

from . import _draws, _settings

LIKELIHOODS = ("bernoulli", "gaussian")
RULES = ("threshold", "stochastic")
GRID_POINTS = {1: 4097, 2: 257}  # per axis, odd: every other point makes the coarse grid
GRID_EDGE = 8.0  # in prior sds
_BLOCK = 2**22  # numbers held at once by the grid

BENCH = {"num_train": 50, "num_test": 20}  # settings that it joins a benchmark with


def problem(
    *,
    likelihood: str = "bernoulli",
    latent_dim: int = 2,
    hidden: int = 64,
    binarise: str = "threshold",
    num_train: int | None = None,
    num_test: int = 360,
    data: Tensor | None = None,
    seed: int = 0,
    data_seed: int = 0,
) -> Problem:
    """A VAE with one hidden layer in each network, on digits or on `data` of any width.

    binarise   the rule that makes the digits binary for a Bernoulli likelihood, 'threshold' or 'stochastic'
    num_train  data to learn from; None: all but the test data (1,437 digits)
    num_test   held-out data, the same ones whatever `num_train` is; 0: none
    data       (N, D) in place of the digits, used as it is; 0 and 1 only for a Bernoulli likelihood
    seed       start of the networks; `data_seed`: split and stochastic rule

    Raises `ProblemError` on a setting out of range, and on data that do not fit the likelihood.
    """
    _settings.choice("likelihood", likelihood, LIKELIHOODS)
    _settings.choice("binarise", binarise, RULES)
    k, width = _settings.count("latent_dim", latent_dim), _settings.count("hidden", hidden)
    shuffle = _settings.generator("data_seed", data_seed)
    if data is None:
        x = digits(binarise if likelihood == "bernoulli" else None, shuffle)
    else:
        x = _settings.data_matrix("data", data).float()
        if likelihood == "bernoulli" and not bool(((x == 0) | (x == 1)).all()):
            raise ProblemError(
                "data: a Bernoulli likelihood needs 0 and 1 only; binarise, or set likelihood='gaussian'."
            )
    n_test = _settings.count("num_test", num_test, 0)
    if n_test >= len(x):
        raise ProblemError(f"num_test={n_test} leaves none of the {len(x)} data to learn from.")
    n_train = len(x) - n_test if num_train is None else _settings.count("num_train", num_train)
    if n_train + n_test > len(x):
        raise ProblemError(f"num_train={n_train} and num_test={n_test} are more than the {len(x)} data.")
    # split from the two ends, so that no choice of sizes lets a test datum be learned from
    x = x[torch.randperm(len(x), generator=shuffle)]
    train, test = x[:n_train], x[len(x) - n_test :]

    with torch.random.fork_rng(devices=[]):  # layers start from the global generator: lend it, and on the CPU only
        torch.default_generator.manual_seed(_settings.seed("seed", seed))
        decoder, encoder = Decoder(k, width, x.shape[1]), Encoder(x.shape[1], width, k)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(k), 1.0).to_event(1))
            if likelihood == "bernoulli":
                pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
            else:
                scale = pyro.param("scale", lambda: x.new_tensor(0.3), constraint=constraints.positive)
                pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, sd = encoder(x)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(loc, sd).to_event(1))

    return Problem(
        model,
        args=(train,),
        guide=guide,
        reference=partial(reference, decoder=decoder, latent_dim=k),
        name=f"vae ({likelihood}, {k}-d latent)",
        held_out=(test,) if n_test else None,
    )


class Decoder(nn.Module):
    """z (..., k) -> logits or means of the pixels (..., D)."""

    def __init__(self, latent_dim: int, hidden: int, data_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Softplus(), nn.Linear(hidden, data_dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Encoder(nn.Module):
    """x (..., D) -> mean and sd of z, each (..., k)."""

    def __init__(self, data_dim: int, hidden: int, latent_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(data_dim, hidden), nn.Softplus())
        self.loc = nn.Linear(hidden, latent_dim)
        self.log_sd = nn.Linear(hidden, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(x)
        return self.loc(h), self.log_sd(h).exp()


def digits(rule: str | None, generator: torch.Generator | None = None) -> Tensor:
    """The digits, (1797, 64) float32: binary by `rule`, or with None as grey levels 0..1."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    if rule is None:
        return pixels / 16
    if rule == "threshold":
        return (pixels > 7.5).float()
    return torch.bernoulli(pixels / 16, generator=generator)


def reference(parameters: Mapping[str, Tensor], x: Tensor, *, decoder: nn.Module, latent_dim: int) -> Reference:
    """Moments of z and log evidence per datum by the trapezoidal rule over [-8, 8]^k, k <= 2; x (N, D).

    The grid is decoded once; log p(x_i | z_g) for all i and g is then one matrix product, in float64. Errors are
    differences to the rule of twice the step, and infinite where the posterior reaches the edge of the grid.
    `parameters` are those of the decoder, 'decoder.*', and 'scale' where the likelihood is Gaussian.
    """
    if latent_dim not in GRID_POINTS:
        return Reference("none", provenance=f"latent_dim = {latent_dim}; a grid holds {max(GRID_POINTS)} at most")
    points = GRID_POINTS[latent_dim]
    axis = torch.linspace(-GRID_EDGE, GRID_EDGE, points, dtype=torch.float64)
    z = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)  # (G, k)
    index = torch.cartesian_prod(*[torch.arange(points)] * latent_dim).reshape(-1, latent_dim)
    coarse = (index % 2 == 0).all(1).nonzero().squeeze(1)
    edge = ((index == 0) | (index == points - 1)).any(1).nonzero().squeeze(1)

    state = {name.removeprefix("decoder."): v.double() for name, v in parameters.items() if name.startswith("decoder.")}
    output = torch.func.functional_call(decoder, state, (z,), strict=True)  # (G, D)
    x = x.double()
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    if "scale" in parameters:
        scale = parameters["scale"].double()
        slope = output / scale.square()
        per_point = log_prior - 0.5 * (output / scale).square().sum(1)
        per_datum = -0.5 * (x / scale).square().sum(1) - x.shape[1] * (scale.log() + 0.5 * math.log(2 * math.pi))
    else:
        slope = output
        per_point = log_prior - functional.softplus(output).sum(1)
        per_datum = x.new_zeros(len(x))
    cell = latent_dim * math.log(2 * GRID_EDGE / (points - 1))

    def log_joints() -> Iterator[Tensor]:  # (B, G), a block of data at a time
        for rows, offset in zip(x.split(size := max(1, _BLOCK // len(z))), per_datum.split(size), strict=True):
            yield rows @ slope.T + per_point + offset[:, None]

    def draws() -> dict[str, Tensor]:
        weights = ((block - block.amax(1, keepdim=True)).clamp_min(-700).exp() for block in log_joints())
        at = torch.cat([_draws.of_grid(block, seed=i) for i, block in enumerate(weights)], 1)
        return {"z": _draws.within_cells(z[at], float(axis[1] - axis[0]))}

    blocks = []
    for log_joint in log_joints():
        fine = _integrate(log_joint, z, cell)
        halved = _integrate(log_joint[:, coarse], z[coarse], cell + latent_dim * math.log(2))
        leak = torch.logsumexp(log_joint[:, edge], 1) + cell - fine[0] > math.log(1e-8)
        errors = [_infinite_where(leak, (a - b).abs()) for a, b in zip(fine, halved, strict=True)]
        blocks.append((*fine, *errors))
    evidence, mean, sd, evidence_error, mean_error, sd_error = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Reference(
        "quadrature",
        mean={"z": mean},
        sd={"z": sd},
        mean_error={"z": mean_error},
        sd_error={"z": sd_error},
        log_evidence=Evidence(evidence, evidence_error, "estimate"),
        provenance=f"trapezoidal rule on {points} points an axis over [-8, 8], float64; error from twice the step",
        draws=Later(draws),
    )


def _integrate(log_joint: Tensor, z: Tensor, cell: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence (B), mean and sd (B, k) on a grid z (G, k) whose cells have the log volume `cell`."""
    log_sum = torch.logsumexp(log_joint, 1)
    weight = (log_joint - log_sum[:, None]).clamp_min(-700).exp()  # below lie denormals: slow, and nothing
    mean = weight @ z
    # clamped, for on a grid too coarse for the posterior rounding can make it negative
    variance = (weight @ z.square() - mean.square()).clamp_min(0)
    return log_sum + cell, mean, variance.sqrt()


def _infinite_where(leak: Tensor, error: Tensor) -> Tensor:
    return error.masked_fill(leak.reshape(-1, *[1] * (error.dim() - 1)), math.inf)

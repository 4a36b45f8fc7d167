"""Gaussian families over the unconstrained latents: which member a guide is for each datum, and which is the best.

    q_i(u) = N(loc_i, tril_i tril_i'),   ELBO_i = E_eps[log p(x_i, loc_i + tril_i eps)] + log |tril_i| + constant

Gradients of ELBO_i are taken by hand from g = d log p / du at u = loc + tril eps: mean g for loc, and the lower part of
mean g eps' for tril (Kingma & Welling 2014, arXiv:1312.6114).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrometer.inference.density import Density
from pyrometer.inference.engine import EngineError
from pyrometer.inference.laplace import laplace
from pyrometer.inference.posterior import gathered
from pyrometer.inference.problem import ProblemError

FAMILIES = ("AutoNormal", "AutoMultivariateNormal")
LEARNING_RATE = 0.1  # in sds of the start, falling to zero
SELECTION = 500  # draws by which one of the candidates is chosen
UNDOUBTED = 3.0  # standard errors by which the guide must be better than what the search found to be taken
_AT_ONCE = 2**22  # numbers of u that are worked on together


class Gaussian(NamedTuple):
    """loc (*batch, D) and lower triangular tril (*batch, D, D), one for each datum."""

    loc: Tensor
    tril: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """u = loc + tril eps, (S, *batch, D); eps may lack the batch."""
        return self.loc + (self.tril @ noise[..., None])[..., 0]

    def log_prob(self, u: Tensor) -> Tensor:
        noise = torch.linalg.solve_triangular(self.tril, (u - self.loc)[..., None], upper=False)[..., 0]
        return self.log_q(noise)

    def log_q(self, noise: Tensor) -> Tensor:
        """log q(loc + tril eps), (S, *batch)."""
        log_volume = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (-0.5 * noise.square() - 0.5 * math.log(2 * math.pi)).sum(-1) - log_volume


def log_weights(density: Density, member: Gaussian, noise: Tensor) -> Tensor:
    """log p(x, u) - log q(u) at u = loc + tril eps, (S, *batch), on the CPU."""
    size = max(1, _AT_ONCE // max(member.loc.numel(), 1))
    parts = [density.log_joint(member.at(part)) - member.log_q(part) for part in noise.split(size)]
    return torch.cat(parts).double().cpu()


def member_of(density: Density, family: str) -> Gaussian | None:
    """The member of the family that the guide is, for each datum; None where it is none.

    Locations and scales are read off the guide's distributions, and then its density has to be that of the Gaussian
    at draws of its own: so sites that depend on one another, or are masked or scaled, are not taken for what they are
    not.
    """
    found = _read(density)
    if found is None:
        return None
    off_diagonal = torch.tril(found.tril, -1)
    if family == "AutoNormal" and bool((off_diagonal != 0).any()):
        return None
    noise = torch.randn((20, *found.loc.shape), dtype=found.loc.dtype, device=found.loc.device)
    u = found.at(noise)
    try:
        expected = density.log_guide(u)
    except ProblemError:
        return None
    tolerance = 1e-7 if density.dtype == torch.float64 else 1e-3
    close = torch.isclose(found.log_q(noise), expected, rtol=tolerance, atol=tolerance * (1 + u.shape[-1]))
    return found if bool(close.all()) else None


def _read(density: Density) -> Gaussian | None:
    """The Gaussian that the guide's own sites spell out, in the layout of u; None where they are of other kinds."""
    trace = poutine.trace(density.problem.guide).get_trace(*density.args, **density.kwargs)
    if set(density.guide_latents) != set(density.continuous):
        return None
    batch = tuple(density.batch_shape)
    locs, blocks = [], []
    for name in density.continuous:
        fn = trace.nodes[name]["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if isinstance(fn, torch.distributions.Normal | torch.distributions.LogNormal):  # log-normal: u is the logarithm
            shape = trace.nodes[name]["value"].shape
            if math.prod(shape) % max(math.prod(batch), 1) or tuple(shape[: len(batch)]) != batch:
                return None
            locs.append(fn.loc.expand(shape).reshape(*batch, -1))
            blocks.append(torch.diag_embed(fn.scale.expand(shape).reshape(*batch, -1)))
        elif isinstance(fn, torch.distributions.MultivariateNormal) and tuple(fn.batch_shape) == batch:
            locs.append(fn.loc.expand(*batch, fn.event_shape[0]))
            blocks.append(fn.scale_tril.expand(*batch, *fn.event_shape, *fn.event_shape))
        else:
            return None
    loc = torch.cat(locs, -1).to(density.dtype)
    if loc.shape[-1] != density.dim:
        return None
    tril = torch.zeros((*loc.shape, loc.shape[-1]), dtype=loc.dtype, device=loc.device)
    first = 0
    for block in blocks:
        last = first + block.shape[-1]
        tril[..., first:last, first:last] = block
        first = last
    return Gaussian(loc, tril)


def start_from_draws(density: Density, family: str, count: int = 1000) -> Gaussian:
    """The member with the moments of the guide's draws. Raises ProblemError where it does not draw every latent."""
    values = density.guide(count, auxiliary=True).values
    missing = [name for name in density.continuous if name not in values]
    if missing:
        raise ProblemError(f"the guide does not draw site {missing[0]!r}")
    u = density.unconstrain({name: values[name] for name in density.continuous})
    loc = u.mean(0)
    centred = u - loc
    variance = centred.square().mean(0).clamp_min(1e-12)
    if family == "AutoNormal":
        return Gaussian(loc, torch.diag_embed(variance.sqrt()))
    covariance = torch.einsum("s...i,s...j->...ij", centred, centred) / count + torch.diag_embed(1e-6 * variance)
    tril, failed = torch.linalg.cholesky_ex(covariance)
    good = (failed == 0)[..., None, None]
    return Gaussian(loc, torch.where(good, tril, torch.diag_embed(variance.sqrt())))


def best_members(
    density: Density, start: Gaussian, family: str, start_counts: bool, num_steps: int, num_particles: int
) -> tuple[Gaussian, float]:
    """For each datum the member of greatest ELBO that was found, and the nats per datum that the search left.

    Adam climbs from `start` and from the Laplace approximation, since a posterior of several modes holds several
    local optima. Which is taken is decided by draws of their own, the same for all, so that neither the search's noise
    nor that of the later ELBO flatters the choice. `start` itself (where `start_counts`) is taken only where it is
    better beyond doubt: a tie taken for the start would be a gap of zero without error.
    """
    found = [climb(density, begin, family, num_steps, num_particles) for begin in _starts(density, start, family)]
    candidates, slacks = [member for member, _ in found], [left for _, left in found]
    noise = torch.randn((SELECTION, *start.loc.shape), dtype=start.loc.dtype, device=start.loc.device)
    weights = torch.stack([log_weights(density, member, noise) for member in candidates])
    taken = weights.mean(1).nan_to_num(nan=-math.inf).argmax(0)
    if start_counts:
        better = log_weights(density, start, noise) - gathered(weights.movedim(1, -1), taken[None])[0].movedim(-1, 0)
        doubt = UNDOUBTED * better.std(0) / math.sqrt(SELECTION)
        candidates.append(start)
        slacks.append(torch.zeros_like(slacks[0]))
        taken = torch.where(better.mean(0) > doubt + 1e-9, len(candidates) - 1, taken)
    taken = taken.to(start.loc.device)
    loc = torch.stack([member.loc for member in candidates])
    tril = torch.stack([member.tril for member in candidates])
    left = float(gathered(torch.stack(slacks), taken[None]).mean())
    return Gaussian(gathered(loc, taken[None])[0], gathered(tril, taken[None])[0]), left


def _starts(density: Density, start: Gaussian, family: str) -> list[Gaussian]:
    try:
        mode = laplace(density)
    except EngineError:
        return [start]
    tril = mode.tril
    if family == "AutoNormal":  # the best mean-field member of a Gaussian has the precision's diagonal
        precision = torch.cholesky_inverse(tril).diagonal(dim1=-2, dim2=-1)
        tril = torch.diag_embed(precision.rsqrt())
    return [start, Gaussian(mode.mean, tril)]


def climb(
    density: Density, start: Gaussian, family: str, num_steps: int, num_particles: int
) -> tuple[Gaussian, Tensor]:
    """A local optimum of every datum's ELBO by Adam, and the nats (*batch) still to be gained by its gradient there.

        u = loc_0 + tril_0 (a + M eps),   M = diag(exp b) + strictly lower c (zero in the mean-field family)

    The noise is the same in all steps, antithetic, with unit covariance: so on a Gaussian posterior the optimum at
    this noise is the true one, and elsewhere the noise enters through higher moments only.
    """
    full = family == "AutoMultivariateNormal"
    noise = _noise(num_particles, start.loc.shape[-1], start.loc)
    noise = noise.reshape(len(noise), *[1] * (start.loc.dim() - 1), -1).expand(len(noise), *start.loc.shape)
    a, b = torch.zeros_like(start.loc), torch.zeros_like(start.loc)
    c = torch.zeros_like(start.tril)
    moving = [a, b, c] if full else [a, b]
    run = density.compiled_value_and_grad(start.at(noise))
    adam = torch.optim.Adam(moving, lr=LEARNING_RATE, betas=(0.9, 0.97))  # gradients shrink fast: forget the first
    for step in range(num_steps + 1):
        inner = torch.diag_embed(b.exp()) + c
        _, slope = run(start.loc + (start.tril @ (a + (inner @ noise[..., None])[..., 0])[..., None])[..., 0])
        slope = (start.tril.mT @ slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)[..., None])[..., 0]
        by_a = slope.mean(0)
        by_inner = torch.einsum("s...i,s...j->...ij", slope, noise) / len(noise)
        by_b = by_inner.diagonal(dim1=-2, dim2=-1) * b.exp() + 1
        by_c = torch.tril(by_inner, -1)
        if step == num_steps:
            break
        for tensor, gradient in zip(moving, (by_a, by_b, by_c), strict=False):
            tensor.grad = -gradient
        adam.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        adam.step()
    # in units of the member's own sds the ELBO's curvature is about 1 in loc and 2 in log scale
    inner = torch.diag_embed(b.exp()) + c
    left = 0.5 * (inner.mT @ by_a[..., None])[..., 0].square().sum(-1) + 0.25 * by_b.square().sum(-1)
    if full:
        left = left + 0.5 * torch.tril(inner.mT @ by_c, -1).square().sum((-2, -1))
    loc = start.loc + (start.tril @ a[..., None])[..., 0]
    return Gaussian(loc, start.tril @ inner), left


def _noise(count: int, dim: int, like: Tensor) -> Tensor:
    """(K, D), K even and at least 4 D: mean zero and covariance one exactly."""
    half = torch.randn((max(count // 2, 2 * dim), dim), dtype=like.dtype, device=like.device)
    lower = torch.linalg.cholesky(half.mT @ half / len(half))
    half = torch.linalg.solve_triangular(lower, half.mT, upper=False).mT
    return torch.cat([half, -half])

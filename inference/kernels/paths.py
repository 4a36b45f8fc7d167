"""Paths of densities from one that can be drawn from to the posterior, and the pairs of parts that they run between.

    geometric    log f_b = (1 - b) log f_0 + b log f_1
    arithmetic   log f_b = log((1 - b) f_0 + b f_1)

f_0 is normalised: the prior of the continuous latents or the guide, both with the log-Jacobian of the unconstrained
space; f_1 is the joint density p(x, z) there, so that the normaliser of f_1 is the evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..density import Density
from ..lanes import Parts

STARTS = ("auto", "prior", "guide")


def geometric(beta: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """log f_b (W,) and the weights of the parts, (W, 2). Exact at both ends, also where the other part is -inf."""
    first = torch.where(beta == 1, 0.0, (1 - beta) * values[..., 0])
    last = torch.where(beta == 0, 0.0, beta * values[..., 1])
    return first + last, torch.stack([1 - beta, beta], -1)


def arithmetic(beta: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """log f_b (W,) of the mixture, and the weights of the parts' gradients, (W, 2): their shares at the point."""
    weights = torch.stack([1 - beta, beta], -1)
    terms = torch.where(weights == 0, -torch.inf, weights.log() + values)
    value = torch.logaddexp(terms[..., 0], terms[..., 1])
    return value, torch.where((value == -torch.inf)[..., None], 0.0, (terms - value[..., None]).exp())


PATHS = {"geometric": geometric, "arithmetic": arithmetic}


def prior_to_posterior(density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    """log p(z) and log p(x, z) at u (*sample, *batch, D), (*sample, *batch) each, discrete latents summed out."""
    prior = density.log_prior(u)
    if density.discrete:
        return prior, density.log_joint(u)
    return prior, prior + density.log_likelihood(u)


def guide_to_posterior(density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z | x) and log p(x, z) at u."""
    return density.log_guide(u), density.log_joint(u)


def choose(density: Density, start: str) -> str:
    """'auto' is the guide where it stands ready and serves, else the prior."""
    if start != "auto":
        return start
    return "guide" if density.guide_ready and not _guide_fault(density) else "prior"


def why_not_start(density: Density, start: str) -> str:
    """Why no path can begin there, in words; '' where it can."""
    if not density.continuous:
        return "all latents are discrete and summed out: there is nothing to move; enumeration gives the exact answer"
    if density.unlisted:
        return f"the discrete site {density.unlisted[0]!r} cannot be summed out"
    if choose(density, start) == "guide":
        density.require_guide()
        return _guide_fault(density)
    fault = density.prior_fault
    return f"{fault}: give the problem a guide and start there (start='guide')" if fault else ""


def _guide_fault(density: Density) -> str:
    if density.guide_flaw:
        return density.guide_flaw
    if altered := [n for n, s in density.guide_latents.items() if s.reweighted]:
        return f"site {altered[0]!r} of the guide is masked or scaled, so not all of log q is known"
    missing = [n for n in density.continuous if n not in density.guide_latents]
    if missing:
        return f"the guide does not propose site {missing[0]!r}"
    own = [n for n in density.guide_latents if n not in density.continuous]
    return f"the guide draws site {own[0]!r}, so its density of the continuous latents is not known" if own else ""


def begin(density: Density, start: str) -> tuple[Parts, Callable[[int], Tensor]]:
    """The parts of a path from a start, 'prior' or 'guide', and draws from it: count -> u (count, *batch, D)."""
    if start == "guide":
        return guide_to_posterior, lambda count: density.unconstrain(_continuous(density, density.guide(count).values))
    return prior_to_posterior, lambda count: density.unconstrain(density.prior(count).values)


def _continuous(density: Density, values: Any) -> dict[str, Tensor]:
    # sites that are summed out have no value in the guide; any will do, the continuous ones do not depend on it
    return {n: values[n] for n in density.continuous}

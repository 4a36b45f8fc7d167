"""Resampling: which particle each particle of the next generation descends from, datum by datum.

    multinomial   every descendant draws its ancestor by itself
    residual      floor(S w) descendants for certain, the rest multinomial (Liu & Chen 1998, doi:10.2307/2669847)
    stratified    one uniform number in each of S strata
    systematic    one uniform number for all strata (Kitagawa 1996, doi:10.2307/1390750)

In all of them the mean number of descendants is S w. Pure functions of uniform numbers, batched over data.
Comparison: Douc, Cappe & Moulines 2005, arXiv:cs/0507025.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMES = ("systematic", "stratified", "residual", "multinomial")
POLICIES = ("adaptive", "always", "never")


def takes(scheme: str, count: int) -> int:
    """How many uniform numbers a datum of `count` particles takes."""
    return 1 if scheme == "systematic" else count


def ancestors(scheme: str, log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Numbers of the ancestors, (S, N), ascending for each datum but for the random part of 'residual'.

    log_weights (S, N), unnormalised; uniform (takes, N) in (0, 1). A particle of weight zero has no descendants.
    Raises ValueError, naming the data, where the weights of one are all zero or undefined.
    """
    top = log_weights.amax(0)
    broken = ~top.isfinite()
    if bool(broken.any()):
        first = broken.nonzero().flatten().tolist()
        raise ValueError(f"all weights are zero or undefined for {len(first)} data, first {first[:5]}")
    weights = (log_weights - top).exp()
    count = len(weights)
    strata = torch.arange(count, dtype=weights.dtype, device=weights.device)[:, None]
    if scheme == "systematic":
        return reached(weights, (strata + uniform[:1]) / count)
    if scheme == "stratified":
        return reached(weights, (strata + uniform) / count)
    if scheme == "multinomial":
        return reached(weights, uniform.sort(0).values)
    if scheme != "residual":
        raise ValueError(f"scheme {scheme!r}: expected one of {', '.join(SCHEMES)}.")
    # rounding must not cost a particle that is due a whole number of descendants
    due = weights / weights.sum(0) * count
    certain = (due + 1e-9).floor()
    until = certain.cumsum(0)
    rest = (due - certain).clamp_min(0.0)
    fixed = _first_above(until, strata.expand_as(until).contiguous())
    rest = torch.where(rest.sum(0) > 0, rest, weights)  # nothing is left to chance there, and none of it is used
    return torch.where(strata < until[-1], fixed.clamp_max(count - 1), reached(rest, uniform))


def reached(weights: Tensor, share: Tensor) -> Tensor:
    """The first particle with which the running sum of weights exceeds a share (S, N) of the whole."""
    cumulative = weights.cumsum(0)
    whole = cumulative[-1:]
    return _first_above(cumulative, torch.minimum(share * whole, torch.nextafter(whole, torch.zeros_like(whole))))


def _first_above(cumulative: Tensor, position: Tensor) -> Tensor:
    return torch.searchsorted(cumulative.T.contiguous(), position.T.contiguous(), right=True).T.contiguous()

"""How far off the means and sds of an answer probably are, told from the run itself, without the truth.

Each mean and each sd has an error that is about normal, with a shift d and a noise s, in units of the posterior sd:

    noise   the standard error; of weighted draws  s^2 = sum_g (sum_{i in g} W_i (z_i - m))^2 / v,  where g are draws of
            one value: copies of an ancestor that came through resampling together, or that were never moved
    shift   d = (mean of the answer - mean of a better estimate) / sd of that, where the run has one at hand: the draws
            of a guide under the Pareto smoothed weights p(x, z) / q(z) (Yao, Vehtari, Simpson & Gelman 2018,
            arXiv:1802.02538), or those of ABC adjusted to the observed summaries. The noise is then the better one's.

The likely error is the t that none of them exceeds with probability 0.9, taken for independent,

    prod_k [ Phi((t - d_k) / s_k) - Phi((-t - d_k) / s_k) ] = 0.9,

or, of a hundred data and more, that no more than one in a hundred data does. Of a discrete latent it is the error of
the probabilities, total variation. It is what the run can see: a mode that no draw came near is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .statistics import mcse
from .words import Judgement, element, level_by, unravel

CAUTION, BAD = 0.2, 1.0  # posterior sds
SURE = 0.9
TOLERATED = 0.01  # of the data
FEW_VALUES = 32  # of a discrete latent, up to which probabilities are compared in place of moments
AT_ONCE = 2**20  # numbers that are worked on together
BISECTIONS = 50
ROUNDING = 1e-12

Draws = Mapping[str, Tensor]
Weighted = tuple[Draws, Tensor | None]


class Worst(NamedTuple):
    """A figure at the scalar where it is largest; `of`: 'mean', 'sd' or 'probability'; `where`: the site's element."""

    value: float
    of: str
    where: str


class Accuracy(NamedTuple):
    """The likely error, the largest shift (signed) and the largest noise; all in posterior sds, or a probability."""

    likely: float
    shift: Worst
    noise: Worst


def judged_by(found: Accuracy | None, better: str = "", advice: str = "") -> Judgement:
    """The likely error as a figure, and in words with its cause: how the `better` estimate was made, whose shift
    `advice` mends, or chance."""
    if found is None:
        return {}, []
    likely, shift, noise = found
    figures = {"likely_error": likely} | ({"moment_shift": abs(shift.value)} if better else {})
    level = level_by(likely <= CAUTION, likely > BAD)
    unit = "" if shift.of == noise.of == "probability" else " sd"
    if level == "good":
        return figures, [(level, f"errors probably below {likely:.2g}{unit}")]
    if abs(shift.value) <= 2 * noise.value:
        cause = f"by chance, most in the {noise.of} of {noise.where}: draw more"
    elif shift.of == "sd":  # the answer's, relative to the better one, less one
        cause = f"{better} multiplies the sd of {shift.where} by {1 / max(1 + shift.value, ROUNDING):.2g}: {advice}"
    else:
        by = f"{abs(shift.value):.2g}" + " sd" * (shift.of == "mean")
        cause = f"{better} moves the {shift.of} of {shift.where} by {by}: {advice}"
    return figures, [(level, f"errors up to {likely:.2g}{unit} are likely (should be < {CAUTION}); {cause}")]


class Part(NamedTuple):
    """Shift and noise of one kind of error of a site whose scalars are of this shape, (data, events)."""

    of: str
    site: str
    shape: tuple[int, ...]
    shift: Tensor
    noise: Tensor


def of_draws(answer: Weighted, better: Weighted | None = None, batch_dims: int = 0) -> Accuracy | None:
    """Of independent or weighted draws: site -> (C, S, *batch, *event), with log weights (C, S, *batch) or None, held
    against `better` ones of as many draws and data. None where nothing varies."""
    found, weights = better or answer
    parts: list[Part] = []
    for site, values in found.items():
        if not values.numel():
            continue
        size = values.shape[:2].numel(), values.shape[2 : 2 + batch_dims].numel()
        mine, theirs = (_normalised(w, size) for w in (answer[1], weights))
        x, y = (v.reshape(*size, -1) for v in (answer[0][site], values))
        listed = _listed(y)
        figures = _moments if listed is None else partial(_probabilities, listed)
        columns = max(1, AT_ONCE // size[0])
        errors = torch.cat([
            torch.cat([
                figures(*map(_rows, (x[:, data, events], mine[:, data], y[:, data, events], theirs[:, data])))
                for events in _slices(x.shape[2], columns)
            ], 3)
            for data in _slices(size[1], max(1, columns // x.shape[2]))
        ], 2)  # fmt: skip
        parts += [Part(of, site, values.shape[2:], *error) for of, error in zip(_kinds(listed), errors, strict=True)]
    return _likely(parts)


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, count, step)]


def _rows(values: Tensor) -> Tensor:
    """(S, data, events) -> (data, events, S), which sums and sorts run through quickly."""
    return values.double().permute(1, 2, 0).contiguous()


def of_chains(draws: Draws, judged: Mapping[str, Tensor], batch_dims: int = 0) -> Accuracy | None:
    """Of chains, (C, S, *batch, *event), by the autocorrelation of the values and of their squares; of the scalars that
    are `judged`, (*batch, *event). None where there are none."""
    parts: list[Part] = []
    for site, which in judged.items():
        if not bool(which.any()):
            continue
        x = draws[site]
        squares = (x.double() - x.double().mean((0, 1))).square()
        variance = squares.mean((0, 1))
        noise = mcse(x) / variance.sqrt()
        listed = _listed(x)
        if listed is None:
            errors = [noise, mcse(squares) / (2 * variance)]
        else:  # as many effective draws as of the values
            errors = [noise * sum(0.5 * (p * (1 - p)).sqrt() for p in ((x == v).double().mean((0, 1)) for v in listed))]
        data = x.shape[2 : 2 + batch_dims].numel()
        for of, error in zip(_kinds(listed), errors, strict=True):
            kept = error.masked_fill(~which.expand_as(error) | ~error.isfinite(), 0.0).reshape(data, -1)
            parts.append(Part(of, site, which.shape, torch.zeros_like(kept), kept))
    return _likely(parts)


def _kinds(listed: Tensor | None) -> tuple[str, ...]:
    return ("mean", "sd") if listed is None else ("probability",)


def _listed(values: Tensor) -> Tensor | None:
    """The values of a discrete latent, where there are few; else None."""
    if values.is_floating_point() and not bool((values == values.round()).all()):
        return None
    listed = values.unique()
    return listed if len(listed) <= FEW_VALUES else None


def _normalised(log_weights: Tensor | None, size: tuple[int, int]) -> Tensor:
    """(S, data, 1), that sum to one over the draws."""
    if log_weights is None:
        return torch.full((*size, 1), 1 / size[0], dtype=torch.float64)
    return torch.softmax(log_weights.double().reshape(size), 0)[..., None]


def _moments(x: Tensor, mine: Tensor, y: Tensor, theirs: Tensor) -> Tensor:
    """Shift and noise of means and of sds, (2, 2, data, events), of draws (data, events, S)."""
    mean = (theirs * y).sum(-1, keepdim=True)
    centred = y - mean
    terms = theirs * centred
    squares = terms * centred
    variance = squares.sum(-1)
    own_mean = (mine * x).sum(-1, keepdim=True)
    own = (mine * (x - own_mean).square()).sum(-1)
    sd = variance.sqrt()
    of_mean, of_square = _errors(y, terms, squares - theirs * variance[..., None])
    shifts = torch.stack([(own_mean - mean)[..., 0] / sd, own.sqrt() / sd - 1])
    noises = torch.stack([of_mean / sd, of_square / (2 * variance)])
    found = torch.stack([shifts, noises], 1)
    width = x.amax(-1) - x.amin(-1)
    collapsed = (width == 0) | (variance <= (ROUNDING * width).square())  # to one draw
    found = torch.where(collapsed, math.inf, found)
    settled = (width == 0) & (x[..., 0] == x[..., 0].round())  # a zero of a matrix, say
    return torch.where(settled, 0.0, found)


def _errors(values: Tensor, *terms: Tensor) -> list[Tensor]:
    """The standard error of the sum of terms over the last dimension, of which those at equal values go together."""
    flat = values.flatten(0, 1)
    ordered = torch.from_numpy(np.sort(flat.numpy(), 1))
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    found = [t.square().sum(-1) for t in terms]
    if bool(tied.any()):
        ordered, order = flat[tied].sort(1)
        group = torch.zeros_like(order)
        group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        for variance, each in zip(found, terms, strict=True):
            together = torch.zeros_like(ordered).scatter_add_(1, group, each.flatten(0, 1)[tied].gather(1, order))
            variance.view(-1)[tied] = together.square().sum(1)
    return [variance.sqrt() for variance in found]


def _probabilities(listed: Tensor, x: Tensor, mine: Tensor, y: Tensor, theirs: Tensor) -> Tensor:
    """Shift and noise of the probabilities of a discrete latent's values, (1, 2, data, events)."""
    shift = noise = torch.zeros_like(x[..., 0])
    for value in listed:
        is_it = (y == value).double()
        p = (theirs * is_it).sum(-1)
        shift = shift + 0.5 * ((mine * (x == value)).sum(-1) - p).abs()
        noise = noise + 0.5 * (theirs * (is_it - p[..., None])).square().sum(-1).sqrt()
    return torch.stack([shift, noise])[None]


def _likely(parts: list[Part]) -> Accuracy | None:
    parts = [part for part in parts if bool(((part.shift.abs() > ROUNDING) | (part.noise > ROUNDING)).any())]
    if not parts:
        return None
    shift = torch.cat([part.shift for part in parts], 1).abs()  # (data, all figures)
    noise = torch.cat([part.noise for part in parts], 1).clamp_min(ROUNDING)

    def within(t: float) -> bool:
        beyond = torch.special.ndtr((shift - t) / noise) + torch.special.ndtr((-t - shift) / noise)
        log_none = torch.log1p(-beyond.clamp_max(1.0)).sum(1)  # of each datum
        tolerated = int(TOLERATED * len(shift))
        return bool(log_none.sum() >= math.log(SURE)) or bool(-torch.expm1(log_none).sum() <= tolerated)

    low, high = 0.0, float((shift + 10 * noise).max())
    if math.isfinite(high):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if within(middle) else (middle, high)
    return Accuracy(high, _worst(parts, "shift"), _worst(parts, "noise"))


def _worst(parts: list[Part], name: str) -> Worst:
    part = max(parts, key=lambda part: float(getattr(part, name).abs().max()))
    values = getattr(part, name).flatten()
    at = int(values.abs().argmax())
    return Worst(float(values[at]), part.of, element(part.site, unravel(at, part.shape)))

"""What draws are worth: R-hat, effective sample size, Monte Carlo error and Pareto smoothing, for all scalars at once.

The figures are those of arviz, to which the tests compare them; these here take thousands of scalars in one pass,
since a per-datum posterior has as many chains to judge as it has data.

Chains: Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), https://doi.org/10.1214/20-BA1221.
Weights: Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72), https://arxiv.org/abs/1507.02646.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 2**16  # numbers that are worked on together: bounds memory, not results
FEWEST_DRAWS = 4
FEWEST_WEIGHTS = 25  # with fewer positive weights the tail holds fewer than the five that a fit needs
DISTINCT = 8  # decimals (nats) to which two log weights must differ to count as two


# ---------------------------------------------------------------------------------------------------------------
# Chains


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a copy of them: none that is not is lost in their sum."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded: (C, S, ...) -> (...).

    nan with one chain, fewer than four draws, a value that is not finite, or a chain that never moves.
    """

    def statistic(chains: Tensor) -> Tensor:
        halves = _split(chains)
        folded = (halves - _quantile(_sorted(halves), 0.5)[:, None, None]).abs()
        return torch.maximum(_split_rhat(_normal_scores(halves)), _split_rhat(_normal_scores(folded)))

    return _each(statistic, draws, fewest_chains=2)


def ess(draws: Tensor, kind: str = "bulk") -> Tensor:
    """Effective number of draws in all chains together: (C, S, ...) -> (...), `kind` 'bulk' or 'tail'.

    'bulk' is that of the rank-normalised draws, 'tail' the smaller of those for the 5 % and 95 % quantiles.
    nan as in `rhat`, save that one chain will do. Raises ValueError for another kind.
    """
    if kind not in ("bulk", "tail"):
        raise ValueError(f"ess kind {kind!r}: expected 'bulk' or 'tail'.")

    def tail(chains: Tensor) -> Tensor:
        ordered = _sorted(chains)
        low, high = (
            _ess(_split((chains <= _quantile(ordered, p)[:, None, None]).to(chains.dtype))) for p in (0.05, 0.95)
        )
        return torch.minimum(low, high)

    return _each((lambda chains: _ess(_normal_scores(_split(chains)))) if kind == "bulk" else tail, draws)


def mcse(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean of correlated draws, sd / sqrt(ESS): (C, S, ...) -> (...), in their
    unit; nan as in `ess`."""
    return _each(lambda chains: chains.flatten(1).std(1) / _ess(_split(chains)).sqrt(), draws)


def _each(statistic: Callable[[Tensor], Tensor], draws: Tensor, fewest_chains: int = 1) -> Tensor:
    """A statistic of chains (K, C, S) for every scalar of (C, S, ...); nan where they cannot be judged.

    Constants would pass for perfect mixing, so chains that never move are not shown to it.
    """
    chains, length = draws.shape[:2]
    values = draws.detach().cpu().reshape(chains, length, math.prod(draws.shape[2:]))
    result = torch.full((values.shape[2],), math.nan, dtype=torch.float64)
    if chains >= fewest_chains and length >= FEWEST_DRAWS:
        size = max(1, AT_ONCE // (chains * length))
        for first in range(0, values.shape[2], size):
            part = values[..., first : first + size].double().permute(2, 0, 1).contiguous()
            judged = part.isfinite().all(2).all(1) & (part != part[..., :1]).any(2).all(1)
            result[first : first + size][judged] = statistic(part[judged]) if judged.any() else part.new_empty(0)
    return result.reshape(draws.shape[2:])


def _split(chains: Tensor) -> Tensor:
    """Halves of chains, as chains: (K, C, S) -> (K, 2C, S // 2)."""
    half = chains.shape[2] // 2
    return torch.cat([chains[..., :half], chains[..., -half:]], 1)


def _normal_scores(chains: Tensor) -> Tensor:
    """Each value's normal quantile at its rank among all draws; equal values share their mean rank."""
    flat = chains.flatten(1)
    order = torch.from_numpy(flat.numpy().argsort(1))
    ordered = flat.gather(1, order)
    size = ordered.shape[1]
    place = torch.arange(size)
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = torch.ones_like(differs[:, :1])
    first = torch.where(torch.cat([edge, differs], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([differs, edge], 1), place, size).flip(1).cummin(1).values.flip(1)
    rank = (first + last).double() / 2 + 1
    scores = torch.special.ndtri((rank - 0.375) / (size + 0.25))
    return torch.empty_like(scores).scatter_(1, order, scores).reshape(chains.shape)


def _sorted(chains: Tensor) -> Tensor:
    """(K, C, S) -> (K, C S). numpy's sort is ten times quicker than torch's."""
    return torch.from_numpy(np.sort(chains.flatten(1).numpy(), 1))


def _quantile(ordered: Tensor, p: float) -> Tensor:
    """Quantile of sorted values (K, N), linear between two of them (type 7 of Hyndman and Fan 1996): (K,)."""
    size = ordered.shape[1]
    at = size * p + (1 - p)  # rounded as in scipy's mquantiles, for it decides whether a draw is counted
    above = min(max(int(at), 1), size - 1)
    gap = at - above
    return (1 - gap) * ordered[:, above - 1] + gap * ordered[:, above]


def _split_rhat(chains: Tensor) -> Tensor:
    within = chains.var(2).mean(1)
    between = chains.mean(2).var(1)  # of the means: the variance between chains, over their length
    length = chains.shape[2]
    return (between / within + (length - 1) / length).sqrt()


def _ess(chains: Tensor) -> Tensor:
    """Draws over their autocorrelation time, by Geyer's (1992) initial monotone sequence: (K, C, S) -> (K,)."""
    number, length = chains.shape[1:]
    covariance = _autocovariance(chains)
    variance = covariance[:, 0] * length / (length - 1)
    total = covariance[:, 0] + (chains.mean(2).var(1) if number > 1 else 0.0)
    rho = 1 - (variance[:, None] - covariance) / total[:, None]
    rho[:, 0] = 1.0
    pairs = rho[:, : length // 2 * 2].unflatten(1, (-1, 2)).sum(2)  # rho(2k) + rho(2k + 1)
    most = max(0, (length - 3) // 2)
    positive = (pairs[:, :most] > 0).to(torch.int64).cumprod(1)  # those before the first that is not
    stop = positive.sum(1)
    monotone = (pairs[:, :most].cummin(1).values * positive).sum(1)
    rest = rho.gather(1, 2 * stop[:, None])[:, 0]
    rest = torch.where((rest > 0) | (pairs.gather(1, stop[:, None])[:, 0] >= 0), rest, 0.0)
    time = -1 + 2 * monotone + rest
    count = number * length
    found = count / time.clamp_min(1 / math.log10(count))
    flat = chains.flatten(1)
    constant = flat.amax(1) - flat.amin(1) < 1e-15
    return torch.where(constant, float(count), found).masked_fill(rho.isnan().any(1) & ~constant, math.nan)


def _autocovariance(chains: Tensor) -> Tensor:
    """At every lag, the mean of those of the chains: (K, C, S) -> (K, S)."""
    length = chains.shape[2]
    size = 2 ** math.ceil(math.log2(2 * length))
    spectrum = torch.fft.rfft(chains - chains.mean(2, keepdim=True), size)
    squares = torch.view_as_real(spectrum).square().mean(1)  # of |x|^2 the parts, without the root that abs takes
    return torch.fft.irfft(squares[..., 0] + squares[..., 1], size)[:, :length] / length


# ---------------------------------------------------------------------------------------------------------------
# Weights


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto smoothed importance weights, each batch element by itself: (S, *batch) -> (S, *batch), k-hat (*batch).

    The largest ceil(min(S / 5, 3 sqrt S)) weights are replaced by the order statistics of a generalised Pareto
    distribution fitted to them, and cut at the largest raw weight. Log weights come back on the scale they came in
    (not normalised), in float64, so that their mean still estimates the evidence. k-hat is the shape of the tail.
    Draws of weight zero (-inf) stay so and are left out of the fit. Where there is nothing to fit the weights come
    back as they are, and k-hat is
      0    where the weights have no tail: all equal, or a few values over and over (a discrete latent);
      nan  below 25 positive weights: unknown;
      inf  where the fit fails because a few draws outweigh the rest beyond the range of floating point.

    Raises ValueError at nan or +inf.
    """
    raw = log_weights.detach().cpu().double()
    broken = raw.isnan() | (raw == math.inf)
    if bool(broken.any()):
        first = tuple(broken.nonzero()[0].tolist())
        raise ValueError(
            f"psis: {int(broken.sum())} of {broken.numel()} log weights are nan or +inf, the first at {first}; "
            "a log weight is finite, or -inf for weight zero. Find the draw at which the density overflows."
        )
    columns = raw.reshape(raw.shape[0], math.prod(raw.shape[1:])).T.clone(memory_format=torch.contiguous_format)
    k_hat = torch.full((len(columns),), math.nan, dtype=torch.float64)
    counts = (columns > -math.inf).sum(1)
    for count in counts.unique().tolist():
        if count >= FEWEST_WEIGHTS:
            _smooth(columns, k_hat, (counts == count).nonzero()[:, 0], count)
    return columns.T.reshape(raw.shape), k_hat.reshape(raw.shape[1:])


def k_hat_threshold(draws: int) -> float:
    """Above which k-hat says that figures from so many draws are not to be relied on: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(max(draws, 2)), 0.7)


def _smooth(columns: Tensor, k_hat: Tensor, rows: Tensor, count: int) -> None:
    """`psis` in place, for those rows of (K, S) that have `count` positive weights."""
    tail = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    top, where = columns[rows].topk(tail + 1)  # from the largest down
    largest = top[:, :1]
    top = top - largest
    values = (top * 10**DISTINCT).round()
    flat = 1 + (values[:, 1:] != values[:, :-1]).sum(1) <= top.shape[1] // 2
    k_hat[rows[flat]] = 0.0
    cut = top[:, -1:].clamp_min(math.log(torch.finfo(torch.float64).tiny))
    lengths = (top[:, :-1] > cut).sum(1)  # ties at the cut are not in the tail
    for length in lengths[~flat].unique().tolist():
        chosen = (~flat & (lengths == length)).nonzero()[:, 0]
        if length < 5:
            k_hat[rows[chosen]] = math.inf
            continue
        for part in chosen.split(max(1, AT_ONCE // (length * (30 + math.isqrt(length))))):
            excess = (top[part, :length].exp() - cut[part].exp()).flip(1)
            k, scale = _fit_pareto(excess)
            fitted = (_pareto_quantiles(length, k, scale) + cut[part].exp()).log().clamp_max(0.0).flip(1)
            good = k.isfinite()
            k_hat[rows[part]] = torch.where(good, k, math.inf)
            kept = rows[part[good]]
            columns[kept[:, None], where[part[good], :length]] = fitted[good] + largest[part[good]]


def _fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale (K,) of generalised Pareto distributions, from sorted excesses (K, n).

    Zhang and Stephens (2009), doi:10.1198/tech.2009.08017, with a weak prior that pulls the shape towards 1/2.
    """
    n = excess.shape[1]
    candidates = 30 + math.isqrt(n)
    grid = 1 - (candidates / (torch.arange(1, candidates + 1, dtype=excess.dtype) - 0.5)).sqrt()
    b = grid / (3 * excess[:, int(n / 4 + 0.5) - 1, None]) + 1 / excess[:, -1:]
    k = torch.log1p(-b[..., None] * excess[:, None]).mean(2)
    profile = n * ((-(b / k)).log() - k - 1)
    weight = torch.softmax(profile, 1)
    weight = weight.masked_fill(weight < 10 * torch.finfo(weight.dtype).eps, 0.0)
    b = torch.where(weight > 0, b * weight, 0.0).sum(1) / weight.sum(1)
    k = torch.log1p(-b[:, None] * excess).mean(1)
    return (n * k + 10 * 0.5) / (n + 10), -k / b


def _pareto_quantiles(count: int, shape: Tensor, scale: Tensor) -> Tensor:
    """The quantiles at (i - 1/2) / count of generalised Pareto distributions, (K, count)."""
    log_survival = torch.log1p(-torch.arange(0.5, count, dtype=shape.dtype) / count)
    shape = shape[:, None]
    flat = shape.abs() < torch.finfo(shape.dtype).eps
    return scale[:, None] * torch.where(flat, -log_survival, torch.expm1(-shape * log_survival) / shape)

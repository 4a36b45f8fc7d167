"""How far the draws of an answer are from draws of the truth: distances between laws, their weights honoured.

Each takes a posterior and a reference that has draws. Latents of a datum are one vector, in units of their true sd.
Of many data `DATA` are looked at, always the same ones, with at most `DRAWS` draws each. The truth's own error is
that distance between two halves of its draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrometer.inference import Posterior
from pyrometer.inference.problem import Reference

from .metrics import SMALLEST_SD, Score, discrete, metric

DATA, DRAWS = 16, 500
CLASSIFIED, CLASSIFIED_DRAWS, FOLDS = 4, 500, 3  # data, draws and folds of the classifiers, which are slow
DIRECTIONS = 64
LEVELS = (0.05, 0.5, 0.95)
FEWEST_IN_MODE = 0.05  # of the mass: less is no mode
DIP = 0.5  # between two modes the density falls below this share of the lower one


@dataclass(frozen=True)
class Pair:
    """Draws x (n, D) of an answer and y (m, D) of the truth at one datum, in true sds; weights (n), (m) sum to one.

    `rule`: x are the points of a rule, which are all there is of the answer, and not draws of it.
    """

    where: str
    x: Tensor
    wx: Tensor
    y: Tensor
    wy: Tensor
    rule: bool = False


def pairs(posterior: Posterior, reference: Reference, data: int = DATA, draws: int = DRAWS) -> list[Pair]:
    """The continuous latents that both have, for a choice of data; empty where there are none."""
    if reference.log_weights is not None or not len(reference.draws):
        return []
    truth = {n: v for n, v in reference.draws.items() if n in posterior.draws and v.is_floating_point()}
    if not truth:
        return []
    batch = tuple(posterior.batch_shape)
    number = math.prod(batch)
    chosen = torch.arange(number)
    if number > data:
        chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:data].sort().values
    weights = _normalised(reference.draw_log_weights, len(next(iter(truth.values()))), number)
    flat = [(posterior.draws[n].double().flatten(0, 1), v.double()) for n, v in truth.items()]
    x, y = (torch.cat([part[i].reshape(len(part[i]), number, -1)[:, chosen] for part in flat], -1) for i in (0, 1))
    own = posterior.weights().flatten(0, 1).reshape(-1, number)[:, chosen]
    wy = weights[:, chosen]
    centre = (wy[..., None] * y).sum(0)
    scale = (wy[..., None] * (y - centre).square()).sum(0).sqrt()
    scale = torch.maximum(scale, SMALLEST_SD * centre.abs().clamp(min=1.0))
    x, y = (x - centre) / scale, (y - centre) / scale
    found = []
    for i, datum in enumerate(chosen.tolist()):
        at, wx = fewer(own[:, i], draws, weighted=posterior.log_weights is not None)
        to, w = fewer(wy[:, i], draws, weighted=reference.draw_log_weights is not None)
        where = str([int(k) for k in np.unravel_index(datum, batch)]) if batch else ""
        found.append(Pair(where, x[at, i], wx, y[to, i], w, posterior.is_rule))
    return found


def _normalised(log_weights: Tensor | None, draws: int, number: int) -> Tensor:
    if log_weights is None:
        return torch.full((draws, number), 1 / draws, dtype=torch.float64)
    return torch.softmax(log_weights.double(), 0).reshape(draws, number)


def fewer(weights: Tensor, most: int, weighted: bool) -> tuple[Tensor, Tensor]:
    """Which of the draws to look at, and their weights: all of a few; of many that weigh alike, evenly spaced ones; of
    others, those that systematic resampling takes, each once with its number of copies for a weight."""
    if len(weights) <= most:
        return torch.arange(len(weights)), weights
    if not weighted:
        return torch.linspace(0, len(weights) - 1, most, dtype=torch.float64).round().long(), weights.new_full(
            (most,), 1 / most
        )
    ends = torch.cat([weights.new_zeros(1), (weights.cumsum(0) / weights.sum() * most + 0.5).floor()])
    copies = ends.diff()
    at = copies.nonzero()[:, 0]
    return at, copies[at] / copies.sum()


def halves(pair: Pair) -> Pair:
    """The truth against itself: one half of its draws for the answer."""
    order = torch.randperm(len(pair.y), generator=torch.Generator().manual_seed(1))
    a, b = order[: len(order) // 2], order[len(order) // 2 :]
    wa, wb = (pair.wy[half] / pair.wy[half].sum() for half in (a, b))
    return replace(pair, x=pair.y[a], wx=wa, y=pair.y[b], wy=wb, rule=False)


def _distance(distance: Callable[[Pair], float], posterior: Posterior, reference: Reference) -> Score | None:
    found = pairs(posterior, reference)
    if not found:
        return None
    values = [distance(pair) for pair in found]
    floor = float(np.mean([abs(distance(halves(pair))) for pair in found]))
    return summary(values, [pair.where for pair in found], floor)


def summary(values: Any, where: list[str], floor: float = 0.0, better: str = "lower", **more: Any) -> Score:
    """The average over data, the worst and where it is; nan is the worst of all."""
    array = np.asarray(values, dtype=float)
    bad = np.nan_to_num(array if better == "lower" else -array, nan=math.inf, posinf=math.inf, neginf=-math.inf)
    at = int(bad.argmax())
    worst = float(array[at]) if not math.isnan(array[at]) else math.copysign(math.inf, bad[at])
    return Score(float(array.mean()), worst, where[at], floor, **more)


@metric("error of quantiles", shown=False)
def quantile_error(posterior: Posterior, reference: Reference) -> Score | None:
    """|quantile - true quantile| / true sd at 5, 50 and 95 %, over every entry of the sites that both have draws of."""
    if reference.log_weights is not None or not len(reference.draws):
        return None
    errors, floors, where = [], [], []
    for site, values in reference.draws.items():
        if site not in posterior.draws or not values.is_floating_point():
            continue
        weights = None if reference.draw_log_weights is None else reference.draw_log_weights[None]
        truth = Posterior({site: values[None]}, weights, batch_shape=posterior.batch_shape)
        scale = truth.sd(site)
        scale = torch.maximum(scale, SMALLEST_SD * truth.mean(site).abs().clamp(min=1.0))
        own = truth.weights().square().sum((0, 1)).amax()  # one over the number of draws, where they weigh alike
        for level in LEVELS:
            error = (posterior.quantile(site, level) - truth.quantile(site, level)).abs() / scale
            margin = float((level * (1 - level) * own).sqrt())
            ends = (truth.quantile(site, min(max(level + s * margin, 0.0), 1.0)) for s in (1, -1))
            floors.append(((next(ends) - next(ends)) / (2 * scale)).flatten())
            errors.append(error.flatten())
            where += [f"{site}{_index(i, error.shape)} at {level:.0%}" for i in range(error.numel())]
    if not errors:
        return None
    return summary(torch.cat(errors).tolist(), where, float(torch.cat(floors).mean()))


def _index(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(i) for i in np.unravel_index(flat, shape)]) if shape else ""


@metric("sliced Wasserstein", shown=False)
def sliced_wasserstein(posterior: Posterior, reference: Reference) -> Score | None:
    """Mean over 64 directions of the 1-Wasserstein distance along them, int |F - G| dt, in true sds: a shift by one sd
    along every axis is 1 in one dimension (Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3)."""
    return _distance(wasserstein, posterior, reference)


def wasserstein(pair: Pair) -> float:
    dim = pair.x.shape[1]
    directions = torch.ones(1, 1, dtype=torch.float64)
    if dim > 1:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(dim, DIRECTIONS, generator=generator, dtype=torch.float64)
        directions = directions / directions.norm(dim=0)
    along = torch.cat([pair.x @ directions, pair.y @ directions])  # (n + m, directions)
    weights = torch.cat([pair.wx, -pair.wy])[:, None].expand(along.shape)
    ordered, order = along.sort(0)
    difference = weights.gather(0, order).cumsum(0)[:-1]
    return float((difference.abs() * ordered.diff(dim=0)).sum(0).mean())


@metric("energy distance", shown=False)
def energy_distance(posterior: Posterior, reference: Reference) -> Score | None:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, in true sds: 0 for the same law, below 0 by chance
    (Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018)."""
    return _distance(energy, posterior, reference)


def energy(pair: Pair) -> float:
    return -_contrast(pair, lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"))


@metric("squared MMD", shown=False)
def squared_mmd(posterior: Posterior, reference: Reference) -> Score | None:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), unbiased, k(a, b) = exp(-|a - b|^2 / (2 h^2)), with h the median distance
    of two draws of the truth: 0 for the same law, below 0 by chance (Gretton et al. 2012, jmlr.org/papers/v13)."""
    return _distance(mmd, posterior, reference)


def mmd(pair: Pair, bandwidth: float | None = None) -> float:
    h = bandwidth or max(float(torch.pdist(pair.y[:500]).median()), SMALLEST_SD)
    return _contrast(pair, lambda a, b: torch.exp(-torch.cdist(a, b).square() / (2 * h * h)))


def _contrast(pair: Pair, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), pairs of a draw with itself left out."""

    def within(z: Tensor, w: Tensor, whole: bool = False) -> Tensor:
        k = kernel(z, z)
        if whole or len(z) == 1:  # points that are the law itself
            return w @ k @ w
        k.fill_diagonal_(0.0)
        return w @ k @ w / (1 - w @ w)

    between = pair.wx @ kernel(pair.x, pair.y) @ pair.wy
    return float(within(pair.x, pair.wx, pair.rule) + within(pair.y, pair.wy) - 2 * between)


@metric("C2ST", shown=False)
def c2st(posterior: Posterior, reference: Reference) -> Score | None:
    """Cross-validated share of draws that a classifier assigns rightly to answer or truth: 0.5 for the same law, 1 for
    laws apart. The larger of logistic regression on (z, z^2) and gradient-boosted trees, named in `where`; the figure
    depends on the classifier (Lopez-Paz and Oquab 2017, arXiv:1610.06545). The truth's own: 0.5 and two of its
    standard errors."""
    found = pairs(posterior, reference, CLASSIFIED, CLASSIFIED_DRAWS)
    if not found or found[0].rule:  # a classifier tells a grid from any law
        return None
    told = [two_sample(pair) for pair in found]
    effective = [min(1 / float(p.wx @ p.wx), 1 / float(p.wy @ p.wy)) for p in found]
    error = math.sqrt(sum(0.125 / n for n in effective)) / len(found)
    where = [f"{name}{' at ' + pair.where if pair.where else ''}" for (_, name), pair in zip(told, found, strict=True)]
    return summary([value for value, _ in told], where, 0.5 + 2 * error, std_error=error)


def two_sample(pair: Pair) -> tuple[float, str]:
    """The larger accuracy, and whose it is."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    z = torch.cat([pair.x, pair.y]).numpy()
    label = np.repeat([0, 1], [len(pair.x), len(pair.y)])
    weight = torch.cat([pair.wx, pair.wy]).numpy()
    if min(len(pair.x), len(pair.y)) < FOLDS:
        return 1.0, "too few draws"
    squares = np.concatenate([z, z**2], 1)
    best = (0.0, "")
    for name, features, make in (
        ("logistic on (z, z^2)", squares, lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))),
        ("boosted trees", z, lambda: HistGradientBoostingClassifier(max_iter=30, random_state=0)),
    ):
        right = np.zeros(len(z))
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, label):
            model = make()
            step = "logisticregression__" if name.startswith("logistic") else ""
            scaled = weight[train] * len(train) / weight[train].sum()
            model.fit(features[train], label[train], **{f"{step}sample_weight": scaled})
            right[test] = model.predict(features[test]) == label[test]
        accuracy = 0.5 * sum(float(weight[label == k] @ right[label == k] / weight[label == k].sum()) for k in (0, 1))
        best = max(best, (accuracy, name))
    return best


@metric("mode coverage", shown=False, better="higher")
def mode_coverage(posterior: Posterior, reference: Reference) -> Score | None:
    """Share of the truth's modes that hold at least half of their mass, over the data whose truth has several; None
    where none has. Modes are where mean shift on the truth's draws ends (Silverman's bandwidth), 5 % of the mass or
    more, with a dip of the density to half between them; a draw belongs to the mode of the nearest draw of the truth.
    More than three latents are looked at along the two axes of the truth's largest variance.
    """
    shares, where = [], []
    for pair in map(_along_two, pairs(posterior, reference, DATA, 400)):
        labels = modes(pair.y, pair.wy)
        masses = torch.stack([pair.wy[labels == k].sum() for k in range(int(labels.max()) + 1)])
        if len(masses) < 2:
            continue
        own = labels[torch.cdist(pair.x, pair.y).argmin(1)]
        held = torch.stack([pair.wx[own == k].sum() for k in range(len(masses))])
        shares.append(float((held >= masses / 2).double().mean()))
        where.append(pair.where)
    return summary(shares, where, better="higher") if shares else None


def _along_two(pair: Pair) -> Pair:
    if pair.y.shape[1] <= 3:
        return pair
    centre = pair.wy @ pair.y
    axes = torch.linalg.svd((pair.wy.sqrt()[:, None] * (pair.y - centre)), full_matrices=False).Vh[:2].T
    return replace(pair, x=(pair.x - centre) @ axes, y=(pair.y - centre) @ axes)


def modes(y: Tensor, w: Tensor) -> Tensor:
    """The mode of each draw, numbered from 0; y (m, D) in sds with weights w (m). Kept for the engines that are next to
    be held against the same truth."""
    return _modes(y.numpy().tobytes(), w.numpy().tobytes(), y.shape[1]).clone()


@lru_cache(maxsize=4 * DATA)
def _modes(draws: bytes, weights: bytes, dim: int) -> Tensor:
    y, w = (torch.frombuffer(bytearray(values), dtype=torch.float64) for values in (draws, weights))
    y, m = y.reshape(-1, dim), len(w)
    spread = y.quantile(0.75, 0) - y.quantile(0.25, 0)
    width = torch.minimum(y.std(0), spread / 1.34).clamp(min=0.05)
    y = y / width
    h2 = (4 / (m * (dim + 2))) ** (2 / (dim + 4))

    def kernel(at: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(at, y).square() / (2 * h2)) * w

    at = y.clone()
    for _ in range(100):
        k = kernel(at)
        before, at = at, k @ y / k.sum(1, keepdim=True).clamp_min(1e-300)
        if float((at - before).abs().max()) < 1e-3:
            break
    height = kernel(at).sum(1)
    labels = torch.full((m,), -1)
    ends: list[Tensor] = []
    while bool((labels < 0).any()):  # the highest end that is left, and all that came to the same place
        top = at[torch.where(labels < 0, height, -1.0).argmax()]
        same = next((k for k, end in enumerate(ends) if _joined(top, end, kernel)), len(ends))
        ends += [top] * (same == len(ends))
        labels[(labels < 0) & ((at - top).norm(dim=1) < 0.1)] = same
    large = [k for k in range(len(ends)) if float(w[labels == k].sum()) >= FEWEST_IN_MODE]
    if not large:
        return torch.zeros(m, dtype=torch.long)
    nearest = torch.cdist(at, torch.stack([ends[k] for k in large])).argmin(1)
    for number, mode in enumerate(large):
        nearest[labels == mode] = number
    return nearest


def _joined(a: Tensor, b: Tensor, kernel: Callable[[Tensor], Tensor]) -> bool:
    """Whether the density has no dip on the line from one point to the other."""
    line = a + torch.linspace(0, 1, 21, dtype=a.dtype)[:, None] * (b - a)
    density = kernel(line).sum(1)
    return bool(density.min() > DIP * torch.minimum(density[0], density[-1]))


@metric("KL(answer, truth)", shown=False)
def kl_of_answer(posterior: Posterior, reference: Reference) -> Score | None:
    """sum_k q(k) log q(k) / p(k) in nats per datum, of a discrete latent whose exact probabilities p are known."""
    return _kl(posterior, reference, lambda p, q: torch.xlogy(q, q) - torch.xlogy(q, p))


@metric("KL(truth, answer)", shown=False)
def kl_of_truth(posterior: Posterior, reference: Reference) -> Score | None:
    """sum_k p(k) log p(k) / q(k) in nats per datum, likewise; infinite where a value of some mass was never drawn."""
    return _kl(posterior, reference, lambda p, q: torch.xlogy(p, p) - torch.xlogy(p, q))


def _kl(posterior: Posterior, reference: Reference, terms: Callable[[Tensor, Tensor], Tensor]) -> Score | None:
    probabilities = discrete(posterior, reference)
    if probabilities is None:
        return None
    site, exact, found = probabilities
    nats = terms(exact, found).sum(-1).clamp(min=0.0)  # rounding
    return summary(nats.flatten().tolist(), [site + _index(i, nats.shape) for i in range(nats.numel())])

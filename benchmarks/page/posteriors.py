"""What the figures of one block show of the draws: a few coordinates of each engine beside the truth, and k-hats.

One posterior is in memory at a time, and of each only thinned curves, a few hundred points and one k-hat per datum are
kept. All are of one seed and of each engine's largest budget, so they are judged at one theta.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrometer import models
from pyrometer.inference import Posterior, Problem, ProblemError
from pyrometer.inference.problem import Reference

from .. import reading
from ..doubt import Doubtful, as_images, k_hat_known, k_hats, worst_data
from .summary import Block, Group

PANELS = 4  # coordinates that are shown
ENGINES = 8  # engines in one figure
LEVELS = 64  # points of a curve
POINTS = 300  # of a cloud
IMAGES = 8  # worst data of an engine

Index = tuple[int, ...]
Place = tuple[str, Index]  # a scalar: its site, and the datum and entry
PLACE = re.compile(r"(.*?)(?:\[([0-9, ]*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Curve:
    """A weighted distribution function: P(z <= x) at the points x, as steps."""

    x: np.ndarray
    p: np.ndarray


@dataclass
class Panel:
    """One scalar: `site` at `index` = datum and entry; the truth as a curve, or as a mean and an sd."""

    site: str
    index: Index
    curves: dict[str, Curve] = field(default_factory=dict)
    truth: Curve | None = None
    moments: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return name_of((self.site, self.index))


@dataclass
class Pair:
    """Two scalars of the same datum: clouds of equally weighted points (n, 2)."""

    places: tuple[Place, Place]
    clouds: dict[str, np.ndarray] = field(default_factory=dict)
    truth: np.ndarray | None = None
    moments: tuple[tuple[float, float], tuple[float, float]] | None = None


@dataclass
class Doubts:
    """k-hat of every datum by one engine, and the worst of them with their images (H, W), where data are images."""

    k_hats: np.ndarray
    doubtful: Doubtful
    images: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass
class Drawn:
    """All that the figures of a block need; `missing` says what is not shown and why."""

    seed: int = 0
    keys: dict[str, str] = field(default_factory=dict)  # engine -> key of the cell
    panels: list[Panel] = field(default_factory=list)
    pair: Pair | None = None
    doubts: dict[str, Doubts] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    truth: str = "none"


def name_of(place: Place) -> str:
    """'z[17, 0]', as in a score."""
    return f"{place[0]}{list(place[1]) if place[1] else ''}"


def drawn(folder: Path, block: Block) -> Drawn:
    """Read the draws of the block's engines, one after the other."""
    found = Drawn()
    chosen = _chosen(block)
    if not chosen:
        return found
    found.seed = chosen[0][1]
    try:
        problem: Problem | None = problem_of(chosen[0][0])
    except Exception as error:  # of another's model: it may raise anything, and costs only the truth in the figure
        problem = None
        found.missing.append(f"the truth and the data are not shown: {error}")
    truth: Reference | None = None
    for group, seed in chosen:
        entry = next(e for e in group.done if e.seed == seed)
        try:
            posterior = reading.draws(folder, entry.key, entry.draws)
            if not posterior.draws:
                raise ValueError("no draws are kept")
            if truth is None:
                truth = _truth(problem, posterior, found)
                _choose_panels(block, posterior, truth, found)
            _add(group.engine, posterior, problem, found)
            found.keys[group.engine] = entry.key
        except (ValueError, OSError, RuntimeError, KeyError, IndexError) as error:
            found.missing.append(f"{group.engine}: {error}")
    found.panels = [panel for panel in found.panels if panel.curves]
    return found


def problem_of(group: Group) -> Problem:
    """The problem by the name of its family. Raises ValueError for a model that is no installed family: a module that
    a record names is never imported."""
    cell = group.cell
    if cell.model not in models.families():
        raise ValueError(f"model {cell.model!r} is no family that is installed here")
    problem = models.find(cell.model).problem(**cell.model_settings)
    if not isinstance(problem, Problem):
        raise ValueError(f"model {cell.model!r} gave no problem")
    return problem


def _chosen(block: Block) -> list[tuple[Group, int]]:
    """The largest budget of each engine that answered, with the seed that most engines have."""
    last = [answered[-1] for name in block.engines if (answered := [g for g in block.ladder(name) if g.done])]
    seeds = [entry.seed for group in last for entry in group.done]
    if not seeds:
        return []
    seed = max(sorted(set(seeds)), key=seeds.count)
    with_seed = [group for group in last if any(entry.seed == seed for entry in group.done)]
    for metric in block.metrics[:1]:  # where there are too many engines, those of the smallest error
        with_seed.sort(key=lambda g: (e.mean if (e := g.error(metric)) is not None else float("inf"), g.engine))
    return [(group, seed) for group in with_seed[:ENGINES]]


def _truth(problem: Problem | None, posterior: Posterior, found: Drawn) -> Reference:
    if problem is None:
        return Reference("none")
    try:
        truth = problem.reference_at(posterior.parameters)
    except Exception as error:  # a reference is a function of the user's
        found.missing.append(f"the truth is not shown: {type(error).__name__}: {error}")
        return Reference("none")
    found.truth = truth.kind
    return truth


def _choose_panels(block: Block, posterior: Posterior, truth: Reference, found: Drawn) -> None:
    """First the scalars at which an engine is furthest out, then the first ones of each site."""
    batch = len(posterior.batch_shape)
    wanted = [*_worst_places(block), *_first_places(posterior)]
    places: list[Place] = []
    for site, index in wanted:
        shape = posterior.draws[site].shape[2:] if site in posterior.draws else None
        known = shape is not None and len(index) == len(shape) and all(i < n for i, n in zip(index, shape, strict=True))
        if known and (site, index) not in places:
            places.append((site, index))
    for site, index in places[:PANELS]:
        panel = Panel(site, index)
        _panel_truth(panel, truth)
        found.panels.append(panel)
    pair = _pair_places(places, posterior, batch)
    if pair is not None:
        found.pair = Pair(pair)
        _pair_truth(found.pair, truth)


def _worst_places(block: Block) -> Iterator[Place]:
    worst = [
        (score.largest, score.where)
        for group in block.groups
        for entry in group.done
        for score in list(entry.errors.values())[:2]
        if score.where
    ]
    for _, where in sorted(worst, key=lambda found: -found[0] if found[0] == found[0] else -np.inf):
        match = PLACE.fullmatch(where)
        if match:
            yield match[1], tuple(int(i) for i in (match[2] or "").split(",") if i.strip())


def _first_places(posterior: Posterior) -> Iterator[Place]:
    for number in range(PANELS):
        for site, value in posterior.draws.items():
            shape = value.shape[2:]
            if number < shape.numel():
                yield site, tuple(int(i) for i in np.unravel_index(number, shape)) if shape else ()


def _pair_places(places: list[Place], posterior: Posterior, batch: int) -> tuple[Place, Place] | None:
    """Two continuous scalars of one datum, the first of them the first panel's, where there are such."""
    real = [
        (site, i) for site, i in [*places, *_neighbours(places, posterior)] if posterior.draws[site].is_floating_point()
    ]
    if not real:
        return None
    datum = real[0][1][:batch]
    others = [place for place in real[1:] if place != real[0] and place[1][:batch] == datum]
    return (real[0], others[0]) if others else None


def _neighbours(places: list[Place], posterior: Posterior) -> Iterator[Place]:
    for site, index in places[:1]:
        shape = posterior.draws[site].shape[2:]
        if index:
            yield site, (*index[:-1], (index[-1] + 1) % shape[-1])


def _add(engine: str, posterior: Posterior, problem: Problem | None, found: Drawn) -> None:
    """What is kept of one engine's draws."""
    batch = len(posterior.batch_shape)
    generator = np.random.default_rng(0)
    for panel in found.panels:
        if panel.site in posterior.draws and posterior.draws[panel.site].dim() == 2 + len(panel.index):
            values, weights = _scalar(posterior, panel.site, panel.index, batch)
            panel.curves[engine] = curve(values, weights)
    if found.pair is not None and all(site in posterior.draws for site, _ in found.pair.places):
        columns = [_scalar(posterior, site, index, batch) for site, index in found.pair.places]
        weights = columns[0][1]  # of the same datum, so the same for both
        kept = generator.choice(len(weights), POINTS, p=weights / weights.sum())
        found.pair.clouds[engine] = np.stack([values for values, _ in columns], 1)[kept]
    if posterior.batch_shape and k_hat_known(posterior) and np.prod(posterior.batch_shape) > 1:
        doubtful = worst_data(posterior)
        hats = k_hats(posterior).flatten().numpy()
        found.doubts[engine] = Doubts(
            hats, doubtful, _images(problem, [i for i, _ in doubtful.worst[:IMAGES]], len(hats))
        )


def _images(problem: Problem | None, indices: Iterable[int], data: int) -> dict[int, np.ndarray]:
    try:
        images = as_images(problem.args[0]) if problem is not None and problem.args else None
    except (ProblemError, TypeError, RuntimeError):
        return {}
    if images is None or len(images) != data:
        return {}
    return {index: images[index].numpy() for index in indices}


def _scalar(posterior: Posterior, site: str, index: Index, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """All draws of one scalar over chains, and their normalised weights."""
    values = _entries(posterior.draws[site], 2, index).double().flatten()
    weights = _entries(posterior.weights(), 2, index[:batch]).flatten()
    return values.numpy(), weights.numpy()


def _entries(values: Tensor, kept: int, index: Index) -> Tensor:
    """values[:, ..., *index]: the first dimensions whole, of the others one entry."""
    place: tuple[Any, ...] = (*[slice(None)] * kept, *index)
    return values[place]


def curve(values: np.ndarray, weights: np.ndarray) -> Curve:
    """The weighted distribution function, thinned to about `LEVELS` steps of equal height; whole where it has fewer."""
    usable = np.isfinite(values) & (weights > 0)
    if not usable.any():
        raise ValueError("no finite draw has weight")
    values, weights = values[usable], weights[usable]
    points, inverse = np.unique(values, return_inverse=True)
    p = np.cumsum(np.bincount(inverse, weights)) / weights.sum()
    if len(points) > LEVELS:
        kept = np.unique(np.searchsorted(p, np.linspace(p[0], p[-1], LEVELS), side="left").clip(max=len(p) - 1))
        points, p = points[kept], p[kept]
    return Curve(points, p)


def _panel_truth(panel: Panel, truth: Reference) -> None:
    """By the reference's draws, by exact probabilities of a discrete latent, or by its mean and sd."""
    place = (panel.site, panel.index)
    found = _reference_scalar(truth, *place)
    if found is not None:
        panel.truth = curve(*found)
    elif truth.log_weights is not None and panel.site in truth.mean and len(panel.index) == truth.log_weights.dim() - 1:
        p = _entries(torch.softmax(truth.log_weights.double(), 0), 1, panel.index)
        panel.truth = Curve(np.arange(len(p), dtype=float), p.cumsum(0).numpy())
    elif panel.site in truth.mean and panel.site in truth.sd:
        panel.moments = (_at(truth.mean, place), _at(truth.sd, place))


def _pair_truth(pair: Pair, truth: Reference) -> None:
    first, second = (_reference_scalar(truth, site, index) for site, index in pair.places)
    if first is not None and second is not None:
        weights = first[1]
        kept = np.random.default_rng(1).choice(len(weights), 2 * POINTS, p=weights / weights.sum())
        pair.truth = np.stack([first[0], second[0]], 1)[kept]
    elif all(site in truth.mean and site in truth.sd for site, _ in pair.places):
        of_first, of_second = ((_at(truth.mean, place), _at(truth.sd, place)) for place in pair.places)
        pair.moments = (of_first, of_second)


def _reference_scalar(truth: Reference, site: str, index: Index) -> tuple[np.ndarray, np.ndarray] | None:
    """Draws (S, *batch, *event) of the reference and their weights, where it has them."""
    if site not in truth.draws or truth.draws[site].dim() != 1 + len(index):
        return None
    values = _entries(truth.draws[site], 1, index).double().numpy()
    log_weights = truth.draw_log_weights
    if log_weights is None:
        return values, np.full(len(values), 1 / len(values))
    if log_weights.dim() > 1:
        log_weights = _entries(log_weights, 1, index[: log_weights.dim() - 1])
    return values, torch.softmax(log_weights.double(), 0).numpy()


def _at(values: Mapping[str, Tensor], place: Place) -> float:
    value = values[place[0]]
    return float(value[place[1]] if place[1] else value)

"""Chains of every datum, moved together: warm-up and draws of any kernel on lanes.

Each chain of each datum has its own step size, mass matrix and accept step, so that a hard datum costs its neighbours
nothing. Kernels whose draws all cost the same move in step, block after block. The No-U-Turn sampler does not: there a
lane starts its next draw when its tree is complete, whatever the others do, and when it has all its draws another
chain takes its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .density import Density
from .engine import Run, no_sum
from .kernels import adaptation, nuts, streams
from .kernels.adaptation import Warmup
from .kernels.metropolis import Kernel, Point, only
from .lanes import Lanes
from .problem import ProblemError
from .recorded import Record
from .starts import starts

T = TypeVar("T")

SLOTS = 1024  # lanes that grow trees side by side, at most,
TURNS = 4  # and at least so many chains for each: the last to finish leave the others idle
FEWEST_SLOTS = 64
FEWEST_DRAWS, STARTING = 10, 80  # of each chain in the smallest run; calls that finding where to start takes
SHRINK = 3  # when only so small a part is still at work, it moves to lanes of its own


@dataclass(frozen=True)
class Schedule:
    """How many draws of each chain, and how it is tuned."""

    num_samples: int
    warmup_steps: int
    target_acceptance: float
    step_size: float = 0.1  # where tuning begins


@dataclass(frozen=True)
class Tuned:
    """Step sizes (L,) and inverse mass matrices (L, D) of all lanes."""

    step_size: Tensor
    inverse_mass: Tensor


def in_step(density: Density, kernel: Kernel, starts: Tensor, tuned: Tuned | None, run: Run, plan: Schedule) -> Record:
    """Chains of a kernel whose transitions all cost the same, from `starts` (C, *batch, D)."""
    flat = starts.reshape(-1, starts.shape[-1])
    lanes, transition, learn = _bound(density, kernel, starts, plan)
    figures = {"lp": flat.dtype, "acceptance_rate": flat.dtype, "energy": flat.dtype, "diverging": torch.bool,
               "n_steps": torch.int64}  # fmt: skip
    record = Record(lanes, plan.num_samples, flat, figures)
    keys = streams.keys(_seed(run), lanes.total, flat.device)
    ones = torch.ones(lanes.width, dtype=flat.dtype, device=flat.device)
    inside, ends = adaptation.schedule(plan.warmup_steps)
    warmup = 0 if tuned else plan.warmup_steps
    common = streams.common(_seed(run), warmup + plan.num_samples)
    blocks = -(-lanes.total // lanes.width)
    with record.until_interrupted(run):
        for block, (ids, real) in enumerate(lanes.blocks()):
            point = Point(flat[ids], *_evaluated(lanes, flat[ids], kernel.gradient))
            key, counter = keys[ids], torch.zeros_like(ids, device=flat.device)
            step, mass = plan.step_size * ones, torch.ones_like(point.u)
            with run.tuning():
                w = adaptation.begin(step, mass)
                for t in range(warmup):
                    point, moved = transition(point, ones, w.log_step.exp(), w.inverse_mass, key, counter, common[t])
                    counter = counter + transition.takes()
                    flags = (ones > 0, inside[t] & (ones > 0), ends[t] & (ones > 0))
                    w = Warmup(*learn(*w, point.u, moved.acceptance, *flags))
                    run.progress("warm-up", block * warmup + t + 1, blocks * warmup)
            step, mass = adaptation.settled(w)
            if tuned is not None:
                step, mass = tuned.step_size[ids], tuned.inverse_mass[ids]
            record.settle(ids[:real], step[:real], mass[:real])
            for s in range(plan.num_samples):
                point, moved = transition(point, ones, step, mass, key, counter, common[warmup + s])
                counter = counter + transition.takes()
                record.write(
                    ids[:real], s, point.u[:real], lp=point.values[:real, 0], acceptance_rate=moved.acceptance[:real],
                    energy=moved.energy[:real], diverging=moved.diverging[:real], n_steps=moved.steps[:real],
                )  # fmt: skip
                run.progress("draws", block * plan.num_samples + s + 1, blocks * plan.num_samples)
    return record


def by_turns(density: Density, max_depth: int, starts: Tensor, tuned: Tuned | None, run: Run, plan: Schedule) -> Record:
    """Chains of the No-U-Turn sampler from `starts` (C, *batch, D); lanes start their draws when they are ready.

    The figure `executed`: leapfrog steps that were computed for each one that a chain needed.
    """
    flat = starts.reshape(-1, starts.shape[-1])
    total, warmup = len(flat), 0 if tuned else plan.warmup_steps
    lanes, turn = _turning(density, starts, max_depth, plan, warmup, max(FEWEST_SLOTS, total // TURNS))
    figures = {"lp": flat.dtype, "acceptance_rate": flat.dtype, "energy": flat.dtype, "diverging": torch.bool,
               "n_steps": torch.int64, "tree_depth": torch.int64, "reached_max_treedepth": torch.bool}  # fmt: skip
    record = Record(lanes, plan.num_samples, flat, figures)
    keys = streams.keys(_seed(run), total, flat.device)
    parts = [tuple(t[:real] for t in _evaluated(lanes, flat[ids])) for ids, real in lanes.blocks()]
    everywhere = Point(flat, *(torch.cat(column) for column in zip(*parts, strict=True)))
    first = Tuned(torch.full_like(flat[:, 0], plan.step_size), torch.ones_like(flat)) if tuned is None else tuned

    def planted(ids: Tensor) -> tuple[Tensor, ...]:
        """The state of chains at their beginning."""
        point = Point(*(t[ids] for t in everywhere))
        step, mass, key = first.step_size[ids], first.inverse_mass[ids], keys[ids]
        none = torch.zeros_like(ids)
        tree = nuts.plant(point, only, torch.ones_like(step), mass, key, none, max_depth)
        return (*tree, *adaptation.begin(step, mass), none)

    ids, fresh, finished = torch.arange(lanes.width, device=flat.device), lanes.width, 0
    lanes.place(ids)
    state = list(planted(ids))
    began, before, executed = time.perf_counter(), density.counts["gradients"], 0
    needed, drawn = 0, 0  # leapfrog steps

    def settle(at: Tensor) -> None:
        """What these of the lanes that stand there draw with."""
        w = Warmup(*state[len(nuts.Tree._fields) : -1])
        step = w.log_step_mean[at].exp() if tuned is None else tuned.step_size[ids[at]]
        record.settle(ids[at], step, w.inverse_mass[at])

    with record.until_interrupted(run):
        while finished < total:
            *state, done, acceptance, leaves, depth, energy, diverging = turn(*state)
            executed += lanes.width
            at = done.nonzero()[:, 0]
            if not len(at):
                continue
            draw = state[-1][at]
            at, draw = at[draw <= warmup + plan.num_samples], draw[draw <= warmup + plan.num_samples]
            steps = leaves[at]
            needed += int(steps.sum())
            kept = draw > warmup
            drawn += int(steps[kept].sum())
            tree = nuts.Tree(*state[: len(nuts.Tree._fields)])
            to, which = at[kept], draw[kept] - warmup - 1
            record.write(
                ids[to], which, tree.u[to], lp=tree.values[to, 0], acceptance_rate=acceptance[to], energy=energy[to],
                diverging=diverging[to], n_steps=leaves[to], tree_depth=depth[to],
                reached_max_treedepth=depth[to] >= max_depth,
            )  # fmt: skip
            over = at[draw == warmup + plan.num_samples]
            if not len(over):
                continue
            settle(over)
            finished += len(over)
            run.progress("chains", finished, total)
            more = min(len(over), total - fresh)
            if more:
                ids = ids.clone()
                ids[over[:more]] = torch.arange(fresh, fresh + more, device=ids.device)
                fresh += more
                lanes.place(ids)
                for tensor, new in zip(state, planted(ids[over[:more]]), strict=True):
                    tensor[over[:more]] = new
            if total - finished <= lanes.width // SHRINK and lanes.width > FEWEST_SLOTS and not lanes.whole:
                # few are left: they go on in narrower lanes
                busy = (state[-1] < warmup + plan.num_samples).nonzero()[:, 0]
                lanes, turn = _turning(density, starts, max_depth, plan, warmup, max(FEWEST_SLOTS, len(busy)))
                place = torch.arange(lanes.width, device=ids.device)
                spare, busy = place >= len(busy), busy[place % len(busy)]
                ids, state = ids[busy], [t[busy] for t in state]
                state[-1][spare] = warmup + plan.num_samples + 1
                lanes.place(ids)
    if finished < total:
        settle((state[-1] <= warmup + plan.num_samples).nonzero()[:, 0])
    lanes.count(executed / lanes.width)
    share = 1 - drawn / max(needed, 1)
    run.tuning_counts["gradients"] += share * (density.counts["gradients"] - before)
    run.tuning_seconds += share * (time.perf_counter() - began)
    record.figures["executed"] = executed / max(needed, 1)
    return record


def _turning(
    density: Density, starts: Tensor, max_depth: int, plan: Schedule, warmup: int, width: int
) -> tuple[Lanes, Any]:
    """Lanes, and the compiled function that takes one leapfrog step of each and begins the next draw where one ends."""
    # few widths, for the cache's sake; and whole vectors, so that a lane is computed alike wherever it stands
    chains, width = starts.shape[0], min(SLOTS, FEWEST_SLOTS * 2 ** math.ceil(math.log2(max(1, width / FEWEST_SLOTS))))
    key = ("by turns", chains, tuple(density.batch_shape), max_depth, warmup, plan.target_acceptance, width)

    def make() -> tuple[Lanes, Any]:
        lanes = Lanes(density, chains, width=width)
        inside, ends = (t.to(starts.device) for t in adaptation.schedule(warmup))
        trees = len(nuts.Tree._fields)

        def turn(*state: Tensor) -> tuple[Tensor, ...]:
            old, w, draw = nuts.Tree(*state[:trees]), Warmup(*state[trees:-1]), state[-1]
            tuning = draw < warmup
            ones = torch.ones_like(w.log_step)
            step = torch.where(tuning, w.log_step, w.log_step_mean).exp()
            new = nuts.grow(old, lanes, only, ones, step, w.inverse_mass, max_depth)
            done = new.done
            acceptance = new.acceptance / new.leaves.to(step)
            if warmup:
                at = draw.clamp_max(warmup - 1)
                w = adaptation.update(w, new.u, acceptance, plan.target_acceptance, done & tuning, inside[at], ends[at])
            point = Point(new.u, new.values, new.gradients)
            next_one = nuts.plant(point, only, ones, w.inverse_mass, new.key, new.counter, max_depth)
            tree = [
                torch.where(done.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(next_one, new, strict=True)
            ]
            stats = (done, acceptance, new.leaves, new.depth, new.energy, new.diverging)
            return (*tree, *w, draw + done.to(draw.dtype), *stats)

        flat = starts.reshape(-1, starts.shape[-1])[torch.arange(lanes.width)]
        point = Point(flat, *lanes.evaluate(flat))
        step, mass = torch.full_like(flat[:, 0], plan.step_size), torch.ones_like(flat)
        none = torch.zeros_like(lanes.ids, device=flat.device)
        examples = []
        for k in range(2):
            keys = streams.keys(k, lanes.width, flat.device)
            tree = nuts.plant(point, only, torch.ones_like(step), mass, keys, none, max_depth)
            examples.append((*tree, *adaptation.begin(step, mass), none.clone()))
        return lanes, lanes.compile(turn, examples)

    return _kept(density, key, make)


def _bound(density: Density, kernel: Kernel, starts: Tensor, plan: Schedule) -> tuple[Lanes, Any, Any]:
    """Lanes, the kernel on them, and the compiled update of its tuning."""
    key = ("in step", kernel, starts.shape[0], tuple(density.batch_shape), plan.target_acceptance)

    def make() -> tuple[Lanes, Any, Any]:
        lanes = Lanes(density, starts.shape[0])
        u = starts.reshape(-1, starts.shape[-1])[lanes.ids]
        example = Point(u, *lanes.evaluate(u, kernel.gradient))
        transition = kernel.bind(lanes, only, example)

        def learn(*args: Tensor) -> tuple[Tensor, ...]:
            position, acceptance, active, inside, ends = args[-5:]
            w = Warmup(*args[:-5])
            return adaptation.update(w, position, acceptance, plan.target_acceptance, active, inside, ends)

        ones = torch.ones_like(u[:, 0])
        w = adaptation.begin(ones, torch.ones_like(u))
        examples = [(*w, u, 0.5 * ones, ones > 0, ones > k, ones > 1 - k) for k in range(2)]
        return lanes, transition, lanes.compile(learn, examples)

    return _kept(density, key, make)


def _kept(density: Density, key: Any, make: Any) -> Any:
    """What was made for this density before, on the rows that it sees now: an E-step is run many times."""
    if key not in density.kept:
        density.kept[key] = make()
    density.kept[key][0].renew()
    return density.kept[key]


def _evaluated(lanes: Lanes, u: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor]:
    with lanes.density.uncounted():
        found = lanes.evaluate(u, gradient)
    lanes.count(1, gradient)
    return found


def _seed(run: Run) -> int:
    return int(run.seed.generate_state(1, np.uint64)[0]) >> 1


def why_not(density: Density, sampler: str) -> str:
    """Why a sampler of continuous latents cannot run, in words; '' where it can."""
    if not density.continuous:
        return f"the latents are all discrete; {sampler} moves continuous ones (enumeration serves these)"
    if density.unlisted:
        return f"{no_sum(density)}: its support cannot be listed"
    return ""


def begin(engine: Any, density: Density, run: Run) -> tuple[Tensor, Tuned | None]:
    """Where an engine's chains start, (C, *batch, D), and their tuning where an earlier run has left it."""
    if run.warm:
        check_one_start(engine)
        return earlier(run.warm, density, engine.num_chains)
    with run.tuning():
        return starts(density, run, engine.num_chains, engine.initial, engine.initial_tries, apart=True), None


def sized(engine: T, calls: float, per_draw: float, per_warmup: float) -> T:
    """A sampler whose chains together make about `calls` calls of the density; warm-up keeps its share of the steps.

    At least `FEWEST_DRAWS` of each chain, with half as many steps of warm-up.
    """
    settings: Any = engine
    share = settings.warmup_steps / settings.num_samples
    cost = settings.num_chains * (per_draw + share * per_warmup)
    draws = max(FEWEST_DRAWS, int((calls - STARTING) / cost))
    warmup = max(FEWEST_DRAWS // 2, int(share * draws)) if settings.warmup_steps else 0
    return replace(settings, num_samples=draws, warmup_steps=warmup)


def check_one_start(engine: Any) -> None:
    if engine.initial is not None:
        kind = type(engine).__name__
        raise ProblemError(f"{kind}(initial=...) and warm=... both say where to start: give one of them.")


def earlier(state: Mapping[str, Tensor], density: Density, num_chains: int) -> tuple[Tensor, Tuned]:
    """Points and tuning of the run that this one goes on from. Raises `ProblemError` where they do not fit."""
    points = state["position"].to(dtype=density.dtype, device=density.device)
    shape = (num_chains, *density.batch_shape, density.dim)
    if points.shape != shape or "inverse_mass" not in state or state["step_size"].shape != shape[:-1]:
        raise ProblemError(
            f"the warm start holds positions of shape {tuple(points.shape)}, this run needs {shape}: same data, same "
            "num_chains."
        )
    step, mass = (state[name].to(points) for name in ("step_size", "inverse_mass"))
    return points, Tuned(step.reshape(-1), mass.reshape(-1, density.dim))

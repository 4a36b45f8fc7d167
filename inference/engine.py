"""The harness around every engine: `infer` owns seed, clock, counters and failures; an engine only its mathematics."""

from __future__ import annotations

import math
import numbers
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from .accuracy import Weighted
from .budget import Counts, ExhaustedError, check_calls, within
from .density import Density
from .diagnostics import diagnose
from .posterior import Cost, Evidence, Posterior, Status
from .problem import Problem, ProblemError
from .registry import as_engine, prepared
from .settings import options
from .statistics import all_finite

if TYPE_CHECKING:
    from .chain_sums import Marginals
    from .learn import Fit


T = TypeVar("T")
NO_LATENTS = "the model has no latent sites: learn(problem, ML()) fits a fully observed model"


class EngineError(RuntimeError):
    """The engine cannot give an answer here (all weights zero, no finite start ...); becomes a failed status."""


@dataclass(frozen=True)
class Draws:
    """What an engine answers; `infer` makes a `Posterior` of it. Shapes as there."""

    values: Mapping[str, Tensor]
    kind: str
    log_weights: Tensor | None = None
    log_evidence: Evidence | None = None
    sample_stats: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    log_ratio: Tensor | None = None  # log p(x, z) - log q(z) of draws from q, (S, *batch)
    deterministic: bool = False  # weighted points of a rule, without sampling error
    exact: bool = False  # independent draws of the posterior itself
    unknown: str = ""  # what no figure of the draws can tell, in words
    alarms: tuple[str, ...] = ()  # what the engine saw that speaks against its answer
    adjusted: Weighted | None = None  # other draws and their log weights, nearer the posterior, to judge by
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # of its own, for the diagnostics
    marginals: Marginals | None = None  # exact ones, for M-steps that take them in place of draws


class Engine(Protocol):
    """A method with its settings. One file in `engines/`, a class decorated with `settings`, is all it takes.
    One that never asks for the density of observations says `simulates: ClassVar[bool] = True`."""

    name: ClassVar[str]

    def supports(self, density: Density) -> str:
        """Why this engine cannot run the problem, in words; '' where it can. Raises `ProblemError` on bad settings."""

    def run(self, density: Density, run: Run) -> Draws:
        """Draw from p_theta(z | x) at the density's theta. Called inside the density, without gradients."""

    def sized(self, calls: float, density: Density) -> Self:
        """The same settings, made to spend about `calls` calls of the density: evaluations and gradients together,
        each over all data once, tuning included. Where that is too few, the smallest run that makes sense.

        An estimate will do: `infer` measures and asks again. An engine without it runs with its own settings.
        """


@dataclass
class Run:
    """What the harness lends to an engine or a learner: seeds, a warm start, progress and the tuning account."""

    density: Density
    seed: np.random.SeedSequence
    warm: Mapping[str, Tensor] = field(default_factory=dict)
    report: Callable[[str, int, int], None] | None = None
    nested: bool = False  # part of a longer run, which an interruption ends as a whole
    tuning_counts: dict[str, float] = field(default_factory=lambda: {"evaluations": 0.0, "gradients": 0.0})
    tuning_seconds: float = 0.0
    _tuning: bool = False

    def progress(self, stage: str, step: int, total: int) -> None:
        if self.report is not None:
            self.report(stage, step, total)

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """What happens inside is warm-up or fitting: counted, and listed apart."""
        if self._tuning:
            yield
            return
        before, start = dict(self.density.counts), time.perf_counter()
        self._tuning = True
        try:
            yield
        finally:
            self._tuning = False
            self.tuning_seconds += time.perf_counter() - start
            for key, value in self.density.counts.items():
                self.tuning_counts[key] += value - before[key]

    def child(self, index: int, warm: Mapping[str, Tensor] | None = None) -> Run:
        """A run inside this one with a seed of its own."""
        seed = np.random.SeedSequence(self.seed.entropy, spawn_key=(*self.seed.spawn_key, index))
        return Run(self.density, seed, warm or {}, nested=True)

    def cost(self, seconds: float, peak_memory: int | None) -> Cost:
        return Cost(
            evaluations=self.density.counts["evaluations"],
            gradients=self.density.counts["gradients"],
            tuning_evaluations=self.tuning_counts["evaluations"],
            tuning_gradients=self.tuning_counts["gradients"],
            seconds=seconds,
            tuning_seconds=self.tuning_seconds,
            compile_seconds=self.density.compile_seconds,
            peak_memory=peak_memory,
            backend=self.density.backend,
        )


def infer(
    problem: Problem,
    engine: Engine | type[Engine] | str,
    *,
    seed: int = 0,
    parameters: Mapping[str, Tensor] | Fit | None = None,
    warm: Posterior | None = None,
    progress: bool | Callable[[str, int, int], None] = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    calls: float | None = None,
) -> Posterior:
    """Approximate p_theta(z | x), theta held fixed.

    engine      an instance, a class (its defaults) or a name
    parameters  theta (and the guide's phi) by name, or the `Fit` that learned them; None: as they stand in the program
    warm        a posterior of the same engine and problem to go on from
    progress    True draws a bar on a terminal; a function is called with (stage, step, total)
    backend     how the density is run where it is compiled: 'auto' (the fastest that serves), 'native', 'graph',
                'eager' or 'inductor'; what served stands in `cost.backend`
    dtype       of the computation: None, float64 where the program allows it; torch.float32 is about twice as fast on
                large decoders, and rounds the log joint to some 1e-7 of its size
    calls       the engine is sized to spend about so many evaluations and gradients, tuning included, in place of its
                own counts of draws and steps; what spends twice as many all the same is 'timed out', without draws
    Returns a posterior whose `status` says how it ended: an engine that does not serve the model is 'unsupported',
    a run that broke is 'failed', each with the reason. Raises `ProblemError` for input that cannot be used.
    """
    method: Engine = as_engine(engine)
    check_problem(problem)

    def attempt(size: float | None = None, limit: float = math.inf) -> Posterior:
        with isolated(seed, device), torch.no_grad():
            density, sized, reason = _prepare(problem, method, parameters, device, backend, dtype, size)
            if reason:
                with density:  # where theta is this run's
                    return finish(None, density, Status("unsupported", reason), Cost(), sized, seed)
            density.counts = Counts(limit)
            state = _warm_state(warm, method)
            with density, reporter(progress, method.name) as report:
                return _run(density, sized, Run(density, np.random.SeedSequence(seed), state, report), seed)

    if calls is None:
        return attempt()
    if not hasattr(method, "sized"):
        posterior = attempt()
        notes = (*posterior.diagnostics.notes, f"{method.name} cannot be sized: it ran with its own settings")
        return replace(posterior, diagnostics=replace(posterior.diagnostics, notes=notes))
    return within(check_calls(calls), attempt)


def _warm_state(warm: Any, method: Engine) -> dict[str, Tensor]:
    if warm is None:
        return {}
    if not isinstance(warm, Posterior):
        raise ProblemError(f"warm: expected a Posterior of an earlier run, got {type(warm).__name__}.")
    if warm.engine != method.name:
        raise ProblemError(f"warm: a posterior of engine {warm.engine!r} cannot start {method.name!r}.")
    if not warm.state:
        raise ProblemError(f"warm: the earlier run left no state to go on from; its status: {warm.status}.")
    return dict(warm.state)


def why_not(
    problem: Problem, engine: Engine | type[Engine] | str, parameters: Mapping[str, Tensor] | Fit | None = None
) -> str:
    """Why the engine cannot serve the problem, in words; '' where it can. Runs the model a few times only."""
    check_problem(problem)
    with isolated(0), torch.no_grad():
        return _prepare(problem, as_engine(engine), parameters, None)[2]


def _prepare(
    problem: Problem, engine: Engine, parameters: Any, device: Any, backend: str = "auto",
    dtype: torch.dtype | None = None, calls: float | None = None,
) -> tuple[Density, Engine, str]:  # fmt: skip
    """The density, the engine sized to it, and why it cannot run there, in words."""
    if dtype not in (None, torch.float32, torch.float64):
        raise ProblemError(f"dtype={dtype!r}: expected torch.float64, torch.float32 or None.")
    density = Density(prepared(engine, problem), device=device, dtype=dtype, backend=backend)
    if dtype == torch.float32:
        density.notes.append("computed in float32")
    if parameters is not None:
        density.set_parameters(parameters)
    if not density.latents:
        return density, engine, NO_LATENTS
    if density.simulated and not getattr(engine, "simulates", False):
        return density, engine, no_density(density)
    with density:
        if calls is not None:
            engine = engine.sized(calls, density)
        return density, engine, engine.supports(density)


def no_sum(density: Density) -> str:
    return f"discrete site {density.unlisted[0]!r} cannot be summed out"


def no_density(density: Density) -> str:
    return f"site {density.simulated[0]!r} can only be simulated, it has no density: ABC serves such models"


def _run(density: Density, engine: Engine, run: Run, seed: int) -> Posterior:
    draws, status, cost = measured(lambda: engine.run(density, run), run)
    return finish(draws, density, _judge(draws) if draws else status, cost, engine, seed)


def measured(call: Callable[[], T], run: Run) -> tuple[T | None, Status, Cost]:
    """What a call answers, with time, counts and memory; what breaks in it becomes a failed status with the reason."""
    start, memory = time.perf_counter(), peak_memory()
    answer, status = None, Status("done")
    try:
        answer = call()
    except ProblemError:
        raise
    except ExhaustedError:
        pass
    except Exception as error:
        reason = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        status = Status("failed", reason)
    if answer is None and isinstance(counts := run.density.counts, Counts) and counts.exhausted:
        status = Status("timed out", f"stopped after {sum(counts.values()):.0f} calls of the density")
    return answer, status, run.cost(time.perf_counter() - start, peak_memory() - memory)


def _judge(draws: Draws) -> Status:
    """Failures that show in the numbers."""
    for name, value in draws.values.items():
        if value.is_floating_point() and not all_finite(value):
            return Status("failed", f"site {name!r}: {int((~value.isfinite()).sum())} draws are not finite")
    if draws.log_evidence is not None and bool(draws.log_evidence.value.isnan().any()):
        count = int(draws.log_evidence.value.isnan().sum())
        return Status("failed", f"the log evidence is undefined (NaN) for {count} data: the density is, at some draws")
    if draws.log_weights is not None:
        best = draws.log_weights.flatten(0, 1).amax(0)
        if not bool(best.isfinite().all()):
            bad = (~best.isfinite()).flatten().nonzero().flatten().tolist()
            return Status("failed", f"all weights are zero or undefined for {len(bad)} data, first {bad[:5]}")
    return Status("done")


def finish(draws: Draws | None, density: Density, status: Status, cost: Cost, method: Any, seed: int) -> Posterior:
    """The posterior record of a run: draws judged and moved to the CPU; without draws, its status alone."""
    common: dict[str, Any] = {
        "status": status,
        "engine": method.name,
        "engine_options": options(method),
        "seed": seed,
        "cost": cost,
        "parameters": density.theta.values(),
        "batch_shape": tuple(density.batch_shape),
        "problem": density.problem,
    }
    if draws is None or not status.done:
        return Posterior({}, **common)
    values, stats = _on_cpu(draws.values), _on_cpu(draws.sample_stats)
    log_weights = None if draws.log_weights is None else draws.log_weights.detach().cpu()
    notes = [*density.notes, *draws.notes]
    missing = [name for name in density.latents if name not in values]
    if missing:
        notes.append(f"summed out exactly, not drawn: {', '.join(missing)}")
    latents = {name: value for name, value in values.items() if name in density.latents}
    judged = replace(draws, values=latents, log_weights=log_weights, sample_stats=stats)
    diagnostics = diagnose(judged, common["batch_shape"], tuple(notes))
    return Posterior(
        values,
        log_weights,
        draws.log_evidence,
        diagnostics=replace(diagnostics, figures={**diagnostics.figures, **_on_cpu(draws.figures)}),
        state=_on_cpu(draws.state),
        kind=draws.kind,
        sample_stats=stats,
        **common,
    )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def as_chain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(S, ...) -> (1, S, ...): one chain."""
    return {name: value[None] for name, value in values.items()}


@contextmanager
def isolated(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Seed every generator for the run and give the global ones back as they were.

    Raises `ProblemError` on a seed that is none, a device that is not there, or where torch makes tensors elsewhere
    than on the CPU unasked: draws and figures live there, whatever device computes.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
        raise ProblemError(f"seed = {seed!r}: expected a whole number from 0 to 2**64 - 1.")
    if (default := torch.get_default_device()).type != "cpu":
        raise ProblemError(
            f"torch's default device is {str(default)!r}: set it back by torch.set_default_device('cpu'), and say "
            f"device={str(default)!r} instead."
        )
    states = random.getstate(), np.random.get_state()
    devices = _cuda_devices(device)
    with torch.random.fork_rng(devices=devices):
        seed_all(np.random.SeedSequence(int(seed)))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _cuda_devices(device: torch.device | str | None) -> list[int]:
    """The CUDA devices whose generators a run may move: all where CUDA is in use."""
    try:
        kind = torch.device("cpu" if device is None else device).type
    except RuntimeError as error:
        raise ProblemError(f"device={device!r}: {error}") from error
    if kind not in ("cpu", "cuda"):
        raise ProblemError(f"device={device!r}: expected 'cpu' or 'cuda', 'cuda:1' ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ProblemError(f"device={device!r}: no CUDA device is available here; leave device out to use the CPU.")
    return list(range(torch.cuda.device_count())) if kind == "cuda" or torch.cuda.is_initialized() else []


def seed_all(sequence: np.random.SeedSequence) -> None:
    """Seed torch, numpy and random from one seed sequence (neighbouring seeds share nothing)."""
    words = sequence.generate_state(3, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))


def check_problem(problem: Any) -> None:
    if not isinstance(problem, Problem):
        raise ProblemError(f"expected a Problem, got {type(problem).__name__}; write Problem(model, args=(x,)).")


def peak_memory() -> int:
    """Largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def reporter(progress: Any, title: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function to call with (stage, step, total); a bar on a terminal for True."""
    if callable(progress):
        yield progress
        return
    if not progress or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, step: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{title}: {stage}", total=total)
            bar.update(tasks[stage], completed=step, total=total)

        yield report

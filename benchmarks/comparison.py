"""One problem, several engines and learners, one record: `compare`.

theta is given or learned; every engine is then judged at the same theta, against the truth at that theta. So a
comparison is a list of `Theta`s, each with its truth, and a list of `Row`s, one for each engine at each theta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyrometer.inference import Posterior, Problem, ProblemError, infer
from pyrometer.inference.chains import interrupted
from pyrometer.inference.density import Density
from pyrometer.inference.engine import check_problem, isolated, why_not
from pyrometer.inference.learn import Fit
from pyrometer.inference.posterior import Cost, Evidence, Status
from pyrometer.inference.problem import Reference

from .facts import describe, machine, versions
from .methods import engines_from, learners_from, row_seed, settings, trained
from .metrics import HeldOut, Score, held_out_log_likelihood, measure
from .tabled import Tabled

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = bool | Callable[[str, int, int], None]


@dataclass(frozen=True)
class PerDatum:
    """log p_theta(x) in nats per datum, its standard error and kind, over `data` data points.

    Where the latents are shared the data are one, and the figure is their joint evidence.
    """

    value: float
    std_error: float
    kind: str
    data: int
    refined: PerDatum | None = None

    @classmethod
    def of(cls, evidence: Evidence | None) -> PerDatum | None:
        if evidence is None:
            return None
        value, std_error = evidence.per_datum()
        return cls(value, std_error, evidence.kind, max(evidence.value.numel(), 1), cls.of(evidence.refined))


@dataclass(frozen=True)
class Theta:
    """One theta: who learned it and at what cost, what is true there, and how it predicts data not seen.

    `learner` is '' for the problem's own theta. `log_evidence` is the reference's. `held_out_reason` says why
    `held_out` is missing. `objective` is the learner's last figure over all data, in nats, of kind `objective_kind`.
    """

    learner: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    status: Status = field(default_factory=lambda: Status("done"))
    reference: str = "none"
    provenance: str = ""
    log_evidence: PerDatum | None = None
    held_out: HeldOut | None = None
    held_out_reason: str = ""
    objective: float | None = None
    objective_kind: str = ""
    notes: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Row:
    """One engine at one theta: its errors (by metric), evidence, diagnostics, cost and status.

    What an engine does not have is missing or None, never a made-up number.
    """

    learner: str
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    status: Status = field(default_factory=lambda: Status("done"))
    errors: Mapping[str, Score] = field(default_factory=dict)
    log_evidence: PerDatum | None = None
    level: str = "unknown"
    verdict: str = ""
    notes: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Comparison(Tabled):
    """The table that people came for, as a record: thetas, rows, and all that is needed to get them again.

    `problem` holds its name and shapes; `command` is the command line that made it, where there was one; `complete`
    is false where the run was ended early. Print it for the table; `to_json` keeps everything.
    """

    thetas: tuple[Theta, ...]
    rows: tuple[Row, ...]
    problem: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    complete: bool = True
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)

    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        from .report import render

        return render(self, width, ascii_only)


def compare(
    problem: Problem,
    engines: Any,
    *,
    learn: Any = None,
    seed: int = 0,
    progress: Progress = False,
    device: Any = None,
) -> Comparison:
    """Run every engine on the problem, at its own theta or at each theta that a learner finds, and compare.

    `engines` and `learn` take instances, classes or names ('svi', 'em:nuts' for EM with a NUTS E-step), one or
    several, or a dict from labels of your own to these. What cannot run or fails is a row that says why. The random
    numbers of a row depend on `seed`, its learner and its engine alone: neither on the order nor on the other rows.
    Raises ProblemError, before anything runs, for an unknown name, a method named twice, nothing to run, or an
    unusable problem, setting or seed. Ctrl-C ends it with the rows that are there, if any are (`complete` is False).
    """
    steps = judge(problem, engines, learn=learn, seed=seed, progress=progress, device=device)
    found: list[Theta | Row] = []
    try:
        found.extend(steps)
    except KeyboardInterrupt:
        if not any(isinstance(step, Row) for step in found):
            raise
        return gather(problem, found, seed=seed, complete=False)
    return gather(problem, found, seed=seed)


def gather(
    problem: Problem, steps: Iterable[Theta | Row], *, seed: int = 0, command: str = "", complete: bool = True
) -> Comparison:
    """The comparison made of these thetas and rows."""
    found = list(steps)
    return Comparison(
        thetas=tuple(step for step in found if isinstance(step, Theta)),
        rows=tuple(step for step in found if isinstance(step, Row)),
        problem=describe(problem),
        seed=seed,
        command=command,
        complete=complete,
    )


def judge(
    problem: Problem,
    engines: Any,
    *,
    learn: Any = None,
    seed: int = 0,
    progress: Progress = False,
    device: Any = None,
    on: Problem | None = None,
    announce: Callable[[str], None] = lambda text: None,
    fits: dict[str, Fit] | None = None,
    every: bool = False,
) -> Iterator[Theta | Row]:
    """`compare`, one result at a time as each is ready: a `Theta`, then its `Row`s, for each learner in turn.

    `on` is the problem that the engines are judged on, where it is not the one learned from (fewer data, say).
    `announce` is told what runs next, `fits` collects what was learned, by learner; `every` takes all the metrics there
    are. Raises ProblemError at the call, before the first result is asked for, and KeyboardInterrupt on Ctrl-C, after
    the row of an engine that keeps the draws it has.
    """
    chosen = engines_from(engines)
    check_problem(problem)
    learners = {} if learn is None else learners_from(learn)
    if not chosen:
        raise ProblemError("engines: none given; name at least one, for example engines=['svi', 'nuts'].")
    target = on or problem
    # theta as it stands, given to every engine: a parameter that starts at random would differ from row to row.
    with isolated(row_seed(seed, "theta")):
        start = Density(target).theta.values()
    refusals = {name: why_not(target, engine, start) for name, engine in chosen.items()}

    def run() -> Iterator[Theta | Row]:
        for learner_name, learner in learners.items() or [("", None)]:
            theta = Theta()
            parameters: Any = start
            if learner is not None:
                announce(f"learning theta by {learner_name}")
                theta, parameters = learned(problem, learner_name, learner, seed, progress, device)
                if fits is not None and parameters is not None:
                    fits[learner_name] = parameters
            reference = Reference("none")
            if theta.status.done:
                reference = target.reference_at({**start, **getattr(parameters, "parameters", parameters)})
                theta = replace(
                    theta,
                    reference=reference.kind,
                    provenance=reference.provenance,
                    log_evidence=PerDatum.of(reference.log_evidence),
                )
            yield theta
            for name, engine in chosen.items():
                row = Row(learner_name, name, settings(engine), row_seed(seed, learner_name, name))
                if not theta.status.done:
                    reason = f"there is no theta to judge at, since {learner_name} has not learned one"
                    yield replace(row, status=Status("failed", reason))
                elif refusals[name]:
                    announce(f"{name} cannot run: {refusals[name]}")
                    yield replace(row, status=Status("unsupported", refusals[name]))
                else:
                    announce(name + (f" at the theta of {learner_name}" if learner_name else ""))
                    judged_row = _judged(target, row, engine, parameters, reference, progress, device, every)
                    yield judged_row
                    if interrupted(judged_row.notes):
                        raise KeyboardInterrupt  # which the engine kept to itself, for the sake of its draws

    return run()


def learned(
    problem: Problem, name: str, learner: Any, seed: int, progress: Progress = False, device: Any = None
) -> tuple[Theta, Fit | None]:
    """theta by this learner, and what it cost; the held-out score is taken with the same random numbers for all."""
    facts, fit = trained(problem, name, learner, seed, progress=progress, device=device)
    theta = Theta(**facts)
    if fit is None:
        return theta, None
    try:
        held_out = held_out_log_likelihood(problem, fit.parameters, seed=row_seed(seed, "held out"))
    except ProblemError as error:
        return replace(theta, held_out_reason=str(error)), fit
    return replace(theta, held_out=held_out, held_out_reason="" if held_out else "there are no held-out data"), fit


def _judged(
    problem: Problem, row: Row, engine: Any, parameters: Any, reference: Reference, progress: Progress, device: Any,
    every: bool = False,
) -> Row:  # fmt: skip
    """The row of what the engine answers at these parameters."""
    try:
        posterior = infer(problem, engine, seed=row.seed, parameters=parameters, progress=progress, device=device)
    except ProblemError as error:
        return replace(row, status=Status("unsupported", str(error)))
    return judged(row, posterior, reference, every)


def judged(row: Row, posterior: Posterior, reference: Reference, every: bool = False) -> Row:
    """The row with all that the engine's posterior says, and how far that is from the truth at its theta."""
    if not posterior.status.done:
        return replace(row, status=posterior.status, cost=posterior.cost)
    missing = [site for site in reference.mean if site not in posterior.draws]
    notes = (f"no draws of {', '.join(missing)} to compare",) if missing else ()
    return replace(
        row,
        errors=measure(posterior, reference, every),
        log_evidence=PerDatum.of(posterior.log_evidence),
        level=posterior.diagnostics.level,
        verdict=posterior.diagnostics.verdict,
        notes=(*notes, *posterior.diagnostics.notes),
        cost=posterior.cost,
    )

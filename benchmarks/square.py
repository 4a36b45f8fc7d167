"""Train with A, judge with B: every learner's theta under every estimator of log p_theta(x), on the same data.

    l_ab(i) = log p_{theta_a}(x_i) by estimator b, in nats;   value = mean_i l_ab(i)
    d_ab(i) = l_ab(i) - l_{a* b}(i),   a* the learner of the largest value under b

One evaluator may favour a learner: a bound favours the theta whose posterior its guide can follow. A ranking that is
the same in every column does not hang on the evaluator. All cells judge the same data, so a difference is taken datum
by datum, and its spread is far smaller than that of the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrometer.inference import Problem, ProblemError
from pyrometer.inference.engine import check_problem
from pyrometer.inference.learn import Fit
from pyrometer.inference.posterior import Cost, Evidence, Status

from .comparison import PerDatum, Progress
from .doubt import Doubtful, k_hat_known, worst_data
from .facts import describe, machine, versions
from .methods import engines_from, learners_from, row_seed, settings, trained
from .metrics import BY_PROBLEM, data_error, log_likelihood
from .tabled import Tabled

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Trained:
    """One learner: its settings, cost and status. `objective` is its own last figure over all training data, in nats;
    it ranks nothing here."""

    learner: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    status: Status = field(default_factory=lambda: Status("done"))
    objective: float | None = None
    objective_kind: str = ""
    notes: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Difference:
    """mean_i d(i) to the learner `to`, in nats per datum.

    `std_error` is the estimators' own error, sqrt(sum_i s_a(i)^2 + s_b(i)^2) / n: cells have random numbers of their
    own, so their errors add. `data_error` is paired, sd of d(i) over data / sqrt(n), and holds the estimators' error
    too: what other data and another run would change. None for one datum.
    """

    to: str
    value: float
    std_error: float
    data_error: float | None


@dataclass(frozen=True)
class Cell:
    """One learner's theta under one evaluator. Where `status` is not 'done' there is no number, but a reason.

    `value` is the mean of log p_theta(x_i) in nats, `std_error` the estimator's own error, `data_error` the spread
    sd / sqrt(n) over data, `kind` 'exact', 'estimate' or 'lower bound'. `values` and `errors` are those of each datum.
    """

    learner: str
    evaluator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    status: Status = field(default_factory=lambda: Status("done"))
    value: float | None = None
    std_error: float | None = None
    data_error: float | None = None
    data: int = 0
    kind: str = ""
    refined: PerDatum | None = None
    difference: Difference | None = None
    level: str = "unknown"
    verdict: str = ""
    doubtful: Doubtful | None = None
    cost: Cost = field(default_factory=Cost)
    values: tuple[float, ...] = field(default=(), repr=False)
    errors: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Square(Tabled):
    """Learners, and cells in the order learner by learner. Print it for the table; `to_json` keeps everything."""

    learners: tuple[Trained, ...]
    cells: tuple[Cell, ...]
    judged: str = "held-out"
    problem: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    complete: bool = True
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)

    @property
    def evaluators(self) -> list[str]:
        return list(dict.fromkeys(cell.evaluator for cell in self.cells))

    def cell(self, learner: str, evaluator: str) -> Cell:
        """Raises KeyError."""
        for cell in self.cells:
            if (cell.learner, cell.evaluator) == (learner, evaluator):
                return cell
        raise KeyError(f"no cell of learner {learner!r} and evaluator {evaluator!r}.")

    def best(self, evaluator: str) -> str:
        """The learner of the largest value under this evaluator; '' where none has a number."""
        return next((c.difference.to for c in self.cells if c.evaluator == evaluator and c.difference), "")

    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        from .report_square import render

        return render(self, width, ascii_only)

    @classmethod
    def from_json(cls, path: str | Path) -> Square:
        """Read what `to_json` wrote. Raises OSError, and ValueError where it is no square."""
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(read, dict) or not {"learners", "cells"} <= set(read):
            raise ValueError(f"{path}: not a square; it has no learners and cells.")
        read.pop("gaps", None)  # which the command writes beside it
        read["learners"] = tuple(_trained(learner) for learner in read["learners"])
        read["cells"] = tuple(_cell(cell) for cell in read["cells"])
        return cls(**read)


def square(
    problem: Problem,
    learners: Any,
    evaluators: Any = "auto",
    *,
    held_out: bool = True,
    seed: int = 0,
    progress: Progress = False,
    device: Any = None,
) -> Square:
    """Learn theta with each learner and judge it with each evaluator, on held-out (or the training) data.

    `learners` as for `compare`. `evaluators` are 'reference' (the truth), 'auto' (the truth, or what comes nearest) and
    engines, by name, class or instance, one or several, or a dict from labels to these. What cannot run or fails is a
    cell with its reason. The random numbers of a cell depend on `seed`, its learner and its evaluator alone.
    Raises ProblemError, before anything runs, for an unknown name, a method named twice, nothing to run, or an
    unusable problem, setting or seed.
    """
    found = steps(problem, learners, evaluators, held_out=held_out, seed=seed, progress=progress, device=device)
    return gather(problem, found, held_out=held_out, seed=seed)


def gather(
    problem: Problem,
    found: Iterable[Trained | Cell],
    *,
    held_out: bool = True,
    seed: int = 0,
    command: str = "",
    complete: bool = True,
) -> Square:
    """The square made of these learners and cells, with differences."""
    found = list(found)
    return Square(
        learners=tuple(step for step in found if isinstance(step, Trained)),
        cells=with_differences([step for step in found if isinstance(step, Cell)]),
        judged="held-out" if held_out else "training",
        problem=describe(problem),
        seed=seed,
        command=command,
        complete=complete,
    )


def steps(
    problem: Problem,
    learners: Any,
    evaluators: Any = "auto",
    *,
    held_out: bool = True,
    seed: int = 0,
    progress: Progress = False,
    device: Any = None,
    announce: Callable[[str], None] = lambda text: None,
    fits: dict[str, Fit] | None = None,
) -> Iterator[Trained | Cell]:
    """`square`, one result at a time: a `Trained`, then its `Cell`s, for each learner in turn. `fits` collects what
    was learned, by learner. Raises ProblemError at the call, before the first result is asked for."""
    check_problem(problem)
    chosen, judges = learners_from(learners), evaluators_from(evaluators)
    if not chosen:
        raise ProblemError("learners: none given; name at least one, for example learners=['svi', 'em'].")
    if not judges:
        raise ProblemError("evaluators: none given; name at least one, for example evaluators=['reference', 'svi'].")
    if held_out and problem.held_out is None:
        raise ProblemError(f"problem {problem.name!r} has no held-out data; judge on the training data instead.")
    row_seed(seed)
    target = problem.on_held_out() if held_out else problem
    running = {"progress": progress, "device": device}

    def run() -> Iterator[Trained | Cell]:
        for name, learner in chosen.items():
            announce(f"learning theta by {name}")
            facts, fit = trained(problem, name, learner, seed, **running)
            if fits is not None and fit is not None:
                fits[name] = fit
            yield Trained(**facts)
            for label, judge in judges.items():
                empty = Cell(name, label, _settings(judge), row_seed(seed, "square", name, label))
                if fit is None:
                    reason = f"there is no theta to judge, since {name} has not learned one"
                    yield replace(empty, status=Status("failed", reason))
                else:
                    announce(f"{label} judges the theta of {name}")
                    yield _judge(target, empty, judge, fit, running)

    return run()


def evaluators_from(given: Any) -> dict[str, Any]:
    """label -> 'auto', 'reference' or an engine, from names, classes, instances or a dict. Raises ProblemError."""
    if isinstance(given, Mapping):
        return {str(k): v if v in BY_PROBLEM else engines_from([v]).popitem()[1] for k, v in given.items()}
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    elif not isinstance(given, Sequence):
        given = [given]
    found: dict[str, Any] = {}
    for item in given:
        named = {item: item} if isinstance(item, str) and item in BY_PROBLEM else engines_from([item])
        for name, method in named.items():
            if name in found:
                raise ProblemError(f"evaluator {name} is given twice; tell them apart by a dict.")
            found[name] = method
    return found


def _settings(judge: Any) -> dict[str, Any]:
    return {} if isinstance(judge, str) else settings(judge)


def _judge(target: Problem, empty: Cell, judge: Any, fit: Fit, running: Mapping[str, Any]) -> Cell:
    try:
        judged = log_likelihood(target, fit, judge, empty.seed, **running)
    except ProblemError as error:
        return replace(empty, status=Status("unsupported", str(error)))
    cell = replace(empty, status=judged.status, cost=judged.cost)
    if judged.evidence is None:
        return cell
    return replace(
        filled(cell, judged.evidence),
        level=judged.level,
        verdict=judged.verdict,
        doubtful=worst_data(judged.posterior) if judged.posterior and k_hat_known(judged.posterior) else None,
    )


def filled(cell: Cell, evidence: Evidence) -> Cell:
    """The cell with the evidence of each datum, its mean and errors."""
    value, std_error = evidence.per_datum()
    return replace(
        cell,
        value=value,
        std_error=std_error,
        data_error=data_error(evidence.value),
        data=evidence.value.numel(),
        kind=evidence.kind,
        refined=PerDatum.of(evidence.refined),
        values=tuple(evidence.value.flatten().tolist()),
        errors=tuple(evidence.std_error.flatten().tolist()),
    )


def with_differences(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Each cell with its paired difference to the best one of the same evaluator; none between a bound and another
    kind, whose difference would say nothing."""
    best: dict[str, Cell] = {}
    for cell in cells:
        if cell.value is not None and cell.value > _value(best.get(cell.evaluator)):
            best[cell.evaluator] = cell
    return tuple(
        replace(cell, difference=_difference(cell, best[cell.evaluator]))
        if cell.value is not None and cell.kind == best[cell.evaluator].kind
        else cell
        for cell in cells
    )


def _value(cell: Cell | None) -> float:
    return -math.inf if cell is None or cell.value is None else cell.value


def _difference(cell: Cell, best: Cell) -> Difference:
    if cell.learner == best.learner:
        return Difference(best.learner, 0.0, 0.0, 0.0 if cell.data > 1 else None)
    paired = torch.tensor(cell.values, dtype=torch.float64) - torch.tensor(best.values, dtype=torch.float64)
    std_error = math.hypot(*cell.errors, *best.errors) / len(paired)
    return Difference(best.learner, float(paired.mean()), std_error, data_error(paired))


# -- reading ----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> Any:
    """The float that stands as 'inf', '-inf' or 'nan' in strict JSON."""
    return float(value) if isinstance(value, str) else value


def _numbers(of: Any, read: Mapping[str, Any]) -> Any:
    return of(**{k: v if k in ("to", "kind", "backend", "refined") else _number(v) for k, v in read.items()})


def _trained(read: dict[str, Any]) -> Trained:
    return Trained(
        **{
            **read,
            "status": Status(**read["status"]),
            "objective": _number(read["objective"]),
            "notes": tuple(read["notes"]),
            "cost": _numbers(Cost, read["cost"]),
        }
    )


def _cell(read: dict[str, Any]) -> Cell:
    some: dict[str, Any] = {
        key: _number(read[key]) for key in ("value", "std_error", "data_error") if read[key] is not None
    }
    some |= {key: tuple(map(_number, read[key])) for key in ("values", "errors")}
    for key, of in (("refined", PerDatum), ("difference", Difference), ("cost", Cost)):
        some[key] = None if read[key] is None else _numbers(of, read[key])
    some["doubtful"] = None if read["doubtful"] is None else Doubtful.read(read["doubtful"])
    return Cell(**{**read, **some, "status": Status(**read["status"])})

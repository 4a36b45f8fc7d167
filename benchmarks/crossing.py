"""What `pyrometer square` runs: the square, and on wish the gaps of its fits and a picture of the worst data."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pyrometer.inference import Problem, ProblemError
from pyrometer.inference.learn import Fit

from .comparison import Progress
from .doubt import as_images, guide_weights, picture, worst_data
from .gaps import Gaps, gaps
from .gaussian import FAMILIES
from .methods import row_seed
from .metrics import BY_PROBLEM
from .settings import configure, names
from .square import Square, gather, steps
from .tabled import Tabled


@dataclass(frozen=True)
class Plan:
    """The words of the command line."""

    model: str
    learn: str
    evaluate: str = "auto"
    training: bool = False
    gaps: bool = False
    family: str = "AutoNormal"
    worst: Path | None = None
    assignments: tuple[str, ...] = ()
    seed: int = 0
    device: str | None = None

    @property
    def command(self) -> str:
        """The command line that repeats it."""
        words = ["pyrometer", "square", self.model, "--learn", self.learn, "--evaluate", self.evaluate]
        words += ["--training"] * self.training + ["--gaps", "--family", self.family] * self.gaps
        words += [word for assignment in self.assignments for word in ("--set", assignment)]
        words += ["--seed", str(self.seed)] + (["--device", self.device] if self.device else [])
        return shlex.join(words)


@dataclass(frozen=True)
class Crossing(Tabled):
    """The square, the gaps where they were asked for, what was drawn, and what ended the run early."""

    square: Square
    gaps: Gaps | None = None
    said: str = ""
    ended: BaseException | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.square.to_dict(), "gaps": None if self.gaps is None else self.gaps.to_dict()}

    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        parts: list[RenderableType] = [self.square.table(width, ascii_only)]
        parts += [self.gaps.table(width, ascii_only)] if self.gaps is not None else []
        parts += [Text(self.said)] if self.said else []
        return Group(*parts)


def run(
    plan: Plan, announce: Callable[[str], None], progress: Progress, collect: Callable[[Iterator[Any]], tuple[Any, Any]]
) -> Crossing:
    """All that the plan asks for; `collect` takes what there is of steps that end early, and what ended them.

    Raises ProblemError, before anything is learned, for what the user can put right.
    """
    engines = names(plan.evaluate)
    named = [name for name in engines if name not in BY_PROBLEM]
    problem, chosen, learners = configure(plan.model, ",".join(named), plan.learn, plan.assignments)
    found = iter(chosen.items())
    pairs = [(name, name) if name in BY_PROBLEM else next(found) for name in engines]
    if len(dict(pairs)) < len(pairs):
        twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
        raise ProblemError(f"evaluator {twice} is given twice.")
    if plan.family not in FAMILIES:
        raise ProblemError(f"--family {plan.family}: expected one of {', '.join(FAMILIES)}.")
    held_out = not plan.training
    if held_out and problem.held_out is None:
        raise ProblemError(f"{plan.model} has no held-out data; --training judges on the data learned from.")
    if plan.worst is not None:
        _check_picture(plan.worst, problem)
    fits: dict[str, Fit] = {}
    cells, ended = collect(
        steps(
            problem, learners or {}, dict(pairs), held_out=held_out, seed=plan.seed, progress=progress,
            device=plan.device, announce=announce, fits=fits,
        )
    )  # fmt: skip
    made = gather(problem, cells, held_out=held_out, seed=plan.seed, command=plan.command, complete=ended is None)
    crossing = Crossing(made, ended=ended)
    if ended is not None or not fits:
        return crossing
    if plan.gaps:
        announce("gaps of the guides")
        split, ended = collect(_gaps(problem, fits, plan, dict(pairs), held_out))
        crossing = Crossing(made, split[0] if split else None, ended=ended)
        if ended is not None:
            return crossing
    said = _drawn(plan.worst, problem, fits, made, held_out, plan.seed) if plan.worst is not None else ""
    return Crossing(made, crossing.gaps, said)


def _gaps(problem: Problem, fits: dict[str, Fit], plan: Plan, judges: dict[str, Any], held_out: bool) -> Iterator[Gaps]:
    """By the first evaluator, so that the gaps can be read beside the square's first column."""
    first = next(iter(judges.values()))
    yield gaps(problem, fits, evaluator=first, family=plan.family, held_out=held_out, seed=plan.seed)


def _images(problem: Problem) -> Any:
    return problem.args[0] if problem.args else None


def _check_picture(path: Path, problem: Problem) -> None:
    if path.suffix.lower() != ".png":
        raise ProblemError(f"--worst {path}: expected a name that ends in .png.")
    try:
        as_images(_images(problem))
    except (ProblemError, TypeError, RuntimeError) as error:
        raise ProblemError(f"--worst: the data of {problem.name} are no images. {error}") from error


def _drawn(path: Path, problem: Problem, fits: dict[str, Fit], made: Square, held_out: bool, seed: int) -> str:
    """Draw the data that the best learner's guide misses; in words what was drawn, or why nothing was."""
    best = made.best(made.evaluators[0]) or next(iter(fits))
    target = problem.on_held_out() if held_out else problem
    try:
        doubtful = worst_data(guide_weights(target, fits[best], row_seed(seed, "worst", best)))
        picture(path, _images(target), doubtful)
    except ProblemError as error:
        return f"{path} was not drawn: {error}"
    except OSError as error:
        return f"{path} was not drawn: {error.strerror or error}"
    return f"{path}: the guide of {best}, {doubtful.words()}"

"""One cell done: theta learned or looked up, the engine run within its budget, judged, and put into the store."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyrometer.inference
from pyrometer.inference import Fit, Posterior, Problem, ProblemError, Reference, Status, infer
from pyrometer.inference.chains import interrupted
from pyrometer.inference.density import Density
from pyrometer.inference.engine import isolated

from . import alarms, brackets, distances, metrics, scores
from .alarms import figures_of
from .brackets import bracketed
from .cell import Cell, Record, typed
from .comparison import PerDatum, Row, Theta, judged, learned
from .facts import machine, plain, versions
from .grid import Grid, family
from .methods import row_seed, settings
from .store import Store

KEPT = 1000  # draws of each datum that are stored; figures and errors are of all


@dataclass(frozen=True)
class Task:
    """What a process needs to do one cell, or to learn the theta that several need (`learning`).

    name    of the result in the store; `theta` is that of the theta, '' for the problem's own
    grid    holds this cell alone, with the objects that it needs
    rerun   states that do not count as done
    """

    name: str
    grid: Grid
    theta: str = ""
    learning: bool = False
    rerun: tuple[str, ...] = ()

    @property
    def cell(self) -> Cell:
        return self.grid.cells[0]

    def __str__(self) -> str:
        cell = self.cell
        if self.learning:
            return f"{cell.problem}: theta by {cell.learner}, seed {cell.seed}"
        learner = f" at the theta of {cell.learner}" if cell.learner else ""
        return f"{cell.problem}: {cell.engine}{learner}, {cell.budget}, seed {cell.seed}"


def tasks(grid: Grid, rerun: tuple[str, ...] = ()) -> tuple[list[Task], list[Task]]:
    """What there is to learn, each once, and the cells. Every problem and method is made once, so that a mistake is
    found before anything runs. Raises ProblemError."""
    thetas: dict[str, Task] = {}
    cells: dict[str, Task] = {}
    contexts: dict[str, tuple[str, ...]] = {}
    sources: dict[str, str] = {}

    def source(cell: Cell, kind: str, make: Callable[[Cell], Any]) -> str:
        """Of the file that the cell's method stands in; made once, since to look for plug-ins takes milliseconds."""
        named = [
            getattr(cell, f"{kind}_settings"),
            getattr(cell, kind),
            cell.method if kind == "engine" else cell.learn_by,
        ]
        what = json.dumps([kind, *map(plain, named)])
        if what not in sources:
            sources[what] = _source(type(make(cell)))
        return sources[what]

    for cell in grid.cells:
        where = json.dumps([cell.problem, cell.model, plain(cell.model_settings)])
        if where not in contexts:
            contexts[where] = (*_surroundings(), *_content(cell, grid.problem(cell)))
        context = contexts[where]
        kinds = ("problem", cell.problem), ("engine", cell.engine), ("learner", cell.learner)
        objects = {kind: grid.objects[kind] for kind in kinds if kind in grid.objects}
        part = Grid((cell,), grid.name, objects)
        theta = ""
        if cell.learner:
            bare = Cell(
                problem=cell.problem, model=cell.model, engine="", learner=cell.learner, seed=cell.seed,
                model_settings=cell.model_settings, learner_settings=cell.learner_settings, learn_by=cell.learn_by,
            )  # fmt: skip
            theta = "theta-" + bare.key(*context, source(cell, "learner", grid.learner))
            thetas.setdefault(theta, Task(theta, part, learning=True, rerun=rerun))
        key = cell.key(*context, theta, source(cell, "engine", grid.engine))
        cells[key] = Task(key, part, theta, rerun=rerun)
    return list(thetas.values()), list(cells.values())


def perform(task: Task, store: Store) -> str:
    """Do the task, put its record into the store, and say how it ended. Raises `StoreError`."""
    with one_thread():
        try:
            record, posterior = (_learn if task.learning else _run)(task, store)
        except Exception as error:  # a broken plug-in, model, metric or reference costs one cell
            reason = str(error) if isinstance(error, ProblemError) else f"{type(error).__name__}: {error}"
            record, posterior = without_answer(task, Status("failed", reason)), None
    store.write(task.name, record, posterior)
    return state_of(record)


def without_answer(task: Task, status: Status) -> Any:
    """The record of a task that gave nothing, and why."""
    cell = task.cell
    if task.learning:
        return _theta_record(task, Theta(cell.learner, plain(cell.learner_settings), cell.seed, status))
    row = Row(cell.learner, cell.engine, plain(cell.engine_settings), _seed(cell), status)
    return Record(cell, task.name, Theta(cell.learner, seed=cell.seed), row, versions=versions(), machine=machine())


def state_of(record: Any) -> str:
    return record.row.status.state if isinstance(record, Record) else record["theta"].status.state


def _learn(task: Task, store: Store) -> tuple[Any, Posterior | None]:
    cell = task.cell
    theta, fit = learned(_problem(task), cell.learner, task.grid.learner(cell), cell.seed)
    if fit is None:
        return _theta_record(task, theta), None
    kept = Posterior({}, parameters=fit.parameters, state=fit.guide_parameters, kind="point", engine=fit.learner)
    return _theta_record(task, theta), kept


def _theta_record(task: Task, theta: Theta) -> dict[str, Any]:
    cell = task.cell
    told = {"problem": cell.problem, "model": cell.model, "model_settings": cell.model_settings}
    return {"key": task.name, **told, "theta": theta, "versions": versions(), "machine": machine()}


def _run(task: Task, store: Store) -> tuple[Record, Posterior | None]:
    cell, problem, engine = task.cell, _problem(task), task.grid.engine(task.cell)
    with isolated(row_seed(cell.seed, "theta")):
        parameters: Any = Density(problem).theta.values()
    theta, start = Theta(seed=cell.seed), parameters
    if task.theta:
        theta = _theta_of(store.read(task.theta))
        if not theta.status.done:
            reason = f"there is no theta to judge at, since {cell.learner} has not learned one: {theta.status.reason}"
            return replace(without_answer(task, Status("failed", reason)), theta=theta), None
        kept = store.draws(task.theta)
        parameters = Fit(kept.parameters, kept.state)
    reference = _reference(task, problem, {**start, **getattr(parameters, "parameters", parameters)})
    theta = replace(
        theta,
        reference=reference.kind,
        provenance=reference.provenance,
        log_evidence=PerDatum.of(reference.log_evidence),
    )
    posterior = _within(problem, engine, cell, parameters)
    posterior = bracketed(posterior, problem, engine, reference, parameters, row_seed(_seed(cell), "bracket"))
    row = Row(cell.learner, cell.engine, plain(posterior.engine_options) or settings(engine), _seed(cell))
    row = judged(row, posterior, reference, every=True)
    record = Record(cell, task.name, theta, row, figures_of(posterior), versions=versions(), machine=machine())
    return record, thinned(posterior) if posterior.draws else None


def _within(problem: Problem, engine: Any, cell: Cell, parameters: Any) -> Posterior:
    """The engine's answer within the budget. One of seconds is met by runs of growing size, of which the last that
    fits is the answer: how large that is depends on the machine, so these numbers do not repeat."""
    calls, seconds = cell.budget.calls, cell.budget.seconds

    def run() -> Posterior:
        posterior = infer(problem, engine, seed=_seed(cell), parameters=parameters, calls=calls)
        if interrupted(posterior.diagnostics.notes):
            raise KeyboardInterrupt  # a part of the draws is not the cell's answer
        return posterior

    if seconds is None:
        return run()
    best, calls, left = None, 500.0, seconds
    while True:
        posterior = run()
        took = posterior.cost.seconds
        fits = posterior.status.done and took <= seconds
        if fits and (best is None or posterior.cost.calls > 1.2 * best.cost.calls):
            best = posterior
        elif posterior.status.state != "timed out" or best is not None:
            break
        calls, left = 3 * calls, left - took
        if 3 * took > seconds or left < -10 * seconds:
            break
    if best is not None:
        return best
    if not posterior.status.done:
        return posterior
    reason = f"the smallest run took {took:.2g} s, of {seconds:g} given"
    return Posterior({}, status=Status("timed out", reason), cost=posterior.cost, engine=posterior.engine)


def _theta_of(data: Mapping[str, Any]) -> Theta:
    return typed(Theta, data["theta"])


def _seed(cell: Cell) -> int:
    """The random numbers of a cell: those of its row in `compare`, and others for each budget."""
    budget = () if cell.budget.calls is None and cell.budget.seconds is None else (str(cell.budget),)
    return row_seed(cell.seed, cell.learner, cell.engine, *budget)


def thinned(posterior: Posterior, most: int = KEPT) -> Posterior:
    """At most `most` draws of each datum, evenly spaced, with their weights: what pictures need. The points of a rule
    belong together, and stay."""
    every = math.ceil(posterior.num_chains * posterior.num_samples / most)
    if every > 1 and not posterior.is_rule:
        shape = (posterior.num_chains, posterior.num_samples)
        posterior = replace(
            posterior,
            draws={name: value[:, ::every].clone() for name, value in posterior.draws.items()},
            log_weights=None if posterior.log_weights is None else posterior.log_weights[:, ::every].clone(),
            sample_stats={n: v[:, ::every].clone() for n, v in posterior.sample_stats.items() if v.shape[:2] == shape},
        )
    return replace(posterior, state={})


# -- what a process keeps from cell to cell --------------------------------------------------------------------------

_kept: dict[str, Any] = {}


def _problem(task: Task) -> Problem:
    """The cell's problem, made once for as long as cells ask for the same."""
    cell = task.cell
    if not cell.model:
        _kept.clear()
        return task.grid.problem(cell)
    key = json.dumps([cell.model, plain(cell.model_settings)], sort_keys=True)
    if _kept.get("key") != key:
        _kept.clear()
        _kept.update(key=key, problem=task.grid.problem(cell))
    return _kept["problem"]


def _reference(task: Task, problem: Problem, parameters: Mapping[str, Tensor]) -> Reference:
    """The truth at these parameters, worked out once for as long as cells ask for the same."""
    at = "truth " + digest(dict(parameters))
    if at not in _kept:
        for name in [name for name in _kept if name.startswith("truth ")]:
            del _kept[name]
        _kept[at] = problem.reference_at(parameters)
    return _kept[at]


@contextmanager
def one_thread() -> Iterator[None]:
    """Cells run side by side, and sums must not depend on how many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what a key depends on besides the cell --------------------------------------------------------------------------


@cache
def _surroundings() -> tuple[str, ...]:
    """Versions, and the code that numbers come from."""
    folder = Path(pyrometer.inference.__file__).parent
    code = hashlib.sha256()
    for path in [
        *sorted(folder.rglob("*.py")),
        *(Path(inspect.getfile(m)) for m in (alarms, brackets, distances, metrics, scores)),
    ]:
        code.update(path.read_bytes())
    return json.dumps(versions(), sort_keys=True), code.hexdigest()


def _content(cell: Cell, problem: Problem) -> tuple[str, str]:
    """The model's source, and the data, as digests."""
    model = _source(family(cell.model)) if cell.model else digest([problem.model, problem.guide])
    return model, digest([problem.args, problem.kwargs, problem.held_out])


def _source(thing: Any) -> str:
    """The digest of the file that a class or module stands in; its name where there is none."""
    try:
        return _digest_of_file(inspect.getfile(thing))
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", "")


@cache
def _digest_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of data, and of programs by their source and what they close over: the same in every process."""
    state = hashlib.sha256()

    def add(item: Any, depth: int = 0) -> None:
        state.update(type(item).__name__.encode())
        if isinstance(item, Tensor):
            state.update(f"{item.dtype} {tuple(item.shape)}".encode())
            state.update(item.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(item, nn.Module):
            add(dict(item.state_dict()), depth + 1)
            state.update(_source(type(item)).encode())
        elif isinstance(item, Mapping):
            for key in sorted(item, key=str):
                state.update(str(key).encode())
                add(item[key], depth + 1)
        elif isinstance(item, list | tuple):
            for part in item:
                add(part, depth + 1)
        elif inspect.isfunction(item) and depth < 8:
            try:
                state.update(inspect.getsource(item).encode())
            except OSError:
                state.update(item.__code__.co_code)
            add(dict(inspect.getclosurevars(item).nonlocals), depth + 1)
        else:
            state.update(json.dumps(plain(item), sort_keys=True).encode())

    add(value)
    return state.hexdigest()

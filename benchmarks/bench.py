"""Run a grid: every cell once, in processes that are watched, into a folder that can be taken up again.

    bench("standard", "runs/", jobs=2)

Finished cells are never run again, failed ones on request; learned thetas are shared. The numbers of a cell depend on
the cell alone: not on the back end, the number of jobs, or what ran before.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import queue
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrometer.inference import ProblemError

from .cell import Record
from .grid import Grid, named, near
from .line import Line
from .metrics import MORE
from .store import Store, StoreError
from .task import Task, perform, tasks
from .terminal import interruptible
from .worker import Worker

if TYPE_CHECKING:
    from rich.table import Table

BACKENDS = ("process", "in-process", "loky", "dask", "ray")
RERUN = ("failed", "timed out", "unsupported", "done")
LIMIT, MEMORY = 600.0, 4096.0  # seconds and MB for each cell
CONNECT = 20  # seconds for a cluster to answer
BUSY = "busy"  # another process is at this cell

Progress = Callable[["Going"], None]
Run = Callable[[Task, Store], str]


@dataclass(frozen=True)
class Going:
    """How far a grid is: cells done of all, how they ended, what ended last, and the seconds left, if they can be
    told."""

    done: int
    total: int
    states: Mapping[str, int]
    last: str
    left: float | None


@dataclass(frozen=True)
class Bench:
    """A grid that was run: how each cell ended, by its key, and the store that holds the records."""

    store: Store
    states: Mapping[str, str]

    def records(self) -> Iterator[Record]:
        """The records of this grid's cells, one at a time."""
        for key in self.states:
            yield self.store.record(key)

    def table(self) -> Table:
        """How each engine ended and what its errors were, in short."""
        return table(self.records())


def bench(
    grid: Grid | str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    backend: str = "process",
    address: str | None = None,
    rerun: Iterable[str] = (),
    limit: float = LIMIT,
    memory: float = MEMORY,
    progress: Progress | None = None,
) -> Bench:
    """Run what of the grid is not yet in the folder `out`.

    grid     a `Grid`, a name ('smoke', 'standard', 'dlvm') or a TOML file
    jobs     cells at a time
    backend  'process': warm processes on this machine; 'in-process': here, without limits; 'loky', 'dask', 'ray':
             joblib's, the last two on the cluster at `address`, whose machines all see the folder `out`
    rerun    states to run again: 'failed', 'timed out', 'unsupported', 'done'
    limit    seconds for each cell, `memory` MB likewise; what exceeds them is a record that says so
    Raises ProblemError for mistakes, before anything runs, `StoreError` where the folder cannot be written, and
    KeyboardInterrupt on Ctrl-C or SIGTERM: what is finished is kept.
    """
    whole = grid if isinstance(grid, Grid) else named(grid)
    again = tuple(rerun)
    _check(jobs, backend, address, again, limit, memory)
    thetas, cells = tasks(whole, again)
    store = Store(out)
    states = {task.name: store.state(task.name) for task in cells}
    todo = [task for task in cells if not states[task.name] or states[task.name] in again]
    needed = {task.theta for task in todo}
    learn = [t for t in thetas if t.name in needed and (not (s := store.state(t.name)) or (s in again and s != "done"))]
    watch = _Watch(progress, states, [task.name for task in todo])
    with interruptible():
        for part in (learn, todo):
            for task, state in _run(part, store, jobs, backend, address, limit, memory):
                watch(task, state)
    return Bench(store, watch.states)


def _check(jobs: int, backend: str, address: str | None, rerun: tuple[str, ...], limit: float, memory: float) -> None:
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ProblemError(f"jobs={jobs!r}: expected a whole number of at least 1.")
    if backend not in BACKENDS:
        raise ProblemError(f"backend={backend!r}: {near(str(backend), BACKENDS)}")
    if backend == "in-process" and jobs > 1:
        raise ProblemError("backend='in-process' does one cell at a time: leave jobs out, or take 'process'.")
    if address is not None and backend not in ("dask", "ray"):
        raise ProblemError(f"address={address!r} is of a cluster: it needs backend='dask' or 'ray'.")
    for state in rerun:
        if state not in RERUN:
            raise ProblemError(f"rerun {state!r}: {near(str(state), RERUN)}")
    for name, value in (("limit", limit), ("memory", memory)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ProblemError(f"{name}={value!r}: expected a positive number.")


# -- running ---------------------------------------------------------------------------------------------------------


def attempt(task: Task, store: Store, run: Run) -> str:
    """Do the task unless it is done or another process is at it; say how it ended."""
    with store.claim(task.name) as mine:
        if not mine:
            return BUSY
        state = store.state(task.name)
        return state if state and state not in task.rerun else run(task, store)


def _run(
    todo: list[Task], store: Store, jobs: int, backend: str, address: str | None, limit: float, memory: float
) -> Iterator[tuple[Task, str]]:
    """Each task with how it ended. Those that another process is at come last, when that has done them or given up."""
    if not todo:
        return
    turn: Callable[[list[Task]], Iterator[tuple[Task, str]]]
    if backend == "process":
        turn = partial(_threads, store=store, jobs=min(jobs, len(todo)), limit=limit, memory=memory)
    elif backend == "in-process":
        turn = lambda part: ((task, attempt(task, store, perform)) for task in part)  # noqa: E731
    else:
        turn = partial(
            _joblib, folder=str(store.folder), jobs=jobs, backend=backend, address=address, limit=limit, memory=memory
        )
    while todo:
        busy: list[Task] = []
        for task, state in turn(todo):
            if state == BUSY:
                busy.append(task)
            else:
                yield task, state
        while busy and not any(_free(task, store) for task in busy):
            time.sleep(0.2)
        todo = busy


def _free(task: Task, store: Store) -> bool:
    with store.claim(task.name) as mine:
        return mine


def _threads(todo: list[Task], store: Store, jobs: int, limit: float, memory: float) -> Iterator[tuple[Task, str]]:
    """One thread for each process: it only waits."""
    line = Line(todo)
    ended: queue.SimpleQueue[tuple[Task, str] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        last = None
        try:
            with Worker(limit, memory, stop.is_set) as worker:
                while not stop.is_set() and (last := line.next(last)):
                    ended.put((last, attempt(last, store, worker)))
        except BaseException as error:
            ended.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        for _ in todo:
            while True:
                with contextlib.suppress(queue.Empty):
                    found = ended.get(timeout=0.1)  # in turns, so that signals are seen
                    break
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=4)


def _joblib(
    todo: list[Task], folder: str, jobs: int, backend: str, address: str | None, limit: float, memory: float
) -> Iterator[tuple[Task, str]]:
    """Through joblib. Every one of its processes keeps a process of its own for the cells, which can be ended."""
    import joblib  # type: ignore[import-untyped]

    with _cluster(backend, address) as name:
        try:
            with joblib.parallel_config(backend=name, n_jobs=jobs):
                parallel = joblib.Parallel(batch_size=1, return_as=_return_as(name))
                calls = (joblib.delayed(_remote)(place, task, folder, limit, memory) for place, task in enumerate(todo))
                for place, state, error in parallel(calls):
                    if error:
                        raise StoreError(error)
                    yield todo[place], state
        finally:
            if name == "loky":
                joblib.externals.loky.get_reusable_executor().shutdown(wait=False, kill_workers=True)


def _return_as(backend: str) -> str:
    from joblib.parallel import BACKENDS as KNOWN  # type: ignore[import-untyped]

    known = KNOWN.get(backend)
    return "generator_unordered" if getattr(known, "supports_return_generator", False) else "list"


_own = threading.local()


def _remote(place: int, task: Task, folder: str, limit: float, memory: float) -> tuple[int, str, str]:
    """What one of joblib's processes does for a cell."""
    if getattr(_own, "limits", None) != (limit, memory):
        _own.limits, _own.worker = (limit, memory), Worker(limit, memory)
    try:
        return place, attempt(task, Store(folder), _own.worker), ""
    except StoreError as error:
        return place, "", str(error)


@contextlib.contextmanager
def _cluster(backend: str, address: str | None) -> Iterator[str]:
    """Connected to the cluster, if it is one; the name that joblib knows the back end by. Raises ProblemError where no
    cluster answers."""
    if backend == "dask":
        here: dict[str, Any] = {"n_workers": os.cpu_count(), "threads_per_worker": 1, "dashboard_address": None}
        connect = _needed("distributed", "dask").Client
        with _answering(address):
            client = connect(address, timeout=CONNECT) if address else connect(processes=True, **here)
        with client:
            yield "dask"
    elif backend == "ray":
        ray = _needed("ray", "ray")
        _needed("ray.util.joblib", "ray").register_ray()
        with _answering(address):
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
        try:
            yield "ray"
        finally:
            ray.shutdown()
    else:
        yield backend


@contextlib.contextmanager
def _answering(address: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # of both: time-outs and refused connections are OSErrors
        if address is None:
            raise
        raise ProblemError(f"address={address!r}: no cluster answers there: {error}") from error


def _needed(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f"pip install 'pyrometer[{package}]'"
        raise ProblemError(f"backend={package!r} needs a package that is not here: {hint}.") from error


class _Watch:
    """Keeps how the cells ended, and tells who wants to know."""

    def __init__(self, progress: Progress | None, states: Mapping[str, str], todo: list[str]) -> None:
        self.progress, self.states, self.todo, self.ended = progress, dict(states), len(todo), 0
        self.finished = len(states) - len(todo)
        self.began = time.monotonic()
        for name in todo:
            self.states[name] = ""
        self._tell("")

    def __call__(self, task: Task, state: str) -> None:
        if not task.learning:
            self.states[task.name] = state
            self.ended += 1
        self._tell(f"{task}: {state}")

    def _tell(self, last: str) -> None:
        if self.progress is None:
            return
        spent = time.monotonic() - self.began
        left = spent / self.ended * (self.todo - self.ended) if self.ended else None
        counts = Counter(state for state in self.states.values() if state)
        self.progress(Going(self.finished + self.ended, len(self.states), counts, last, left))


# -- in short --------------------------------------------------------------------------------------------------------


def table(records: Iterable[Record]) -> Table:
    """Engine by engine: how its cells ended, how many were judged good, and at the largest budget the median errors, by
    the measures that a terminal has room for."""
    from rich.table import Table

    endings: dict[str, Counter[str]] = defaultdict(Counter)
    errors: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        engine, row = record.cell.engine, record.row
        endings[engine].update((row.status.state, *(["good"] if row.level == "good" else [])))
        for title, score in row.errors.items():
            if title in MORE:
                continue
            errors[title][engine].append((record.cell.budget.calls or math.inf, score.average))
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("engine", no_wrap=True)
    titles = ("done", "failed", "timed out", "unsupported", "good")
    for title in (*titles, *(f"{title} (median)" for title in errors)):
        shown.add_column(title, justify="right")
    for engine in sorted(endings):
        counts = [str(endings[engine][title] or "-") for title in titles]
        shown.add_row(engine, *counts, *(_median(errors[title].get(engine, [])) for title in errors))
    return shown


def _median(found: list[tuple[float, float]]) -> str:
    """Of those at the largest budget."""
    most = max((calls for calls, _ in found), default=0.0)
    return f"{statistics.median(value for calls, value in found if calls == most):.2g}" if found else "-"

"""Grids and their runs: equal numbers however they are run, and what goes wrong costs one cell."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from records import same_but_for_times

from pyrometer.benchmarks.bench import bench
from pyrometer.benchmarks.cell import Budget
from pyrometer.benchmarks.cli import main
from pyrometer.benchmarks.comparison import compare
from pyrometer.benchmarks.grid import LADDER, Grid, grid, named, selected
from pyrometer.benchmarks.line import Line
from pyrometer.benchmarks.store import RECORD, Store
from pyrometer.benchmarks.task import tasks, thinned
from pyrometer.inference import (
    EM,
    NUTS,
    SMC,
    SVI,
    Enumeration,
    ImportanceSampling,
    Problem,
    ProblemError,
    find_engine,
    infer,
    why_not,
)  # fmt: skip
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Draws
from pyrometer.inference.registry import engines
from pyrometer.inference.settings import options, settings
from pyrometer.models import conjugate_gaussian, families

PROBLEM = {"cg": ("conjugate_gaussian", {"num_data": 5})}
ENGINES = ["importance_sampling", "svi", "enumeration"]


def small(**changes) -> Grid:
    """Six cells, two of which are unsupported; they compile nothing that takes long."""
    return grid(PROBLEM, changes.pop("engines", ENGINES), **{"learners": None, "budgets": [700], "seeds": 2, **changes})


def learned() -> Grid:
    """The same, at two thetas that are learned."""
    return small(learners=[EM(num_steps=3)])


def contents(folder: Path) -> dict[str, tuple]:
    """name -> the record without times, and the bytes of the draws."""
    store = Store(folder)
    names = [*store.names(), *store.names(thetas=True)]
    draws = lambda name: (folder / name / "draws.nc").read_bytes() if (folder / name / "draws.nc").exists() else b""  # noqa: E731
    return {name: (store.read(name), draws(name)) for name in names}


def assert_same(left: Path, right: Path) -> None:
    one, other = contents(left), contents(right)
    assert set(one) == set(other)
    for name in one:
        assert same_but_for_times(one[name][0], other[name][0]), name
        assert one[name][1] == other[name][1], name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    bench(learned(), folder, backend="in-process")
    return folder


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", engines())
def test_every_engine_spends_what_it_is_given(engine):
    """By the density's own count, at most 5/4; exact rules may need less."""
    problem = families()["gaussian_mixture"].problem(num_data=4) if engine == "enumeration" else toy(1.0)
    cls = find_engine(engine)
    if why := why_not(problem, cls()):
        pytest.skip(why)
    with Density(problem) as density:
        sizes = [options(cls().sized(calls, density)) for calls in (1, 4000, 40000)]
    exact = getattr(cls, "exact", False)
    assert exact or sizes[0] != sizes[1] != sizes[2]
    posterior = infer(problem, cls(), seed=2, calls=4000)
    assert posterior.status.done, posterior.status
    assert posterior.cost.calls <= 5000
    assert exact or posterior.cost.calls >= 1600


def test_what_cannot_be_made_small_enough_is_timed_out_without_draws():
    posterior = infer(toy(1.0), SMC(), seed=0, calls=30)
    assert posterior.status.state == "timed out"
    assert "stopped after" in posterior.status.reason  # not let run to its end
    assert not posterior.draws
    with pytest.raises(ProblemError, match="calls=-3"):
        infer(toy(1.0), SMC(), calls=-3)


@pytest.mark.parametrize("share", [0.2, 1.8, 10.0])
def test_a_wrong_guess_of_the_engine_is_put_right_and_said(share):
    @settings
    class Guesser:
        """Spends `share` of what it is told to."""

        name: ClassVar[str] = "guesser"
        num_samples: int = 100

        def supports(self, density):
            return ""

        def sized(self, calls, density):
            return Guesser(num_samples=max(1, int(calls * share)))

        def run(self, density, run):
            draws = density.prior(self.num_samples)
            return Draws({n: v[None] for n, v in draws.values.items()}, "iid")

    posterior = infer(toy(1.0), Guesser(), calls=5000)
    assert posterior.status.done
    assert 2500 <= posterior.cost.calls <= 6250
    assert any("trial" in note for note in posterior.diagnostics.notes)
    del Guesser.sized
    posterior = infer(toy(1.0), Guesser(), calls=5000)
    assert posterior.cost.calls == 100
    assert any("cannot be sized" in note for note in posterior.diagnostics.notes)


def test_a_budget_of_seconds_is_kept(tmp_path):
    done = bench(
        grid(PROBLEM, ["importance_sampling"], budgets=Budget(seconds=0.3), seeds=1), tmp_path, backend="in-process"
    )
    (record,) = done.records()
    assert record.row.status.done, record.row.status
    assert record.row.cost.seconds <= 0.3
    assert record.row.cost.evaluations > 2000  # more than the smallest run


# -- grids -----------------------------------------------------------------------------------------------------------


def test_standard_is_every_family_with_a_reference_and_every_engine():
    standard = named("standard")
    assert {cell.method for cell in standard.cells} == set(engines())
    assert {cell.model for cell in standard.cells} == {
        name for name, module in families().items() if module.problem(**first(module)).reference is not None
    }
    assert {cell.budget.calls for cell in standard.cells} == set(LADDER)
    assert len({cell.seed for cell in standard.cells}) == 3
    assert len({cell.key() for cell in standard.cells}) == len(standard)
    assert len(selected(standard, engines=["smc"], budgets=[50], seeds=[7])) * 9 * len(engines()) == len(standard)


def test_smoke_is_small_and_every_engine_has_something_that_it_serves():
    """So that a family which is added does not make it long, and an engine which is added does not go unseen."""
    smoke = named("smoke")
    said = {name for name, module in families().items() if hasattr(module, "SMOKE")}
    assert {cell.model for cell in smoke.cells} == said
    assert {cell.method for cell in smoke.cells} == set(engines())
    assert len({cell.problem for cell in smoke.cells}) <= 8
    assert len({(cell.budget, cell.seed) for cell in smoke.cells}) == 1
    problems = {cell.problem: smoke.problem(cell) for cell in smoke.cells}
    assert all(problem.reference is not None for problem in problems.values())
    for name, engine in engines().items():
        assert any(not refusal(problem, engine()) for problem in problems.values()), f"{name} serves none of them"


def refusal(problem, engine) -> str:
    try:
        return why_not(problem, engine)
    except ProblemError as error:
        return str(error)


def test_methods_are_looked_up_once_and_not_for_every_cell(monkeypatch):
    """To look for plug-ins reads the file of every installed package: a grid of thousands spent half a minute on it."""
    from pyrometer.inference import registry

    asked = []
    discover = registry._discover
    monkeypatch.setattr(registry, "_discover", lambda *of: (asked.append(of), discover(*of))[1])
    problems = {f"cg{n}": ("conjugate_gaussian", {"num_data": n}) for n in range(1, 6)}
    tasks(grid(problems, ENGINES, budgets=[100, 200], seeds=4))
    assert len(asked) <= 5 * len(ENGINES)


def first(module):
    bench_settings = getattr(module, "BENCH", {})
    return bench_settings if isinstance(bench_settings, dict) else bench_settings[0]


def test_a_toml_file_says_all_of_a_grid(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        textwrap.dedent(
            """
            seeds = [4, 5]
            budgets = [1000]
            problems = ["ppca", {name = "vae", label = "digits", settings = {num_train = 9}}]
            learners = ["em:nuts"]
            engines = ["smc", {name = "importance_sampling", settings = {proposal = {name = "svi", num_steps = 7}}}]
            """
        )
    )
    found = named(path)
    assert found.name == "mine"
    assert len(found) == 2 * 2 * 2
    cell = found.cells[-1]
    assert (cell.problem, cell.model, cell.model_settings, cell.seed) == ("digits", "vae", {"num_train": 9}, 5)
    assert found.engine(cell) == ImportanceSampling(proposal=SVI(num_steps=7))
    assert found.learner(cell).e_step == NUTS()
    assert json.loads(json.dumps(asdict(cell))) == asdict(cell)  # plain: another process can have it


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("problem = ['ppca']", "'problem'; did you mean 'problems'"),
        ("problems = ['pcpa']", "did you mean 'ppca'"),
        ("problems = [{name = 'ppca', setings = {}}]", "did you mean 'settings'"),
        ("problems = [{name = 'ppca', settings = {num_dat = 3}}]", "did you mean 'num_data'"),
        ("problems = ['ppca']\nengines = ['nutz']", "Did you mean 'nuts'"),
        ("problems = ['ppca']\nengines = [{name = 'nuts', settings = {draws = 3}}]", "Did you mean 'num_samples'"),
        ("problems = ['ppca', 'ppca']", "twice"),
        ("problems = ['ppca']\nbudgets = [-1]", "positive"),
        ("problems = ['ppca']\nseeds = [1, 1]", "each once"),
        ("problems = ['ppca']\nseeds = 'all'", "a list, or how many"),
        ("engines = ['nuts']", "problems is missing"),
        ("problems = [", "not TOML"),
    ],
)
def test_a_mistake_in_a_grid_is_told_with_the_nearest_name(tmp_path, text, words):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ProblemError, match=words.replace("?", r"\?")) as caught:
        named(path)
    assert "grid.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jobs": 0}, "jobs=0"),
        ({"backend": "daks"}, "did you mean 'dask'"),
        ({"backend": "in-process", "jobs": 2}, "one cell at a time"),
        ({"address": "tcp://x:1"}, "needs backend="),
        ({"rerun": ["faild"]}, "did you mean 'failed'"),
        ({"limit": 0}, "limit=0"),
        ({"memory": float("nan")}, "memory=nan"),
    ],
)
def test_a_mistake_in_a_call_is_told_before_anything_runs(tmp_path, changes, words):
    with pytest.raises(ProblemError, match=words):
        bench(small(), tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


def test_keys_change_with_data_settings_seeds_and_model_source_only():
    def key(**changes):
        return [
            task.name for task in tasks(grid(**{"problems": PROBLEM, "engines": ["svi"], "seeds": 1, **changes}))[1]
        ]

    one = key()
    assert one == key()
    assert one != key(seeds=[1])
    assert one != key(budgets=[100])
    assert one != key(engines=[SVI(num_steps=3)])
    assert one != key(problems={"cg": ("conjugate_gaussian", {"num_data": 6})})
    mine = [toy(scale) for scale in (1.0, 1.0, 2.0)]
    first, again, other = (key(problems={"toy": problem}) for problem in mine)
    assert first == again != other  # what the program closes over is part of it


def toy(scale: float) -> Problem:
    x = torch.tensor([0.3, 1.0])

    def model(x):
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0), obs=x)

    return Problem(model, args=(x,), name="toy")


# -- the same numbers ------------------------------------------------------------------------------------------------


def test_a_process_stays_at_its_problem_and_the_dearest_cells_come_first():
    problems = {name: ("conjugate_gaussian", {"num_data": n}) for n, name in enumerate("abc", 1)}
    todo = tasks(grid(problems, ["svi"], budgets=[100, 400, 200], seeds=2))[1]
    line, done, at, seeds = Line(todo), [], {0: None, 1: None}, []
    for turn in range(len(todo)):
        worker = turn % 2
        at[worker] = line.next(at[worker])
        done.append((worker, at[worker].cell.problem, at[worker].cell.budget.calls))
        seeds.append(at[worker].cell.seed)
    assert line.next(at[0]) is None
    assert line.next(None) is None
    assert len({task.name for task in todo}) == len(done)
    by = [[problem for worker, problem, _ in done if worker == w] for w in (0, 1)]
    assert by[0][:6] == ["a"] * 6
    assert by[1][:6] == ["b"] * 6
    assert by[0][6:] == by[1][6:] == ["c"] * 3, "at the end they share"
    assert [calls for worker, _, calls in done if worker == 0][:6] == [400, 400, 200, 200, 100, 100]
    assert [calls for _, problem, calls in done if problem == "c"] == [400, 400, 200, 200, 100, 100]
    assert seeds[:12:2] == seeds[1:12:2] == [0, 1, 0, 1, 0, 1], "equals as they were given"


def test_two_workers_give_what_one_process_gives(whole, tmp_path):
    """And what a run in another order gives."""
    forward = learned()
    backward = Grid(forward.cells[::-1], forward.name, forward.objects)
    done = bench(backward, tmp_path, jobs=2)
    assert_same(whole, tmp_path)
    assert Counter(done.states.values()) == {"done": 4, "unsupported": 2}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask", "ray"])
def test_a_cluster_gives_the_same(whole, tmp_path, backend):
    if backend != "loky":
        pytest.importorskip({"dask": "distributed"}.get(backend, backend), reason=f"{backend} is not installed")
    program = tmp_path / "run.py"
    program.write_text(
        "from pyrometer.benchmarks.bench import bench\nfrom test_bench import learned\n"
        f"if __name__ == '__main__':\n    bench(learned(), {str(tmp_path / 'runs')!r}, jobs=2, backend={backend!r})\n"
    )
    run_program(program)
    assert_same(whole, tmp_path / "runs")


def run_program(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, env=surroundings(**environment)
    )
    assert done.returncode == 0, done.stderr
    return done


def surroundings(**changes: str) -> dict[str, str]:
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def heeded() -> None:
    """In the background of a shell Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_cell_without_budget_has_the_numbers_of_compare(tmp_path):
    problem = conjugate_gaussian.problem(num_data=5)
    done = bench(grid({"cg": problem}, [SVI(num_steps=30)], seeds=[3]), tmp_path, backend="in-process")
    (row,) = compare(problem, [SVI(num_steps=30)], seed=3).rows
    (record,) = done.records()
    assert {name: record.row.errors[name] for name in row.errors} == row.errors
    assert len(record.row.errors) > len(row.errors)  # a record has every measure
    titles = [column.header for column in done.table().columns]
    assert [title for title in titles if title.endswith("(median)")] == [f"{title} (median)" for title in row.errors]
    assert record.row.seed == row.seed
    assert record.row.log_evidence == row.log_evidence
    assert record.cell.method == "svi"


# -- what is done is done --------------------------------------------------------------------------------------------


def test_finished_cells_are_not_run_again_and_failed_ones_on_request(tmp_path):
    options = {"backend": "in-process"}
    one = small()
    bench(one, tmp_path, **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{RECORD}")}
    bench(one, tmp_path, **options)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{RECORD}")}
    bench(one, tmp_path, rerun=["unsupported"], **options)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"*/{RECORD}")}
    again = {path.parent.name for path in before if after[path] != before[path]}
    store = Store(tmp_path)
    assert again == {line["key"] for line in store.index() if line["state"] == "unsupported"}
    assert len(again) == 2


def test_a_damaged_cell_is_set_aside_and_run_again(whole, tmp_path):
    one = learned()
    done = bench(one, tmp_path, backend="in-process")
    key = next(key for key, state in done.states.items() if state == "done")
    for file in (RECORD, "draws.nc"):
        path = tmp_path / key / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        bench(one, tmp_path, backend="in-process")
        assert_same(whole, tmp_path)
    assert len(list(tmp_path.glob(f"{key}.damaged*"))) == 2


def test_theta_is_learned_once_and_a_failure_to_learn_is_a_row(tmp_path, monkeypatch):
    told = []
    bench(learned(), tmp_path / "a", backend="in-process", progress=lambda going: told.append(going.last))
    assert sum("theta by em" in text for text in told) == 2  # one for each seed
    wrong = small(learners=[EM(e_step=Enumeration())], engines=["svi"], seeds=1)
    (record,) = bench(wrong, tmp_path / "b", backend="in-process").records()
    assert record.row.status.state == "failed"
    assert "there is no theta" in record.row.status.reason
    assert "is continuous" in record.row.status.reason


def test_stored_draws_are_few_with_their_weights_and_rules_stay_whole():
    problem = conjugate_gaussian.problem(num_data=3)
    weighted = infer(problem, ImportanceSampling(num_samples=2500), seed=0)
    kept = thinned(weighted)
    assert kept.num_samples == 834
    assert torch.equal(kept.log_weights, weighted.log_weights[:, ::3])
    rule = infer(problem, "quadrature", seed=0)
    assert thinned(rule, most=5).num_samples == rule.num_samples


# -- what goes wrong -------------------------------------------------------------------------------------------------


@settings
class Broken:
    """Breaks in the way that it is told to."""

    name: ClassVar[str] = "broken"
    way: str = "raise"

    def supports(self, density):
        return ""

    def run(self, density, run):
        if self.way == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.way == "exit":
            os._exit(3)
        if self.way == "hang":
            subprocess.Popen(["sleep", "77.25"])
            while True:
                time.sleep(1)
        if self.way == "memory":
            held = []
            while True:
                held.append(bytearray(b"x" * 2**24))
        if self.way == "print":
            print('{"state": "forged"}', flush=True)
            return Draws({n: v[None] for n, v in density.prior(10).values.items()}, "iid")
        raise ZeroDivisionError("by nothing")


ENDINGS = {
    "crash": ("failed", "SIGSEGV"),
    "exit": ("failed", "exit code 3"),
    "hang": ("timed out", "ended after 10 s"),
    "memory": ("failed", "out of memory: more than 1500 MB"),
    "raise": ("failed", "ZeroDivisionError: by nothing"),
    "print": ("done", ""),  # what it printed was not taken for an answer
}


@pytest.mark.parametrize(
    "ways", [("crash", "hang", "print"), pytest.param(("exit", "memory", "raise"), marks=pytest.mark.slow)]
)
def test_a_crash_a_hang_and_an_exhausted_memory_cost_one_cell_each(tmp_path, ways):
    broken = {way: Broken(way=way) for way in ways}
    one = grid({"toy": toy(1.0)}, {**broken, "fine": ImportanceSampling(num_samples=20)}, seeds=1)
    start = time.monotonic()
    done = bench(one, tmp_path, limit=10.0 if "hang" in ways else 100.0, memory=1500.0)
    assert time.monotonic() - start < 200
    ended = {record.cell.engine: record.row.status for record in done.records()}
    assert ended.pop("fine").done
    assert set(ended) == set(ways)
    for way, status in ended.items():
        assert (status.state, status.reason) == (ENDINGS[way][0], status.reason)
        assert ENDINGS[way][1] in status.reason
    children = subprocess.run(["pgrep", "-f", "sleep 77.25"], capture_output=True, text=True, check=False)
    assert not children.stdout  # what a hung engine has started goes with it


RUN = """
import sys
from pyrometer.benchmarks.bench import bench
from test_bench import learned
if __name__ == "__main__":
    bench(learned(), sys.argv[1], jobs=int(sys.argv[2]))
"""


def started(tmp_path: Path, out: Path, jobs: int = 2) -> subprocess.Popen[str]:
    program = tmp_path / "run.py"
    program.write_text(RUN)
    return subprocess.Popen(
        [sys.executable, str(program), str(out), str(jobs)], stderr=subprocess.PIPE, text=True, env=surroundings()
    )


def forked(out: Path) -> int:
    """A process that runs the grid; forked, it has nothing to import."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            bench(learned(), out, backend="in-process")
            code = 0
        finally:
            os._exit(code)
    return pid


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_files(whole, tmp_path):
    """kill -9 six times: nothing lost, doubled or half-written."""
    moments, kills, out = random.Random(1), 0, tmp_path / "runs0"
    began = time.monotonic()
    os.waitpid(forked(tmp_path / "timed"), 0)
    longest = time.monotonic() - began
    while kills < 6:
        pid = forked(out)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # it was quicker: begin another
            assert os.WEXITSTATUS(status) == 0
            assert_whole(whole, out)
            out = tmp_path / f"runs{kills}"
    assert os.WEXITSTATUS(os.waitpid(forked(out), 0)[1]) == 0
    assert_whole(whole, out)


def assert_whole(whole: Path, out: Path) -> None:
    """As the uninterrupted run, and nothing else is there."""
    assert_same(whole, out)
    assert {path.name for path in out.iterdir()} - set(contents(out)) == {".claims"}


@pytest.mark.slow
def test_a_run_with_workers_that_is_killed_fifty_times_goes_on_to_the_same_files(whole, tmp_path):
    moments, kills, out = random.Random(2), 0, tmp_path / "runs0"
    while kills < 50:
        process = started(tmp_path, out)
        began = time.monotonic()
        while process.poll() is None and not list(out.glob("*")) and time.monotonic() - began < 60:
            time.sleep(0.01)  # until the imports are over
        time.sleep(moments.uniform(0.0, 6.0))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            time.sleep(1.0)
            assert_whole(whole, out)
            out = tmp_path / f"runs{kills}"
    final = started(tmp_path, out)
    assert final.communicate()[1] == ""
    assert final.returncode == 0
    assert_whole(whole, out)


def test_two_processes_share_a_folder(whole, tmp_path):
    both = [forked(tmp_path) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in both] == [0, 0]
    assert_whole(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_with_workers_share_a_folder(whole, tmp_path):
    out = tmp_path / "runs"
    both = [started(tmp_path, out, jobs=1) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert_whole(whole, out)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_stops_within_five_seconds_and_keeps_what_is_finished(tmp_path, signum):
    out = tmp_path / "runs"
    grid_file = tmp_path / "grid.toml"
    grid_file.write_text(
        "problems = [{name='conjugate_gaussian', settings={num_data=5}}]\nseeds = 1\n"
        "engines = ['enumeration', {name='svi', settings={num_steps=100000000}}]"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pyrometer.benchmarks", "bench", str(grid_file), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings(), preexec_fn=heeded,
    )  # fmt: skip
    began = time.monotonic()
    while not list(out.glob(f"*/{RECORD}")) and time.monotonic() - began < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signum)
    began = time.monotonic()
    _, words = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert words == "interrupted\n"
    assert [line["state"] for line in Store(out).index()] == ["unsupported"]


def test_a_folder_that_cannot_be_written_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(
        main, ["bench", "smoke", "--engines", "enumeration", "--out", str(tmp_path / "file" / "x")]
    )
    assert done.exit_code == 2
    assert "file" in done.output
    assert "Traceback" not in done.output


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_there(tmp_path):
    """Where no file may be longer than 6000 bytes, draws cannot be written."""
    out, program = tmp_path / "runs", tmp_path / "run.py"
    one = selected(small(), engines=["enumeration"])
    before = bench(one, out, backend="in-process")
    program.write_text(
        "import resource, signal, sys\nfrom pyrometer.benchmarks.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "main()\n"
    )
    (tmp_path / "grid.toml").write_text("problems=['ppca']\nengines=['importance_sampling']\nseeds=1\nbudgets=[2000]")
    words = ["--backend", "in-process", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(program), "bench", str(tmp_path / "grid.toml"), *words],
        capture_output=True, text=True, check=False, env=surroundings(),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "too large" in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert all(Store(out).state(key) == "unsupported" for key in before.states)
    assert len(list(Store(out).names())) == len(before.states)


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_command_runs_a_grid_is_quiet_and_says_what_came_of_it(tmp_path):
    out = tmp_path / "a folder, with blanks"
    words = [
        "bench",
        "smoke",
        "--models",
        "conjugate_gaussian",
        "--engines",
        "enumeration,quadrature",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(main, [*words, "--seeds", "1,2", "--budgets", "500"])
    assert done.exit_code == 0, done.output
    assert "4 cells in" in done.output
    assert "pyrometer report" in done.output
    assert done.stderr == ""
    lines = list(Store(out).index())
    assert Counter((line["engine"], line["state"]) for line in lines) == {
        ("enumeration", "unsupported"): 2,
        ("quadrature", "done"): 2,
    }
    assert {line["seed"] for line in lines} == {1, 2}
    for wrong, near in (
        (["--engines", "nutz"], "'nuts'"),
        (["--models", "eight_school"], "'eight_schools'"),
        (["--seeds", "x"], "whole"),
    ):
        mistake = CliRunner().invoke(main, ["bench", "smoke", "--out", str(out), *wrong])
        assert mistake.exit_code == 2
        assert near in mistake.output


def test_a_cluster_that_does_not_answer_is_a_mistake_in_one_line(tmp_path, monkeypatch):
    def refuse(address, timeout):
        assert timeout <= 60
        raise OSError(f"Timed out trying to connect to {address}")

    monkeypatch.setitem(sys.modules, "distributed", SimpleNamespace(Client=refuse))
    with pytest.raises(ProblemError, match="no cluster answers there: Timed out"):
        bench(small(), tmp_path, backend="dask", address="tcp://127.0.0.1:1")


def test_an_absent_cluster_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ProblemError, match=r"pip install 'pyrometer\[dask\]'"):
        bench(small(), tmp_path, backend="dask")

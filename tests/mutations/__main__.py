"""Plant each bug in a copy of the tree, and see that the test named with it fails, and passes without it."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from . import ROOT, Mutation, mutations

PACKAGES = ("inference", "models", "benchmarks")
# what takes seconds to import, and is not ours: read once, by the process that all others are forked from
OTHERS = ("pytest", "torch", "pyro", "arviz", "xarray", "h5netcdf", "scipy.stats", "sklearn.ensemble", "nutpie", "rich")
LIMIT = 600.0  # seconds for one test: a run without an end is seen
PASSED, FAILED, AWRY = 0, 1, 99  # exit codes; others of pytest's are errors, which see nothing


class Tree:
    """A copy of the source and its tests, imported in the place of what is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (*PACKAGES, "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "Makefile"):
            shutil.copy(ROOT / name, folder)
        self.namespace = folder / "namespace"
        (self.namespace / "pyrometer").mkdir(parents=True)
        for name in PACKAGES:
            (self.namespace / "pyrometer" / name).symlink_to(folder / name)

    def start(self, nodes: Iterable[str], *options: str) -> ForkProcess:
        """The tests of these nodes, up to the first that fails, in a process of their own."""
        arguments = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *options, *(f"tests/{node}" for node in nodes)]
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(arguments,))
        process.start()
        return process

    def _run(self, arguments: list[str]) -> None:
        import pytest

        os.setpgid(0, 0)  # what it starts ends with it
        os.chdir(self.folder)
        sys.path[:] = [str(self.namespace), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(self.namespace), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with open(self.folder / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = int(pytest.main(arguments))
            import pyrometer.inference as tested

            sys.stdout.flush()
            os._exit(code if Path(str(tested.__file__)).is_relative_to(self.folder.resolve()) else AWRY)


def judged(todo: Iterable[Mutation], trees: list[Tree]) -> Iterator[tuple[Mutation, str, float]]:
    """Each bug, '' where its test sees it, else what came of it in words, and the seconds that it took."""
    free, waiting = list(trees), iter(todo)
    busy: dict[int, tuple[Tree, Mutation, str, ForkProcess, float]] = {}
    while True:
        while free and (mutation := next(waiting, None)) is not None:
            tree = free.pop()
            path = tree.folder / mutation.file
            whole = path.read_text()
            path.write_text(mutation.planted(tree.folder))
            process = tree.start([mutation.test])
            busy[process.sentinel] = (tree, mutation, whole, process, time.perf_counter())
        if not busy:
            return
        ended = set(wait(list(busy), timeout=1.0))
        for sentinel, (tree, mutation, whole, process, start) in list(busy.items()):
            seconds = time.perf_counter() - start
            if sentinel not in ended and seconds < LIMIT:
                continue
            if late := sentinel not in ended:
                os.killpg(process.pid or 0, 9)
            process.join()
            del busy[sentinel]
            free.append(tree)
            (tree.folder / mutation.file).write_text(whole)
            fault = f"not tested: pytest ended with code {process.exitcode}"
            yield mutation, "" if late else {FAILED: "", PASSED: "survived"}.get(process.exitcode or 0, fault), seconds


def chosen(names: Iterable[str]) -> list[Mutation]:
    known = mutations()
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no bug is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in names or known]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs to plant; none: all")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time (2)")
    parser.add_argument("--only-bugs", action="store_true", help="do not run the tests without bugs first")
    arguments = parser.parse_args()
    every = chosen(arguments.names)
    todo, lost = [m for m in every if m.test], []
    for module in OTHERS:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as scratch:
        trees = [Tree(Path(scratch) / str(number)) for number in range(max(1, arguments.jobs))]
        if not arguments.only_bugs:
            clean = trees[0].start(sorted({m.test for m in todo}))
            clean.join()
            if clean.exitcode != PASSED:
                print((trees[0].folder / "output").read_text()[-3000:])
                raise SystemExit("the tests fail without any bug")
        for mutation, fault, seconds in judged(todo, trees):
            print(f"{mutation.name:<40} {fault or 'seen':<12} {seconds:6.1f} s  {mutation.test}", flush=True)
            lost += [mutation.name] * bool(fault)
    print(f"{len(todo) - len(lost)} of {len(todo)} bugs are seen; {len(every) - len(todo)} are equivalent")
    if lost:
        print(f"not seen: {', '.join(lost)}")
    return int(bool(lost))


if __name__ == "__main__":
    raise SystemExit(main())

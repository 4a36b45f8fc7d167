"""Plant each bug in a copy of the tree, and see that the test named with it fails, and passes without it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import ROOT, Mutation, mutations

PACKAGES = ("inference", "models", "benchmarks")
LIMIT = 600  # seconds for one test
PASSED, FAILED = 0, 1  # exit codes of pytest; others are errors, which see nothing


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
        found = self.run([sys.executable, "-c", "import pyrometer.inference as i; print(i.__file__)"])
        if not Path(found.stdout.strip()).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"the copy in {folder} is not what would be tested: {found.stdout}{found.stderr}")

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ, "PYTHONPATH": str(self.namespace), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"
        }  # fmt: skip
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )

    def test(self, *nodes: str) -> subprocess.CompletedProcess[str]:
        """The tests of these nodes, up to the first that fails."""
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        return self.run([sys.executable, "-m", "pytest", *options, *(f"tests/{node}" for node in nodes)])

    def judge(self, mutation: Mutation) -> str:
        """'' where the test sees the bug; else what came of it, in words."""
        path = self.folder / mutation.file
        whole = path.read_text()
        path.write_text(mutation.planted(self.folder))
        try:
            code = self.test(mutation.test).returncode
        except subprocess.TimeoutExpired:
            return ""  # a run without an end is seen
        finally:
            path.write_text(whole)
        return {FAILED: "", PASSED: "survived"}.get(code, f"not tested: pytest ended with code {code}")


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
    todo = [m for m in every if m.test]
    with tempfile.TemporaryDirectory() as scratch:
        trees = [Tree(Path(scratch) / str(number)) for number in range(max(1, arguments.jobs))]
        if not arguments.only_bugs:
            clean = trees[0].run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                                  *sorted({f"tests/{m.test}" for m in todo})])  # fmt: skip
            if clean.returncode != PASSED:
                print(clean.stdout[-3000:], clean.stderr[-3000:])
                raise SystemExit("the tests fail without any bug")

        def judged(mutation: Mutation) -> tuple[Mutation, str, float]:
            tree, start = trees.pop(), time.perf_counter()
            try:
                return mutation, tree.judge(mutation), time.perf_counter() - start
            finally:
                trees.append(tree)

        lost = []
        with ThreadPoolExecutor(len(trees)) as pool:
            for mutation, fault, seconds in pool.map(judged, todo):
                print(f"{mutation.name:<40} {fault or 'seen':<12} {seconds:6.1f} s  {mutation.test}", flush=True)
                lost += [mutation.name] * bool(fault)
    print(f"{len(todo) - len(lost)} of {len(todo)} bugs are seen; {len(every) - len(todo)} are equivalent")
    if lost:
        print(f"not seen: {', '.join(lost)}")
    return int(bool(lost))


if __name__ == "__main__":
    raise SystemExit(main())

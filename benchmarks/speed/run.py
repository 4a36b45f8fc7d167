"""The order of measurements, and a process for each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from . import cases
from .record import Begun, Measurement, Plan
from .tools import Tool, chosen

Measure = Callable[[str, Tool, Plan, int, Path], Measurement]


def steps(
    names: Sequence[str], wanted: Sequence[str], plan: Plan, measure: Measure | None = None
) -> Iterator[Begun | Measurement]:
    """What is measured, in order: each `Begun`, then its `Measurement`.

    Tools take turns, and each round begins with another one. One that gave no answer is not tried again on that case.
    Raises `ProblemError` for a tool that there is none of, before anything is measured.
    """
    by_case = {name: chosen(wanted, [cases.load(name).KIND]) for name in names}
    return _steps(by_case, plan, measure or in_a_process)


def _steps(by_case: Mapping[str, list[Tool]], plan: Plan, measure: Measure) -> Iterator[Begun | Measurement]:
    total, step = plan.rounds * sum(map(len, by_case.values())), 0
    for name, tools in by_case.items():
        lost: set[str] = set()
        with tempfile.TemporaryDirectory(prefix="pyrometer-speed-") as folder:
            for turn, place in itertools.product(range(plan.rounds), range(len(tools))):
                tool = tools[(place + turn) % len(tools)]
                step += 1
                if tool.name in lost:
                    continue
                yield Begun(name, tool.name, turn, step, total)
                if tool.missing:
                    blank = Measurement(name, tool.name, tool.precision)
                    measurement = replace(blank, state="not installed", reason=", ".join(tool.missing))
                else:
                    measurement = measure(name, tool, plan, turn, Path(folder) / tool.name)
                if measurement.state != "done":
                    lost.add(tool.name)
                yield measurement


def in_a_process(case: str, tool: Tool, plan: Plan, turn: int, caches: Path) -> Measurement:
    """One measurement by `worker`, with the caches of compilers in the folder `caches`, emptied in every other turn.

    A process that ends without a result, or not in time, is a measurement with that reason.
    """
    empty = turn % 2 == 0
    if empty:
        shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir(parents=True, exist_ok=True)
    result = caches / "result.json"
    result.unlink(missing_ok=True)
    job = {"case": case, "tool": tool.name, "round": turn, "empty": empty, "plan": asdict(plan)}
    blank = Measurement(case, tool.name, tool.precision, turn, empty)
    process = subprocess.Popen(
        [sys.executable, "-m", "pyrometer.benchmarks.speed.worker", str(result)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_own_caches(caches), **tool.environment(plan)},
        start_new_session=True,  # so that its own workers end with it
    )
    try:
        _, stderr = process.communicate(json.dumps(job), timeout=plan.limit)
    except subprocess.TimeoutExpired:
        return replace(blank, state="timed out", reason=f"no answer within {plan.limit:g} s")
    finally:
        _end(process)
    if not result.exists():
        said = stderr.strip().splitlines()
        words = said[-1] if said else "it said nothing"
        return replace(blank, state="failed", reason=f"its process ended with code {process.returncode}: {words}")
    return Measurement.from_json(json.loads(result.read_text()))


def _own_caches(folder: Path) -> dict[str, str]:
    """Where each compiler keeps what it has compiled."""
    return {
        "PYROMETER_CACHE": str(folder / "pyrometer"),
        "XDG_CACHE_HOME": str(folder / "xdg"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "NUMBA_CACHE_DIR": str(folder / "numba"),
        "PYTENSOR_FLAGS": ",".join(
            filter(None, [os.environ.get("PYTENSOR_FLAGS"), f"base_compiledir={folder}/pytensor"])
        ),
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # JAX has none unless its user asks for one
    }


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of the process and of those it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

"""A process that does one cell after another, and its keeper, which ends it when it takes too long or too much.

A crash, a hang or an exhausted memory costs one cell: the keeper says so in its record, and the next cell has a new
process. Tasks go to the process pickled, through a pipe; nothing pickled is ever on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrometer.inference import Status

from .store import Store, StoreError
from .task import Task, perform, state_of, without_answer

STARTUP = 300.0  # seconds in which a process has to be ready: on a cluster's disk imports can take a minute
GLANCE = 0.02  # seconds between two looks at its memory


class WorkerError(Exception):
    """The process of a worker cannot be started; the message holds its last words."""


class Worker:
    """Runs tasks in a process of its own, started when first needed and kept warm.

    limit    seconds for each task
    memory   MB that the process may hold, all that it has imported (some 400) included; watched where /proc tells it
    stopped  says that the run is being ended: the task in hand is given up
    """

    def __init__(self, limit: float, memory: float, stopped: Callable[[], bool] = lambda: False) -> None:
        self.limit, self.memory, self.stopped = limit, memory, stopped
        self._process: subprocess.Popen[bytes] | None = None
        self._words: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __call__(self, task: Task, store: Store) -> str:
        """Do the task, and say how it ended. Raises `StoreError`, and KeyboardInterrupt where the run is ended."""
        if self._process is None:
            self._start()
        assert self._process is not None
        with contextlib.suppress(BrokenPipeError):
            _send(self._process.stdin, (task, str(store.folder)))
        answer, status = self._answer(time.monotonic() + self.limit)
        if status is not None:
            record = without_answer(task, status)
            store.write(task.name, record)
            return state_of(record)
        if "error" in answer:
            raise StoreError(answer["error"])
        return answer["state"]

    def end(self) -> None:
        """End the process, and what it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self._words.close()

    def _start(self) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        paths = [path for path in sys.path if path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from pyrometer.benchmarks.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is the keeper's, and what it starts can be ended with it
        )
        _, status = self._answer(time.monotonic() + STARTUP)
        if status is not None:
            raise WorkerError(f"a process for the cells cannot be started: {status.reason}")

    def _answer(self, deadline: float) -> tuple[dict[str, Any], Status | None]:
        """What the process says; or, if it was ended or has ended, how."""
        process, start = self._process, time.monotonic()
        assert process is not None
        assert process.stdout is not None
        while True:
            if select.select([process.stdout], [], [], GLANCE)[0]:
                line = process.stdout.readline()
                if line.endswith(b"\n"):
                    return json.loads(line), None
                return {}, self._given_up(Status("failed", self._crash()))
            if self.stopped():
                self.end()
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                return {}, self._given_up(Status("timed out", f"ended after {deadline - start:.0f} s"))
            if _resident(process.pid) > self.memory * 2**20:
                return {}, self._given_up(Status("failed", f"out of memory: more than {self.memory:.0f} MB"))

    def _given_up(self, status: Status) -> Status:
        self.end()
        return status

    def _crash(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - 2000))
        words = self._words.read().decode(errors="replace").strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = "" if code < 0 or not words else f": {words[-1][:200]}"
        return f"the process crashed ({how}){said}"


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where that cannot be known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _send(pipe: Any, message: Any) -> None:
    import cloudpickle  # type: ignore[import-untyped]

    packed = cloudpickle.dumps(message)
    pipe.write(struct.pack("<Q", len(packed)) + packed)
    pipe.flush()


def main() -> None:
    """The process: tasks on standard input, a line of JSON for each on what was standard output."""
    import pickle
    import warnings

    import torch

    import pyrometer.inference.interop  # noqa: F401  so that the first cell has nothing left to import

    warnings.simplefilter("ignore")  # a posterior's notes say what matters; nobody reads this stream
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a model prints must not pass for an answer
    answers.write('{"state": "ready"}\n')
    while header := sys.stdin.buffer.read(8):
        task, folder = pickle.loads(sys.stdin.buffer.read(struct.unpack("<Q", header)[0]))
        try:
            answer = {"state": perform(task, _store(folder))}
        except StoreError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")


_stores: dict[str, Store] = {}


def _store(folder: str) -> Store:
    if folder not in _stores:
        _stores[folder] = Store(folder)
    return _stores[folder]


def _outlive_nobody(parent: int) -> None:
    """A keeper that was killed cannot end its process: that looks for itself."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os._exit(1)

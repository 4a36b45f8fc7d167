"""Results on disk: a folder for each cell, whole or not at all, and believed only after its checksum.

    <run>/<key>/record.json     what became of the cell; its first line is the digest of all that follows it
    <run>/<key>/draws.nc        the draws, where there are some; the record holds their digest
    <run>/theta-<key>/          what a learner found, likewise, shared by the cells of its problem and seed

A folder is written under another name, synced and renamed, so that a process that is killed leaves nothing half-done.
What is found damaged is set aside as `<key>.damaged` and done again. Only these names are ever paths, and links are
not followed. Processes may share a folder: a claim is a lock of the system, which ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyrometer.inference.posterior import Cost, Posterior
from pyrometer.inference.storage import save

from . import reading
from .cell import Record
from .facts import plain
from .reading import DRAWS, RECORD, SCHEMA

try:
    import fcntl
except ImportError:  # no POSIX: two processes on one folder may then do a cell twice, with the same result
    fcntl = None  # type: ignore[assignment]


class StoreError(Exception):
    """The folder cannot be read or written; the message says which and why."""


class Store:
    """A folder of results. Raises `StoreError` where it cannot be made or written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".claims").mkdir(exist_ok=True)
            probe = self.folder / f".{secrets.token_hex(8)}.tmp"
            probe.mkdir()
            probe.rmdir()

    # -- reading -------------------------------------------------------------------------------------------------

    def names(self, thetas: bool = False) -> Iterator[str]:
        """The names of all results, in no order: cells', or thetas'."""
        with self._explained():
            yield from reading.names(self.folder, thetas)

    def records(self) -> Iterator[Record]:
        """Every whole record, one at a time; damaged ones are passed over."""
        with self._explained():
            yield from reading.records(self.folder)

    def index(self) -> Iterator[dict[str, Any]]:
        """What a list of cells needs, for every whole record: key, problem, learner, engine, budget, seed, state,
        level. Derived by a scan, kept nowhere."""
        for name in self.names():
            with contextlib.suppress(ValueError):
                data = self.read(name)
                cell, row = data["cell"], data["row"]
                line = {key: cell[key] for key in ("problem", "learner", "engine", "budget", "seed")}
                yield {"key": name, **line, "state": row["status"]["state"], "level": row["level"]}

    def read(self, name: str) -> dict[str, Any]:
        """The record of this name as plain data, its digest checked. Raises ValueError where it is missing or not
        whole, or of another schema."""
        self._check_name(name)
        return reading.read(self.folder, name)

    def record(self, key: str) -> Record:
        """The record of a cell. Raises ValueError where it is missing or not whole."""
        return Record.from_plain(self.read(key))

    def draws(self, name: str) -> Posterior:
        """The draws beside a record, the digest in the record checked. Raises ValueError."""
        return reading.draws(self.folder, name, self.read(name)["draws"])

    def state(self, name: str) -> str:
        """How the run of this name ended, both files checked; '' where there is none. What is damaged is set aside."""
        if not self._path(name).is_dir():
            return ""
        try:
            data = self.read(name)
            if data["draws"]:
                reading.check_draws(self.folder, name, data["draws"])
            return str(data["row" if "row" in data else "theta"]["status"]["state"])
        except (ValueError, KeyError, TypeError):
            self.set_aside(name)
            return ""

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, name: str, record: Any, posterior: Posterior | None = None) -> None:
        """Put a record (a dataclass, or plain data, with a field `draws`) and its draws in place, both or neither;
        what stood there gives way. Raises `StoreError`, and leaves what was there as it was."""
        target, unfinished = self._path(name), self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        with self._explained():
            try:
                unfinished.mkdir()
                digest = ""
                if posterior is not None:
                    save(timeless(posterior), unfinished / DRAWS)
                    digest = reading.digest_of(unfinished / DRAWS)
                data = {**plain(record), "draws": digest, "schema": SCHEMA}
                body = (json.dumps(data, allow_nan=False)[1:] + "\n").encode()
                opening = f'{{"digest": "{hashlib.sha256(body).hexdigest()}",\n'.encode()
                with open(unfinished / RECORD, "xb") as file:
                    file.write(opening + body)
                    file.flush()
                    os.fsync(file.fileno())
                _sync(unfinished)
                self._exchange(unfinished, target)
                _sync(self.folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def set_aside(self, name: str) -> None:
        """Keep a damaged result under a name that nothing reads."""
        with self._explained():
            for number in range(1, 1000):
                away = self.folder / (f"{name}.damaged" + (f".{number}" if number > 1 else ""))
                if not away.exists():
                    with contextlib.suppress(FileNotFoundError):  # another process was quicker
                        os.rename(self._path(name), away)
                    return

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process is the one that works on `name`; what a dead one has left of it is cleared away."""
        if fcntl is None:
            yield True
            return
        path = self.folder / ".claims" / name
        with self._explained():
            self._path(name)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # this file system has no locks: the rename alone has to do
                yield True
                return
            for remains in self.folder.glob(f".{name}.*.tmp"):
                shutil.rmtree(remains, ignore_errors=True)
            yield True
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        self._check_name(name)
        return self.folder / name

    def _check_name(self, name: str) -> None:
        try:
            reading.checked(name)
        except ValueError as error:
            raise StoreError(str(error)) from error

    def _exchange(self, new: Path, target: Path) -> None:
        """Rename `new` to `target`; what is there is moved away first, and deleted."""
        old = self.folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if not target.is_dir():  # else another process was quicker, with the same result
                raise
        shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.folder}: {error.strerror or error}.") from error


def timeless(posterior: Posterior) -> Posterior:
    """Without what differs from run to run, seconds and bytes, so that equal answers are equal files; the record has
    these."""
    cost = posterior.cost
    counts = (cost.evaluations, cost.gradients, cost.tuning_evaluations, cost.tuning_gradients)
    return replace(posterior, cost=Cost(*counts, backend=cost.backend))


def _sync(folder: Path) -> None:
    """The names in a folder, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

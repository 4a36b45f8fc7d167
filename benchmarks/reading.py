"""Reading a folder of results, for the store and for the page: nothing is believed before its checksum, no link is
followed, nothing that was read is executed or used as a path.

    <folder>/<key>/record.json     its first line is the digest of all that follows it
    <folder>/<key>/draws.nc        the draws, where there are some; the record holds their digest
    <folder>/theta-<key>/          what a learner found, likewise
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyrometer.inference.posterior import Posterior
from pyrometer.inference.storage import load

from .cell import Record

SCHEMA = 1
NAME = re.compile(r"(theta-)?[0-9a-f]{32}")
OPENING = re.compile(rb'\{"digest": "([0-9a-f]{64})",\n')
RECORD, DRAWS = "record.json", "draws.nc"
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError, OSError)  # what a damaged file can raise


def names(folder: Path, thetas: bool = False) -> Iterator[str]:
    """The names of all results, in no order: cells', or thetas'."""
    with os.scandir(folder) as entries:
        for entry in entries:
            wanted = NAME.fullmatch(entry.name) and entry.name.startswith("theta-") == thetas
            if wanted and entry.is_dir(follow_symlinks=False):
                yield entry.name


def records(
    folder: Path, unreadable: dict[str, str] | None = None, cleaned: Callable[[Any], Any] = lambda data: data
) -> Iterator[Record]:
    """Every whole record, one at a time, in the order of the keys, its plain data first `cleaned`. What cannot be read
    is put into `unreadable`, key -> reason, and is never a number."""
    for name in sorted(names(folder)):
        try:
            record = Record.from_plain(cleaned(read(folder, name)))
        except UNREADABLE as error:
            if unreadable is not None:
                unreadable[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        yield record


def read(folder: Path, name: str) -> dict[str, Any]:
    """The record of this name as plain data, its digest checked. Raises ValueError where it is missing or not whole, or
    of another schema."""
    where = f"{folder / checked(name) / RECORD}"
    try:  # plain text: the interpreter remembers the parts of a `Path`, and there may be many
        handle = os.open(os.path.join(folder, name, RECORD), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(handle, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise ValueError(f"{name}/{RECORD}: {error.strerror}") from error
    if not whole(content):
        raise ValueError(f"{where}: not a record, or cut or changed since it was written.")
    data = parse(content.decode())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{where}: of schema {data.get('schema')}; this version reads {SCHEMA}.")
    if data.get("key") != name:
        raise ValueError(f"{where}: the record of {str(data.get('key'))[:64]!r}, not of this folder.")
    del data["schema"], data["digest"]
    return data


def draws(folder: Path, name: str, digest: str) -> Posterior:
    """The draws beside a record that holds this digest of them. Raises ValueError where they are others, or none."""
    check_draws(folder, name, digest)
    return load(folder / name / DRAWS)


def check_draws(folder: Path, name: str, digest: str) -> None:
    path = folder / checked(name) / DRAWS
    if not digest or path.is_symlink() or not path.is_file():
        raise ValueError(f"no draws are kept in {name}.")
    if digest_of(path) != digest:
        raise ValueError(f"the draws are not those that were recorded, but cut or changed since: {name}.")


def whole(content: bytes) -> bool:
    """Whether a record is as it was written: its first line is the digest of all that follows."""
    found = OPENING.match(content)
    return found is not None and hashlib.sha256(content[found.end() :]).hexdigest().encode() == found.group(1)


def checked(name: str) -> str:
    """Raises ValueError for what is not the name of a result."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a result.")
    return name


def parse(text: str) -> Any:
    """Strict JSON: NaN and Infinity are none. Raises one of UNREADABLE."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

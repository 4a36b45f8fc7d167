"""From a folder of runs to records, one at a time, and from a record to its draws. Nothing here executes what it reads.

A cell lies in `<key>/record.json`, whose first line is the digest of all that follows, and its draws in
`<key>/draws.nc`. Only folders whose name is a key (hexadecimal) are looked into, links are not followed, and no name
that stands inside a record is ever used as a path.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyrometer.inference import Posterior

from ..cell import Record, typed
from ..store import DRAWS, RECORD, whole

KEY = re.compile(r"[0-9a-f]{8,64}")
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError, OSError)  # what a damaged file can raise
# Control characters, halves of pairs, and those that turn the direction of what follows: not text, and no XML.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def records(folder: Path, unreadable: dict[str, str] | None = None) -> Iterator[Record]:
    """Every record in the folder, in the order of the keys. What cannot be read is put into `unreadable`, key ->
    reason, and is never a number."""
    for place in sorted(folder.iterdir()):
        file = place / RECORD
        if not KEY.fullmatch(place.name) or place.is_symlink() or not file.is_file() or file.is_symlink():
            continue
        try:
            content = file.read_bytes()
            if not whole(content):
                raise ValueError("not a record, or cut or changed since it was written")
            record = typed(Record, parse(content.decode()))
            if record.key != place.name:
                raise ValueError(f"the record is of cell {record.key[:64]!r}")
        except UNREADABLE as error:
            if unreadable is not None:
                unreadable[place.name] = f"{type(error).__name__}: {error}"[:300]
            continue
        yield record


def draws_of(folder: Path, key: str, digest: str) -> Posterior:
    """The draws of the cell. Raises ValueError or OSError where there are none, or not the ones that were recorded."""
    file = folder / key / DRAWS
    if not KEY.fullmatch(key) or file.is_symlink() or not file.is_file():
        raise ValueError("no draws are kept")
    with open(file, "rb") as handle:
        if digest and hashlib.file_digest(handle, "sha256").hexdigest() != digest:
            raise ValueError("the draws are not those that were recorded")
    return Posterior.load(file)


def parse(text: str) -> Any:
    """Strict JSON, with what is no text in its strings replaced. Raises one of UNREADABLE."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return _as_text(json.loads(text, parse_constant=refuse))


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_TEXT.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list) else value

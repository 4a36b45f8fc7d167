"""From a folder of runs to records, one at a time, and from a record to its draws. Nothing here executes what it reads.

A cell lies in `<key>/record.json`, whose first line is the digest of all that follows, and its draws in
`<key>/draws.nc`. Only folders whose name is a key (hexadecimal) are looked into, links are not followed, and no name
that stands inside a record is ever used as a path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pyrometer.inference import Posterior

from ..cell import Record

OPENING = re.compile(rb'\{"digest": "([0-9a-f]{64})",\n')
KEY = re.compile(r"[0-9a-f]{8,64}")
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError, OSError)  # what a damaged file can raise
# Control characters, halves of pairs, and those that turn the direction of what follows: not text, and no XML.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def records(folder: Path, unreadable: dict[str, str] | None = None) -> Iterator[Record]:
    """Every record in the folder, in the order of the keys. What cannot be read is put into `unreadable`, key ->
    reason, and is never a number."""
    for place in sorted(folder.iterdir()):
        file = place / "record.json"
        if not KEY.fullmatch(place.name) or place.is_symlink() or not file.is_file() or file.is_symlink():
            continue
        try:
            content = file.read_bytes()
            opening = OPENING.match(content)
            if opening is None or hashlib.sha256(content[opening.end() :]).hexdigest().encode() != opening[1]:
                raise ValueError("not a record, or cut or changed since it was written")
            record = read_as(Record, parse(content.decode()))
            if record.key != place.name:
                raise ValueError(f"the record is of cell {record.key[:64]!r}")
        except UNREADABLE as error:
            if unreadable is not None:
                unreadable[place.name] = f"{type(error).__name__}: {error}"[:300]
            continue
        yield record


def draws_of(folder: Path, key: str, digest: str) -> Posterior:
    """The draws of the cell. Raises ValueError or OSError where there are none, or not the ones that were recorded."""
    file = folder / key / "draws.nc"
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


def read_as(hint: Any, value: Any) -> Any:
    """`value`, plain data as `facts.plain` writes them, as the type of this annotation: dataclasses by their fields,
    'inf', '-inf' and 'nan' as numbers where a number is due. Fields that are not known are left out.

    Raises ValueError or TypeError where the data are of another form.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return read_as(next(option for option in inside if option is not type(None)), value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"expected the fields of {hint.__name__}, got {type(value).__name__}")
        hints = _fields(hint)
        return hint(**{name: read_as(hints[name], item) for name, item in value.items() if name in hints})
    if origin is tuple:
        items = _of(list, value)
        of_items = inside if Ellipsis not in inside else [inside[0]] * len(items)
        return tuple(read_as(of, item) for of, item in zip(of_items, items, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {str(name): read_as(inside[1], item) for name, item in _of(dict, value).items()}
    if hint is float:
        return float(value if isinstance(value, str) else _of((int, float), value))
    return value if hint is Any else _of(hint, value)


@cache
def _fields(of: type) -> dict[str, Any]:
    """The fields of a dataclass with their types, looked up once."""
    hints = typing.get_type_hints(of)
    return {field.name: hints[field.name] for field in dataclasses.fields(of) if field.init}


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, Any)):
        raise ValueError(f"expected {getattr(kind, '__name__', 'a number')}, got {type(value).__name__}")
    return value

"""Posteriors on disk: one netCDF file each, whole or not at all, checked before a byte of it is believed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from .diagnostics import Diagnostics
from .posterior import Cost, Evidence, Posterior, Status

SCHEMA = 1
SEAL = b"pyrometer posterior sha256:"  # with the digest of all that stands before it: the last bytes of a file
DIGEST_SIZE = hashlib.sha256().digest_size
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


def save(posterior: Posterior, path: Path) -> Path:
    """Write a posterior, without its problem, to one netCDF file and return the path.

    Tensors stand in groups (draws, log_weights, sample_stats, parameters, state, evidence, figures); all else is
    JSON in the root attribute `pyrometer`. Engine options that JSON cannot hold are kept as their repr. The file
    appears whole or not at all: it is written under another name in the same folder, synced, then renamed. It
    ends with a SHA-256 digest of its content, behind the end of the HDF5 data, where other readers do not look.

    Raises ValueError for a tensor of a type netCDF has not, OSError where the folder cannot be written.
    """
    import h5netcdf

    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first.")
    header, arrays = _pack(posterior)
    content = io.BytesIO()  # HDF5 itself crashes on a disk that fills up
    with h5netcdf.File(content, "w") as file:
        file.attrs["pyrometer"] = to_json(header)
        for group_name, tensors in arrays.items():
            group = file.create_group(group_name)
            for name, tensor in tensors.items():
                _write(group, _label(name), tensor)
    with whole(path) as handle:
        handle.write(content.getbuffer())
        handle.write(SEAL + hashlib.sha256(content.getbuffer()).digest())
    return path


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole or not at all: it is written under another name in the same folder, synced,
    then renamed. A device or a pipe, as /dev/stdout is, is written to as it stands. Raises OSError."""
    stream = path.exists() and not path.is_file()
    if stream or path.absolute().parent in (Path("/dev"), Path("/dev/fd")):  # a rename would put a file in its place
        with open(path, "ab") as file:
            yield file
        return
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path) -> Posterior:
    """Read what `save` wrote; the problem is not in the file, so it is None.

    The digest is checked before anything is parsed. Raises ValueError, naming the file, where the file is cut,
    changed, foreign or of another schema; FileNotFoundError where there is none.
    """
    import h5netcdf

    end = os.path.getsize(path) - len(SEAL) - DIGEST_SIZE
    with open(path, "rb") as handle:
        digest = _digest(handle, end) if end > 0 else b""
        if handle.read() != SEAL + digest:
            raise ValueError(f"{path}: not a saved posterior, or cut or changed since it was saved.")
    with h5netcdf.File(path, "r") as file:
        header = json.loads(file.attrs["pyrometer"], object_hook=_from_plain)
        if header["schema"] != SCHEMA:
            raise ValueError(
                f"{path}: written with schema {header['schema']} by pyrometer {header['versions']['pyrometer']}; "
                f"this version reads schema {SCHEMA}."
            )
        arrays = {
            group: {name: _read(file[group][_label(name)], dtype) for name, dtype in dtypes.items()}
            for group, dtypes in header["arrays"].items()
        }
    return _unpack(header, arrays)


def _pack(posterior: Posterior) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A posterior as a header for JSON and named tensors in groups."""
    evidence = posterior.log_evidence
    kinds: list[str] = []
    tensors: dict[str, Tensor] = {}
    while evidence is not None:
        tensors |= {f"value_{len(kinds)}": evidence.value, f"std_error_{len(kinds)}": evidence.std_error}
        kinds.append(evidence.kind)
        evidence = evidence.refined
    figures = posterior.diagnostics.figures
    arrays = {
        "draws": dict(posterior.draws),
        "log_weights": {} if posterior.log_weights is None else {"log_weights": posterior.log_weights},
        "sample_stats": dict(posterior.sample_stats),
        "parameters": dict(posterior.parameters),
        "state": dict(posterior.state),
        "evidence": tensors,
        "figures": {name: value for name, value in figures.items() if isinstance(value, Tensor)},
    }
    for group, named in arrays.items():
        for name, tensor in named.items():
            if _dtype(tensor) not in DTYPES:
                raise ValueError(
                    f"{group} {name!r} has dtype {tensor.dtype}, which netCDF cannot hold; "
                    f"convert it to one of {', '.join(DTYPES)}."
                )
    header = {
        "schema": SCHEMA,
        "versions": {name: version(name) for name in ("pyrometer", "torch", "pyro-ppl", "arviz")},
        "arrays": {group: {name: _dtype(tensor) for name, tensor in named.items()} for group, named in arrays.items()},
        "evidence_kinds": kinds,
        "diagnostics": {
            "figures": {name: value for name, value in figures.items() if not isinstance(value, Tensor)},
            "level": posterior.diagnostics.level,
            "verdict": posterior.diagnostics.verdict,
            "notes": posterior.diagnostics.notes,
        },
        "figure_order": list(figures),
        "cost": asdict(posterior.cost),
        "status": asdict(posterior.status),
        "kind": posterior.kind,
        "batch_shape": posterior.batch_shape,
        "engine": posterior.engine,
        "engine_options": posterior.engine_options,
        "seed": posterior.seed,
    }
    return header, arrays


def _unpack(header: dict[str, Any], arrays: dict[str, dict[str, Tensor]]) -> Posterior:
    """The inverse of `_pack`."""
    evidence = None
    for i, kind in reversed(list(enumerate(header["evidence_kinds"]))):
        named = arrays["evidence"]
        evidence = Evidence(named[f"value_{i}"], named[f"std_error_{i}"], kind, evidence)
    diagnostics = header["diagnostics"]
    figures = diagnostics["figures"] | arrays["figures"]
    return Posterior(
        draws=arrays["draws"],
        log_weights=arrays["log_weights"].get("log_weights"),
        log_evidence=evidence,
        parameters=arrays["parameters"],
        diagnostics=Diagnostics(
            figures={name: figures[name] for name in header["figure_order"]},
            level=diagnostics["level"],
            verdict=diagnostics["verdict"],
            notes=tuple(diagnostics["notes"]),
        ),
        cost=Cost(**header["cost"]),
        status=Status(**header["status"]),
        state=arrays["state"],
        kind=header["kind"],
        sample_stats=arrays["sample_stats"],
        batch_shape=tuple(header["batch_shape"]),
        engine=header["engine"],
        engine_options=header["engine_options"],
        seed=header["seed"],
    )


def _write(group: Any, label: str, tensor: Tensor) -> None:
    """One tensor as a netCDF variable with dimensions of its own; bool as int8, since netCDF has no bool."""
    array = tensor.detach().cpu().numpy()
    if array.dtype == np.bool_:
        array = array.astype(np.int8)
    dims = tuple(f"{label}:{i}" for i in range(array.ndim))  # no label holds a colon: no clash with a variable
    for dim, size in zip(dims, array.shape, strict=True):
        group.dimensions[dim] = size
    group.create_variable(label, dims, array.dtype, data=array)


def _read(variable: Any, dtype: str) -> Tensor:
    return torch.from_numpy(np.array(variable[...])).to(getattr(torch, dtype))


def _label(name: str) -> str:
    """A name that HDF5 takes, one to one: odd characters as %XX; '.', '..' and '' mean folders there, so marked."""
    label = quote(name, safe="")
    return label if label.strip(".") else f"%{label}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(handle: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first `length` bytes; the handle is left behind them."""
    digest = hashlib.sha256()
    while length > 0 and (chunk := handle.read(min(length, 1 << 20))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.digest()


def to_json(value: Any) -> str:
    return json.dumps(_to_plain(value), allow_nan=False)


def _to_plain(value: Any) -> Any:
    """What strict JSON can hold: nan and infinities marked, tuples as lists, objects as their repr."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _from_plain(value: dict[str, Any]) -> Any:
    """The inverse of `_to_plain` for floats, as a hook of `json.loads`."""
    return float(value["$float"]) if value.keys() == {"$float"} else value

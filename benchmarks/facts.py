"""Facts that belong beside a number: what was run, with which versions, on which machine; as plain values."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrometer.inference import Problem

PACKAGES = ("pyrometer", "torch", "pyro-ppl", "nutpie", "arviz", "numpy", "scikit-learn")


def describe(problem: Problem) -> dict[str, Any]:
    """The name of a problem and the shapes of its data."""
    shapes = lambda args: [list(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]  # noqa: E731
    return {
        "name": problem.name,
        "data": shapes(problem.args),
        "held_out": shapes(problem.held_out or ()),
        "guide": problem.guide is not None,
    }


def versions() -> dict[str, str]:
    """package -> installed version, for those that the numbers depend on."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def plain(value: Any) -> Any:
    """`value` as dicts, lists, strings, whole and finite numbers, so that any reader of strict JSON can have it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return plain(value.tolist()) if value.numel() <= 16 else f"tensor of shape {tuple(value.shape)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    # Never repr: it may hold an address, and labels (so seeds) must be the same in every process.
    return getattr(value, "__qualname__", type(value).__qualname__)

"""Checks that the families share: a setting is used as given, or refused with its name and what would do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pyrometer.inference.problem import ProblemError


def count(setting: str, value: Any, least: int = 1) -> int:
    """`value`, an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ProblemError(f"{setting}={value!r}: expected an integer of at least {least}.")
    return int(value)


def number(setting: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """`value`, a finite number with least <= value and above < value."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ProblemError(f"{setting}={value!r}: expected a finite number.")
    if value < least or value <= above:
        bound = f"above {above:g}" if value <= above else f"of at least {least:g}"
        raise ProblemError(f"{setting}={value!r}: expected a number {bound}.")
    return float(value)


def choice(setting: str, value: Any, options: Sequence[str]) -> str:
    """`value`, one of `options`."""
    if value not in options:
        near = difflib.get_close_matches(str(value), options, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(options)}."
        raise ProblemError(f"{setting}={value!r}: {hint}")
    return str(value)


def data_matrix(setting: str, value: Any) -> Tensor:
    """`value`, a tensor (N, D) of finite floating-point numbers, N >= 1."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ProblemError(f"{setting}: expected a floating-point tensor (N, D), got {kind}.")
    if value.dim() != 2 or value.numel() == 0:
        raise ProblemError(f"{setting}: expected shape (N, D) with data in it, got {tuple(value.shape)}.")
    if not bool(torch.isfinite(value).all()):
        raise ProblemError(f"{setting}: row {int((~torch.isfinite(value)).any(1).nonzero()[0])} is not finite.")
    return value


def seed(setting: str, value: Any) -> int:
    """`value`, an integer with 0 <= value < 2^63."""
    if count(setting, value, 0) >= 2**63:
        raise ProblemError(f"{setting}={value!r}: expected an integer below 2^63.")
    return int(value)


def generator(setting: str, value: Any) -> torch.Generator:
    """A random generator started from the seed `value`, so that the global one is left alone."""
    return torch.Generator().manual_seed(seed(setting, value))

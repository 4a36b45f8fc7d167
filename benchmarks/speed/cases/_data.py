"""Data that float32 holds exactly, so that tools of either precision see the same."""

from __future__ import annotations

from typing import Any

import numpy as np


def exact(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays, real ones rounded to float32 and kept as float64."""
    return {
        name: value.astype(np.float32).astype(np.float64) if value.dtype.kind == "f" else value
        for name, value in arrays.items()
    }


def tensors(data: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """The same for a Pyro program, in its order and in torch's own dtypes: float32 and int64."""
    import torch

    return tuple(torch.from_numpy(v.astype(np.float32) if v.dtype.kind == "f" else v) for v in data.values())

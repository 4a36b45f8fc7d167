"""Shapes that are numbers.

`torch.broadcast_shapes`, which torch's own distributions call when they are made, asks of every size whether it is a
symbol, and for that imports torch's symbolic shapes, and sympy with them: 0.2 s of every new process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch

_torchs = torch.broadcast_shapes


def broadcast_shapes(*shapes: Any) -> torch.Size:
    """`torch.broadcast_shapes`, with its answers and its errors."""
    try:
        return torch.Size(np.broadcast_shapes(*shapes))
    except (TypeError, ValueError):
        return _torchs(*shapes)


def shapes_without_symbols() -> AbstractContextManager[Any]:
    """Inside, whoever asks torch for a common shape is answered in numbers."""
    return mock.patch.object(torch, "broadcast_shapes", broadcast_shapes)

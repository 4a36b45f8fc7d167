"""Numbers, compared."""

from __future__ import annotations

import numpy as np
import torch


def assert_close(actual, expected, tolerance=1e-8):
    """|actual - expected| <= tolerance (1 + |expected|), all finite, shapes equal."""
    actual, expected = (
        np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, dtype=float) for v in (actual, expected)
    )
    assert actual.shape == expected.shape
    assert np.all(np.isfinite(actual))
    assert np.all(np.abs(actual - expected) <= tolerance * (1 + np.abs(expected)))


def tensors(**arrays):
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in arrays.items()}

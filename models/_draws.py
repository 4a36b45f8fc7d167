"""Draws of a reference: independent, of a seed of their own, made when they are first looked at."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBER = 2000  # draws of each datum


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal draws (NUMBER, *shape), always the same."""
    return torch.randn((NUMBER, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_grid(weights: Tensor, seed: int = 0) -> Tensor:
    """Indices (NUMBER, *batch) into a grid, drawn by its weights (*batch, G), which need not be normalised."""
    generator = torch.Generator().manual_seed(seed)
    cumulative = weights.double().cumsum(-1)
    uniform = torch.rand((*weights.shape[:-1], NUMBER), generator=generator, dtype=torch.float64)
    at = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    return at.clamp_max(weights.shape[-1] - 1).movedim(-1, 0)


def within_cells(points: Tensor, step: float) -> Tensor:
    """Grid points moved within their cells, so that no two are the same: the density is linear between points, which
    moves them by the sum of two uniforms of half a step each, less one step."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand((2, *points.shape), generator=generator, dtype=torch.float64)
    return points + step * (uniform.sum(0) - 1)

"""Random numbers by counting: each lane has a key of its own, so that its numbers depend on no other lane.

    bits(key, n) = mix(key + n * golden)

Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195 (SplitMix64): the n-th number is had without those before it, so
a lane may start late, run long or stand beside others, and still meets the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def keys(seed: int, lanes: int, device: torch.device | None = None) -> Tensor:
    """One key for each lane, (lanes,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (lanes,), generator=generator).to(device)


def uniforms(key: Tensor, counter: Tensor, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers `counter` to `counter + count - 1` of each lane's stream, in (0, 1): (W,), (W,) -> (W, count)."""
    place = counter[:, None] + torch.arange(count, device=key.device)
    bits = _mixed(key[:, None] + place * GOLDEN)
    # the upper 53 bits, in the middle of their cell, so that neither 0 nor 1 is ever met
    digits = 53 if dtype == torch.float64 else 24
    return ((_shifted(bits, 64 - digits).to(dtype)) + 0.5) * 2.0**-digits


def normals(key: Tensor, counter: Tensor, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, (W, count), which take `normals_take(count)` numbers of each lane's stream.
    Box & Muller 1958, doi:10.1214/aoms/1177706645."""
    half = (count + 1) // 2
    u = uniforms(key, counter, 2 * half, dtype)
    radius = (-2 * u[:, :half].log()).sqrt()
    angle = 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def common(seed: int, count: int) -> list[float]:
    """Uniform numbers that belong to no lane, one for each transition of a run: what all its lanes have in common."""
    return uniforms(torch.tensor([seed]), torch.zeros(1, dtype=torch.int64), count)[0].tolist()


def normals_take(count: int) -> int:
    return (count + 1) // 2 * 2


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * MIX[0]
    z = (z ^ _shifted(z, 27)) * MIX[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """z >> places, filled with zeros (torch fills with the sign)."""
    return (z >> places) & ((1 << (64 - places)) - 1)

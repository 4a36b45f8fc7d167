"""The data that a program sees: all of them, the rows of a minibatch, or others in their place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Problem, ProblemError
from .program import Plate


class Minibatch(NamedTuple):
    """Rows (B,) of the data of a plate, and what its sites are scaled by: N/B where all data share the latents."""

    plate: Plate
    rows: Tensor
    scale: float


class Rows:
    """The arguments of a problem's model and guide, in one dtype and on one device.

    plate      the one that holds all observations, None without one: minibatches run over it
    batch_dim  how many plates the batch has; in 1 the data have latents of their own, and minibatches are not scaled
    """

    def __init__(
        self, problem: Problem, plate: Plate | None, batch_dim: int, dtype: torch.dtype, device: torch.device | None
    ) -> None:
        self.plate, self.batch_dim = plate, batch_dim
        self.args = tuple(converted(v, dtype, device) for v in problem.args)
        self.kwargs = {k: converted(v, dtype, device) for k, v in problem.kwargs.items()}
        self.minibatch: Minibatch | None = None
        self._whole = self.args, self.kwargs

    @contextmanager
    def minibatch_of(self, index: Tensor) -> Iterator[None]:
        """Inside, the program sees these rows. Raises `ProblemError` where the data arguments cannot be sliced."""
        plate = self.sliceable()
        before = self.args, self.kwargs, self.minibatch
        args, kwargs = self._whole
        self.args = tuple(v[index] if _is_data(v, plate.size) else v for v in args)
        self.kwargs = {k: v[index] if _is_data(v, plate.size) else v for k, v in kwargs.items()}
        self.minibatch = Minibatch(plate, index, 1.0 if self.batch_dim else plate.size / len(index))
        try:
            yield
        finally:
            self.args, self.kwargs, self.minibatch = before

    @contextmanager
    def substituted(self, data: Mapping[int | str, Tensor]) -> Iterator[None]:
        """Inside, the arguments at these positions or names are others."""
        args, kwargs = self.args, self.kwargs
        self.args = tuple(data.get(i, v) for i, v in enumerate(args))
        self.kwargs = {k: data.get(k, v) for k, v in kwargs.items()}
        try:
            yield
        finally:
            self.args, self.kwargs = args, kwargs

    @property
    def numbers(self) -> Tensor | None:
        """Which rows the program sees, (B,); None for all."""
        return None if self.minibatch is None else self.minibatch.rows

    @property
    def share(self) -> float:
        """The share of all data that the program sees now, B/N."""
        return 1.0 if self.minibatch is None else len(self.minibatch.rows) / self.minibatch.plate.size

    @property
    def scale(self) -> float:
        """What a sum over the data of a minibatch, each with a latent of its own, is multiplied by to stand for all:
        N/B; else 1."""
        if self.minibatch is None or not self.batch_dim:
            return 1.0
        return self.minibatch.plate.size / len(self.minibatch.rows)

    def sliceable(self) -> Plate:
        """The plate that minibatches run over. Raises `ProblemError` where no plate or no argument serves."""
        if self.plate is None:
            raise ProblemError(
                "minibatches need a plate that holds all observations (`with pyro.plate('data', len(x)):`); "
                "this model has none. Use batch_size=None."
            )
        if self.batch_dim > 1:
            raise ProblemError("minibatches over several batch plates are not defined; use batch_size=None.")
        args, kwargs = self._whole
        if not any(_is_data(v, self.plate.size) for v in (*args, *kwargs.values())):
            raise ProblemError(
                f"minibatches slice the data arguments, but no argument has plate {self.plate.name!r}'s size "
                f"{self.plate.size} as its first dimension; pass the data in args."
            )
        return self.plate


def data_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the first argument that holds floating-point numbers; without one, torch's default."""
    for value in (*problem.args, *problem.kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.dtype
    return torch.get_default_dtype()


def converted(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    """A tensor on the device, and in the dtype if it has floating-point numbers; all else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _is_data(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size

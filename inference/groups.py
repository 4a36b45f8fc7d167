"""Particles of many data, moved together in groups of data by one kernel that was compiled for all groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .density import Density
from .kernels.metropolis import HMC, Kernel, Path, Point, RandomWalk, Transition, langevin
from .kernels.nuts import NUTS
from .lanes import Lanes, Parts
from .problem import ProblemError

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
BLOCK = 4096  # lanes that are moved together, at least one datum's
QUARTER_TURN = math.pi / 2  # longest trajectories, in units of a normal target's sd: they forget where they began
KERNELS: dict[str, Kernel] = {
    "hmc": HMC(num_steps=3),
    "langevin": langevin(),
    "random_walk": RandomWalk(),
    "nuts": NUTS(),
}


def as_kernel(owner: Any, value: Any, kernels: Mapping[str, Kernel] = KERNELS) -> Kernel:
    """A kernel from its name or itself. Raises `ProblemError`."""
    if isinstance(value, str) and value in kernels:
        return kernels[value]
    if isinstance(value, str | type) or not hasattr(value, "bind"):
        raise ProblemError(
            f"{type(owner).__name__}(kernel={value!r}): expected one of {', '.join(kernels)}, or a kernel such as "
            "HMC(num_steps=10) of pyrometer.inference.kernels.metropolis."
        )
    return value


class Bound:
    """Lanes of S particles for each datum, and a kernel that is bound to them; data pass through in groups."""

    def __init__(self, density: Density, count: int, parts: Parts, kernel: Kernel, path: Path, u: Tensor) -> None:
        total = max(1, density.batch_shape.numel())
        self.count, self.kernel, self.path = count, kernel, path
        self.lanes = Lanes(density, count, parts, count * min(total, max(1, BLOCK // count)))
        self.data = total if self.lanes.whole else self.lanes.width // count
        self.begun: Point | None = None
        example = self.point(u.reshape(-1, u.shape[-1])[next(self.groups())[1].to(u.device)])
        self.transition: Transition = kernel.bind(self.lanes, path, example)
        self.begun = example  # where the first group is about to stand

    @classmethod
    def of(cls, density: Density, count: int, parts: Parts, kernel: Kernel, path: Path, u: Tensor) -> Bound:
        """The one of this density, compiled once, on the rows that it sees now: an E-step is run many times."""
        whole = density.row_numbers is None
        key = ("path", count, parts, id(kernel), path, whole, tuple(density.batch_shape))
        if key not in density.kept:
            density.kept[key] = cls(density, count, parts, kernel, path, u)
        density.kept[key].lanes.renew()
        return density.kept[key]

    def groups(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Numbers of the data (G,), of their lanes (S G,), and how many of the data count: the last group is filled up
        with data that do not."""
        total = self.lanes.data
        for first in range(0, total, self.data):
            data = torch.arange(first, first + self.data) % total
            ids = (torch.arange(self.count)[:, None] * total + data).reshape(-1)
            self.lanes.place(ids)
            yield data, ids, min(self.data, total - first)

    def through(
        self, u: Tensor, move: Callable[[Tensor, Tensor, Point], tuple[Point, T]], report: Progress
    ) -> tuple[Tensor, list[tuple[Tensor, T]]]:
        """Move all lanes from u (total, D), group by group: where they end, and what is told of each group, with the
        numbers of its data (g,). `move`: numbers of data and lanes, the lanes -> the lanes moved, what is told."""
        ended, told, done = torch.empty_like(u), [], 0
        for data, ids, count in self.groups():
            at = ids.to(u.device)
            point, tells = move(data.to(u.device), at, self.point(u[at]))
            kept = at.reshape(-1, self.data)[:, :count].reshape(-1)
            ended[kept] = point.u.reshape(self.count, self.data, -1)[:, :count].reshape(-1, u.shape[1])
            told.append((data[:count], tells))
            done += count
            report("data", done, self.lanes.data)
        return ended, told

    def lane(self, of_datum: Tensor) -> Tensor:
        """What a group's data have (G, ...), for each of their lanes, (S G, ...)."""
        S, G = self.count, self.data
        return of_datum.expand(S, *of_datum.shape).reshape(S * G, *of_datum.shape[1:])

    def point(self, u: Tensor) -> Point:
        """The lanes that stand there, at u (W, D)."""
        begun, self.begun = self.begun, None
        if begun is not None and torch.equal(begun.u, u):
            return begun
        with self.lanes.density.uncounted():
            values, gradients = self.lanes.evaluate(u, self.kernel.gradient)
        self.lanes.count(1, self.kernel.gradient)
        return Point(u, values, gradients)

    @property
    def longest(self) -> float:
        """The largest step size that makes sense."""
        return QUARTER_TURN / self.kernel.num_steps if isinstance(self.kernel, HMC) else math.inf

    def first_step(self, dim: int) -> float:
        return 2.4 / math.sqrt(dim) if not self.kernel.gradient else min(self.longest, 1.0 / dim**0.25)

"""The compiled functions of one density: each made once for a shape, with the parameters read where they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compile import Compiled, Function, check_backend, compiled


class Compilations:
    """Compiles for one density, and keeps what it made.

    parameters  tensors that every function reads and that move between calls: theta and phi
    wanted      'auto', or one of `compile.BACKENDS`
    backend     the one that served last
    seconds     what all compiling took
    Raises `ProblemError` where there is no such back end.
    """

    def __init__(self, parameters: list[Tensor], wanted: str) -> None:
        check_backend(wanted)
        self.parameters, self.wanted = parameters, wanted
        self.backend, self.seconds = "eager", 0.0
        self.made: dict[Any, tuple[Compiled, Tensor | None]] = {}

    def compile(
        self, function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor], native: bool = True
    ) -> Compiled:
        """The function, by the fastest back end that agrees with it at the examples; `moving` are more tensors that it
        reads and that move. `native=False`: machine code would not pay for itself."""
        tensors = list({id(t): t for t in [*moving, *self.parameters]}.values())
        backend = "graph" if self.wanted == "auto" and not native else self.wanted
        made = compiled(function, examples, tensors, backend=backend)
        self.backend = made.backend
        self.seconds += made.seconds
        return made

    def at(
        self, function: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]], u: Tensor, rows: Tensor | None
    ) -> Compiled:
        """The function of u, at the shape of u and for so many rows of the data (B,); None: for all."""
        key = (tuple(u.shape), None if rows is None else len(rows))
        if key not in self.made:
            index = None if rows is None else rows.clone()  # read where it lives, so that other rows can follow
            with torch.no_grad():
                examples: list[tuple[Tensor, ...]] = [(u.clone(),), (u + 0.1 * torch.randn_like(u),)]
            made = self.compile(lambda v: function(v, index), examples, [] if index is None else [index])
            self.made[key] = made, index
        made, index = self.made[key]
        if index is not None and rows is not None:
            index.copy_(rows)
        self.backend = made.backend
        return made

"""Exact posterior and evidence of discrete latents, by listing every value.

    p(z = k | x) = p(x, z = k) / sum_j p(x, z = j)

per batch element; the listed values are the draws, and log p(x, z) their weights.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, Run, as_chain
from ..posterior import Evidence
from ..settings import settings


@settings
class Enumeration:
    """List all values of the discrete latents of a datum: exact, linear in the data, exponential in their number.

    max_values  refuse to list more values than this for one batch element
    """

    name: ClassVar[str] = "enumeration"
    exact: ClassVar[bool] = True
    max_values: int = 2**20

    def supports(self, density: Density) -> str:
        if density.continuous:
            return f"site {density.continuous[0]!r} is continuous; enumeration lists discrete values only"
        if density.unlisted:
            return f"site {density.unlisted[0]!r} cannot be listed: its support is infinite or differs between elements"
        values = sum(math.log(k) * m for k, m in factors(density))
        if values > math.log(self.max_values) + 1e-9:
            return (
                f"{math.exp(min(values, 700.0)):.3g} joint values for one datum are more than "
                f"max_values = {self.max_values}"
            )
        return ""

    def sized(self, calls: float, density: Density) -> Self:
        return self  # as many evaluations as there are values

    def run(self, density: Density, run: Run) -> Draws:
        values = every_value(density)
        log_joint = density.log_joint(values).double()
        evidence = torch.logsumexp(log_joint, 0) - density.log_idle().to(log_joint)
        return Draws(
            as_chain(values),
            "weighted",
            log_weights=log_joint[None],
            log_evidence=Evidence(evidence.cpu(), torch.zeros(()), "exact"),
            deterministic=True,
        )


def every_value(density: Density) -> dict[str, Tensor]:
    """Each site of discrete latents at every joint value of one datum, (K, *batch, *event)."""
    radices = [k for k, m in factors(density) for _ in range(m)]
    count = math.prod(radices)
    digits, index = [], torch.arange(count)
    for radix in reversed(radices):
        digits.append(index % radix)
        index = index // radix
    digits.reverse()
    values, batch = dict[str, Tensor](), tuple(density.batch_shape)
    for name, site in density.latents.items():
        support = site.values(density.dtype)
        shape, m = site.inner_shape, math.prod(site.inner_shape)
        chosen, digits = digits[:m], digits[m:]
        table = torch.stack([support[d.to(support.device)] for d in chosen], 1)  # (K, m, *event)
        table = table.reshape((count, *shape, *table.shape[2:]))
        ones = (1,) * len(batch)
        values[name] = table.reshape((count, *ones, *table.shape[1:])).expand((count, *batch, *table.shape[1:]))
    return values


def factors(density: Density) -> list[tuple[int, int]]:
    """(values of one element, number of elements in a datum) of each discrete site."""
    sites = density.latents.values()
    return [(len(s.support), math.prod(s.inner_shape)) for s in sites if s.support is not None]

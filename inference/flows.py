"""Normalising flows as guides, by zuko.

    z = centre + spread (loc + scale f(e)),   e ~ N(0, I),   log q(z) = log N(e; 0, I) - log |det dz/de|

f is an autoregressive flow run from noise to values, so that draws and their densities cost one pass (Kingma et al.
2016, arXiv:1606.04934). Where each datum has its own latents the flow is one for all data, shifted and bent for each by
its own `loc`, `scale` and a learned vector that the networks read. Kinds: masked affine (Papamakarios et al. 2017,
arXiv:1705.07057) and rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .density import Density
from .problem import ProblemError
from .settings import check_choice, settings

KINDS = ("nsf", "maf")


@settings
class Flow:
    """A flow to be fitted: `SVI(guide=Flow(kind="maf"))`; `SVI(guide="flow")` for the defaults.

    kind        'nsf', splines, which can split one mode into two; 'maf', affine
    transforms  how many follow one another
    width       of both hidden layers of each network
    embedding   length of the vector that each datum learns; not used where all data share their latents
    """

    name: ClassVar[str] = "flow"
    kind: str = "nsf"
    transforms: int = 3
    width: int = 32
    embedding: int = 4

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)

    def __str__(self) -> str:
        return f"Flow(kind={self.kind!r})"


def require_zuko() -> None:
    if importlib.util.find_spec("zuko") is None:
        raise ProblemError("flow guides need zuko, which is not installed: pip install 'pyrometer[flows]'.")


class FlowGuide:
    """A flow over u (*batch, D), in coordinates standardised by the prior."""

    point = False

    def __init__(self, density: Density, flow: Flow, centre: Tensor, spread: Tensor) -> None:
        require_zuko()
        zuko = importlib.import_module("zuko")
        self.density, self.flow, self.centre, self.spread = density, flow, centre, spread
        self.scored: list[str] = []
        batch = tuple(density.batch_shape)
        make = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}[flow.kind]
        context = flow.embedding if batch else 0
        self.net = make(density.dim, context=context, transforms=flow.transforms, hidden_features=(flow.width,) * 2)
        self.net.to(dtype=density.dtype, device=centre.device)
        one = torch.full_like(centre, math.log(math.expm1(1.0)))
        self._own = {"loc": torch.zeros_like(centre), "scale": one}
        if batch:
            self._own["embedding"] = 0.1 * torch.randn((*batch, context), dtype=centre.dtype, device=centre.device)
        for tensor in self._own.values():
            tensor.requires_grad_(True)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._own.values(), *self.net.parameters()]

    def _named(self) -> dict[str, Tensor]:
        fixed = {"centre": self.centre, "spread": self.spread}
        return {**self._own, **{f"net.{n}": p for n, p in self.net.named_parameters()}, **fixed}

    def state(self) -> dict[str, Tensor]:
        return {f"guide.{n}": t.detach().cpu().clone() for n, t in self._named().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._named().items():
                kept = state.get(f"guide.{name}")
                if kept is None or kept.shape != tensor.shape:
                    raise ProblemError(f"the warm start does not fit {self.flow} on this problem (at {name!r}).")
                tensor.copy_(kept)

    def _affine(self) -> tuple[Tensor, Tensor]:
        loc, scale = (self.density.rows(self._own[name]) for name in ("loc", "scale"))
        centre, spread = self.density.rows(self.centre), self.density.rows(self.spread)
        return centre + spread * loc, spread * softplus(scale)

    def _transform(self) -> Any:
        own = self._own.get("embedding")
        return self.net.transform(None if own is None else self.density.rows(own))

    def draw(self, count: int) -> tuple[Tensor, Tensor, None]:
        shift, scale = self._affine()
        noise = torch.randn((count, *shift.shape), dtype=shift.dtype, device=shift.device)
        value, log_slope = self._transform().call_and_ladj(noise)
        return shift + scale * value, _log_normal(noise) - log_slope - scale.log().sum(-1), None

    def log_prob(self, z: Tensor) -> Tensor:
        """Needs the inverse, which takes one pass for each dimension."""
        shift, scale = self._affine()
        noise, log_slope = self._transform().inv.call_and_ladj((z - shift) / scale)
        return _log_normal(noise) + log_slope - scale.log().sum(-1)


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)

"""Approximating families q_phi(z): the problem's own guide, and automatic ones that factorise over the batch.

Pyro's autoguides join all data in one vector: AutoMultivariateNormal on N data of D latents has (N D)^2 numbers and
no density per datum. The families here carry the same names and mean the same on one datum, and give every batch
element its own: on a problem with global latents, batch (), they are Pyro's. They live in the unconstrained space,
in coordinates standardised by the prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal
from torch.nn.functional import softplus

from .density import Density, Values
from .flows import Flow, FlowGuide
from .problem import ProblemError

INIT_SCALE = 0.1  # Pyro's


class Guide(Protocol):
    """What an engine needs of a family: draws with their log density, its parameters and its state."""

    point: bool  # a point, not a distribution: no density, no evidence
    scored: list[str]  # sites whose draws have no reparameterised gradient

    @property
    def tensors(self) -> list[Tensor]: ...

    def draw(self, count: int) -> tuple[Tensor | Values, Tensor, Tensor | None]:
        """z (count, *batch, ...), log q(z) (count, *batch), and the part of log q that has no reparameterised
        gradient (None: all has). z is unconstrained (a tensor) or constrained (a mapping)."""

    def log_prob(self, z: Any) -> Tensor:
        """log q of given values, laid out as `draw` gives them, (count, *batch)."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


class PairedGuide:
    """The problem's own guide."""

    def __init__(self, density: Density) -> None:
        density.require_guide()
        self.density = density
        self.tensors = density.phi.tensors
        self.flaw = density.guide_flaw
        self.point = bool(density.guide_latents) and all(s.point for s in density.guide_latents.values())
        self.scored = [n for n, s in density.guide_latents.items() if s.discrete or not s.reparameterised]

    def draw(self, count: int) -> tuple[Values, Tensor, Tensor | None]:
        values, log_q, log_score = self.density.guide(count, auxiliary=True)
        return values, log_q, log_score if self.scored else None

    def log_prob(self, z: Values) -> Tensor:
        return self.density.log_guide(z)

    def state(self) -> dict[str, Tensor]:
        return self.density.phi.values()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.density.phi.set({n: v for n, v in state.items() if n in self.density.phi})


class AutoGuide:
    """A family with its own parameters for each batch element, over u (*batch, D)."""

    FAMILIES = ("AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoDelta")

    def __init__(self, density: Density, family: str) -> None:
        self.density = density
        self.family = family
        self.point = family == "AutoDelta"
        self.scored: list[str] = []
        batch, dim = tuple(density.batch_shape), density.dim
        self.centre, self.spread = _prior_location(density)
        options: dict[str, Any] = {"dtype": density.dtype, "device": self.centre.device}
        raw = math.log(math.expm1(INIT_SCALE))
        self._parameters = {"loc": torch.zeros(*batch, dim, **options)}
        if family in ("AutoNormal", "AutoMultivariateNormal"):
            self._parameters["scale"] = torch.full((*batch, dim), raw, **options)
        if family == "AutoMultivariateNormal":
            self._parameters["tril"] = torch.zeros(*batch, dim, dim, **options)
        if family == "AutoLowRankMultivariateNormal":
            rank = max(1, round(math.sqrt(dim)))  # Pyro's
            self._parameters["scale"] = torch.full((*batch, dim), raw, **options)
            start = torch.randn(*batch, dim, rank, **options) * (0.1 * INIT_SCALE)
            self._parameters["factor"] = start
        for tensor in self._parameters.values():
            tensor.requires_grad_(True)

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._parameters.values())

    def state(self) -> dict[str, Tensor]:
        return {
            f"guide.{n}": t.detach().cpu().clone()
            for n, t in {**self._parameters, "centre": self.centre, "spread": self.spread}.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in {**self._parameters, "centre": self.centre, "spread": self.spread}.items():
                kept = state.get(f"guide.{name}")
                if kept is None or kept.shape != tensor.shape:
                    raise ProblemError(f"the warm start does not fit {self.family} on this problem (at {name!r}).")
                tensor.copy_(kept)

    def stand(self, mean: Tensor, tril: Tensor) -> None:
        """Make an AutoMultivariateNormal N(mean, tril tril') of u: (*batch, D) and (*batch, D, D)."""
        scaled = tril / self.spread[..., None]
        scale = scaled.diagonal(dim1=-2, dim2=-1)
        values = {
            "loc": (mean - self.centre) / self.spread,
            "scale": torch.where(scale > 20, scale, scale.expm1().log()),  # what softplus maps to it
            "tril": (scaled / scale[..., None]).tril(-1),
        }
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        p = {n: self.density.rows(t) for n, t in self._parameters.items()}
        centre, spread = self.density.rows(self.centre), self.density.rows(self.spread)
        loc = p["loc"]
        log_volume = spread.log().sum(-1)
        if self.point:
            v, log_q = loc.expand(count, *loc.shape), torch.zeros((count, *loc.shape[:-1]), dtype=loc.dtype)
            return centre + spread * v, log_q.to(loc.device), None
        scale = softplus(p["scale"])
        noise = torch.randn((count, *loc.shape), dtype=loc.dtype, device=loc.device)
        if self.family == "AutoLowRankMultivariateNormal":
            normal = LowRankMultivariateNormal(loc, p["factor"], scale.square(), validate_args=False)
            v = normal.rsample((count,))
            return centre + spread * v, normal.log_prob(v) - log_volume, None
        v = scale * noise
        if self.family == "AutoMultivariateNormal":
            lower = torch.tril(p["tril"], -1)
            v = scale * (noise + (lower @ noise[..., None])[..., 0])
        log_q = (-0.5 * noise.square() - 0.5 * math.log(2 * math.pi)).sum(-1) - scale.log().sum(-1) - log_volume
        return centre + spread * (loc + v), log_q, None

    def log_prob(self, z: Tensor) -> Tensor:
        if self.point:
            raise ProblemError("AutoDelta is a point: it has no density.")
        p = {n: self.density.rows(t) for n, t in self._parameters.items()}
        centre, spread = self.density.rows(self.centre), self.density.rows(self.spread)
        log_volume = spread.log().sum(-1)
        v, scale = (z - centre) / spread - p["loc"], softplus(p["scale"])
        if self.family == "AutoLowRankMultivariateNormal":
            normal = LowRankMultivariateNormal(torch.zeros_like(v[0]), p["factor"], scale.square(), validate_args=False)
            return normal.log_prob(v) - log_volume
        noise = v / scale
        if self.family == "AutoMultivariateNormal":
            lower = torch.tril(p["tril"], -1)  # v = scale (noise + lower noise)
            noise = torch.linalg.solve_triangular(
                lower + torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device), noise[..., None],
                upper=False, unitriangular=True,
            )[..., 0]  # fmt: skip
        return (-0.5 * noise.square() - 0.5 * math.log(2 * math.pi)).sum(-1) - scale.log().sum(-1) - log_volume


def make_guide(density: Density, guide: str | Flow | None) -> Guide:
    """The family of this name, a flow, or the problem's own guide for None. Raises `ProblemError` where it cannot
    serve."""
    if guide is None:
        return PairedGuide(density)
    if not density.continuous:
        raise ProblemError(f"guide {str(guide)!r} needs continuous latents; this model has none.")
    if isinstance(guide, Flow):
        return FlowGuide(density, guide, *_prior_location(density))
    return AutoGuide(density, guide)


def _prior_location(density: Density) -> tuple[Tensor, Tensor]:
    """Median and standard deviation of the prior in the unconstrained space, (*batch, D) each."""
    shape = (*density.batch_shape, density.dim)
    centre = torch.zeros(shape, dtype=density.dtype, device=density.device)
    spread = torch.ones(shape, dtype=density.dtype, device=density.device)
    if density.improper:
        return centre, spread
    with torch.no_grad():
        u = density.unconstrain(density.prior(200).values)
    middle = u.median(0).values
    width = (u.quantile(0.84, 0) - u.quantile(0.16, 0)) / 2  # robust against heavy tails
    usable = middle.isfinite() & width.isfinite() & (width > 0)
    return torch.where(usable, middle, centre), torch.where(usable, width.clamp(1e-3, 1e3), spread)

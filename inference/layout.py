"""How the latents of one batch element lie in one flat unconstrained vector u, and in what shapes they come out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import biject_to

from .program import Plate, Site, is_fixed


@dataclass(frozen=True, eq=False)
class Layout:
    """The sites of a model and of its guide, by name, once it is known which plates are the batch's.

    u is the continuous latents, unconstrained, one after another in the order of the program: (*batch, D).
    """

    sites: dict[str, Site]
    guide_sites: dict[str, Site]
    batch_plates: list[Plate]  # left to right; none where a latent is shared by all data

    @classmethod
    def of(cls, sites: Mapping[str, Site], guide_sites: Mapping[str, Site], batch_plates: list[Plate]) -> Layout:
        """Every site that lies in all plates of the batch is told apart by datum."""
        dims = tuple(p.dim for p in batch_plates)
        inside = {n: replace(s, batch=dims) for n, s in sites.items() if all(p in s.plates for p in batch_plates)}
        guide = {n: replace(s, batch=dims) for n, s in guide_sites.items()}
        return cls({**sites, **inside}, guide, batch_plates)

    def only(self, names: Iterable[str]) -> Layout:
        """The layout of these sites alone, one after another."""
        return Layout({n: self.sites[n] for n in names}, {}, self.batch_plates)

    def leaving_out(self, padded: Collection[str]) -> Layout:
        """The same, where what these latents' masks leave out is padding."""
        sites = {n: replace(s, padded=n in padded) for n, s in self.sites.items()}
        return Layout(sites, self.guide_sites, self.batch_plates)

    @cached_property
    def latents(self) -> dict[str, Site]:
        return {n: s for n, s in self.sites.items() if s.role == "latent"}

    @cached_property
    def guide_latents(self) -> dict[str, Site]:
        return {n: s for n, s in self.guide_sites.items() if s.role == "latent"}

    @cached_property
    def discrete(self) -> list[str]:
        return [n for n, s in self.latents.items() if s.discrete]

    @cached_property
    def continuous(self) -> list[str]:
        return [n for n, s in self.latents.items() if not s.discrete]

    @cached_property
    def unlisted(self) -> list[str]:
        """Discrete latents whose support cannot be listed, so that they cannot be summed out."""
        return [n for n in self.discrete if self.latents[n].support is None]

    @cached_property
    def followers(self) -> list[str]:
        """`pyro.deterministic` sites that can be told per batch element."""
        return [
            name
            for name, site in self.sites.items()
            if site.role == "deterministic" and bool(site.batch) == bool(self.batch_plates)
        ]

    @cached_property
    def guide_flaw(self) -> str:
        """Why log q(z) of the guide's draws is no density of them, in words; '' where it is. A Delta's is one only
        where it maps auxiliary draws, as many as it has dimensions, and carries the log-Jacobian, as autoguides do."""
        points = [n for n, s in self.guide_latents.items() if s.point and n in self.continuous]
        auxiliary = [n for n, s in self.guide_latents.items() if n not in self.latents and not s.point]
        mapped = sum(math.prod(self.latents[n].unconstrained_shape) for n in points)
        drawn = sum(math.prod(self.guide_latents[n].shape) for n in auxiliary)
        if drawn < mapped:
            return f"the guide gives site {points[0]!r} a point, which has no density"
        if drawn > mapped:
            return f"the guide draws the auxiliary site {auxiliary[0]!r}, and log q is not summed over it"
        return ""

    @cached_property
    def guide_in_padding(self) -> str:
        """A site that the guide gives a density where the model has padding; '' where there is none."""
        both = [(n, self.latents[n], s) for n, s in self.guide_latents.items() if n in self.latents]
        return next((n for n, own, s in both if own.padded and not s.point and s.reaches_beyond(own)), "")

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers of u each continuous latent takes."""
        return [math.prod(self._inner(n)) for n in self.continuous]

    @property
    def dim(self) -> int:
        """D, the length of u."""
        return sum(self.sizes)

    @cached_property
    def numel(self) -> int:
        """How many numbers one run of the program makes, roughly: its values."""
        return sum(math.prod(s.shape) for s in self.sites.values()) + 1

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions plates take: the ones left of them are free for enumeration."""
        return max((-p.dim for s in self.sites.values() for p in s.plates), default=0)

    def _inner(self, name: str) -> tuple[int, ...]:
        """The shape of one batch element's part of u, as the site has it."""
        site = self.latents[name]
        return site.own_shape(site.unconstrained_shape, site.unconstrained_event_dim)[len(self.batch_plates) :]

    def given(self, z: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """u (*batch, D), or values site -> (*batch, *event), by site as Pyro lays it out."""
        if not isinstance(z, Tensor):
            return {n: self.latents[n].to_pyro(v, self.latents[n].event_dim) for n, v in z.items()}
        parts = torch.split(z, self.sizes, -1) if self.sizes else ()
        given = {}
        for name, part in zip(self.continuous, parts, strict=True):
            part = part.reshape((*part.shape[:-1], *self._inner(name)))
            given[name] = self.latents[name].to_pyro(part, self.latents[name].unconstrained_event_dim)
        return given

    def is_direct(self, names: Collection[str]) -> bool:
        """Whether these are latents whose values can be told of u without running the program."""
        return bool(names) and all(n in self.continuous and is_fixed(self.latents[n].domain) for n in names)

    def constrained(self, u: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """u (*sample, *batch, D) -> site -> (*sample, *batch, *event), of latents that are direct."""
        parts = dict(zip(self.continuous, torch.split(u, self.sizes, -1), strict=True))
        shaped = {n: parts[n].reshape((*u.shape[:-1], *self._inner(n))) for n in names}
        return {n: biject_to(self.latents[n].domain)(part) for n, part in shaped.items()}

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """All continuous latents in order, (*sample, *batch, *event), all direct -> u (*sample, *batch, D)."""
        parts = [biject_to(self.latents[n].domain).inv(value) for n, value in values.items()]
        inner = [len(self._inner(n)) for n in values]
        return torch.cat([p.reshape((*p.shape[: p.dim() - d], -1)) for p, d in zip(parts, inner, strict=True)], -1)

    def flat(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained values, site -> (*batch, *event), as u (*batch, D)."""
        batch_dim = len(self.batch_plates)
        return torch.cat([parts[n].reshape((*parts[n].shape[:batch_dim], -1)) for n in self.continuous], -1)

    def sample_shape(self, z: Tensor | Mapping[str, Tensor], sites: Mapping[str, Site]) -> torch.Size:
        """The dimensions that u (*sample, *batch, D), or values of these sites, have in front of their own."""
        if isinstance(z, Tensor):
            return z.shape[: z.dim() - len(self.batch_plates) - 1]
        name, first = next(iter(z.items()))
        own = sites[name].own_shape(sites[name].shape, sites[name].event_dim)
        return first.shape[: first.dim() - len(own)]

"""A problem's program at one draw: what a density says of many draws at once, said of one by one plain run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Layout
from .marginal import enumerated_trace, sum_out
from .problem import Problem, ProblemError
from .program import SOMETIMES, Reading, Scribe, Unobserved
from .rows import Rows

_VALUES = frozenset({"values"})
_DRAWN = frozenset({"drawn", "values"})


class PriorDraws(NamedTuple):
    """All latents drawn from the prior, (n, *batch, *event), and their log densities (n, *batch)."""

    values: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: Tensor


class GuideDraws(NamedTuple):
    """Sites drawn from the guide, (n, *batch, *event), with log q and its part without reparameterised gradient."""

    values: dict[str, Tensor]
    log_q: Tensor
    log_score: Tensor


class OneDraw:
    """Functions of one draw z: a flat u (*batch, D), or values site -> (*batch, *event). Figures are (*batch), in nats.

    Each is a run of the model or the guide, as plain as Pyro's own, on the rows of data that it sees now; nothing is
    batched, counted or lent here. vmap runs through all of them.
    """

    def __init__(self, problem: Problem, layout: Layout, rows: Rows) -> None:
        self.problem, self.layout, self.rows = problem, layout, rows

    @property
    def batch_shape(self) -> torch.Size:
        """The sizes of the batch plates; inside a minibatch, its number of rows."""
        if self.rows.minibatch is not None and self.layout.batch_plates:
            return torch.Size((len(self.rows.minibatch.rows),))
        return torch.Size(p.size for p in self.layout.batch_plates)

    def model(
        self, given: Mapping[str, Tensor], *, transformed: bool | Collection[str] = False,
        want: frozenset[str] = frozenset(), inside: AbstractContextManager[Any] | None = None,
    ) -> Scribe:  # fmt: skip
        """The model run at values as Pyro lays them out, and what was written down; `inside` holds a handler."""
        scribe = Scribe(self.layout.sites, given, transformed=transformed, minibatch=self.rows.minibatch, want=want)
        with scribe, inside or nullcontext():
            self.problem.model(*self.rows.args, **self.rows.kwargs)
        return scribe

    def guide(self, given: Mapping[str, Tensor], want: frozenset[str] = frozenset()) -> Reading:
        """What the guide tells, run at values as Pyro lays them out."""
        scribe = Scribe(self.layout.guide_sites, given, minibatch=self.rows.minibatch, want=want)
        with scribe:
            self.problem.guide(*self.rows.args, **self.rows.kwargs)  # type: ignore[misc]
        return scribe.reading

    def reading(self, z: Any, want: frozenset[str] = frozenset()) -> Reading:
        """What the model tells at z. Raises `ProblemError` where it lacks a site that its first run had."""
        scribe = self.model(self.layout.given(z), transformed=isinstance(z, Tensor), want=want)
        if len(scribe.seen) < len(self.layout.sites):
            raise ProblemError(SOMETIMES.format(next(n for n in self.layout.sites if n not in scribe.seen)))
        return scribe.reading

    # -- densities -----------------------------------------------------------------------------------------------

    def log_joint(self, z: Any, jacobian: bool = True) -> Tensor:
        if self._sums_out(z):
            total, log_jacobian = self._marginal(z)
        else:
            reading = self.reading(z)
            total, log_jacobian = reading.log_prior + reading.log_likelihood, reading.log_jacobian
        return self._filled(total + log_jacobian if jacobian else total)

    def log_prior(self, z: Any) -> Tensor:
        if self._sums_out(z):
            return self._filled(sum(self._marginal(z, observed=False)))
        reading = self.reading(z)
        return self._filled(reading.log_prior + reading.log_jacobian)

    def log_likelihood(self, z: Any) -> Tensor:
        return self._filled(self.reading(z).log_likelihood)

    def log_guide(self, z: Any) -> Tensor:
        """Raises `ProblemError` where the guide samples a site that z does not give."""
        transformed = isinstance(z, Tensor)
        log_jacobian: Any = 0.0
        missing = [n for n in self.layout.guide_latents if n not in (self.layout.continuous if transformed else z)]
        if missing:
            raise ProblemError(f"site {missing[0]!r} of the guide has no value, so its density cannot be told.")
        if transformed:
            reading = self.reading(z, _VALUES)
            z, log_jacobian = reading.values, reading.log_jacobian
        given = {n: s.to_pyro(z[n], s.event_dim) for n, s in self.layout.guide_latents.items()}
        return self._filled(self.guide(given).log_prior + log_jacobian)

    def pointwise(self, z: Any) -> dict[str, Tensor]:
        return self.reading(z, frozenset({"pointwise"})).pointwise

    def _sums_out(self, z: Any) -> bool:
        discrete = self.layout.discrete
        return bool(discrete) if isinstance(z, Tensor) else any(n not in z for n in discrete)

    def _marginal(self, z: Any, observed: bool = True) -> tuple[Tensor, Any]:
        """The log joint (the log prior where not `observed`) and the log-Jacobian, with the discrete latents that z
        lacks summed out."""
        sites, minibatch = self.layout.sites, self.rows.minibatch
        # scaling comes after the sums, or it is wrong
        local = minibatch and minibatch._replace(scale=1.0)
        given, want = self.layout.given(z), frozenset({"trace"})
        scribe = Scribe(sites, given, transformed=isinstance(z, Tensor), minibatch=local, want=want)
        with scribe:
            nesting = self.layout.max_plate_nesting
            trace = enumerated_trace(self.problem.model, self.rows.args, self.rows.kwargs, nesting)
        for name, site in sites.items():
            if not observed and site.role != "latent" and name in trace.nodes:
                trace.remove_node(name)
        scaled = (minibatch.plate.name, minibatch.scale) if minibatch else None
        total = sum_out(trace, [p.name for p in self.layout.batch_plates], scaled)
        idle = self.log_idle(n for n in self.layout.discrete if n not in given)
        return total - idle.to(total), scribe.reading.log_jacobian

    def log_idle(self, names: Iterable[str]) -> Tensor:
        """What a sum over the values of these discrete latents counts too much, (*batch): padding has no say, and so
        counts once, not once for each of its values."""
        total: Any = 0.0
        for name in names:
            site, minibatch = self.layout.sites[name], self.rows.minibatch
            if site.mask is None or site.support is None or not site.padded:
                continue
            idle = (~site.mask.expand(site.shape)).double()
            idle = idle.flatten(idle.dim() - site.event_dim)[..., 0] if site.event_dim else idle
            if minibatch is not None and minibatch.plate in site.plates:
                idle = idle.index_select(minibatch.plate.dim, minibatch.rows.to(idle.device)) * minibatch.scale
            total = total + site.per_element(idle) * math.log(len(site.support))
        return self._filled(total)

    def _filled(self, value: Any) -> Tensor:
        """A per-element figure, as a tensor of the batch's shape even where no site added to it."""
        shape = self.batch_shape
        return value if isinstance(value, Tensor) and value.shape == shape else torch.as_tensor(value).expand(shape)

    # -- values --------------------------------------------------------------------------------------------------

    def values(self, z: Any, names: Collection[str]) -> dict[str, Tensor]:
        """Constrained values of these sites, (*batch, *event)."""
        values = self.reading(z, _DRAWN).values
        return {n: values[n] for n in names}

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """u (*batch, D) of constrained values."""
        return self.layout.flat(self.reading(values, frozenset({"unconstrained"})).unconstrained)

    def observed(self, z: Any) -> dict[str, Tensor]:
        values = self.reading(z, _VALUES).values
        return {n: values[n] for n, s in self.layout.sites.items() if s.role == "observed"}

    # -- draws ---------------------------------------------------------------------------------------------------

    def prior(self, _: Any = None) -> PriorDraws:
        """All latents drawn from the prior."""
        reading = self.reading({}, _VALUES)
        values = {n: reading.values[n] for n in self.layout.latents}
        return PriorDraws(values, self._filled(reading.log_prior), self._filled(reading.log_likelihood))

    def propose(self, _: Any, names: Collection[str]) -> GuideDraws:
        """Sites of these names drawn from the guide."""
        reading = self.guide({}, _VALUES)
        values = {n: v for n, v in reading.values.items() if n in names}
        return GuideDraws(values, self._filled(reading.log_prior), self._filled(reading.log_score))

    def simulate(self, z: Any, roles: Collection[str]) -> dict[str, Tensor]:
        """Sites of these roles drawn from the model, given what z tells: u, values of some latents, or nothing."""
        scribe = self.model(self.layout.given(z), transformed=isinstance(z, Tensor), want=_DRAWN, inside=Unobserved())
        return {n: v for n, v in scribe.reading.values.items() if self.layout.sites[n].role in roles}

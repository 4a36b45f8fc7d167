"""Running a Pyro program once, and reading its log probabilities site by site.

One messenger does all of it: it stands outermost, so that every handler of the user's (condition, mask, scale,
reparam ...) has had its say, sets the values at latent sites, and adds up log probabilities per batch element.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Beta,
    Distribution,
    Independent,
    LKJCholesky,
    MixtureSameFamily,
    VonMises,
    biject_to,
    constraints,
)

from .problem import ProblemError


@dataclass(frozen=True)
class Plate:
    """A vectorised `pyro.plate`: its name, its dimension (negative, from the right) and its full size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True, eq=False)
class Site:
    """What one sample statement looks like, and how its value is laid out.

    Pyro lays a value out as (*plates by their dim, *event). Ours puts the plates of the batch first and drops the
    singleton dimensions of plates that the site is not in: (*batch, *other plates, *event).
    """

    name: str
    role: str  # 'latent', 'observed', 'factor' or 'deterministic'
    event_dim: int
    plates: tuple[Plate, ...]  # by dim, left to right
    shape: tuple[int, ...]  # of the value, as Pyro lays it out
    discrete: bool = False
    support: Tensor | None = None  # of an enumerable site: (k, *event)
    auxiliary: bool = False
    point: bool = False  # drawn from a Delta
    reparameterised: bool = True
    bounded: bool = False  # a site that has no density somewhere, which its formula may not say
    simulated: bool = False  # an observed site that can be drawn from, and has no density
    scaled: bool = False  # by a handler: its draws are not what its density says
    mask: Tensor | None = None  # where it has its density, against the value as Pyro lays it out; None: everywhere
    padded: bool = False  # what its mask leaves out moves nothing else: padding, which is no part of the answer
    domain: Any = None  # of a continuous site: the constraint that its values satisfy
    unconstrained_event_dim: int = 0
    unconstrained_shape: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()  # dims of the batch plates, left to right

    @property
    def reweighted(self) -> bool:
        """Whether its draws are not what its density says, and that matters."""
        return self.scaled or (self.mask is not None and not self.padded)

    def reaches_beyond(self, other: Site) -> bool:
        """Whether it has a density somewhere where the mask of a site of the same shape leaves that out."""
        here, there = (torch.tensor(True) if m is None else m for m in (self.mask, other.mask))
        return bool((here & ~there.to(here.device)).any())

    def per_element(self, log_prob: Tensor) -> Tensor:
        """A (*plates) tensor summed over all but the batch plates."""
        if not self.batch:
            return log_prob.sum()
        dims = [d for d in range(-log_prob.dim(), 0) if d not in self.batch]
        return log_prob.sum(dims) if dims else log_prob

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values of an enumerable site, (k, *event), in the precision of a run: they were listed in the user's."""
        assert self.support is not None
        return self.support.to(dtype) if self.support.is_floating_point() else self.support

    def shape_of(self, fn: Any, value: Tensor) -> torch.Size:
        """The shape that an observed value has once it is broadcast against its distribution."""
        batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - self.event_dim])
        return torch.Size((*batch, *value.shape[value.dim() - self.event_dim :]))

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The sizes of the plates inside one batch element, (*other plates)."""
        own = self.own_shape(self.shape, self.event_dim)
        return own[len(self.batch) : len(own) - self.event_dim]

    def own_shape(self, shape: tuple[int, ...], event_dim: int) -> tuple[int, ...]:
        """The shape (*batch, *other plates, *event) of a value that Pyro lays out as `shape`."""
        rest = shape[: len(shape) - event_dim]
        sizes = {d - len(rest): size for d, size in enumerate(rest)}
        order = [*self.batch, *self._kept(rest)]
        return (*(sizes[d] for d in order), *shape[len(shape) - event_dim :])

    def _kept(self, rest: tuple[int, ...]) -> list[int]:
        plates = {p.dim for p in self.plates}
        dims = range(-len(rest), 0)
        return [d for d in dims if d not in self.batch and (d in plates or rest[d] != 1)]

    def to_pyro(self, value: Tensor, event_dim: int) -> Tensor:
        """(*batch, *other plates, *event) -> as Pyro lays it out."""
        rest = self.shape[: len(self.shape) - self.event_dim]
        order = [*self.batch, *self._kept(rest)]
        target = sorted(order)
        events = list(range(len(order), len(order) + event_dim))
        value = value.permute([order.index(d) for d in target] + events)
        index = tuple(slice(None) if d in target else None for d in range(-len(rest), 0))
        return value[index] if None in index else value

    def to_own(self, value: Tensor, event_dim: int) -> Tensor:
        """As Pyro lays it out -> (*batch, *other plates, *event)."""
        rest_dim = value.dim() - event_dim
        rest = self.shape[: len(self.shape) - self.event_dim]
        order = [*self.batch, *self._kept(rest)]
        dropped = [d for d in range(-rest_dim, 0) if d not in order]
        value = value.permute([d - event_dim for d in (*order, *dropped)] + list(range(-event_dim, 0)))
        shape = (*value.shape[: len(order)], *value.shape[value.dim() - event_dim :])
        return value.reshape(shape) if dropped else value


def support_of(fn: Any) -> Any:
    """Where a distribution has its values, where torch says something else that no map is known for or that is wrong.

    An angle lies between -pi and pi: torch says the reals, on which its density goes round and round, without end.
    What mixes components that all lie in one set lies there too.
    """
    inner = fn
    while isinstance(inner, Independent | MaskedDistribution):
        inner = inner.base_dist
    if isinstance(inner, VonMises):
        support: Any = constraints.interval(-math.pi, math.pi)
    elif isinstance(inner, MixtureSameFamily) and is_fixed(inner.component_distribution.support):
        support = inner.component_distribution.support
    else:
        return fn.support
    further = fn.event_dim - support.event_dim
    return constraints.independent(support, further) if further else support


def is_fixed(support: Any) -> bool:
    """Whether a continuous support is the same whatever the distribution's parameters."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    fixed = (constraints.real, constraints.real_vector, constraints.positive, constraints.unit_interval)
    return any(support is c for c in (*fixed, constraints.nonnegative, constraints.simplex))


SOMETIMES = "site {!r} appears in some runs of the program only; the sites must always be the same."


@dataclass
class Reading:
    """What one run of a program tells. Log probabilities have the shape of the batch."""

    log_prior: Any = 0.0
    log_likelihood: Any = 0.0
    log_jacobian: Any = 0.0
    log_score: Any = 0.0  # of the draws that cannot be reparameterised
    values: dict[str, Tensor] = field(default_factory=dict)
    unconstrained: dict[str, Tensor] = field(default_factory=dict)
    pointwise: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


class Scribe(Messenger):
    """Sets latent values and writes down a `Reading`.

    given          site -> value in Pyro's layout; sites not given are drawn from the program
    transformed    the given values, or those of these sites, are unconstrained: map each by its site's own support, as
                   it is at this run, and add the log-Jacobian (so a support that depends on another site is right)
    want           what to write down besides the log probabilities: 'values', 'unconstrained', 'pointwise', 'terms'
                   (the log probability of every site as Pyro lays it out); 'drawn': the values alone; 'trace': only
                   set values, since a trace outside does the writing
    minibatch      (plate, indices, scale): the program sees these rows of the data; sites of the plate are scaled
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        given: Mapping[str, Tensor],
        *,
        transformed: bool | Collection[str] = False,
        minibatch: tuple[Plate, Tensor, float] | None = None,
        want: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.sites = sites
        self.given = given
        self.transformed = frozenset((given if transformed is True else transformed) or ())
        self.minibatch = minibatch
        self.want = want
        self.reading = Reading()
        self.seen: set[str] = set()

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample":
            return
        name: str = msg["name"]
        if site_is_subsample(msg):
            if self.minibatch and name == self.minibatch[0].name and msg["fn"].size == self.minibatch[0].size:
                msg["value"] = self.minibatch[1]
            return
        settle(msg)
        if self.minibatch is not None:
            msg["scale"] = self._scale(msg, self.minibatch)
        if msg["is_observed"]:
            return
        if name not in self.given:
            if isinstance(msg["fn"], LKJCholesky):
                msg["value"] = _draw_lkj(msg["fn"])
            return
        value = self.given[name]
        if name in self.transformed:
            fill_padding(msg, self.sites[name])
            transform = biject_to(support_of(msg["fn"]))
            unconstrained, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(unconstrained, value)
            self.reading.log_jacobian = self.reading.log_jacobian + self.sites[name].per_element(jacobian)
        msg["value"] = value

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg) or "trace" in self.want:
            return
        name: str = msg["name"]
        site = self.sites.get(name)
        if site is None:
            raise ProblemError(SOMETIMES.format(name))
        self.seen.add(name)
        fn: TorchDistributionMixin = msg["fn"]
        value = msg["value"]
        if name not in self.given and site.role == "latent" and value.is_floating_point():
            # a prior that was built with other numbers draws in its own dtype: the program goes on in the run's
            value = msg["value"] = value.to(torch.get_default_dtype())
        if site.role == "deterministic":
            if "values" in self.want:
                self.reading.values[name] = site.to_own(value, site.event_dim)
            return
        if "drawn" in self.want or site.simulated:
            if site.role != "factor":
                self.reading.values[name] = site.to_own(value.expand(site.shape_of(fn, value)), site.event_dim)
            return
        raw = fn.log_prob(value)
        if site.bounded and name in self.given and name not in self.transformed:
            # formulas go on outside of the support, where there is no density
            raw = torch.where(support_of(fn).check(value), raw, -math.inf)
        log_prob = scale_and_mask(raw, msg["scale"], msg["mask"])
        if log_prob.dim() < len(fn.batch_shape):
            log_prob = log_prob.expand(fn.batch_shape)
        if "terms" in self.want:
            self.reading.terms[name] = log_prob
        if site.role == "latent":
            per_element = site.per_element(log_prob)
            self.reading.log_prior = self.reading.log_prior + per_element
            if name not in self.given and not fn.has_rsample:
                # the draw came from fn itself, so its score carries neither a minibatch's scale nor a mask
                self.reading.log_score = self.reading.log_score + site.per_element(raw.expand(log_prob.shape))
            if "values" in self.want:
                self.reading.values[name] = site.to_own(value, site.event_dim)
            if "unconstrained" in self.want and not site.discrete:
                unconstrained = biject_to(support_of(fn)).inv(value)
                self.reading.unconstrained[name] = site.to_own(unconstrained, site.unconstrained_event_dim)
        else:
            self.reading.log_likelihood = self.reading.log_likelihood + site.per_element(log_prob)
            if "values" in self.want and site.role == "observed":
                self.reading.values[name] = site.to_own(value.expand(site.shape_of(fn, value)), site.event_dim)
            if "pointwise" in self.want and site.role == "observed":
                self.reading.pointwise[name] = site.to_own(log_prob, 0)

    @staticmethod
    def _scale(msg: Message, minibatch: tuple[Plate, Tensor, float]) -> Any:
        """Pyro's scale, with the minibatch counted once whether or not the program's plate knows its full size."""
        plate, _, wanted = minibatch
        for frame in msg["cond_indep_stack"]:
            if frame.name == plate.name:
                return msg["scale"] * (wanted * frame.size / frame.full_size)
        return msg["scale"]


class Unobserved(Messenger):
    """Draws what the program observes, in the shape of the data where these are more than the distribution says.
    `poutine.uncondition` does so to deterministic sites as well, and draws them anew for each element of their plates.
    """

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] or (msg["infer"] or {}).get("_deterministic"):
            return
        fn, value = msg["fn"], msg["value"]
        if isinstance(value, Tensor) and not site_is_subsample(msg):
            batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            msg["fn"] = fn if batch == fn.batch_shape else fn.expand(batch)
        msg["is_observed"], msg["value"], msg["done"] = False, None, False


def lift_mask(msg: Message) -> None:
    """A mask that belongs to the distribution becomes the site's, as `poutine.mask` gives it: what is drawn is drawn
    without it."""
    fn: Any = msg["fn"]
    while isinstance(fn, MaskedDistribution):
        outer: Any = msg["mask"]
        msg["mask"] = fn._mask if outer is None else outer & fn._mask
        fn = msg["fn"] = fn.base_dist


def settle(msg: Message) -> None:
    """As a density sees a site: masked by the message alone, and with no check of values."""
    lift_mask(msg)
    msg["fn"] = _unchecked(msg["fn"])


def fill_padding(msg: Message, site: Site) -> None:
    """Padding has its prior where latents move: they would wander off without."""
    if site.padded:
        msg["mask"], msg["fn"] = None, unmasked(msg["fn"])


def _unchecked(fn: Any) -> Any:
    """The distribution without checks, which depend on values, so that no compiler can follow them. One that was made
    before the program ran, as every `PyroSample` is, has kept its own."""
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, Distribution)}
    inside = {name: _unchecked(part) for name, part in parts.items()}
    if not vars(fn).get("_validate_args") and all(inside[name] is part for name, part in parts.items()):
        return fn
    bare = copy(fn)
    vars(bare).update(inside, _validate_args=False)
    return bare


def unmasked(fn: Any) -> Any:
    """The distribution that a masked one draws from, with masks inside of its events taken off as well."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims:
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def _draw_lkj(fn: Any) -> Tensor:
    """A Cholesky factor of a correlation matrix by the onion method (Lewandowski, Kurowicka & Joe 2009,
    doi:10.1016/j.jmva.2009.04.008, section 3.2): row r is a uniform direction of squared length
    Beta(r / 2, eta + (dim - 1 - r) / 2). torch's own draws (2.13) take Beta(r - 1/2, ...), which is right in two
    dimensions only."""
    eta = fn.concentration[..., None]
    row = torch.arange(1, fn.dim, dtype=eta.dtype, device=eta.device)
    half, rest = torch.broadcast_tensors(row / 2, eta + (fn.dim - 1 - row) / 2)
    squared = Beta(half, rest).sample()
    direction = torch.randn((*squared.shape, fn.dim), dtype=eta.dtype, device=eta.device).tril()
    below = squared.sqrt()[..., None] * direction / direction.norm(dim=-1, keepdim=True)
    below = torch.cat([torch.zeros_like(below[..., :1, :]), below], -2)
    diagonal = (1 - below.square().sum(-1)).clamp_min(torch.finfo(eta.dtype).tiny).sqrt()
    return below + torch.diag_embed(diagonal)

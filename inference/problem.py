"""What is to be inferred: a Pyro model, its guide, its data, and what is known about the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .posterior import Evidence


class ProblemError(ValueError):
    """The problem or its settings cannot be used as they are; the message says what to change."""


class Later(Mapping[str, Tensor]):
    """Draws that are made, by a function of nothing, when they are first looked at."""

    def __init__(self, make: Callable[[], Mapping[str, Tensor]]) -> None:
        self._make = make
        self._made: Mapping[str, Tensor] | None = None
        self.check: Callable[[Mapping[str, Tensor]], None] = lambda made: None

    def _draws(self) -> Mapping[str, Tensor]:
        if self._made is None:
            with torch.no_grad():
                made = self._make()
            self.check(made)
            self._made = made
        return self._made

    def __getitem__(self, name: str) -> Tensor:
        return self._draws()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draws())

    def __len__(self) -> int:
        return len(self._draws())


@dataclass(frozen=True, eq=False)
class Reference:
    """The truth to compare with, at one theta, with its own error.

    `kind` is one of 'exact' (closed form or enumeration), 'quadrature', 'mcmc' (certified draws), 'none'.
    `mean` and `sd` map a latent site to a tensor (*batch, *event); `mean_error` and `sd_error` hold their
    standard errors in the same shapes (missing: zero). `log_evidence` is in nats. `provenance` says in a
    sentence where the numbers come from. `log_weights` are the exact log p(x, z) of discrete latents over
    their support, (K, *batch), where the support is small enough to list.

    `draws` are draws of the posterior, site -> (S, *batch, *event), `Later(function)` where they cost; independent
    ones where `draw_log_weights` is None, else points that have these log weights, (S, *batch), unnormalised.
    """

    kind: str
    mean: Mapping[str, Tensor] = field(default_factory=dict)
    sd: Mapping[str, Tensor] = field(default_factory=dict)
    mean_error: Mapping[str, Tensor] = field(default_factory=dict)
    sd_error: Mapping[str, Tensor] = field(default_factory=dict)
    log_evidence: Evidence | None = None
    provenance: str = ""
    log_weights: Tensor | None = None
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    draw_log_weights: Tensor | None = None

    KINDS = ("exact", "quadrature", "mcmc", "none")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ProblemError(f"Reference kind {self.kind!r}: expected one of {', '.join(self.KINDS)}.")
        for name in self.mean:
            if name in self.sd and self.mean[name].shape != self.sd[name].shape:
                raise ProblemError(
                    f"Reference site {name!r}: mean has shape {tuple(self.mean[name].shape)}, "
                    f"sd {tuple(self.sd[name].shape)}; they must agree."
                )
        if isinstance(self.draws, Later):
            self.draws.check = self._check_draws
        else:
            self._check_draws(self.draws)

    def _check_draws(self, draws: Mapping[str, Tensor]) -> None:
        weights = self.draw_log_weights
        for name, values in draws.items():
            if name in self.mean and values.shape[1:] != self.mean[name].shape:
                raise ProblemError(
                    f"Reference site {name!r}: draws have shape {tuple(values.shape)}; expected (S, "
                    f"{', '.join(map(str, self.mean[name].shape))}), as the mean."
                )
            if weights is not None and values.shape[: weights.dim()] != weights.shape:
                raise ProblemError(
                    f"Reference site {name!r}: draws of shape {tuple(values.shape)} cannot have log weights of shape "
                    f"{tuple(weights.shape)}; expected (S, *batch)."
                )
        if len({len(values) for values in draws.values()}) > 1:
            raise ProblemError("Reference: every site needs the same number of draws.")


@dataclass(frozen=True, eq=False)
class Problem:
    """A deep latent variable model p_theta(x, z), written as a plain Pyro model and guide, with its data.

    model      any Pyro callable: a function, a bound method, an `nn.Module` or a `PyroModule`.
               theta is every parameter that its log joint depends on.
    args       data and other inputs, handed to the model and the guide alike; `kwargs` likewise.
    guide      q_phi(z | x) with the same arguments as the model, or None.
    reference  the truth: a `Reference`, or a function (parameters, *args) -> Reference where it moves with theta.
    held_out   arguments that take the place of `args` to judge what was learned on data not seen, or None.
    m_step     the closed-form M-step, where there is one: (draws, weights, *args) -> parameters. `draws` maps a
               site to (S, *batch, *event); `weights` (S, *batch) are normalised over S. One that also takes
               `marginals=` has the exact ones of a chain there, where the E-step knows them (`markov.Marginals`).

    Raises `ProblemError` where an argument cannot be used.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    guide: Callable[..., Any] | None = None
    reference: Reference | Callable[..., Reference] | None = None
    name: str = ""
    held_out: tuple[Any, ...] | None = None
    m_step: Callable[..., Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise ProblemError(f"model: expected a Pyro callable, got {type(self.model).__name__}.")
        if self.guide is not None and not callable(self.guide):
            hint = " Name an autoguide in the engine: SVI(guide='AutoNormal')." if isinstance(self.guide, str) else ""
            raise ProblemError(f"guide: expected a Pyro callable or None, got {type(self.guide).__name__}.{hint}")
        if isinstance(self.guide, type):
            name = self.guide.__name__
            raise ProblemError(
                f"guide: {name} is a class; pass an instance, or give it to the engine, SVI(guide={name})."
            )
        for field_name in ("args", "held_out"):
            value = getattr(self, field_name)
            if field_name == "held_out" and value is None:
                continue
            if not isinstance(value, tuple):
                raise ProblemError(
                    f"{field_name}: expected a tuple, got {type(value).__name__}; write {field_name}=(x,) for one."
                )
            _refuse_empty(field_name, enumerate(value))
        if not isinstance(self.kwargs, Mapping):
            raise ProblemError(f"kwargs: expected a dict, got {type(self.kwargs).__name__}.")
        _refuse_empty("kwargs", self.kwargs.items())
        if self.m_step is not None and not callable(self.m_step):
            raise ProblemError(f"m_step: expected a function or None, got {type(self.m_step).__name__}.")
        if not (self.reference is None or isinstance(self.reference, Reference) or callable(self.reference)):
            raise ProblemError(f"reference: expected a Reference or a function, got {type(self.reference).__name__}.")
        if not self.name:
            name = getattr(self.model, "__qualname__", type(self.model).__name__)
            object.__setattr__(self, "name", name.replace("<locals>.", ""))

    def on(self, *args: Any) -> Problem:
        """The same problem on other data; a fixed reference is dropped, since it was the old data's."""
        reference = None if isinstance(self.reference, Reference) else self.reference
        return replace(self, args=args, held_out=None, reference=reference)

    def on_held_out(self) -> Problem:
        """The problem on its held-out data. Raises `ProblemError` where it has none."""
        if self.held_out is None:
            raise ProblemError(f"problem {self.name!r} has no held-out data; pass held_out=(...) to Problem.")
        return self.on(*self.held_out)

    def reference_at(self, parameters: Mapping[str, Tensor]) -> Reference:
        """The truth at this theta; kind 'none' where nothing is known."""
        if self.reference is None:
            return Reference("none", provenance="no reference was given")
        if isinstance(self.reference, Reference):
            return self.reference
        with torch.no_grad():
            return self.reference(parameters, *self.args)


def _refuse_empty(where: str, items: Iterable[tuple[Any, Any]]) -> None:
    for key, item in items:
        if isinstance(item, Tensor) and item.numel() == 0:
            raise ProblemError(f"{where}[{key!r}] is empty, shape {tuple(item.shape)}: no data to infer from.")

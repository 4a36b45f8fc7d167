"""A synthetic twin of a problem: data drawn from the model, in the arguments that hold the observed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from .density import Density
from .engine import seed_all
from .problem import Problem, ProblemError

Place = int | str  # of an argument: its position, or its name


def _tensors(density: Density) -> dict[Place, Tensor]:
    """The arguments that are tensors."""
    held: list[tuple[Place, Any]] = [*enumerate(density.args), *density.kwargs.items()]
    return {place: v for place, v in held if isinstance(v, Tensor)}


def observing_arguments(density: Density) -> tuple[dict[str, Place], str]:
    """Observed site -> the argument that holds its data; and a site that has none, or shares it, '' if all do."""
    trace = poutine.trace(density.problem.model).get_trace(*density.args, **density.kwargs)
    tensors = _tensors(density)
    places: dict[str, Place] = {}
    for name, site in density.sites.items():
        if site.role != "observed":
            continue
        value = trace.nodes[name]["value"]
        found = [p for p, v in tensors.items() if v is value] or [p for p, v in tensors.items() if _same(v, value)]
        if len(found) != 1 or found[0] in places.values():
            return places, name
        places[name] = found[0]
    return places, ""


def as_arguments(density: Density, drawn: dict[str, Tensor], places: dict[str, Place]) -> dict[Place, Tensor]:
    """Simulated data as the arguments that they stand for."""
    data = {}
    for name, place in places.items():
        held, site = held_at(density, place), density.sites[name]
        data[place] = site.to_pyro(drawn[name], site.event_dim).reshape(held.shape).to(held.dtype)
    return data


def observing_parts(density: Density) -> dict[str, tuple[Place, Tensor]]:
    """Observed site -> the argument that its data lie in, and they as a view of it: all of it, or a part, as x[:, t] is
    of x. Raises `ProblemError` where they are no part of an argument, or two sites share an entry."""
    places, _ = observing_arguments(density)
    trace = poutine.trace(density.problem.model).get_trace(*density.args, **density.kwargs)
    tensors = {place: v for place, v in _tensors(density).items() if v.is_contiguous()}
    taken = {place: torch.zeros_like(v, dtype=torch.int32) for place, v in tensors.items()}
    parts: dict[str, tuple[Place, Tensor]] = {}
    for name, site in density.sites.items():
        if site.role != "observed":
            continue
        value = trace.nodes[name]["value"]
        if name in places:
            parts[name] = places[name], held_at(density, places[name])
            continue
        for place, v in tensors.items():
            if v.numel() and _lies_in(value, v):
                _part(taken[place], v, value).add_(1)
                parts[name] = place, value
        whole = [place for place, v in parts.values() if v is held_at(density, place)]
        shared = name in parts and (bool((taken[parts[name][0]] > 1).any()) or parts[name][0] in whole)
        if name not in parts or shared:
            raise ProblemError(
                f"no argument alone holds the data of site {name!r}: observe an argument as it is passed (obs=x), or a "
                "part of it that no other site observes (obs=x[:, t])."
            )
    return parts


def held_at(density: Density, place: Place) -> Tensor:
    """The argument at a place."""
    return density.args[place] if isinstance(place, int) else density.kwargs[place]


def simulated(density: Density) -> tuple[dict[Place, Tensor], dict[str, Tensor]]:
    """As many data drawn from the model at theta as there are, as arguments, and the latents that they were drawn
    with, site -> (*batch, *event).

    A model may draw data given earlier data, which it reads from its arguments: they are drawn again, by the same
    random numbers, given those of the time before, until that changes nothing. Raises `ProblemError` where it does not
    end so, the model cannot be drawn from, or arguments do not hold the data alone.
    """
    parts = observing_parts(density)
    seed = np.random.SeedSequence(int(torch.randint(2**62, ())))
    data: dict[Place, Tensor] = {}
    for _ in range(len(parts) + 2):
        seed_all(seed)
        with density.substituted(data):
            drawn = {name: value[0] for name, value in density.simulate(1).items()}
        before, data = data, _filled(density, drawn, parts)
        if (before or not parts) and all(torch.equal(before[place], new) for place, new in data.items()):
            return data, {name: value for name, value in drawn.items() if name in density.latents}
    raise ProblemError(
        "data cannot be drawn from the model, which reads them for more than to observe them in their order, or has "
        "random numbers of its own."
    )


def _filled(
    density: Density, drawn: Mapping[str, Tensor], parts: Mapping[str, tuple[Place, Tensor]]
) -> dict[Place, Tensor]:
    """Copies of the arguments, with drawn data where theirs were."""
    data: dict[Place, Tensor] = {}
    for name, (place, value) in parts.items():
        held, site = held_at(density, place), density.sites[name]
        new = site.to_pyro(drawn[name], site.event_dim).reshape(value.shape).to(held)
        if value is held:
            data[place] = new
        else:
            _part(data.setdefault(place, held.clone()), held, value).copy_(new)
    return data


def _lies_in(value: Any, held: Tensor) -> bool:
    """Whether one tensor is a view of another, of the same kind of numbers."""
    return (
        isinstance(value, Tensor)
        and value.dtype == held.dtype
        and value.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
    )


def _part(copy: Tensor, held: Tensor, value: Tensor) -> Tensor:
    """The part of a copy of `held` that `value` is of `held`, a view."""
    return copy.as_strided(value.shape, value.stride(), value.storage_offset() - held.storage_offset())


def observing(problem: Problem, data: Mapping[Place, Tensor]) -> Problem:
    """The problem on these data."""
    args = tuple(data[i].to(v) if i in data else v for i, v in enumerate(problem.args))
    kwargs = {k: data[k].to(v) if k in data else v for k, v in problem.kwargs.items()}
    return replace(problem.on(*args), kwargs=kwargs)


def twin(density: Density) -> tuple[Problem, dict[str, Tensor]]:
    """The problem on `simulated` data, and the latents that they were drawn with: exact draws from the posterior of
    these data. Raises `ProblemError` as that does."""
    data, latents = simulated(density)
    return observing(density.problem, data), latents


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, however they are shaped and stored."""
    return a.numel() == b.numel() and bool((a.flatten().double() == b.flatten().double()).all())

"""A synthetic twin of a problem: data drawn from the model, in the arguments that hold the observed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyro import poutine
from torch import Tensor

from .density import Density
from .problem import Problem, ProblemError

Place = int | str  # of an argument: its position, or its name


def observing_arguments(density: Density) -> tuple[dict[str, Place], str]:
    """Observed site -> the argument that holds its data; and a site that has none, or shares it, '' if all do."""
    trace = poutine.trace(density.problem.model).get_trace(*density.args, **density.kwargs)
    held: list[tuple[Place, Any]] = [*enumerate(density.args), *density.kwargs.items()]
    tensors = {place: v for place, v in held if isinstance(v, Tensor)}
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
        held: Tensor = density.args[place] if isinstance(place, int) else density.kwargs[place]
        site = density.sites[name]
        data[place] = site.to_pyro(drawn[name], site.event_dim).reshape(held.shape).to(held.dtype)
    return data


def simulated(density: Density) -> tuple[dict[Place, Tensor], dict[str, Tensor]]:
    """As many data drawn from the model at theta as there are, as arguments, and the latents that they were drawn
    with, site -> (*batch, *event). Raises `ProblemError` where the model cannot be drawn from, or an argument does not
    hold the data alone."""
    places, lost = observing_arguments(density)
    if lost:
        raise ProblemError(
            f"no argument alone holds the data of site {lost!r}: observe an argument as it is passed (obs=x)."
        )
    drawn = {name: value[0] for name, value in density.simulate(1).items()}
    latents = {name: value for name, value in drawn.items() if name in density.latents}
    return as_arguments(density, drawn, places), latents


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

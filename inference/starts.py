"""Where chains start: at a draw of the prior that explains the data, or where the user says.

Of a few draws of the prior the one of highest likelihood is taken, per batch element: a single draw may lie where no
sampler finds out of (a tail of a Cauchy prior), while the highest log joint would favour the narrow necks of
hierarchical models. An improper prior cannot be drawn from; there points near zero take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .density import Density
from .engine import EngineError, Run, seed_all
from .posterior import gathered
from .problem import ProblemError

CHOICE = 10  # points, of which the best is taken


def starts(
    density: Density, run: Run, num_chains: int, initial: Mapping[str, Any] | None, tries: int, apart: bool = False
) -> Tensor:
    """One start for each chain, (C, *batch, D), with finite log density and gradient.

    initial  site -> values (C, *shape) or (*shape,); sites that are not in it are drawn from the prior
    tries    prior draws for each chain, at most
    apart    data are moved apart from each other: those that have no such start do not keep the others from theirs
    Raises `ProblemError` for initial values that cannot be used, `EngineError` where the prior has no usable draw.
    """
    given = read_initial(density, initial or {}, num_chains)
    if not given and apart and density.batch_shape.numel() > 1:
        return _apart(density, run, num_chains, tries)
    if not given and tries >= CHOICE and (u := _together(density, run, num_chains)) is not None:
        return u
    points = []
    for chain in range(num_chains):
        seed_all(run.child(chain).seed)
        own = {name: value[chain] for name, value in given.items()}
        points.append(_start(density, own, tries, chain))
    return torch.stack(points)


def _together(density: Density, run: Run, num_chains: int) -> Tensor | None:
    """The starts of all chains from one set of draws; None where one of them cannot be used."""
    seed_all(run.child(num_chains).seed)
    u, score = _candidates(density, {}, CHOICE * num_chains, 0)
    u, score = (t.reshape(CHOICE, num_chains, *t.shape[1:]) for t in (u, score))
    points = _best(u, score)
    value, gradient = density.value_and_grad(points)
    return points if bool(value.isfinite().all()) and bool(gradient.isfinite().all()) else None


def _apart(density: Density, run: Run, num_chains: int, tries: int) -> Tensor:
    """The best of some draws for each chain and datum; others where these cannot be used, as long as there are any."""
    seed_all(run.child(num_chains).seed)
    points = usable = None
    for attempt in range(0, tries, CHOICE):
        count = min(CHOICE, tries - attempt)
        u, score = _candidates(density, {}, count * num_chains, attempt)
        found = _best(*(t.reshape(count, num_chains, *t.shape[1:]) for t in (u, score)))
        value, gradient = density.value_and_grad(found)
        good = value.isfinite() & gradient.isfinite().all(-1)
        points = found if points is None or usable is None else torch.where((good & ~usable)[..., None], found, points)
        usable = good if usable is None else usable | good
        if bool(usable.all()):
            break
    if points is None or usable is None or not bool(usable.any()):
        raise EngineError(_hopeless(tries, ""))
    return torch.where(points.isfinite(), points, 0.0)


def _best(u: Tensor, score: Tensor) -> Tensor:
    """Of points (n, ..., D) with scores (n, ...) the best, (..., D)."""
    at = score.nan_to_num(nan=-torch.inf, posinf=-torch.inf).argmax(0)
    return gathered(u, at[None])[0]


def _start(density: Density, given: Mapping[str, Tensor], tries: int, chain: int) -> Tensor:
    fixed = set(given) == set(density.continuous)
    for attempt in range(0, 1 if fixed else tries, CHOICE):
        u, score = _candidates(density, given, 1 if fixed else min(CHOICE, tries - attempt), attempt)
        u = _best(u, score)
        if given:
            _check_support(density, u, given, chain)
        value, gradient = density.value_and_grad(u)
        if bool(value.isfinite().all()) and bool(gradient.isfinite().all()):
            return u
    reason = _fault(density, u)
    if given:
        raise ProblemError(
            f"initial: the log density or its gradient is not finite where chain {chain} starts{reason}."
        )
    raise EngineError(_hopeless(tries, reason))


def _hopeless(tries: int, reason: str) -> str:
    return (
        f"no start with a finite log density and gradient in {tries} draws of the prior{reason}; check the scale of "
        "the prior and the support of the data"
    )


def _candidates(density: Density, given: Mapping[str, Tensor], count: int, attempt: int) -> tuple[Tensor, Tensor]:
    """Points (count, *batch, D), and how well each explains the data, (count, *batch)."""
    if density.improper:
        near = min(1.0, 20.0 / (attempt + CHOICE))
        u = (torch.rand((count, *density.batch_shape, density.dim), dtype=density.dtype) * 4 - 2) * near
        u = u.to(density.device) if density.device is not None else u
        if given:
            u = density.unconstrain(density.constrain(u) | _repeated(given, count))
        return u, density.log_joint(u)
    prior = density.prior(count)
    if not given:
        return density.unconstrain(prior.values), prior.log_likelihood
    values = prior.values | _repeated(given, count)
    return density.unconstrain(values), density.log_likelihood(values)


def _repeated(given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: value.expand(count, *value.shape) for name, value in given.items()}


def read_initial(density: Density, initial: Mapping[str, Any], num_chains: int) -> dict[str, Tensor]:
    """site -> (C, *shape), as given by the user. Raises `ProblemError`, naming the site at fault."""
    found = {}
    for name, value in initial.items():
        if name not in density.latents:
            raise ProblemError(f"initial: the model has no latent site {name!r}; it has {', '.join(density.latents)}.")
        site = density.latents[name]
        if site.discrete:
            raise ProblemError(f"initial: site {name!r} is discrete and summed out; leave it out.")
        try:
            tensor = torch.as_tensor(value).to(dtype=density.dtype, device=density.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"initial: site {name!r} has values that are no numbers: {error}") from error
        shape = site.own_shape(site.shape, site.event_dim)
        if tensor.shape == shape:
            tensor = tensor.expand(num_chains, *shape)
        if tensor.shape != (num_chains, *shape):
            raise ProblemError(
                f"initial: site {name!r} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, the same for all "
                f"chains, or {(num_chains, *shape)}, one for each."
            )
        found[name] = tensor
    return found


def _check_support(density: Density, u: Tensor, given: Mapping[str, Tensor], chain: int) -> None:
    """A value outside its support does not come back from the unconstrained space."""
    back = density.constrain(torch.where(u.isfinite(), u, torch.nan))
    for name, value in given.items():
        if not torch.allclose(back[name], value, rtol=1e-4, atol=1e-6):
            raise ProblemError(
                f"initial: site {name!r} of chain {chain} is outside its support, or at the edge: {_short(value)}."
            )


def _fault(density: Density, u: Tensor) -> str:
    """Which observations have no finite log likelihood at u, in words; '' where they all have."""
    if density.discrete or not bool(u.isfinite().all()):
        return ""
    for name, value in density.pointwise(density.constrain(u)).items():
        broken = ~value.isfinite()
        if bool(broken.any()):
            bad = float(value[broken][0])
            return f": site {name!r} has log likelihood {bad} for {int(broken.sum())} of {broken.numel()} observations"
    return ""


def _short(value: Tensor) -> str:
    return str(value.tolist()) if value.numel() <= 5 else f"{value.flatten()[:5].tolist()} ..."

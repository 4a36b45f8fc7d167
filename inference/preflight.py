"""What must hold before a density is trusted: batched equals plain, data do not move one another, rows are rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .problem import ProblemError
from .program import Plate, Scribe

if TYPE_CHECKING:
    from .density import Density

BATCHED = (
    "the program cannot be batched over draws (control flow that depends on them, or an operation vmap lacks): slower"
)


def preflight(density: Density) -> bool:
    """Whether the data must be treated as one, whatever the plates say. Tells whether the density is `vectorised`;
    what a user should know goes to its notes. Raises `ProblemError` where the program draws by itself."""
    if not density.latents:
        refuse_randomness(density, {})
        return False
    if density.improper and density.unlisted:
        return False  # there are no values to try it at
    values = some_values(density, 3)
    plain = refuse_randomness(density, values)
    density.vectorised = batches_over_draws(density, values, plain)
    if not density.vectorised:
        density.notes.append(BATCHED)
    if not density.batch_plates or not couples_data(density, values):
        return False
    density.notes.append(
        f"plate {density.batch_plates[0].name!r} couples its data: moving one datum's latent moves another's "
        "density, so all are treated as one"
    )
    return True


def some_values(density: Density, count: int) -> dict[str, Tensor]:
    """Values of the latents to try things on: draws of the prior, or the image of zero where it is improper."""
    if not density.latents:
        return {}
    if not density.improper:
        return density.prior(count).values
    shape = (count, *density.batch_shape, density.dim)
    return density.constrain(torch.zeros(shape, dtype=density.dtype, device=density.device))


def refuse_randomness(density: Density, values: dict[str, Tensor]) -> Tensor:
    """The same values must have the same log joint twice; it is given back. Raises `ProblemError` where the program
    draws by itself."""
    density.vectorised = False
    first, second = density.log_joint(values), density.log_joint(values)
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise ProblemError(
            "the model draws random numbers outside of its sample sites (dropout, noise, a site hidden by block), so "
            "it has no density: call model.eval(), or make what is random a sample site."
        )
    return first


def batches_over_draws(density: Density, values: dict[str, Tensor], plain: Tensor) -> bool:
    """Whether three draws at once, by vmap, have the log joints that they have one by one, `plain`."""
    density.vectorised = True
    try:
        batched = density.log_joint(values)
    except RuntimeError:
        return False
    return bool(torch.allclose(plain, batched, rtol=1e-3, atol=1e-3, equal_nan=True))


def couples_data(density: Density, values: dict[str, Tensor]) -> bool:
    """Whether moving the first datum's latents moves another datum's log joint, whatever the plates declare."""
    if density.batch_shape.numel() < 2:
        return False
    batch_dim = len(density.batch_shape)
    moved = {name: value.clone() for name, value in values.items()}
    for value in moved.values():  # in draw 0 the first datum takes its value of draw 1
        rows = value.view(len(value), density.batch_shape.numel(), *value.shape[1 + batch_dim :])
        rows[0, 0] = rows[1, 0]
    before, after = (density.log_joint(v)[0].flatten()[1:] for v in (values, moved))
    return not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_minibatch(density: Density, batch_size: int = 1) -> None:
    """See that rows of the data have the rows' own likelihoods. Raises `ProblemError` where they do not."""
    plate = density.sliceable()
    if batch_size > plate.size:
        raise ProblemError(f"batch_size = {batch_size} is larger than the {plate.size} data.")
    index = torch.arange(plate.size - 1, -1, -2, device=density.device)[: max(1, plate.size // 2)]
    with density, density.uncounted(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = {n: v[0] for n, v in some_values(density, 1).items()}
        full = _per_row(density, values, plate, None)
        try:
            with density.minibatch(index):
                part = _per_row(density, values, plate, index)
            fits = part.shape == full[index].shape and torch.allclose(part, full[index], rtol=1e-3, atol=1e-3)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ProblemError(f"the model fails on {len(index)} of {plate.size} rows of its data: {error}") from error
    if not fits:
        raise ProblemError(
            f"the model gives other densities on {len(index)} rows of plate {plate.name!r} than on all {plate.size}: "
            f"an argument whose first dimension is {plate.size} is no data, or data are closed over."
        )


def _per_row(density: Density, values: dict[str, Tensor], plate: Plate, index: Tensor | None) -> Tensor:
    """The likelihood of each row of the data plate, (N,) or (B,)."""
    given = {}
    for name, value in values.items():
        site = density.latents[name]
        value = site.to_pyro(value, site.event_dim)
        if index is not None and plate in site.plates:
            value = value.index_select(plate.dim - site.event_dim, index)
        given[name] = value
    minibatch = None if index is None else (plate, index, 1.0)
    scribe = Scribe(density.sites, given, minibatch=minibatch, want=frozenset({"pointwise"}))
    with scribe:
        density.problem.model(*density.args, **density.kwargs)
    total: Any = torch.zeros(plate.size if index is None else len(index), dtype=density.dtype, device=density.device)
    for name, log_prob in scribe.reading.pointwise.items():
        log_prob = density.sites[name].to_pyro(log_prob, 0)
        others = [d for d in range(-log_prob.dim(), 0) if d != plate.dim]
        total = total + (log_prob.sum(others) if others else log_prob)
    return total

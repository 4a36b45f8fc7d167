"""What must hold before a density is trusted: batched equals plain, data do not move one another, rows are rows."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from .problem import ProblemError
from .program import Plate, Scribe

if TYPE_CHECKING:
    from .density import Density

BATCHED = (
    "the program cannot be batched over draws (control flow that depends on them, or an operation vmap lacks): slower"
)
RANDOM = (
    "the model has another log joint when it runs again at the same values, so it has no density: it draws random "
    "numbers outside of its sample sites (dropout, noise, a site hidden by block: call model.eval(), or make what is "
    "random a sample site), or alters its data in place, or counts its runs."
)
DRAWS = 2  # that a program is tried at
SAME = 1e-9  # relative: two runs that differ by less were made of the same numbers
FEW = 8  # masked latents that are looked at one by one
REPEATS = 3  # of a run that moved a generator, say for a parameter's first value that is not used


def preflight(density: Density) -> bool:
    """Whether the data must be treated as one, whatever the plates say. Tells whether the density is `vectorised`, and
    where it was `tried`; what a user should know goes to its notes. Raises `ProblemError` where the program draws by
    itself."""
    if density.improper and density.unlisted:
        return False  # there are no values to try it at
    density.tried = tried = try_out(density)
    if not tried.values:
        return False
    if not density.vectorised:
        density.notes.append(BATCHED)
    density.leave_out(_padding(density, tried))
    if not density.batch_plates or not couples_data(density, tried):
        return False
    density.notes.append(
        f"plate {density.batch_plates[0].name!r} couples its data: moving one datum's latent moves another's "
        "density, so all are treated as one"
    )
    density.tried = None  # its log joints are told datum by datum
    return True


def some_values(density: Density, count: int) -> dict[str, Tensor]:
    """Values of the latents to try things on: draws of the prior, or the image of zero where it is improper."""
    if not density.latents:
        return {}
    if not density.improper:
        return density.prior(count).values
    shape = (count, *density.batch_shape, density.dim)
    return density.constrain(torch.zeros(shape, dtype=density.dtype, device=density.device))


class Tried(NamedTuple):
    """Values of the latents that the program was tried at, and its log joints there, one by one; theta then."""

    values: dict[str, Tensor]
    log_joint: Tensor
    theta: list[Tensor]

    def holds(self, density: Density) -> bool:
        """Whether theta is the same still."""
        return all(torch.equal(old, new) for old, new in zip(self.theta, density.theta.tensors, strict=True))


def try_out(density: Density) -> Tried:
    """Run the program where its log joint can be told twice: by the run that draws latents, for all draws together, and
    by a plain run at each of these. Says in `density.vectorised` whether they agree.

    Raises `ProblemError` where the same values have different log joints: the program draws by itself.
    """
    density.vectorised = True
    values, batched = _drawn(density)
    density.vectorised = False
    before = _generators()
    plain = density.log_joint(values)
    moved = _generators() != before
    if moved or batched is None or not _close(plain, batched, SAME):
        for _ in range(REPEATS if moved else 1):
            if not torch.equal(plain.nan_to_num(), density.log_joint(values).nan_to_num()):
                raise ProblemError(RANDOM)
    density.vectorised = bool(values)
    if values and batched is None:
        try:
            batched = density.log_joint(values)
        except RuntimeError:
            density.vectorised = False
    if batched is not None and not _close(plain, batched, 1e-3):
        density.vectorised = False
    return Tried(values, plain, [t.detach().clone() for t in density.theta.tensors])


def _drawn(density: Density) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values of the latents, and their log joints where the program was run for all of them at once."""
    if density.improper or not density.latents:
        return some_values(density, DRAWS), None
    with _Runs() as runs:
        drawn = density.prior(DRAWS)
    return drawn.values, drawn.log_prior + drawn.log_likelihood if runs.count == 1 else None


class _Runs(Messenger):
    """Counts runs, as often as the site that is met first is met."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.count = "", 0

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "sample":
            self.first = self.first or str(msg["name"])
            self.count += msg["name"] == self.first


def _generators() -> tuple[Any, ...]:
    """Where the generators that a program may draw from stand."""
    _, key, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(key).tobytes(), rest


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _padding(density: Density, tried: Tried) -> list[str]:
    """The latents whose masked entries move nothing, as padding of sequences that end early, masked throughout.

    All are moved together; where that shows, one by one, if they are few."""
    masked = [n for n, s in density.latents.items() if s.mask is not None and not s.scaled and n in tried.values]
    if not masked or _idle(density, tried, masked):
        return masked
    return [n for n in masked if _idle(density, tried, [n])] if len(masked) <= FEW else []


def _idle(density: Density, tried: Tried, names: list[str]) -> bool:
    """Whether the masked entries of these latents can take other values, and the log joint does not change: those of
    another draw and, where they can be listed, the first and the last there are."""
    elsewhere = {name: value.roll(1, 0) for name, value in tried.values.items()}
    if density.improper:  # it was tried at one point alone
        elsewhere = density.constrain(torch.randn(DRAWS, *density.batch_shape, density.dim, dtype=density.dtype))
    listed = any(density.latents[name].support is not None for name in names)
    for other in (None, 0, -1) if listed else (None,):
        moved = {}
        for name in names:
            site, value = density.latents[name], tried.values[name]
            assert site.mask is not None
            mask = site.to_own(site.mask.to(value.device).expand(site.shape), site.event_dim)
            if other is None or site.support is None:
                new = elsewhere[name].to(value)
            else:
                new = site.values(density.dtype)[other].to(value)
            moved[name] = torch.where(mask, value, new)
        if not _close(tried.log_joint, density.log_joint({**tried.values, **moved}), SAME):
            return False
    return True


def couples_data(density: Density, tried: Tried) -> bool:
    """Whether moving the first datum's latents moves another datum's log joint, whatever the plates declare."""
    if density.batch_shape.numel() < 2:
        return False
    batch_dim = len(density.batch_shape)
    moved = {name: value[:1].clone() for name, value in tried.values.items()}
    for name, value in moved.items():  # in draw 0 the first datum takes its value of draw 1
        other = tried.values[name][1].view(density.batch_shape.numel(), *value.shape[1 + batch_dim :])
        value.view(1, *other.shape)[0, 0] = other[0]
    before, after = (joint[0].flatten()[1:] for joint in (tried.log_joint, density.log_joint(moved)))
    return not _close(before, after, 1e-4)


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

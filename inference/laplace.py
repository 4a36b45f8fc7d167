"""Modes and curvatures of all batch elements at once, in the unconstrained space.

Damped Newton steps on log_joint(u), each element with its own damping (Levenberg 1944, doi:10.1090/qam/10666): a step
that does not improve its element is refused and the damping raised, whatever the others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .density import Density
from .engine import EngineError, Run
from .posterior import gathered

CLIMBED = 1e-10  # nats that another step would gain, below which a point has arrived
ROWS_TOGETHER = 2**22  # numbers of the program that rows of a Hessian take, at most
RISING = 1e-6  # nats that a climb may still be below its mode


class GaussianFit(NamedTuple):
    """u ~ N(mean, tril tril') per batch element: (*batch, D) and (*batch, D, D). `rivals`: how many batch elements
    have another mode, more than 3 sds away and less than 5 nats below. At its mean, (*batch) each: `value`, the log
    joint; `unfinished`, whether it still rises; `flat`, whether some direction has no downward curvature."""

    mean: Tensor
    tril: Tensor
    rivals: int = 0
    value: Tensor | None = None
    unfinished: Tensor | None = None
    flat: Tensor | None = None

    @property
    def alarms(self) -> tuple[str, ...]:
        if not self.rivals:
            return ()
        return (f"{self.rivals} of {self.mean[..., 0].numel()} posteriors have a second mode, which this leaves out",)

    @property
    def no_modes(self) -> tuple[str, ...]:
        """What keeps the mean from being a mode, in words."""
        said = []
        for found, words in (
            (self.unfinished, "still rise where the climb ended"),
            (self.flat, "are flat at the mode"),
        ):
            if found is not None and bool(found.any()):
                said.append(f"{int(found.sum())} of {found.numel()} log joints {words}: there may be none")
        return tuple(said)


def laplace(
    density: Density,
    num_steps: int = 100,
    start: Tensor | None = None,
    num_starts: int = 6,
    jacobian: bool = True,
) -> GaussianFit:
    """The Gaussian at the highest of the modes found, with the curvature there.

    start     (*batch, D) to climb from; None: `num_starts` draws of the prior, climbed side by side
    jacobian  False: of the density of the constrained values, whose mode is another
    Raises `EngineError` where no finite start is found.
    """
    starts = starting_points(density, num_starts) if start is None else start[None]
    u, value, gradient, hessian, _ = climb(
        density, lambda u: density.log_joint(u, jacobian=jacobian), starts, num_steps
    )
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    if not bool(value.amax(0).isfinite().all()):
        raise EngineError("the log joint or its curvature is not finite at any of the starting points")
    best = value.argmax(0)
    climbed = u
    u, gradient, hessian = (gathered(t, best[None])[0] for t in (u, gradient, hessian))
    eigenvalues, vectors = torch.linalg.eigh(-hessian)
    if not bool(eigenvalues.isfinite().all()):
        raise EngineError("the curvature of the log joint at its mode is not finite")
    # flat or upward directions get the unit width of the standardised prior rather than an endless one
    variance = torch.where(eigenvalues > 1e-6, 1 / eigenvalues, torch.ones_like(eigenvalues))
    covariance = (vectors * variance[..., None, :]) @ vectors.mT
    tril = torch.linalg.cholesky(covariance + 1e-14 * eye)
    apart = torch.linalg.solve_triangular(tril, (climbed - u)[..., None], upper=False)[..., 0].norm(dim=-1) > 3
    rivals = (apart & (value > value.amax(0) - 5)).any(0)
    # what one more step of the fitted Gaussian would gain, in nats
    uphill = tril.mT @ gradient[..., None]
    gain = 0.5 * uphill.square().sum((-1, -2))
    last = torch.where(gain <= RISING, 1.0, 0.0)  # a step whose gain is below rounding is not judged by it
    return GaussianFit(
        u + last[..., None] * (tril @ uphill)[..., 0],
        tril,
        rivals=int(rivals.sum()),
        value=value.amax(0) + last * gain,
        unfinished=gain > RISING,
        flat=(eigenvalues <= 1e-6).any(-1),
    )


def climb(
    density: Density, function: Callable[[Tensor], Tensor], u: Tensor, num_steps: int = 100
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Damped Newton steps uphill on a function of u (S, *batch, D) made of this density's, each point by itself: where
    they end, its value, gradient and Hessian there, and how much higher the next step would hope to be, (S, *batch)."""
    damping = torch.full(u.shape[:-1], 1e-3, dtype=u.dtype, device=u.device)
    value, gradient, hessian = _curvature(density, function, u)
    # a point without curvature cannot climb, and is none to end at
    whole = gradient.isfinite().all(-1) & hessian.isfinite().all(-1).all(-1)
    value = torch.where(whole, value, torch.full_like(value, -math.inf))
    gradient = torch.where(whole[..., None], gradient, torch.zeros_like(gradient))
    hessian = torch.where(whole[..., None, None], hessian, -torch.eye(u.shape[-1], dtype=u.dtype, device=u.device))
    promise = torch.full_like(value, math.inf)
    for _ in range(num_steps):
        # -hessian + damping I, shifted where it is not positive definite, so that the step goes uphill
        eigenvalues, vectors = torch.linalg.eigh(-hessian)
        lowest = eigenvalues.clamp_min(1e-8).where(eigenvalues > 0, eigenvalues.abs().clamp_min(1e-3))
        step = (vectors @ ((vectors.mT @ gradient[..., None]) / (lowest + damping[..., None])[..., None]))[..., 0]
        promise = (gradient * step).sum(-1)
        moving = promise > CLIMBED
        if not bool(moving.any()):
            break
        proposal = u + step * moving[..., None]
        new = _curvature(density, function, proposal)
        better = moving & (new[0] > value) & new[1].isfinite().all(-1) & new[2].isfinite().all(-1).all(-1)
        u = torch.where(better[..., None], proposal, u)
        value = torch.where(better, new[0], value)
        gradient = torch.where(better[..., None], new[1], gradient)
        hessian = torch.where(better[..., None, None], new[2], hessian)
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e12)
        if not bool((moving & (damping < 1e11)).any()):
            break
    return u, value, gradient, hessian, promise


def earlier_mode(density: Density, run: Run) -> Tensor | None:
    """The mode (*batch, D) that an earlier run on these data has left; None where there is none, or of other data."""
    mode = run.warm.get("mode")
    if mode is None or mode.shape != (*density.batch_shape, density.dim):
        return None
    return mode.to(dtype=density.dtype, device=density.device, copy=True)


def moments(u: Tensor, weights: Tensor) -> GaussianFit:
    """The Gaussian with the mean and covariance of weighted draws u (S, *batch, D), weights (S, *batch)."""
    w = (weights / weights.sum(0))[..., None].to(u)
    mean = (w * u).sum(0)
    centred = u - mean
    covariance = torch.einsum("s...i,s...j->...ij", w * centred, centred)
    jitter = 1e-10 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    tril, failed = torch.linalg.cholesky_ex(covariance + jitter)
    if bool(failed.any()):
        raise EngineError("the draws do not span the space of the latents: their covariance is singular")
    return GaussianFit(mean, tril)


def student_t(fit: GaussianFit, count: int, degrees: float) -> tuple[Tensor, Tensor]:
    """Draws u (count, *batch, D) from the multivariate t around a Gaussian fit, and their log density."""
    noise = torch.randn((count, *fit.mean.shape), dtype=fit.mean.dtype, device=fit.mean.device)
    shape = torch.full((count, *fit.mean.shape[:-1]), degrees / 2, dtype=fit.mean.dtype, device=fit.mean.device)
    noise = noise / (torch._standard_gamma(shape) * 2 / degrees).sqrt()[..., None]
    return fit.mean + (fit.tril @ noise[..., None])[..., 0], _log_t(fit, noise, degrees)


def student_t_log_density(fit: GaussianFit, u: Tensor, degrees: float) -> Tensor:
    """The log density of that t at u (count, *batch, D), (count, *batch)."""
    noise = torch.linalg.solve_triangular(fit.tril, (u - fit.mean)[..., None], upper=False)[..., 0]
    return _log_t(fit, noise, degrees)


def _log_t(fit: GaussianFit, noise: Tensor, degrees: float) -> Tensor:
    dim = noise.shape[-1]
    constant = math.lgamma((degrees + dim) / 2) - math.lgamma(degrees / 2) - dim / 2 * math.log(degrees * math.pi)
    log_volume = fit.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return constant - log_volume - (degrees + dim) / 2 * torch.log1p(noise.square().sum(-1) / degrees)


def starting_points(density: Density, count: int = 6, tries: int = 20) -> Tensor:
    """(count, *batch, D): per batch element the best two of zero and some prior draws, and others as they come, for the
    modes that the best do not lead to. Where the prior is improper, draws uniform on (-2, 2) stand for it."""
    shape = (*density.batch_shape, density.dim)
    u = torch.zeros((1, *shape), dtype=density.dtype, device=density.device)
    best, tries = min(2, count), max(tries, 2 * count)
    if not density.improper:
        u = torch.cat([u, density.unconstrain(density.prior(tries).values)])
    elif count > 1:
        u = torch.cat([u, 4 * torch.rand((tries, *shape), dtype=density.dtype, device=density.device) - 2])
    u = torch.where(u.isfinite(), u, torch.zeros_like(u))
    value = density.log_joint(u)
    value = torch.where(value.isnan(), torch.full_like(value, -math.inf), value)
    if not bool(value.amax(0).isfinite().all()):
        raise EngineError("the log joint is not finite at any of the starting points drawn from the prior")
    order = value.argsort(0, descending=True)
    rest = order[best:]
    shuffled = rest.gather(0, torch.rand(rest.shape, device=rest.device).argsort(0))
    order = torch.cat([order[:best], shuffled[: count - best]])
    order = torch.where(value.gather(0, order).isfinite(), order, order[:1])
    return gathered(u, order)


def _curvature(density: Density, function: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value (*batch), gradient (*batch, D) and Hessian (*batch, D, D) of a function of u."""
    with torch.enable_grad():
        u = u.detach().requires_grad_(True)
        value = function(u)
        (gradient,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        hessian = _rows(density, gradient, u)
        density.counts["gradients"] += u.shape[-1] * len(u)
    return value.detach(), gradient.detach(), (hessian + hessian.mT) / 2


def _rows(density: Density, gradient: Tensor, u: Tensor) -> Tensor:
    """The derivative of a gradient of u, (S, *batch, D, D): many rows by one pass where each of its operations can be
    batched, else one by one."""
    none = torch.zeros((u.shape[-1], *u.shape), dtype=u.dtype, device=u.device)
    if not gradient.requires_grad:
        return none.movedim(0, -2)
    each = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    each = each.reshape(-1, *[1] * (u.dim() - 1), u.shape[-1]).expand_as(none)
    derivative = partial(torch.autograd.grad, gradient, u, retain_graph=True, allow_unused=True)
    together = max(1, ROWS_TOGETHER // (len(u) * density.layout.numel))
    try:
        rows = [derivative(part, is_grads_batched=True)[0] for part in each.split(together)]
    except RuntimeError:
        rows = [derivative(one)[0] for one in each]
        rows = rows if rows[0] is None else [torch.stack(rows)]
    return (none if rows[0] is None else torch.cat(rows)).movedim(0, -2)

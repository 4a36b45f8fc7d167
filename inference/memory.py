"""What stochastic-approximation EM remembers: draws of all steps, in bounded memory.

    Q_t(theta) = (1 - g_t) Q_{t-1}(theta) + g_t mean_s log p_theta(x, z_ts)

is an average over all draws so far, whose weights fall. Beyond `MOST` draws of each datum they are exchanged for fewer
that give the same Q, as far as it depends on first and second moments of each datum's latents: 2 D points, D the number
of its latents' dimensions,

    m +- sqrt(D) r_j,    m = E[z],  sum_j r_j r_j' = Cov[z]      (Julier & Uhlmann 1997, doi:10.1117/12.280797)

or the values of its one discrete latent with their total weights. Whether Q is the same is seen at three thetas: it is
in models whose log joint is quadratic in z, such as linear Gaussian ones. Where it is not, the draws are thinned by
systematic resampling, which changes Q by a random error of mean zero, that of `MOST` / 2 draws: this is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .density import Density
from .learning import expected_log_joint
from .posterior import gathered
from .resampling import reached

MOST = 400  # draws of each datum
SAME = 1e-9  # relative: what rounding may change in Q
SPREAD = 0.1  # of the thetas that Q is compared at, unconstrained

Draws = tuple[dict[str, Tensor], Tensor]


class Memory:
    """Draws (S, *batch, *event) of all steps with weights (S, *batch) that sum to one for each datum. `thinned`:
    whether what is remembered has lost anything."""

    def __init__(self, density: Density) -> None:
        self.density = density
        self.thinned = False
        self._kept: Draws | None = None
        self._shortens = True  # whether fewer draws gave the same Q so far

    def blended(self, values: Mapping[str, Tensor], weights: Tensor, gain: float) -> Draws:
        """Q_t as draws and weights: the old ones at 1 - gain, these at gain."""
        new = dict(values)
        if self._kept is None or gain == 1:
            self._kept = new, weights
            return self._kept
        old, theirs = self._kept
        if all(torch.equal(old[n], v) for n, v in new.items()):  # a list of all values, say
            self._kept = old, (1 - gain) * theirs + gain * weights
            return self._kept
        both = torch.cat([(1 - gain) * theirs, gain * weights])
        self._kept = {n: torch.cat([old[n], v]) for n, v in new.items()}, both
        if len(both) > MOST:
            self._kept = self._fewer(*self._kept)
        return self._kept

    def _fewer(self, values: dict[str, Tensor], weights: Tensor) -> Draws:
        shorter = self._shorter(values, weights) if self._shortens else None
        if shorter is not None and self._is_same((values, weights), shorter):
            return shorter
        self._shortens, self.thinned = False, True
        return _thinned(values, weights)

    def _shorter(self, values: dict[str, Tensor], weights: Tensor) -> Draws | None:
        """Fewer draws with the same moments, or the values of one discrete latent; None where there are no fewer."""
        sites = self.density.latents
        if len(sites) == 1 and self.density.discrete:
            ((name, site),) = sites.items()
            if site.support is None or math.prod(site.inner_shape) != 1:
                return None
            return _listed(name, values[name], weights, site.support)
        if self.density.discrete or list(values) != self.density.continuous:
            return None
        shorter = _points(values, weights)
        return shorter if 2 * len(shorter[1]) <= MOST else None

    def _is_same(self, full: Draws, shorter: Draws) -> bool:
        """Whether Q is, at theta and at two others near it."""
        tensors = self.density.theta.tensors
        own = [t.detach().clone() for t in tensors]
        try:
            for place in range(3):
                for tensor, value in zip(tensors, own, strict=True):
                    away = torch.cos(torch.arange(value.numel()) * 1.7 + place).reshape(value.shape).to(value)
                    tensor.data.copy_(value + (SPREAD * away if place else 0.0))
                with torch.no_grad():
                    before, after = (expected_log_joint(self.density, *draws) for draws in (full, shorter))
                if not bool((before - after).abs() <= SAME * (1 + before.abs())):  # nan is not
                    return False
        finally:
            for tensor, value in zip(tensors, own, strict=True):
                tensor.data.copy_(value)
        return True


def _points(values: dict[str, Tensor], weights: Tensor) -> Draws:
    """2 D equally weighted points with the draws' means and covariances, for each datum."""
    batch = weights.dim()
    flat = torch.cat([v.flatten(batch) if v.dim() > batch else v[..., None] for v in values.values()], -1)
    w = weights[..., None].to(flat)
    mean = (w * flat).sum(0)
    centred = flat - mean
    covariance = torch.einsum("s...i,s...j->...ij", w * centred, centred)
    size, axes = torch.linalg.eigh(covariance)
    steps = (axes * (flat.shape[-1] * size.clamp_min(0)).sqrt()[..., None, :]).movedim(-1, 0)
    points = torch.cat([mean + steps, mean - steps])
    found, start = {}, 0
    for name, value in values.items():
        numbers = math.prod(value.shape[batch:])
        found[name] = points[..., start : start + numbers].reshape(len(points), *value.shape[1:])
        start += numbers
    return found, torch.full(points.shape[:-1], 1 / len(points), dtype=weights.dtype, device=weights.device)


def _listed(name: str, value: Tensor, weights: Tensor, support: Tensor) -> Draws:
    """Every value of a discrete latent, with the total weight of the draws that have it."""
    support = support.to(value)
    batch, event = weights.dim(), support.shape[1:]
    rows = value.reshape(*weights.shape, 1, -1) == support.reshape(len(support), -1)
    total = (rows.all(-1) * weights[..., None]).sum(0).movedim(-1, 0)  # (k, *batch)
    listed = support.reshape(len(support), *[1] * (batch - 1), *event).expand(*total.shape, *event)
    return {name: listed.reshape(len(support), *value.shape[1:])}, total


def _thinned(values: dict[str, Tensor], weights: Tensor) -> Draws:
    """Half of `MOST` draws of each datum, equally weighted, by systematic resampling along the steps."""
    keep, shape = MOST // 2, weights.shape[1:]
    strata = torch.arange(keep, dtype=weights.dtype, device=weights.device)[:, None]
    flat = weights.reshape(len(weights), -1)
    index = reached(flat, (strata + torch.rand_like(flat[:1])) / keep).reshape(keep, *shape)
    found = {name: gathered(value, index) for name, value in values.items()}
    return found, torch.full(index.shape, 1 / keep, dtype=weights.dtype, device=weights.device)

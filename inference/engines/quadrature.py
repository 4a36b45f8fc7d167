"""Gauss-Hermite quadrature around each datum's mode: deterministic posterior and evidence for few latents.

    integral f(u) du  ~  sum_k w_k exp(|t_k|^2) f(m + sqrt(2) L t_k) sqrt(2)^D |L|

with mode m and curvature (L L')^-1; exact where the posterior is Gaussian (any polynomial up to degree 2n - 1).
Liu & Pierce 1994, doi:10.1093/biomet/81.3.624.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, Run, as_chain, no_sum
from ..laplace import GaussianFit, earlier_mode, laplace
from ..posterior import Evidence
from ..settings import settings

FEWEST = 4  # nodes in each direction that can be held against fewer
UNSETTLED = 0.01  # nats


@settings
class Quadrature:
    """Integrate over the latents of each datum by a product rule at its mode: exact for Gaussian posteriors, and
    close for posteriors of one mode in few dimensions. Discrete latents are summed out.

    num_nodes  nodes in each direction; the evidence's error is its change from num_nodes - 2
    max_nodes  refuse product rules with more nodes than this
    """

    name: ClassVar[str] = "quadrature"
    exact: ClassVar[bool] = True
    num_nodes: int = 16
    max_nodes: int = 100_000

    def supports(self, density: Density) -> str:
        if not density.continuous:
            return "the latents are discrete; enumeration is exact for them"
        if density.unlisted:
            return no_sum(density)
        if self.num_nodes**density.dim > self.max_nodes:
            return (
                f"{self.num_nodes} nodes in {density.dim} dimensions are {self.num_nodes**density.dim:.3g}, more than "
                f"max_nodes = {self.max_nodes}"
            )
        return ""

    def sized(self, calls: float, density: Density) -> Self:
        """The modes take some hundred calls, each node one or two; at least two nodes in each direction."""
        nodes = int((max(calls - 200, 1) / 2) ** (1 / max(1, density.dim)) + 1e-9)
        return replace(self, num_nodes=max(min(self.num_nodes, 2), min(self.num_nodes, nodes)))

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            fit = laplace(density, start=earlier_mode(density, run))
        u, log_weights = self._rule(density, fit, self.num_nodes)
        evidence = torch.logsumexp(log_weights, 0)
        coarse = torch.logsumexp(self._rule(density, fit, max(1, self.num_nodes - 2))[1], 0)
        error = (evidence - coarse).abs().cpu() if self.num_nodes > 1 else torch.full_like(evidence, math.inf).cpu()
        return Draws(
            as_chain(density.complete(u)),
            "weighted",
            log_weights=log_weights[None],
            log_evidence=Evidence(evidence.cpu(), error, "estimate"),
            state={"mode": fit.mean},
            deterministic=True,
            alarms=(*fit.alarms, *self._doubts(error)),
        )

    def _doubts(self, error: Tensor) -> tuple[str, ...]:
        """What speaks against the rule: that it is too small to be judged by another, or does not agree with it."""
        if self.num_nodes < FEWEST:
            each = f"{self.num_nodes} nodes in each direction"
            return (f"{each} cannot tell how far off they are: take {FEWEST} or more",)
        far = ~(error <= UNSETTLED)
        if not bool(far.any()):
            return ()
        return (
            f"the log evidence changes by up to {float(error.max()):.2g} nats from {self.num_nodes - 2} to "
            f"{self.num_nodes} nodes, at {int(far.sum())} of {far.numel()} data: take more nodes",
        )

    @staticmethod
    def _rule(density: Density, fit: GaussianFit, count: int) -> tuple[Tensor, Tensor]:
        """Nodes u (K, *batch, D) and their log weights times density (K, *batch)."""
        dim = fit.mean.shape[-1]
        options: dict[str, Any] = {"dtype": torch.float64, "device": fit.mean.device}
        grid, log_w = (torch.as_tensor(column, **options) for column in gauss_hermite(count))
        t = torch.cartesian_prod(*[grid] * dim).reshape(-1, dim)
        log_w = torch.cartesian_prod(*[log_w] * dim).reshape(-1, dim).sum(-1)
        t = t.reshape((len(t), *[1] * (fit.mean.dim() - 1), dim)).to(fit.mean)
        u = fit.mean + math.sqrt(2.0) * (fit.tril @ t[..., None])[..., 0]
        log_volume = fit.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).double() + dim / 2 * math.log(2.0)
        log_w = log_w.reshape((len(log_w), *[1] * (fit.mean.dim() - 1)))
        return u, log_w + log_volume + density.log_joint(u).double()


def gauss_hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes t of the rule of weight exp(-t^2), and log(w exp(t^2)), (count,) each.

    The nodes are the eigenvalues of the recurrence's matrix (Golub & Welsch 1969, doi:10.2307/2004418), and
    1 / w = sum_k h_k(t)^2 over the normalised polynomials, of which those of a rule of 370 nodes overflow: each sum is
    1 here, and its size in the logarithm.
    """
    beside = np.diag(np.sqrt(np.arange(1, count) / 2), 1)
    t = np.linalg.eigvalsh(beside + beside.T)
    t = (t - t[::-1]) / 2
    before, here, log_size = np.zeros(count), np.ones(count), np.full(count, -0.25 * math.log(math.pi))
    for k in range(1, count):
        before, here = here, t * math.sqrt(2 / k) * here - math.sqrt(1 - 1 / k) * before
        size = np.hypot(1.0, here)
        before, here, log_size = before / size, here / size, log_size + np.log(size)
    return t, t**2 - 2 * log_size

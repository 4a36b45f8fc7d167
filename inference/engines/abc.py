"""Approximate Bayesian computation, per datum: simulate data, and keep the latents whose data came near the observed.

    z ~ p(z),  y ~ p(x | z);   keep z where  d(s(y), s(x)) <= epsilon

The likelihood is never evaluated. What is kept has the law p(z | d <= epsilon): the posterior at epsilon = 0, where
data are discrete and not summarised, and then the share that is kept is the evidence; the prior at a large epsilon.
Without a tolerance the nearest `num_samples` of `num_simulations` are kept: epsilon is what simulations can pay for.

'smc' spends them in rounds, each of twice the size of the one before. A round proposes around the nearest of the last
with the Gaussian kernel of twice their weighted covariance in the unconstrained space, and weighs the nearest of its
own:

    u' ~ q(u') = sum_j W_j N(u'; u_j, 2 Cov_W),    w = p(u') / q(u')

Beaumont, Cornuet, Marin & Robert 2009, doi:10.1093/biomet/asp052; Toni et al. 2009, doi:10.1098/rsif.2008.0172.

`regression` moves what is kept to where the observed summaries would have it: u - (s - s_obs) b, by a local linear fit
with Epanechnikov weights (Beaumont, Zhang & Balding 2002, doi:10.1093/genetics/162.4.2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..acceptance import until_accepted
from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain
from ..posterior import gathered
from ..problem import ProblemError
from ..settings import check_choice, settings
from ..simulations import Comparison, Simulated, nearest, still_moving

METHODS = ("rejection", "smc")
FAR = 0.5  # of the median distance of simulations from the prior: nearer ones must be, to tell anything
WIDER = 1.001  # than the tolerance is the kernel of a regression, so that draws at the tolerance have some weight
PILOT = 1000  # simulations that tell the scales


@settings
class ABC:
    """Keep the latents whose simulated data came near the observed, each datum for itself.

    num_samples      kept draws of each datum
    num_simulations  of each datum, at most; None: 100 for each draw
    method           'rejection', from the prior, or 'smc', in rounds from what was near before
    tolerance        epsilon; None: the nearest num_samples are kept. 'smc' stops where it is reached
    summary          of observations: site -> (n, *batch, *event) to (n, *batch, F); None: all observations
    distance         'euclidean', each summary in units of its median absolute deviation under the prior; or a function
                     of summaries (n, *batch, F) and (*batch, F) to (n, *batch)
    regression       adjust by a local linear fit
    """

    name: ClassVar[str] = "abc"
    simulates: ClassVar[bool] = True
    num_samples: int = 1000
    num_simulations: int | None = None
    method: str = "rejection"
    tolerance: float | None = None
    summary: Callable[[dict[str, Tensor]], Tensor] | None = None
    distance: Any = "euclidean"
    regression: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "method", METHODS)
        eps = self.tolerance
        if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf):
            raise ProblemError(f"ABC(tolerance={eps!r}): expected a number of at least 0, or None.")
        for name in ("summary", "distance"):
            value = getattr(self, name)
            if not (callable(value) or value in (None, "euclidean")) or (name == "distance" and value is None):
                raise ProblemError(f"ABC({name}={value!r}): expected a function.")
        if not isinstance(self.regression, bool):
            raise ProblemError(f"ABC(regression={self.regression!r}): expected True or False.")
        if self.regression and eps == 0:
            raise ProblemError("ABC(regression=True, tolerance=0): nothing is left to adjust; give one of them.")
        kept, total = self.num_samples, self.num_simulations
        if isinstance(kept, int) and isinstance(total, int) and total <= kept:
            raise ProblemError(f"ABC(num_simulations={total}): more than num_samples={kept} are needed.")

    def supports(self, density: Density) -> str:
        factors = [n for n, s in density.sites.items() if s.role == "factor"]
        if density.improper or factors:
            return f"site {[*density.improper, *factors][0]!r} cannot be drawn from, so data cannot be simulated"
        shown = ("latent",) if self.summary else ("latent", "observed")
        reweighted = [n for n, s in density.sites.items() if s.reweighted and s.role in shown]
        if reweighted:
            return f"site {reweighted[0]!r} is masked or scaled, which simulated data do not show"
        if (self.method == "smc" or self.regression) and density.discrete:
            what = "method='smc'" if self.method == "smc" else "regression"
            return f"site {density.discrete[0]!r} is discrete: {what} moves continuous latents only"
        return ""

    def sized(self, calls: float, density: Density) -> ABC:
        """The same share of the simulations is kept."""
        total = max(int(calls), 4)
        return replace(self, num_simulations=total, num_samples=max(2, total * self.num_samples // self.total))

    @property
    def total(self) -> int:
        return 100 * self.num_samples if self.num_simulations is None else self.num_simulations

    def run(self, density: Density, run: Run) -> Draws:
        pilot = min(PILOT, self._first_round if self.method == "smc" else self.total // 2)
        compare, first = Comparison.of(density, self.summary, self.distance, pilot)
        if self.method == "smc":
            return self._smc(density, run, compare, first)
        if self.tolerance is not None:
            return self._within(density, run, compare, self.tolerance, self.total - pilot)
        found = nearest(density, compare, self.num_samples, self.total, run, first=first)
        return self._answer(density, compare, found, torch.zeros_like(found.distance))

    def _within(self, density: Density, run: Run, compare: Comparison, tolerance: float, budget: int) -> Draws:
        """What lies within a given tolerance."""

        def draw(count: int) -> tuple[dict[str, Tensor], Tensor]:
            found = compare.simulate(density, count)
            return {**found.latents, "": found.summary}, found.distance <= tolerance

        accepted = until_accepted(density, run, draw, self.num_samples, budget)
        batch, latents = tuple(density.batch_shape), dict(accepted.z)
        summary = latents.pop("")
        exact = tolerance == 0 and self.summary is None and self.distance == "euclidean"
        log_weights = accepted.log_weights(batch)
        if exact:
            return Draws(
                as_chain(density.complete(latents)),
                "iid" if log_weights is None else "weighted",
                log_weights,
                accepted.evidence(torch.zeros(accepted.count.shape, dtype=torch.float64), batch),
                exact=True,
                alarms=accepted.alarms(),
                figures={"acceptance": accepted.rate.reshape(batch)},
            )
        distance = compare.distance(density, summary)
        weights = torch.zeros_like(distance) if log_weights is None else log_weights[0].to(distance)
        answer = self._answer(density, compare, Simulated(latents, summary, distance), weights)
        figures = {**answer.figures, "acceptance": accepted.rate.reshape(batch)}
        return replace(answer, alarms=(*accepted.alarms(), *answer.alarms), figures=figures)

    @property
    def _rounds(self) -> int:
        return max(1, int(math.log2(self.total / (2 * self.num_samples) + 1)))

    @property
    def _first_round(self) -> int:
        return self.total // (2**self._rounds - 1)

    def _smc(self, density: Density, run: Run, compare: Comparison, first: Simulated) -> Draws:
        rounds, size = self._rounds, self._first_round
        found = nearest(density, compare, self.num_samples, size, run, first=first)
        u = density.unconstrain(found.latents)
        log_w = torch.zeros_like(found.distance)
        reached = False
        for index in range(1, rounds):
            kernel = Kernel.around(u, log_w)
            found = nearest(density, compare, self.num_samples, size * 2**index, run, kernel.draw)
            u = found.latents[""]
            log_w = density.log_prior(u) - kernel.log_density(u)
            if bool(log_w.isnan().any()):
                raise EngineError(f"the log prior is undefined (NaN) at a particle of round {index + 1}")
            run.progress("rounds", index + 1, rounds)
            reached = self.tolerance is not None and bool((found.distance.amax(0) <= self.tolerance).all())
            if reached:
                break
        answer = self._answer(density, compare, found._replace(latents={"": u}), log_w, always=True)
        if self.tolerance is None or reached:
            return answer
        eps = float(found.distance.amax())
        alarm = f"the tolerance {self.tolerance:g} was not reached, only {eps:.3g}: take more simulations"
        return replace(answer, alarms=(alarm, *answer.alarms))

    def _answer(
        self, density: Density, compare: Comparison, found: Simulated, log_w: Tensor, always: bool = False
    ) -> Draws:
        """Draws, adjusted where that was asked for, and what can be seen of their distance from the posterior."""
        z: Any = found.latents.get("", found.latents)
        epsilon = found.distance.amax(0)
        alarms, adjusted = compare.alarms(epsilon, FAR), None
        if density.continuous:
            u = z if isinstance(z, Tensor) else density.unconstrain(z)
            width = torch.where(epsilon > 0, WIDER * epsilon, torch.ones_like(epsilon))
            local = 1 - (found.distance / width).square()
            if self.regression:
                u = compare.adjusted(density, u, found.summary, log_w.exp() * local)
                log_w, z = log_w + local.log(), u
            elif bool((epsilon > 0).any()) and compare.enough(log_w.exp() * local):
                moved = compare.adjusted(density, u, found.summary, log_w.exp() * local)
                with density.uncounted():  # they judge the answer, and are not part of it
                    adjusted = as_chain(density.constrain(moved)), (log_w + local.log())[None]
            alarms += still_moving(u, log_w, found.distance)
        weighted = always or self.regression or bool((log_w != 0).any())
        return Draws(
            as_chain(density.complete(z)),
            "weighted" if weighted else "iid",
            log_w.double().cpu()[None] if weighted else None,
            alarms=alarms,
            unknown=""
            if not weighted
            else "draws at a tolerance above zero: no figure tells how far they are from the posterior",
            figures={"tolerance": epsilon, "tolerance_share": epsilon / compare.usual},
            adjusted=adjusted,
        )


class Kernel(NamedTuple):
    """A Gaussian around each of weighted particles u (S, *batch, D), of twice their covariance."""

    u: Tensor
    weights: Tensor  # (S, *batch), normalised
    tril: Tensor

    @classmethod
    def around(cls, u: Tensor, log_w: Tensor) -> Kernel:
        weights = torch.softmax(log_w, 0)
        centred = u - (weights[..., None] * u).sum(0)
        covariance = 2 * torch.einsum("s...i,s...j->...ij", weights[..., None] * centred, centred)
        scale = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        tril, failed = torch.linalg.cholesky_ex(covariance + 1e-10 * scale * eye)
        if bool(failed.any()) or not bool(tril.isfinite().all()):
            raise EngineError("the particles of a round do not span the space of the latents: take more")
        return cls(u, weights, tril)

    def draw(self, count: int) -> Tensor:
        rows = self.weights.reshape(len(self.u), -1).T  # (N, S)
        parent = torch.multinomial(rows, count, replacement=True).T.reshape(count, *self.weights.shape[1:])
        noise = torch.randn((count, *self.u.shape[1:]), dtype=self.u.dtype, device=self.u.device)
        return gathered(self.u, parent) + (self.tril @ noise[..., None])[..., 0]

    def log_density(self, u: Tensor, numbers: int = 2**24) -> Tensor:
        """log q(u), (S', *batch); some data at a time."""

        def white(v: Tensor) -> Tensor:  # (N, S, D)
            solved = torch.linalg.solve_triangular(self.tril, v[..., None], upper=False)[..., 0]
            return solved.reshape(len(v), -1, v.shape[-1]).transpose(0, 1)

        at, centres, log_w = white(u), white(self.u), self.weights.reshape(len(self.u), -1).T.log()
        step = max(1, numbers // (len(u) * len(self.u)))
        pieces = [
            torch.logsumexp(log_w[i : i + step, None] - 0.5 * torch.cdist(a, c).square(), -1)
            for i, (a, c) in ((i, (at[i : i + step], centres[i : i + step])) for i in range(0, len(at), step))
        ]
        log_volume = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + u.shape[-1] / 2 * math.log(2 * math.pi)
        return torch.cat(pieces).T.reshape(u.shape[:-1]) - log_volume

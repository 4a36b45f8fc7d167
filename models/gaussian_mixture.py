"""Gaussian mixtures: a discrete latent under a normal observation, exact by enumeration; and a case that goes wrong.

case='components'   z_i ~ Categorical(weights),   x_i ~ N(locs[z_i], diag(scales[z_i])^2)
                    or, covariance='full',        x_i ~ N(locs[z_i], L L'), L = scale_trils[z_i]

    posterior   r_ik = p(x_i, z_i = k) / sum_l p(x_i, z_i = l), the responsibilities
    learning    EM: weights_k = mean_i r_ik; locs_k, scales_k = mean and sd of the x_i weighted by r_ik

    (or the Cholesky factor of the weighted covariance). The guide is Categorical with logits quadratic in x: it holds
    the exact posterior, and starts there; full covariances have none.
    Source: Dempster, Laird and Rubin (1977), doi:10.1111/j.2517-6161.1977.tb01600.x.

case='merging'      locs_k ~ N(0, 10),   z_i ~ Categorical(0.4, 0.6),   x_i ~ N(locs[z_i], scale),   theta = scale

    Two clusters at -2 and 4 with sd 1; the locs are latent. SVI with a normal guide over the locs merges them: both
    locs settle near the overall mean and the scale near 3, 90 nats below the fit with two clusters. From locs near 0 a
    greater scale is the quickest way up; once it is the sd of all the data, the likelihood is flat in the distance
    of the locs (its curvature there is proportional to the sample variance less scale^2), and a wide guide, which
    that flatness invites, keeps the scale wide. Adam stays there for thousands of steps. At any one theta the
    reference does not share this fate: it sums z out and integrates over both locs.
    The known, unequal weights identify the labels: at scale 1, exchanging them costs 0.2 N log(0.6 / 0.4) nats, so
    no ordering is imposed. At the merged scale the two locs do overlap, and the reference says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Problem, ProblemError, Reference

from . import _draws, _settings

MERGING_WEIGHTS = (0.4, 0.6)
MERGING_LOCS = (-2.0, 4.0)
MERGING_PRIOR = 10.0
MAX_GRID = 1500

BENCH = ({"num_data": 100}, {"case": "merging"})  # settings that it joins a benchmark with
SMOKE = {"num_data": 50}  # settings that it joins a smoke test with


def problem(
    *,
    case: str = "components",
    num_data: int = 200,
    num_components: int = 3,
    data_dim: int = 2,
    separation: float = 4.0,
    covariance: str = "diagonal",
    seed: int = 0,
) -> Problem:
    """N points from K normals in D dimensions, or the merging case.

    case         'components' or 'merging'; the merging case has two components in one dimension, whatever is set
    separation   distance of neighbouring true locs along an axis, in units of the components' sd
    covariance   of the components: 'diagonal' or 'full', whose data are then correlated by 0.5

    theta is `weights` (K), `locs` (K, D) and `scales` (K, D), or `scale_trils` (K, D, D) where covariances are full;
    the locs start at K data far apart, the scales at the sd of all. In the merging case theta is `scale` (), starting
    at 1. Raises `ProblemError` on a setting out of range.
    """
    n = _settings.count("num_data", num_data, 2)
    k, d = _settings.count("num_components", num_components), _settings.count("data_dim", data_dim)
    spread = _settings.number("separation", separation, least=0.0)
    generator = _settings.generator("seed", seed)
    if _settings.choice("case", case, ("components", "merging")) == "merging":
        return _merging(n, generator)
    if k > n:
        raise ProblemError(f"num_components={k} is more than num_data={n}: each starts at a datum of its own.")
    if _settings.choice("covariance", covariance, ("diagonal", "full")) == "full":
        return _full(n, k, d, spread, generator)
    return _components(n, k, d, spread, generator)


def _components(n: int, k: int, d: int, spread: float, generator: torch.Generator) -> Problem:
    x = _clusters(n, k, d, spread, generator)
    start = {
        "weights": torch.full((k,), 1 / k, dtype=torch.float64),
        "locs": _far_apart(x, k),
        "scales": x.std(0).expand(k, d),
    }
    guide_start = posterior_logits(**start)

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", start["weights"].clone, constraint=constraints.simplex)
        locs = pyro.param("locs", start["locs"].clone)
        scales = pyro.param("scales", start["scales"].clone, constraint=constraints.positive)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], scales[z]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        quadratic = pyro.param("quadratic", guide_start["quadratic"].clone)
        linear = pyro.param("linear", guide_start["linear"].clone)
        bias = pyro.param("bias", guide_start["bias"].clone)
        with pyro.plate("data", x.shape[0]):
            logits = x.square() @ quadratic.T + x @ linear.T + bias
            pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return Problem(
        model,
        args=(x,),
        guide=guide,
        reference=reference,
        name="gaussian_mixture",
        m_step=partial(m_step, num_components=k),
    )


def _full(n: int, k: int, d: int, spread: float, generator: torch.Generator) -> Problem:
    correlation = torch.linalg.cholesky(0.5 * torch.eye(d, dtype=torch.float64) + 0.5)
    x = _clusters(n, k, d, spread, generator, correlation)
    start = {
        "weights": torch.full((k,), 1 / k, dtype=torch.float64),
        "locs": _far_apart(x, k),
        "scale_trils": torch.diag(x.std(0)).expand(k, d, d),
    }

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", start["weights"].clone, constraint=constraints.simplex)
        locs = pyro.param("locs", start["locs"].clone)
        trils = pyro.param("scale_trils", start["scale_trils"].clone, constraint=constraints.lower_cholesky)
        components = dist.MultivariateNormal(locs, scale_tril=trils)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", Chosen(components, z), obs=x)

    return Problem(
        model,
        args=(x,),
        reference=full_reference,
        name="gaussian_mixture (full)",
        m_step=partial(full_m_step, num_components=k),
    )


class Chosen(TorchDistribution):
    """The component z (*batch) of a distribution of batch shape (K): `components[z]`, whose densities are computed for
    all K side by side, so that K values of z cost one pass over the data and no gathered covariances."""

    arg_constraints: Mapping[str, constraints.Constraint] = {}

    def __init__(self, components: TorchDistribution, z: Tensor) -> None:
        self.components, self.z = components, z
        super().__init__(z.shape, components.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.components.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Chosen:
        return Chosen(self.components, self.z.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_density = self.components.log_prob(value.unsqueeze(-1 - len(self.event_shape)))  # (*batch, K)
        shape = torch.broadcast_shapes(log_density.shape[:-1], self.z.shape)
        index = self.z.expand(shape)[..., None]
        return log_density.expand(*shape, -1).gather(-1, index)[..., 0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.z.shape
        draws = self.components.expand((*shape, *self.components.batch_shape)).rsample()
        index = self.z.expand(shape).reshape(*shape, 1, *[1] * len(self.event_shape))
        return draws.gather(len(shape), index.expand(*shape, 1, *self.event_shape)).squeeze(len(shape))


def _clusters(
    n: int, k: int, d: int, spread: float, generator: torch.Generator, scale_tril: Tensor | None = None
) -> Tensor:
    """N points (N, D) around locs along the axes, component j in proportion to j + 1, with unit variances."""
    locs = torch.zeros(k, d, dtype=torch.float64)
    for j in range(k):
        locs[j, j % d] = spread * (1 + j // d)
    label = torch.multinomial(torch.arange(1.0, k + 1), n, replacement=True, generator=generator)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return locs[label] + (noise if scale_tril is None else noise @ scale_tril.T)


def _far_apart(x: Tensor, k: int) -> Tensor:
    """k of the data: the first, then each time the one farthest from those chosen; (k, D)."""
    chosen = x[:1]
    while len(chosen) < k:
        chosen = torch.cat([chosen, x[torch.cdist(x, chosen).amin(1).argmax()][None]])
    return chosen


def posterior_logits(weights: Tensor, locs: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The exact log p(z = k | x) up to a constant: quadratic_k . x^2 + linear_k . x + bias_k."""
    precision = scales.square().reciprocal()
    bias = weights.log() - scales.log().sum(1) - 0.5 * (locs.square() * precision).sum(1)
    return {"quadratic": -0.5 * precision, "linear": locs * precision, "bias": bias}


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """All K values of z listed for each datum: `log_weights` (K, N) hold log p(x_i, z_i = k).

    The moments are those of the index z, which is what draws of z hold.
    """
    weights, locs, scales = (parameters[name].double() for name in ("weights", "locs", "scales"))
    standardised = (x.double() - locs[:, None]) / scales[:, None]  # (K, N, D)
    log_density = -0.5 * (standardised.square() + math.log(2 * math.pi)).sum(2) - scales.log().sum(1)[:, None]
    return _listed(weights.log()[:, None] + log_density)


def full_reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """The same for full covariances, by whitening: log N(x; m, L L') = log N(L^-1 (x - m); 0, I) - log det L."""
    weights, locs, trils = (parameters[name].double() for name in ("weights", "locs", "scale_trils"))
    centred = (x.double() - locs[:, None]).mT  # (K, D, N)
    white = torch.linalg.solve_triangular(trils, centred, upper=False)
    log_volume = trils.diagonal(dim1=1, dim2=2).log().sum(1)[:, None]
    log_density = -0.5 * (white.square() + math.log(2 * math.pi)).sum(1) - log_volume
    return _listed(weights.log()[:, None] + log_density)


def _listed(log_weights: Tensor) -> Reference:
    responsibilities = torch.softmax(log_weights, 0)
    index = torch.arange(len(log_weights), dtype=torch.float64)[:, None]
    mean = (responsibilities * index).sum(0)
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": (responsibilities * (index - mean).square()).sum(0).sqrt()},
        log_evidence=Evidence(torch.logsumexp(log_weights, 0), torch.zeros(()), "exact"),
        provenance="enumeration of z",
        log_weights=log_weights,
        draws={"z": torch.arange(len(log_weights))[:, None].expand(log_weights.shape)},
        draw_log_weights=log_weights,
    )


def m_step(draws: Mapping[str, Tensor], weights: Tensor, x: Tensor, *, num_components: int) -> dict[str, Tensor]:
    """Weighted proportions, means and sds of each component; draws['z'] and weights (S, N).

    Raises `ProblemError` where a component has no data, or all its weight on equal data: its likelihood has no
    maximum then.
    """
    responsibilities, total, locs = _weighted_means(draws["z"], weights, x, num_components)
    variance = torch.einsum("kn,knd->kd", responsibilities, (x - locs[:, None]).square()) / total[:, None]
    _refuse_collapse(variance)
    return {"weights": total / total.sum(), "locs": locs, "scales": variance.sqrt()}


def full_m_step(draws: Mapping[str, Tensor], weights: Tensor, x: Tensor, *, num_components: int) -> dict[str, Tensor]:
    """The same with the Cholesky factors of the weighted covariances. Raises `ProblemError` where one is singular."""
    responsibilities, total, locs = _weighted_means(draws["z"], weights, x, num_components)
    covariance = x.new_empty(num_components, x.shape[1], x.shape[1])
    for j, r in enumerate(responsibilities):
        centred = x - locs[j]
        covariance[j] = (r[:, None] * centred).T @ centred / total[j]
    trils, failed = torch.linalg.cholesky_ex(covariance)
    _refuse_collapse(torch.where(failed[:, None] > 0, 0.0, trils.diagonal(dim1=1, dim2=2)))
    return {"weights": total / total.sum(), "locs": locs, "scale_trils": trils}


def _weighted_means(z: Tensor, weights: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Responsibilities (K, N), their sums (K), and the means under them (K, D)."""
    responsibilities = torch.stack([(weights * (z == j)).sum(0) for j in range(k)])
    total = responsibilities.sum(1)
    return responsibilities, total, responsibilities @ x / total[:, None]


def _refuse_collapse(spread: Tensor) -> None:
    """spread (K, D), not all positive where a component has no maximum of its likelihood."""
    bad = ~(spread > 0).all(1)
    if bool(bad.any()):
        raise ProblemError(
            f"component {int(bad.nonzero()[0])} holds no data, or one point only: start elsewhere (seed) "
            "or use fewer components (num_components)."
        )


def _merging(n: int, generator: torch.Generator) -> Problem:
    # exact proportions, so that the labels are identified in every data set
    label = (torch.arange(n) >= round(MERGING_WEIGHTS[0] * n)).long()
    x = torch.tensor(MERGING_LOCS, dtype=torch.float64)[label]
    x = x + torch.randn(n, generator=generator, dtype=torch.float64)

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", lambda: x.new_ones(()), constraint=constraints.positive)
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), MERGING_PRIOR))
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Categorical(x.new_tensor(MERGING_WEIGHTS)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], scale), obs=x)

    return Problem(model, args=(x,), reference=merging_reference, name="gaussian_mixture (merging)")


def merging_reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Moments of the two locs and the log evidence of all data, by the trapezoidal rule on a square; x (N).

    The step is 3/4 of scale / sqrt(N), the least posterior sd a loc can have. Errors are differences to the rule of
    twice the step, and infinite where the posterior reaches the edge of the square. Kind 'none' where the scale is
    so small that the grid would be too large.
    """
    scale, x = parameters["scale"].double(), x.double()
    low, high = float(x.min() - 6 * scale), float(x.max() + 6 * scale)
    half = math.ceil((high - low) / float(1.5 * scale / math.sqrt(len(x))))
    if 2 * half >= MAX_GRID:
        return Reference("none", provenance=f"scale = {float(scale):.3g} is too small for a grid over both locs")
    grid = torch.linspace(low, high, 2 * half + 1, dtype=torch.float64)
    log_component = dist.Normal(grid[:, None], scale).log_prob(x)  # (G, N)
    first, second = (math.log(w) + log_component for w in MERGING_WEIGHTS)
    log_likelihood = torch.stack([torch.logaddexp(row, second).sum(1) for row in first])  # (G, G)
    log_prior = dist.Normal(grid.new_zeros(()), MERGING_PRIOR).log_prob(grid)
    log_joint = log_likelihood + log_prior[:, None] + log_prior

    fine, coarse = _integrate(grid, log_joint), _integrate(grid[::2], log_joint[::2, ::2])
    mean, sd, evidence, edge = fine
    error = [(a - b).abs() if edge < 1e-8 else torch.full_like(a, math.inf) for a, b in zip(fine, coarse, strict=True)]
    return Reference(
        "quadrature",
        mean={"locs": mean},
        sd={"locs": sd},
        mean_error={"locs": error[0]},
        sd_error={"locs": error[1]},
        log_evidence=Evidence(evidence, error[2], "estimate"),
        provenance=f"z summed out, both locs on a {len(grid)} x {len(grid)} grid; error from twice the step",
        draws=Later(lambda: {"locs": _merging_draws(grid, log_joint)}),
    )


def _merging_draws(grid: Tensor, log_joint: Tensor) -> Tensor:
    """Draws (S, 2) of the two locs by the grid of their log density (G, G)."""
    at = _draws.of_grid((log_joint - log_joint.max()).exp().flatten())
    points = torch.stack([grid[at // len(grid)], grid[at % len(grid)]], -1)
    return _draws.within_cells(points, float(grid[1] - grid[0]))


def _integrate(grid: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (2) and sd (2) of the locs, log evidence, and the mass on the edge of the square."""
    log_sum = torch.logsumexp(log_joint.flatten(), 0)
    weight = (log_joint - log_sum).exp()
    marginals = torch.stack([weight.sum(1), weight.sum(0)])  # (2, G)
    mean = marginals @ grid
    sd = (marginals * (grid - mean[:, None]).square()).sum(1).sqrt()
    return mean, sd, log_sum + 2 * (grid[1] - grid[0]).log(), marginals[:, [0, -1]].sum()

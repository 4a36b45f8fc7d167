"""The border to arviz and to disk: chain statistics and Pareto smoothing, export, saving and loading.

The only file that imports arviz or xarray, and only inside functions: they take seconds to import.
Both lines of arviz are met here, 0.x (`InferenceData`) and 1.x (`xarray.DataTree`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .posterior import Posterior
from .problem import Problem
from .storage import to_json

FEWEST_WEIGHTS = 25  # with fewer positive weights the tail holds fewer than the five that a fit needs
DISTINCT = 8  # decimals (nats) to which two log weights must differ to count as two


def _arviz() -> tuple[Any, bool]:
    """arviz, and whether it is the 1.x line. It announces its own changes at import; that is no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz, int(arviz.__version__.split(".")[0]) >= 1


# ---------------------------------------------------------------------------------------------------------------
# Pareto smoothing


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto smoothed importance weights, each batch element by itself: (S, *batch) -> (S, *batch), k-hat (*batch).

    The largest weights are replaced by the order statistics of a generalised Pareto distribution fitted to them,
    and cut at the largest raw weight. Log weights come back on the scale they came in (not normalised), in
    float64, so that their mean still estimates the evidence. k-hat is the shape of the tail. Draws of weight zero
    (-inf) stay so and are left out of the fit. Where there is nothing to fit the weights come back as they are,
    and k-hat is
      0    where the weights have no tail: all equal, or a few values over and over (a discrete latent);
      nan  below 25 positive weights: unknown;
      inf  where the fit fails because a few draws outweigh the rest beyond the range of floating point.
    arviz 0.x and 1.x cut the tail one or two draws apart, so k-hat differs between them by a few hundredths.

    Raises ValueError at nan or +inf.
    Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72), https://arxiv.org/abs/1507.02646.
    """
    raw = log_weights.detach().double().cpu().numpy()
    broken = np.isnan(raw) | (raw == np.inf)
    if broken.any():
        first = tuple(int(i) for i in np.argwhere(broken)[0])
        raise ValueError(
            f"psis: {int(broken.sum())} of {broken.size} log weights are nan or +inf, the first at {first}; "
            "a log weight is finite, or -inf for weight zero. Find the draw at which the density overflows."
        )
    columns = raw.reshape(raw.shape[0], math.prod(raw.shape[1:]))
    smoothed, k_hat = np.empty_like(columns), np.empty(columns.shape[1])
    for j in range(columns.shape[1]):
        smoothed[:, j], k_hat[j] = _smooth(columns[:, j])
    return torch.from_numpy(smoothed.reshape(raw.shape)), torch.from_numpy(k_hat.reshape(raw.shape[1:]))


def _smooth(column: np.ndarray) -> tuple[np.ndarray, float]:
    """`psis` of one vector of log weights without nan or +inf."""
    positive = column > -np.inf
    weights = column[positive]
    if weights.size < FEWEST_WEIGHTS:
        return column, math.nan
    tail = int(min(weights.size / 5, 3 * math.sqrt(weights.size)))
    top = np.sort(weights)[-tail - 1 :]
    if np.unique(np.round(top - top[-1], DISTINCT)).size <= len(top) // 2:
        return column, 0.0
    arviz, one = _arviz()
    with np.errstate(all="ignore"):
        if one:
            from arviz_stats.base import array_stats

            fitted, k_hat = array_stats.psislw(-weights, axis=-1)  # 1.x takes a log likelihood: the other sign
        else:
            fitted, k_hat = arviz.psislw(weights)
    if not np.isfinite(k_hat):
        return column, math.inf
    # arviz normalises; the smallest weight is never in the tail, so it tells by how much
    lowest = weights.argmin()
    smoothed = column.copy()
    smoothed[positive] = fitted + (weights[lowest] - fitted[lowest])
    return smoothed, float(k_hat)


# ---------------------------------------------------------------------------------------------------------------
# Chain statistics


def rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded: (C, S, ...) -> (...).

    nan with one chain, fewer than four draws, a value that is not finite, or a chain that never moves.
    Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), https://doi.org/10.1214/20-BA1221.
    """
    arviz, one = _arviz()
    if draws.shape[0] < 2:
        return torch.full(draws.shape[2:], math.nan, dtype=torch.float64)
    if not one:
        return _each(arviz.rhat, draws)
    from arviz_stats.base import array_stats

    return _each(lambda chains: array_stats.rhat(chains, chain_axis=0, draw_axis=1), draws)


def ess(draws: Tensor, kind: str = "bulk") -> Tensor:
    """Effective number of draws in all chains together: (C, S, ...) -> (...), `kind` 'bulk' or 'tail'.

    'bulk' is that of the rank-normalised draws, 'tail' the smaller of those for the 5 % and 95 % quantiles.
    nan as in `rhat`, save that one chain will do. Raises ValueError for another kind. Source: as `rhat`.
    """
    if kind not in ("bulk", "tail"):
        raise ValueError(f"ess kind {kind!r}: expected 'bulk' or 'tail'.")
    arviz, one = _arviz()
    options = {"method": kind, **({"prob": (0.05, 0.95)} if kind == "tail" else {})}
    if not one:
        return _each(lambda chains: arviz.ess(chains, **options), draws)
    from arviz_stats.base import array_stats

    return _each(lambda chains: array_stats.ess(chains, chain_axis=0, draw_axis=1, **options), draws)


def mcse(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean of correlated draws: (C, S, ...) -> (...), in the draws' unit.

    sd / sqrt(ESS of the mean); nan as in `ess`. Source: as `rhat`.
    """
    arviz, one = _arviz()
    if not one:
        return _each(lambda chains: arviz.mcse(chains, method="mean"), draws)
    from arviz_stats.base import array_stats

    return _each(lambda chains: array_stats.mcse(chains, chain_axis=0, draw_axis=1, method="mean"), draws)


def _each(statistic: Callable[[np.ndarray], Any], draws: Tensor) -> Tensor:
    """A statistic of (C, S) chains for every scalar of (C, S, ...); nan where the chains cannot be judged.

    arviz would take a constant for perfect mixing, so chains that never move are not shown to it.
    """
    values = draws.detach().double().cpu().numpy()
    columns = values.reshape(*values.shape[:2], math.prod(values.shape[2:]))
    result = np.full(columns.shape[2], np.nan)
    if columns.shape[1] >= 4:
        judged = np.isfinite(columns).all((0, 1)) & (columns != columns[:, :1]).any(1).all(0)
        with np.errstate(all="ignore"):  # chains of constant halves divide by zero: infinite R-hat, and rightly so
            for j in np.flatnonzero(judged):
                result[j] = np.asarray(statistic(columns[:, :, j])).item()  # an array of one where numba is installed
    return torch.from_numpy(result.reshape(values.shape[2:]))


# ---------------------------------------------------------------------------------------------------------------
# Export


def to_arviz(posterior: Posterior, problem: Problem | None = None) -> Any:
    """The posterior as arviz's own container: `InferenceData` on 0.x, `xarray.DataTree` on 1.x.

    Groups posterior and sample_stats and, with the problem, observed_data, log_likelihood (per observation) and
    log_prior (per batch element), in nats; the last two only where the draws hold every latent site (a sampler may
    have summed out the discrete ones). Dimensions are chain, draw, batch_dim_0, ... for the batch, and
    <site>_dim_0, ... for the rest. arviz ignores weights, so weighted draws are resampled first and the root is
    marked resampled = 1.

    Raises ValueError where two sites would share a name; `ProblemError` where the problem is not the posterior's.
    """
    arviz, one = _arviz()
    import xarray

    resampled = posterior.log_weights is not None
    shown = posterior.resample() if resampled else posterior
    batch = tuple(posterior.batch_shape)
    groups = {
        "posterior": _dataset(shown.draws, ("chain", "draw"), batch),
        "sample_stats": _dataset(shown.sample_stats, ("chain", "draw"), batch),
    }
    if problem is not None:
        groups |= _densities(shown, problem)
    tree = xarray.DataTree.from_dict({name: group for name, group in groups.items() if group.data_vars})
    tree.attrs.update(_root_attributes(posterior, resampled))
    return tree if one else arviz.InferenceData.from_datatree(tree)


def _densities(posterior: Posterior, problem: Problem) -> dict[str, Any]:
    """The groups that need the model: observed_data, log_likelihood, log_prior."""
    from .density import Density

    batch = tuple(posterior.batch_shape)
    leading = (posterior.num_chains, posterior.num_samples)
    values = {site: draws.flatten(0, 1) for site, draws in posterior.draws.items()}
    with Density(problem, parameters=posterior.parameters) as density:
        groups = {"observed_data": _dataset(density.observed, (), batch)}
        if all(site in values for site in density.latents):
            likelihood = {site: term.unflatten(0, leading) for site, term in density.pointwise(values).items()}
            prior = {"log_prior": density.log_prior(values).unflatten(0, leading)}
            groups["log_likelihood"] = _dataset(likelihood, ("chain", "draw"), batch)
            groups["log_prior"] = _dataset(prior, ("chain", "draw"), batch)
    return groups


def _dataset(tensors: Mapping[str, Tensor], leading: tuple[str, ...], batch: tuple[int, ...]) -> Any:
    """An `xarray.Dataset` of tensors (*leading, *batch, *rest); a tensor without the batch has only the rest."""
    import xarray

    variables: dict[str, tuple[list[str], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        # netCDF keeps "/" for groups, and a variable may not be called like one of its dimensions
        label = name.replace("/", ".") + ("_" if name in leading else "")
        if label in variables:
            raise ValueError(f"site {name!r} would be called {label!r} in arviz, as another is; rename one of them.")
        rest = tensor.shape[len(leading) :]
        shared = len(batch) if tuple(rest[: len(batch)]) == batch else 0
        dims = [*leading, *(f"batch_dim_{i}" for i in range(shared))]
        dims += [f"{label}_dim_{i}" for i in range(len(rest) - shared)]
        variables[label] = (dims, tensor.detach().cpu().numpy())
        sizes |= dict(zip(dims, tensor.shape, strict=True))
    return xarray.Dataset(variables, {dim: np.arange(size) for dim, size in sizes.items()})


def _root_attributes(posterior: Posterior, resampled: bool) -> dict[str, Any]:
    """What a reader of the export should know; strings and numbers only, since netCDF takes no more."""
    attributes: dict[str, Any] = {
        "inference_library": "pyrometer",
        "inference_library_version": version("pyrometer"),
        "creation_library": "pyrometer",
        "engine": posterior.engine,
        "engine_options": to_json(posterior.engine_options),
        "kind": posterior.kind,
        "seed": posterior.seed,
        "status": str(posterior.status),
        "wall_s": posterior.cost.seconds,
        "n_grad": posterior.cost.gradients,
        "n_model_evals": posterior.cost.evaluations,
        "resampled": int(resampled),
    }
    if posterior.log_evidence is not None:
        value, error = posterior.log_evidence.total()
        attributes |= {
            "log_evidence": value,
            "log_evidence_std_error": error,
            "log_evidence_kind": posterior.log_evidence.kind,
        }
    return attributes

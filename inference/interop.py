"""The border to arviz: posteriors as its containers.

The only file that imports arviz or xarray, and only inside functions: they take a second to import.
Both lines of arviz are met here, 0.x (`InferenceData`) and 1.x (`xarray.DataTree`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import Tensor

from .posterior import Posterior
from .problem import Problem
from .storage import to_json


def _arviz() -> tuple[Any, bool]:
    """arviz, and whether it is the 1.x line. It announces its own changes at import; that is no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz, int(arviz.__version__.split(".")[0]) >= 1


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

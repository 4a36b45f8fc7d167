"""PyMC: its model compiled for nutpie's sampler, and its own sampler."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np

from ..record import Draws, Plan
from . import Prepared, Tool


def nutpie(case: ModuleType, plan: Plan) -> Prepared:
    import nutpie

    model = case.pymc_model(case.data())
    warmup = {} if plan.warmup is None else {"tune": plan.warmup}

    def sample(compiled: Any, seed: int) -> Draws:
        trace = nutpie.sample(
            compiled,
            draws=plan.draws,
            chains=plan.chains,
            cores=plan.cores,
            seed=seed,
            progress_bar=False,
            **warmup,
        )
        gradients = sum(int(part.n_steps.sum()) for part in (trace.sample_stats, trace.warmup_sample_stats))
        values = {name: trace.posterior[name].values for name in case.SHAPES}
        return Draws(values, trace.warmup_sample_stats.sizes["draw"], gradients)

    compiled: list[Any] = []

    def called(seed: int) -> Draws:
        compiled[:] = [nutpie.compile_pymc_model(model)]
        return sample(compiled[0], seed)

    return Prepared(called, lambda seed: sample(compiled[0], seed))


def own(case: ModuleType, plan: Plan) -> Prepared:
    import pymc as pm

    model = case.pymc_model(case.data())
    warmup = {} if plan.warmup is None else {"tune": plan.warmup}

    def called(seed: int) -> Draws:
        with model, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few draws, where few were asked for
            trace = pm.sample(
                plan.draws,
                chains=plan.chains,
                cores=plan.cores,
                random_seed=seed,
                progressbar=False,
                nuts_sampler="pymc",
                compute_convergence_checks=False,
                discard_tuned_samples=False,
                **warmup,
            )
        steps = [part.n_steps for part in (trace.sample_stats, trace.warmup_sample_stats)]
        values = {name: np.asarray(trace.posterior[name].values) for name in case.SHAPES}
        return Draws(values, steps[1].sizes["draw"], int(sum(part.sum() for part in steps)))

    return Prepared(called, called)


def one_blas_thread(plan: Plan) -> dict[str, str]:
    """The chains fill the cores; threads of BLAS below them would take turns, and everything longer."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


NUTPIE = {"pymc": "pymc", "nutpie": "nutpie", "numba": "numba"}

TOOLS = [
    Tool("pymc-nutpie", "posterior", NUTPIE, "float64", nutpie, environment=one_blas_thread),
    Tool("pymc", "posterior", {"pymc": "pymc"}, "float64", own),
]

"""PyMC: its model compiled for nutpie's sampler, its own sampler, and its sequential Monte Carlo."""

from __future__ import annotations

import time
import warnings
from types import ModuleType
from typing import Any

import numpy as np

from ..record import Draws, Particles, Plan
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


def smc(case: ModuleType, plan: Plan) -> Prepared:
    """`sample_smc` as it comes, nothing tuned by hand. It compiles in every call, where it sets up its kernel and where
    it draws from the prior: `warm` leaves out both."""
    import pymc as pm

    model = case.pymc_model(case.data())
    compiling: list[float] = []

    class Timed(pm.smc.kernels.IMH):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            super().__init__(*args, **kwargs)
            compiling.append(time.perf_counter() - begin)

        def initialize_population(self) -> Any:
            begin = time.perf_counter()
            population = super().initialize_population()
            compiling.append(time.perf_counter() - begin)
            return population

    def called(seed: int) -> Particles:
        compiling.clear()
        begin = time.perf_counter()
        with model, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one chain, where one was asked for
            trace = pm.sample_smc(
                case.NUM_PARTICLES,
                kernel=Timed,
                chains=1,
                cores=1,
                random_seed=seed,
                progressbar=False,
                compute_convergence_checks=False,
            )
        seconds = time.perf_counter() - begin - sum(compiling)
        log_evidence = trace.sample_stats["log_marginal_likelihood"].values.ravel()[-1]  # of the last stage
        return Particles(case.NUM_PARTICLES, float(log_evidence), seconds)

    return Prepared(called, called)


def one_blas_thread(plan: Plan) -> dict[str, str]:
    """The chains fill the cores; threads of BLAS below them would take turns, and everything longer."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


NUTPIE = {"pymc": "pymc", "nutpie": "nutpie", "numba": "numba"}

TOOLS = [
    Tool("pymc-nutpie", "posterior", NUTPIE, "float64", nutpie, environment=one_blas_thread),
    Tool("pymc", "posterior", {"pymc": "pymc"}, "float64", own),
    Tool("pymc", "smc", {"pymc": "pymc"}, "float64", smc, environment=one_blas_thread),
]

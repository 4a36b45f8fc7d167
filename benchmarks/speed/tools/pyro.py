"""Pyro's own kernel, SVI and importance weights, on the same programs; eager, as they come."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

from ..record import Draws, Plan, Steps, Weights
from . import Prepared, Tool

FEW = 2  # data that are sampled one after the other, at least


def nuts(case: ModuleType, plan: Plan) -> Prepared:
    """In float64, which in eager code takes no longer."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    torch.set_default_dtype(torch.float64)
    problem = case.problem(case.data())
    args = [value.double() if value.is_floating_point() else value for value in problem.args]
    warmup = plan.draws if plan.warmup is None else plan.warmup  # Pyro's default

    def called(seed: int) -> Draws:
        pyro.set_rng_seed(seed)
        runs = 0

        def model(*args: Any) -> None:
            nonlocal runs
            runs += 1
            problem.model(*args)

        sampler = MCMC(NUTS(model), plan.draws, warmup_steps=warmup, num_chains=plan.chains, disable_progbar=True)
        sampler.run(*args)
        draws = sampler.get_samples(group_by_chain=True)
        counted = runs >= plan.draws * plan.chains  # chains in processes of their own count there
        return Draws({n: draws[n].numpy() for n in case.SHAPES}, warmup, gradients=runs if counted else None)

    return Prepared(called, called)


def per_datum(case: ModuleType, plan: Plan) -> Prepared:
    """NUTS for one datum after the other, as a user of Pyro has to, its density compiled, which is faster: of as many
    data as are done when patience ends, in a time that is told as that of all, to which it grows in proportion."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    torch.set_default_dtype(torch.float64)
    problem = case.problem(case.data())
    args = [value.double() if value.is_floating_point() else value for value in problem.args]
    warmup = plan.draws if plan.warmup is None else plan.warmup

    def called(seed: int) -> Draws:
        pyro.set_rng_seed(seed)
        began, each = time.perf_counter(), []
        for datum in range(len(args[0])):
            if datum >= FEW and time.perf_counter() - began > plan.patience:
                break
            kernel = NUTS(problem.model, jit_compile=True, ignore_jit_warnings=True)
            sampler = MCMC(kernel, plan.draws, warmup_steps=warmup, num_chains=plan.chains, disable_progbar=True)
            sampler.run(args[0][datum : datum + 1], *args[1:])
            each.append(sampler.get_samples(group_by_chain=True))
        return Draws(
            {n: torch.cat([draws[n] for draws in each], 2).numpy() for n in case.SHAPES},
            warmup,
            seconds=(time.perf_counter() - began) * len(args[0]) / len(each),
            note=f"only {len(each)} of {len(args[0])} data sampled, one after the other; their worst and median datum "
            "stand for all, and the time of all is extrapolated ('warm'; 'cold' and 'cached' are for those few)",
        )

    return Prepared(called, called)


def svi(case: ModuleType, plan: Plan) -> Prepared:
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO

    from ..cases._vae import BATCH_SIZE, LEARNING_RATE, rows

    size = case.SIZE
    data = torch.from_numpy(size.data())

    def called(seed: int) -> Steps:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        problem = size.problem(data.numpy())
        (x,) = problem.args
        stepper = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
        batches = torch.from_numpy(rows(seed, size, size.num_steps))
        losses = [stepper.step(x[batch]) for batch in batches]
        return Steps(size.num_steps, sum(losses[-100:]) / len(losses[-100:]) / BATCH_SIZE)

    return Prepared(called, called)


def importance(case: ModuleType, plan: Plan) -> Prepared:
    import pyro
    import torch
    from pyro import poutine
    from pyro.infer.importance import vectorized_importance_weights

    from ._weights import evidence

    problem = case.problem(case.data())
    guide = poutine.block(problem.model, hide=["y", "theta"])

    def called(seed: int) -> Weights:
        pyro.set_rng_seed(seed)
        with torch.no_grad():
            log_weights, _, _ = vectorized_importance_weights(
                problem.model, guide, *problem.args, num_samples=case.NUM_DRAWS, max_plate_nesting=1, normalized=False
            )
        return Weights(case.NUM_DRAWS, *evidence(log_weights.numpy()))

    return Prepared(called, called)


REQUIRES = {"pyro-ppl": "pyro", "torch": "torch"}

TOOLS = [
    Tool("pyro", "posterior", REQUIRES, "float64", nuts, compiles=False),
    Tool("pyro-datum-by-datum", "per-datum", REQUIRES, "float64", per_datum, compiles=False),
    Tool("pyro", "svi", REQUIRES, "float32", svi, compiles=False),
    Tool("pyro", "importance", REQUIRES, "float64", importance, compiles=False),
]

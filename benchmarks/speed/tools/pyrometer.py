"""Ourselves, by the public calls alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

from ..record import Draws, Kept, LogWeights, Particles, Plan, Steps, Weights
from . import OURS, Prepared, Tool


def sampler(name: str, precision: str, case: ModuleType, plan: Plan) -> Prepared:
    """NUTS, HMC or Gibbs, as many trajectories' steps as the case says where it says so."""
    import torch

    from pyrometer import inference

    problem = case.problem(case.data())
    settings = {} if plan.warmup is None else {"warmup_steps": plan.warmup}
    settings |= {"num_steps": case.NUM_STEPS} if name == "HMC" else {}
    engine = getattr(inference, name)(num_samples=plan.draws, num_chains=plan.chains, **settings)

    def called(seed: int) -> Draws:
        posterior = inference.infer(problem, engine, seed=seed, dtype=getattr(torch, precision))
        if not posterior.status.done:
            raise RuntimeError(str(posterior.status))
        cost = posterior.cost
        return Draws(
            {name: posterior.draws[name].numpy() for name in case.SHAPES},
            warmup=engine.warmup_steps,
            gradients=round(cost.gradients) or None,
            seconds=cost.seconds - cost.compile_seconds,
            note=f"its density ran as {cost.backend} code",
        )

    return Prepared(called, called)


def svi(case: ModuleType, plan: Plan) -> Prepared:
    from pyrometer.inference import SVI, learn

    from ..cases._vae import BATCH_SIZE, LEARNING_RATE

    size = case.SIZE
    problem = size.problem(size.data())
    engine = SVI(num_steps=size.num_steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, num_samples=2)

    def called(seed: int) -> Steps:
        fit = learn(problem, engine, seed=seed)
        if not fit.status.done:
            raise RuntimeError(str(fit.status))
        trail = fit.trail
        steps = float(trail.step[-1] - trail.step[0])  # the clock of the trail starts after tracing
        return Steps(
            size.num_steps,
            loss=-float(trail.value[trail.step >= size.num_steps - 100].mean()) / size.num_data,
            seconds=float(trail.seconds[-1] - trail.seconds[0]) / steps * size.num_steps,
            note=f"its step ran as {fit.cost.backend} code",
        )

    return Prepared(called, called)


def em(case: ModuleType, plan: Plan) -> Prepared:
    from pyrometer.inference import EM, learn

    problem, learner = case.problem(), EM(num_steps=case.NUM_STEPS, tolerance=0.0)

    def called(seed: int) -> Steps:
        fit = learn(problem, learner, seed=seed)
        if not fit.status.done:
            raise RuntimeError(str(fit.status))
        first, last = fit.trail.seconds[0], fit.trail.seconds[case.NUM_STEPS - 1]
        each = float(last - first) / (case.NUM_STEPS - 1)  # an M-step and an E-step; the E-step after all draws, too
        return Steps(case.NUM_STEPS, -float(fit.trail.value[-1]) / case.ROWS, seconds=each * case.NUM_STEPS)

    return Prepared(called, called)


def importance(case: ModuleType, plan: Plan) -> Prepared:
    from pyrometer.inference import ImportanceSampling, infer

    problem, engine = case.problem(case.data()), ImportanceSampling(proposal="prior", num_samples=case.NUM_DRAWS)

    def called(seed: int) -> Weights:
        posterior = infer(problem, engine, seed=seed)
        if posterior.log_evidence is None:
            raise RuntimeError(str(posterior.status))
        return Weights(case.NUM_DRAWS, *posterior.log_evidence.total())

    return Prepared(called, called)


def latents_importance(precision: str, case: ModuleType, plan: Plan) -> Prepared:
    import torch

    from pyrometer.inference import ImportanceSampling, infer

    problem = case.problem(case.data())
    engine = ImportanceSampling(proposal="guide", num_samples=case.NUM_DRAWS)

    def called(seed: int) -> LogWeights:
        posterior = infer(problem, engine, seed=seed, dtype=getattr(torch, precision))
        if not posterior.status.done or posterior.log_weights is None:
            raise RuntimeError(str(posterior.status))
        return LogWeights(posterior.log_weights[0].numpy(), **_timed(posterior.cost))

    return Prepared(called, called)


def smc(precision: str, case: ModuleType, plan: Plan) -> Prepared:
    import torch

    from pyrometer.inference import SMC, infer

    problem, engine = case.problem(case.data()), SMC(num_samples=case.NUM_PARTICLES)

    def called(seed: int) -> Particles:
        posterior = infer(problem, engine, seed=seed, dtype=getattr(torch, precision))
        if posterior.log_evidence is None:
            raise RuntimeError(str(posterior.status))
        return Particles(case.NUM_PARTICLES, posterior.log_evidence.total()[0], **_timed(posterior.cost))

    return Prepared(called, called)


def _timed(cost: Any) -> dict[str, Any]:
    """Seconds without compilation, and without the diagnosis that comes after the draws: `again` has both."""
    note = f"its density ran as {cost.backend} code; the diagnosis of its draws is in 'again' only"
    return {"seconds": cost.seconds - cost.compile_seconds, "note": note}


def abc(settings: Mapping[str, Any], case: ModuleType, plan: Plan) -> Prepared:
    from pyrometer.inference import ABC, infer

    problem = case.problem(case.data())
    engine = ABC(num_samples=case.NUM_SAMPLES, num_simulations=case.NUM_SIMULATIONS, **settings)

    def called(seed: int) -> Kept:
        posterior = infer(problem, engine, seed=seed)
        if not posterior.status.done:
            raise RuntimeError(str(posterior.status))
        weights = posterior.weights()[0].numpy()
        return Kept(case.NUM_SIMULATIONS, posterior.draws["theta"][0].numpy(), weights)

    return Prepared(called, called)


REQUIRES = {"pyrometer": "pyrometer.inference", "torch": "torch", "pyro-ppl": "pyro"}

TOOLS = [
    Tool(OURS, "posterior", REQUIRES, "float64", partial(sampler, "NUTS", "float64")),
    Tool(OURS, "per-datum", REQUIRES, "float64", partial(sampler, "NUTS", "float64")),
    Tool(f"{OURS}-float32", "per-datum", REQUIRES, "float32", partial(sampler, "NUTS", "float32")),
    Tool(OURS, "hmc", REQUIRES, "float64", partial(sampler, "HMC", "float64")),
    Tool(f"{OURS}-float32", "hmc", REQUIRES, "float32", partial(sampler, "HMC", "float32")),
    Tool(OURS, "gibbs", REQUIRES, "float64", partial(sampler, "Gibbs", "float64")),
    Tool(OURS, "svi", REQUIRES, "float32", svi),
    Tool(OURS, "importance", REQUIRES, "float64", importance),
    Tool(OURS, "latents-importance", REQUIRES, "float64", partial(latents_importance, "float64")),
    Tool(f"{OURS}-float32", "latents-importance", REQUIRES, "float32", partial(latents_importance, "float32")),
    Tool(OURS, "smc", REQUIRES, "float64", partial(smc, "float64")),
    Tool(f"{OURS}-float32", "smc", REQUIRES, "float32", partial(smc, "float32")),
    Tool(OURS, "mixture", REQUIRES, "float64", em),
    Tool(OURS, "chain", REQUIRES, "float64", em),
    Tool(OURS, "abc", REQUIRES, "float64", partial(abc, {})),
    Tool(f"{OURS}-regression", "abc", REQUIRES, "float64", partial(abc, {"regression": True})),
    Tool(f"{OURS}-smc", "abc", REQUIRES, "float64", partial(abc, {"method": "smc"})),
]

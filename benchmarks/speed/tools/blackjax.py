"""BlackJAX on log densities written by hand: NUTS and HMC with window adaptation, chains on a device each or as one
vector; and adaptive tempered SMC."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from ..record import Draws, Particles, Plan
from . import Prepared, Tool
from .numpyro import devices, devices_x64, over_chains, over_data

WARMUP = 1000  # the default of its window adaptation


def nuts(method: str, case: ModuleType, plan: Plan) -> Prepared:
    import blackjax
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    warmup = WARMUP if plan.warmup is None else plan.warmup
    size = sum(math.prod(shape) for shape in case.SHAPES.values())

    def split(flat: Any) -> dict[str, Any]:
        ends = np.cumsum([math.prod(shape) for shape in case.SHAPES.values()])[:-1]
        parts = jnp.split(flat, ends)
        return {n: part.reshape(shape) for (n, shape), part in zip(case.SHAPES.items(), parts, strict=True)}

    def log_density(u: dict[str, Any]) -> Any:
        z, log_jacobian = case.constrain(u, jnp)
        return case.log_joint(z, data, jnp) + log_jacobian

    def chain(key: Any) -> tuple[dict[str, Any], Any]:
        start, adapt, draw = jax.random.split(key, 3)
        position = split(jax.random.uniform(start, (size,), minval=-2.0, maxval=2.0))
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), tuned = adaptation.run(adapt, position, num_steps=warmup)
        kernel = blackjax.nuts(log_density, **parameters)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (case.constrain(state.position, jnp)[0], info.num_integration_steps)

        _, (draws, steps) = jax.lax.scan(step, state, jax.random.split(draw, plan.draws))
        return draws, steps.sum() + tuned.info.num_integration_steps.sum()

    all_chains = over_chains(chain, method)

    def called(seed: int) -> Draws:
        draws, gradients = all_chains(jax.random.split(jax.random.PRNGKey(seed), plan.chains))
        return Draws({name: np.asarray(draws[name]) for name in case.SHAPES}, warmup, int(np.sum(gradients)))

    return Prepared(called, called)


def per_datum(algorithm: str, case: ModuleType, plan: Plan) -> Prepared:
    """A chain for each datum and chain, all as one vector."""
    import blackjax
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    warmup = WARMUP if plan.warmup is None else plan.warmup
    (shape,) = case.SHAPES.values()
    sampler = getattr(blackjax, algorithm)
    length = {"num_integration_steps": case.NUM_STEPS} if algorithm == "hmc" else {}

    def chain(key: Any, x: Any) -> tuple[Any, Any]:
        def log_density(z: Any) -> Any:
            return case.log_joint(z, x, data, jnp)

        start, adapt, draw = jax.random.split(key, 3)
        adaptation = blackjax.window_adaptation(sampler, log_density, **length)
        (state, parameters), tuned = adaptation.run(adapt, jax.random.normal(start, shape), num_steps=warmup)
        kernel = sampler(log_density, **parameters)

        def step(state: Any, key: Any) -> Any:
            state, info = kernel.step(key, state)
            return state, (state.position, info.num_integration_steps)

        _, (draws, steps) = jax.lax.scan(step, state, jax.random.split(draw, plan.draws))
        return draws, steps.sum() + tuned.info.num_integration_steps.sum()

    return over_data(chain, case, plan, data["x"], warmup)


def smc(tuned: bool, case: ModuleType, plan: Plan) -> Prepared:
    """HMC moves the particles, tuned by hand for this case: of steps 0.1 to 0.2 (tuned: 0.3 to 0.5 sds), 3 to 8
    leapfrogs, 1 to 5 moves and ESS targets 0.5 to 0.8, those that gave an error below 0.07 nats soonest.

    tuned  the mass matrix is that of the particles, anew at every temperature; else the unit matrix at all
    """
    import blackjax
    import jax
    import jax.numpy as jnp
    from blackjax.smc import extend_params, resampling
    from blackjax.smc.tuning.from_particles import particles_stds

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    step_size, leapfrogs, moves = (0.3, 4, 1) if tuned else (0.15, 5, 2)

    def settings(variance: Any) -> dict[str, Any]:
        steps = {"step_size": jnp.asarray(step_size), "num_integration_steps": leapfrogs}
        return extend_params({**steps, "inverse_mass_matrix": variance})

    of_all = {
        "logprior_fn": lambda z: case.log_prior(z, jnp),
        "loglikelihood_fn": lambda z: case.log_likelihood(z, data, jnp),
        "mcmc_step_fn": blackjax.hmc.build_kernel(),
        "mcmc_init_fn": blackjax.hmc.init,
        "resampling_fn": resampling.systematic,
        "target_ess": 0.5,
        "num_mcmc_steps": moves,
    }
    unit = settings(jnp.ones(case.COLUMNS))
    if tuned:
        sampler = blackjax.inner_kernel_tuning(
            blackjax.adaptive_tempered_smc,
            mcmc_parameter_update_fn=lambda key, state, info: settings(particles_stds(state.particles) ** 2),
            initial_parameter_value=unit,
            **of_all,
        )
    else:
        sampler = blackjax.adaptive_tempered_smc(mcmc_parameters=unit, **of_all)

    @jax.jit
    def run(key: Any) -> Any:
        key, start = jax.random.split(key)
        state = sampler.init(jax.random.normal(start, (case.NUM_PARTICLES, case.COLUMNS)))

        def unfinished(carried: Any) -> Any:
            _, state, _ = carried
            return (state.sampler_state if tuned else state).tempering_param < 1

        def step(carried: Any) -> Any:
            key, state, log_evidence = carried
            key, of_step = jax.random.split(key)
            state, info = sampler.step(of_step, state)
            return key, state, log_evidence + info.log_likelihood_increment

        _, state, log_evidence = jax.lax.while_loop(unfinished, step, (key, state, 0.0))
        return state, log_evidence

    def called(seed: int) -> Particles:
        _, log_evidence = jax.block_until_ready(run(jax.random.PRNGKey(seed)))
        return Particles(case.NUM_PARTICLES, float(log_evidence))

    return Prepared(called, called)


REQUIRES = {"blackjax": "blackjax", "jax": "jax"}

TOOLS = [
    Tool(f"blackjax-{name}", "posterior", REQUIRES, "float32", partial(nuts, method), devices)
    for name, method in (("parallel", "parallel"), ("vectorised", "vectorized"))
]
TOOLS += [Tool("blackjax-vectorised", "per-datum", REQUIRES, "float32", partial(per_datum, "nuts"), devices)]
TOOLS += [Tool("blackjax-vectorised", "hmc", REQUIRES, "float32", partial(per_datum, "hmc"), devices)]
TOOLS += [
    Tool(name, "smc", REQUIRES, "float32", partial(smc, tuned), devices)
    for name, tuned in (("blackjax-fixed", False), ("blackjax-tuned", True))
]
TOOLS += [Tool(f"{t.name}-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]

"""BlackJAX: NUTS with window adaptation on a log density written by hand, chains on a device each or as one vector."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from ..record import Draws, Plan
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


REQUIRES = {"blackjax": "blackjax", "jax": "jax"}

TOOLS = [
    Tool(f"blackjax-{name}", "posterior", REQUIRES, "float32", partial(nuts, method), devices)
    for name, method in (("parallel", "parallel"), ("vectorised", "vectorized"))
]
TOOLS += [Tool("blackjax-vectorised", "per-datum", REQUIRES, "float32", partial(per_datum, "nuts"), devices)]
TOOLS += [Tool("blackjax-vectorised", "hmc", REQUIRES, "float32", partial(per_datum, "hmc"), devices)]
TOOLS += [Tool(f"{t.name}-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]

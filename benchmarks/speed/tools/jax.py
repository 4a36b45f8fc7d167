"""JAX alone: the weights of eight schools, and the products of a gradient, written by hand and compiled."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..record import Plan, Products, Weights
from . import Prepared, Tool
from ._products import steps_of
from .numpyro import devices_x64


def importance(case: ModuleType, plan: Plan) -> Prepared:
    import jax
    import jax.numpy as jnp

    from ._weights import evidence

    y, sigma = (jnp.asarray(case.data()[name]) for name in ("y", "sigma"))
    constant = -(jnp.log(sigma) + 0.5 * jnp.log(2 * jnp.pi)).sum()

    @jax.jit
    def log_weights(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        mu = 5 * jax.random.normal(keys[0], (case.NUM_DRAWS, 1))
        tau = 5 * jnp.abs(jax.random.cauchy(keys[1], (case.NUM_DRAWS, 1)))
        eta = jax.random.normal(keys[2], (case.NUM_DRAWS, 8))
        return constant - 0.5 * (((y - mu - tau * eta) / sigma) ** 2).sum(1)

    def called(seed: int) -> Weights:
        return Weights(case.NUM_DRAWS, *evidence(np.asarray(log_weights(jax.random.PRNGKey(seed)))))

    return Prepared(called, called)


def products(case: ModuleType, plan: Plan) -> Prepared:
    """All chains of all data as the rows of one matrix. Each gradient is added to the next one's latents, in small, so
    that the compiler cannot leave one out."""
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    a, b, steps, rows = data["a"], data["b"], steps_of(case, plan), plan.chains * len(data["x"])

    @jax.jit
    def run(z: Any) -> Any:
        def step(moved: Any, _: None) -> tuple[Any, None]:
            return z + 1e-6 * (((((z + moved) @ a) @ b) @ b.T) @ a.T), None

        return jax.lax.scan(step, jnp.zeros_like(z), length=steps)[0]

    def called(seed: int) -> Products:
        run(jax.random.normal(jax.random.PRNGKey(seed), (rows, len(a)))).block_until_ready()
        return Products(steps * rows)

    return Prepared(called, called)


TOOLS = [Tool("jax-jit", "importance", {"jax": "jax"}, "float32", importance)]
TOOLS += [Tool("products-jax", "hmc", {"jax": "jax"}, "float32", products)]
TOOLS += [Tool(f"{t.name}-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]

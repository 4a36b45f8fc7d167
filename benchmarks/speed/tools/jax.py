"""JAX alone: the weights of eight schools written by hand and compiled."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..record import Plan, Weights
from . import Prepared, Tool
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


TOOLS = [Tool("jax-jit", "importance", {"jax": "jax"}, "float32", importance)]
TOOLS += [Tool("jax-jit-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]

"""JAX alone: weights of eight schools and of latents, and the products in them, written by hand and compiled."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..record import LogWeights, Plan, Products, Weights
from . import Prepared, Tool
from ._products import amount
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


def latents_importance(case: ModuleType, plan: Plan) -> Prepared:
    """A draw of all data at a time, which is faster than more, or than all draws of a datum: what is between the
    products stays in the cache. log(1 + exp) by way of -|logit|, which is faster than `softplus`. The constants of
    both normals cancel."""
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    loc, scale = data["loc"], data["scale"]

    def log_weight(x: Any, loc: Any, scale: Any, noise: Any) -> Any:
        z = loc + scale * noise
        logits = jnp.tanh(z @ data["a"]) @ data["b"]
        likelihood = x * logits - jnp.maximum(logits, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(logits)))
        return likelihood.sum() + (0.5 * (noise**2 - z**2) + jnp.log(scale)).sum()

    @jax.jit
    def log_weights(key: Any) -> Any:
        def of_all_data(key: Any) -> Any:
            return jax.vmap(log_weight)(data["x"], loc, scale, jax.random.normal(key, loc.shape, loc.dtype))

        return jax.lax.map(of_all_data, jax.random.split(key, case.NUM_DRAWS))

    def called(seed: int) -> LogWeights:
        return LogWeights(np.asarray(log_weights(jax.random.PRNGKey(seed))))

    return Prepared(called, called)


def products(case: ModuleType, plan: Plan) -> Prepared:
    """All chains of all data as the rows of one matrix. What comes of a product is added to the next one's latents, in
    small, so that the compiler cannot leave one out."""
    import jax
    import jax.numpy as jnp

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    a, b = data["a"], data["b"]
    rows, steps, backwards = amount(case, plan, len(data["x"]))

    @jax.jit
    def run(z: Any) -> Any:
        def step(moved: Any, _: None) -> tuple[Any, None]:
            logits = ((z + moved) @ a) @ b
            back = (logits @ b.T) @ a.T if backwards else logits.max(1, keepdims=True)  # a part is not enough for it
            return z + 1e-6 * back, None

        return jax.lax.scan(step, jnp.zeros_like(z), length=steps)[0]

    def called(seed: int) -> Products:
        run(jax.random.normal(jax.random.PRNGKey(seed), (rows, len(a)))).block_until_ready()
        return Products(steps * rows)

    return Prepared(called, called)


TOOLS = [Tool("jax-jit", "importance", {"jax": "jax"}, "float32", importance)]
TOOLS += [Tool("jax-jit", "latents-importance", {"jax": "jax"}, "float32", latents_importance)]
TOOLS += [Tool("products-jax", kind, {"jax": "jax"}, "float32", products) for kind in ("hmc", "latents-importance")]
TOOLS += [Tool(f"{t.name}-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]

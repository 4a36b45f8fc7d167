"""NumPyro: chains one after the other, on a device each, or side by side as one vector; SVI step by step, or scanned.

In float32 as it comes, and in float64. `MCMC.run` compiles again in every call; `warm` takes that out by compiling a
whole chain once, warm-up and draws, and calling it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from ..record import Draws, Plan, Steps
from . import Prepared, Tool

GIBBS_SHARE = 10
WARMUP = 1000  # NumPyro has no default: what its documentation uses, and Stan


def nuts(method: str, case: ModuleType, plan: Plan) -> Prepared:
    import jax
    from numpyro.infer import MCMC, NUTS

    model = case.numpyro_model(case.data())
    warmup = WARMUP if plan.warmup is None else plan.warmup

    def sampler(chains: int) -> Any:
        return MCMC(
            NUTS(model),
            num_warmup=warmup,
            num_samples=plan.draws,
            num_chains=chains,
            chain_method=method,
            progress_bar=False,
        )

    user = sampler(plan.chains)

    def called(seed: int) -> Draws:
        user.run(jax.random.PRNGKey(seed))
        draws = user.get_samples(group_by_chain=True)
        return Draws({name: np.asarray(draws[name]) for name in case.SHAPES}, warmup)

    def chain(key: Any) -> tuple[dict[str, Any], Any]:
        alone = sampler(1)
        gradients = 0
        if warmup:
            alone.warmup(key, extra_fields=("num_steps",), collect_warmup=True)
            gradients = alone.get_extra_fields()["num_steps"].sum()
            key = alone.post_warmup_state.rng_key
        alone.run(key, extra_fields=("num_steps",))
        return alone.get_samples(), gradients + alone.get_extra_fields()["num_steps"].sum()

    all_chains = over_chains(chain, method)

    def warm(seed: int) -> Draws:
        draws, gradients = all_chains(jax.random.split(jax.random.PRNGKey(seed), plan.chains))
        return Draws({name: np.asarray(draws[name]) for name in case.SHAPES}, warmup, int(np.sum(gradients)))

    return Prepared(called, warm)


def per_datum(algorithm: str, case: ModuleType, plan: Plan) -> Prepared:
    """A chain for each datum and chain, all as one vector: its kernel under vmap, on a log density written by hand."""
    import jax
    import jax.numpy as jnp
    from numpyro.infer.hmc import hmc

    data = {name: jnp.asarray(value) for name, value in case.data().items()}
    warmup = WARMUP if plan.warmup is None else plan.warmup
    (shape,) = case.SHAPES.values()
    length = {"num_steps": case.NUM_STEPS, "trajectory_length": None} if algorithm == "HMC" else {}

    def chain(key: Any, x: Any) -> tuple[Any, Any]:
        begin, move = hmc(lambda z: -case.log_joint(z, x, data, jnp), algo=algorithm)
        start, run = jax.random.split(key)

        def step(state: Any, _: None) -> tuple[Any, tuple[Any, Any]]:
            state = move(state)
            return state, (state.z, state.num_steps)

        def tune(state: Any, _: None) -> tuple[Any, Any]:
            state = move(state)
            return state, state.num_steps

        state = begin(jax.random.normal(start, shape), warmup, rng_key=run, **length)
        state, tuned = jax.lax.scan(tune, state, length=warmup)
        _, (draws, steps) = jax.lax.scan(step, state, length=plan.draws)
        return draws, steps.sum() + tuned.sum()

    return over_data(chain, case, plan, data["x"], warmup)


def gibbs(method: str, case: ModuleType, plan: Plan) -> Prepared:
    """`DiscreteHMCGibbs`, which moves labels one by one, NUTS for the rest. A sweep costs the square of the data: it is
    given a tenth of the draws, and as many to warm up, so that it ends; effective draws a second are compared."""
    import jax
    from numpyro.infer import MCMC, NUTS, DiscreteHMCGibbs, init_to_median

    draws = max(50, plan.draws // GIBBS_SHARE)
    warmup = draws if plan.warmup is None else plan.warmup
    sampler = MCMC(
        DiscreteHMCGibbs(NUTS(case.numpyro_model(case.data()), init_strategy=init_to_median)),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=plan.chains,
        chain_method=method,
        progress_bar=False,
        jit_model_args=True,
    )

    def called(seed: int) -> Draws:
        sampler.run(jax.random.PRNGKey(seed))
        found = sampler.get_samples(group_by_chain=True)
        return Draws({name: np.asarray(found[name]) for name in case.SHAPES}, warmup)

    return Prepared(called, called)


def over_data(chain: Callable[[Any, Any], Any], case: ModuleType, plan: Plan, x: Any, warmup: int) -> Prepared:
    """Chains of all data x (N, ...), all as one vector: `chain(key, datum)` answers with draws (S, D) and gradients."""
    import jax

    (name,), count = case.SHAPES, len(x)
    all_chains = jax.jit(jax.vmap(jax.vmap(chain), in_axes=(0, None)))  # chains, data

    def called(seed: int) -> Draws:
        keys = jax.random.split(jax.random.PRNGKey(seed), plan.chains * count).reshape(plan.chains, count, -1)
        draws, gradients = all_chains(keys, x)
        values = np.moveaxis(np.asarray(draws), 1, 2)  # (C, S, N, D)
        return Draws({name: values}, warmup, int(np.sum(gradients)) // count)

    return Prepared(called, called)


def over_chains(chain: Callable[[Any], Any], method: str) -> Callable[[Any], Any]:
    """`chain` of one key, compiled for an array of keys."""
    import jax
    import jax.numpy as jnp

    if method == "parallel":
        return jax.pmap(chain)
    if method == "vectorized":
        return jax.jit(jax.vmap(chain))
    one = jax.jit(chain)
    return lambda keys: jax.tree.map(lambda *parts: jnp.stack(parts), *[one(key) for key in keys])


def svi(scanned: int, case: ModuleType, plan: Plan) -> Prepared:
    """`svi.update` compiled by itself, or `scanned` of them in one call."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO

    from ..cases._vae import BATCH_SIZE, LEARNING_RATE, rows

    size = case.SIZE
    start, data = size.start(), jnp.asarray(size.data())

    def dense(name: str, x: Any) -> Any:
        weight = numpyro.param(f"{name}.weight", jnp.asarray(start[f"{name}.weight"]))
        return x @ weight + numpyro.param(f"{name}.bias", jnp.asarray(start[f"{name}.bias"]))

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(size.latent_dim), 1.0).to_event(1))
            logits = dense("decoder.layers.2", jax.nn.softplus(dense("decoder.layers.0", z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        hidden = jax.nn.softplus(dense("encoder.hidden.0", x))
        loc, sd = dense("encoder.loc", hidden), jnp.exp(dense("encoder.log_sd", hidden))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, sd).to_event(1))

    stepper = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO())

    @jax.jit
    def update(state: Any, batches: Any) -> tuple[Any, Any]:
        if scanned == 1:
            return stepper.update(state, data[batches[0]])
        return jax.lax.scan(lambda state, batch: stepper.update(state, data[batch]), state, batches)

    def called(seed: int) -> Steps:
        state = stepper.init(jax.random.PRNGKey(seed), data[:BATCH_SIZE])
        batches = jnp.asarray(rows(seed, size, size.num_steps).reshape(-1, scanned, BATCH_SIZE))
        losses = []
        for block in batches:
            state, loss = update(state, block)
            losses.append(loss)
        last = np.concatenate([np.ravel(loss) for loss in losses])[-100:]
        return Steps(size.num_steps, float(last.mean()) / BATCH_SIZE)

    return Prepared(called, called)


REQUIRES = {"numpyro": "numpyro", "jax": "jax"}
FIT_REQUIRES = {**REQUIRES, "pyrometer": "pyrometer.models.vae"}  # whose weights all fits start from


def devices(plan: Plan) -> dict[str, str]:
    """A device for each chain, which the cores share: what `numpyro.set_host_device_count` sets."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={plan.chains}"}


def devices_x64(plan: Plan) -> dict[str, str]:
    return {**devices(plan), "JAX_ENABLE_X64": "1"}


TOOLS = [
    Tool(f"numpyro-{name}", "posterior", REQUIRES, "float32", partial(nuts, method), devices)
    for name, method in (("parallel", "parallel"), ("sequential", "sequential"), ("vectorised", "vectorized"))
]
TOOLS += [Tool("numpyro-vectorised", "per-datum", REQUIRES, "float32", partial(per_datum, "NUTS"), devices)]
TOOLS += [Tool("numpyro-vectorised", "hmc", REQUIRES, "float32", partial(per_datum, "HMC"), devices)]
TOOLS += [Tool(f"{t.name}-x64", t.kind, t.requires, "float64", t.prepare, environment=devices_x64) for t in TOOLS]
TOOLS += [
    Tool("numpyro-gibbs", "gibbs", REQUIRES, "float32", partial(gibbs, "parallel"), devices, compiles=False),
    Tool("numpyro-gibbs-x64", "gibbs", REQUIRES, "float64", partial(gibbs, "parallel"), devices_x64, compiles=False),
]
TOOLS += [
    Tool("numpyro-step", "svi", FIT_REQUIRES, "float32", partial(svi, 1)),
    Tool("numpyro-scan", "svi", FIT_REQUIRES, "float32", partial(svi, 100)),
]

"""What is timed: one file, one case. A file put into this folder is run by `pyrometer speed` and checked by the tests.

`KIND` says what a case is. Its libraries are imported inside its functions, for a process loads one tool only.

    'posterior'    NUTS, four chains; speed is effective draws per second
        data() -> {name: array}          drawn with a fixed seed by numpy
        problem(data)                    the model in plain Pyro, as a `Problem`
        numpyro_model(data), pymc_model(data)       the same model as their users write it
        SHAPES                           {latent: unconstrained shape}
        constrain(u, xp) -> z, log |dz/du|          onto the supports, as Pyro maps them
        log_joint(z, data, xp)           log p(x, z) by hand, in nats; xp is numpy or jax.numpy
        identified(z)                    {name: array (C, S, ...)}: scalars with one meaning in every mode; of draws
                                         (C, S, *event) of the latents in numpy
    'per-datum'    NUTS, four chains for each of many data; speed is effective draws of the median datum, times the
                   number of data, per second
        data(), problem(data), SHAPES, identified(z)        as above; draws (C, S, N, *event), unconstrained
        DATA                             the number of data
        log_joint(z, x, data, xp)        log p(x, z) of one datum by hand, in nats
    'hmc'          the same by HMC; speed is gradients of a datum per second, beside the matrix products of one alone
        data(), problem(data), SHAPES, identified(z), log_joint(z, x, data, xp)         as above
        NUM_STEPS                        leapfrog steps of a trajectory
    'gibbs'        Gibbs sampling, four chains, discrete latents drawn too; speed is effective draws per second
        data(), problem(data), numpyro_model(data), SHAPES, identified(z)       as above; SHAPES of the latents judged
    'svi'          steps of a VAE's fit; speed is steps per second
        SIZE                             a `_vae.Size`
    'importance'   prior draws weighted by the likelihood; speed is draws per second
        data(), problem(data), NUM_DRAWS
    'latents-importance'   draws of a normal of each of many data, weighted; speed is weights per second, beside the
                   matrix products of one alone
        data(), problem(data), log_joint(z, x, data, xp)    as above; the normals' 'loc' and 'scale' among the data
        NUM_DRAWS                        of each datum
    'smc'          particles from prior to posterior by tempering; speed is particles per second
        data(), problem(data), pymc_model(data)             as above
        log_prior(z, xp), log_likelihood(z, data, xp)       by hand, in nats, of the one latent
        NUM_PARTICLES, COLUMNS           the latter the latent's dimension
    'mixture'      EM steps on a mixture of normals; speed is steps per second
        problem(), NUM_STEPS, ROWS
        start() -> {name: array}         the data x and the theta to start from, by the problem's names
    'chain'        steps of Baum-Welch on a hidden Markov model; speed is steps per second
        problem(), NUM_STEPS, ROWS       the last the number of observations
        start() -> {name: array}         the data x (T, D) and the theta to start from, by the problem's names
    'abc'          posteriors by simulation alone, of theta ~ N(0, I) (DIM) and x ~ N(theta, NOISE^2 I); speed is
                   simulations per second
        data(), problem(data), DIM, NOISE, NUM_SIMULATIONS, NUM_SAMPLES
        posterior(data) -> mean, sd      exact, (DIM,) each

A case of draws may have `LONGEST`, draws of a chain and of its warm-up at most, whatever the plan says, and any case
`REPEATS`, timed answers of a process at least, patience permitting. A case may have
`truth()`, {name: Estimate}, of what the tools estimate: means of identified scalars ('tau', 'theta[3]')
and of their squares ('tau^2'), or the 'log evidence'.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from ..names import among


def names() -> list[str]:
    """Every case, in alphabetical order; nothing is imported."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def chosen(given: Iterable[str]) -> list[str]:
    """The cases that these names or beginnings of names mean; all where none is given. Raises `ProblemError`."""
    return among(given, names(), "case")


def load(name: str) -> ModuleType:
    """The module of a case."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")

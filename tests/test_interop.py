"""The border: both lines of arviz read the exports."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrometer.inference import statistics
from pyrometer.inference.posterior import Cost, Evidence, Posterior
from pyrometer.inference.problem import Problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # arviz announces its next version at import
    import arviz
    import xarray

ONE = int(arviz.__version__.split(".")[0]) >= 1


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_arviz_is_imported_only_when_it_is_needed():
    code = """
import sys, pyro, pyro.distributions as dist, torch
from pyrometer.inference import Problem, infer

def model():
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

answer = infer(Problem(model), "nuts")
assert answer.diagnostics["r_hat"] < 1.1 and not {"arviz", "xarray"} & set(sys.modules)
answer.to_arviz()
assert {"arviz", "xarray"} <= set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)


# Export


def global_model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixture_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mu + 2 * k, 1.0), obs=x)


Y = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.4, -0.6, 1.5, 0.1], dtype=torch.float64)


def global_posterior(chains=4, samples=1000):
    """Exact draws of the mean of a normal."""
    precision = len(Y) + 0.01
    mu = Y.sum() / precision + randn(chains, samples) / math.sqrt(precision)
    return Posterior(
        {"mu": mu},
        kind="mcmc",
        sample_stats={"diverging": torch.zeros(chains, samples, dtype=torch.bool), "lp": -mu.square()},
        log_evidence=Evidence(torch.tensor(-12.5), torch.tensor(0.1), "estimate"),
        cost=Cost(evaluations=10, gradients=20, seconds=1.5),
        engine="NUTS",
        engine_options={"num_samples": samples, "step_size": math.nan, "kernel": global_model},
        seed=7,
        problem=Problem(global_model, args=(Y,)),
    )


def local_posterior(kind="weighted", samples=2000):
    """Draws of each z from N(0, 1), weighted by the likelihood; the answer is N(x / 2, 1 / 2)."""
    z = randn(1, samples, len(Y))
    return Posterior(
        {"z": z},
        -0.5 * (Y - z).square() if kind == "weighted" else None,
        kind=kind,
        batch_shape=(len(Y),),
        problem=Problem(local_model, args=(Y,)),
    )


def groups(exported):
    return set(exported.children) if ONE else set(exported.groups())


def test_export_of_chains():
    posterior = global_posterior()
    exported = posterior.to_arviz()
    assert isinstance(exported, xarray.DataTree if ONE else arviz.InferenceData)
    assert groups(exported) == {"posterior", "sample_stats", "log_likelihood", "log_prior", "observed_data"}
    assert exported["posterior"]["mu"].dims == ("chain", "draw")
    np.testing.assert_array_equal(exported["posterior"]["mu"].values, posterior.draws["mu"].numpy())
    assert exported["sample_stats"]["diverging"].dtype == bool
    np.testing.assert_array_equal(exported["observed_data"]["y"].values, Y.numpy())
    mu = posterior.draws["mu"][..., None]
    np.testing.assert_allclose(
        exported["log_likelihood"]["y"].values, dist.Normal(mu, 1.0).log_prob(Y).numpy(), atol=1e-10
    )
    np.testing.assert_allclose(
        exported["log_prior"]["log_prior"].values, dist.Normal(0.0, 10.0).log_prob(mu[..., 0]).numpy(), atol=1e-6
    )
    attrs = exported.attrs
    assert (attrs["engine"], attrs["kind"], attrs["seed"], attrs["resampled"]) == ("NUTS", "mcmc", 7, 0)
    assert (attrs["wall_s"], attrs["n_grad"], attrs["n_model_evals"], attrs["log_evidence"]) == (1.5, 20, 10, -12.5)
    assert attrs["inference_library"] == attrs["creation_library"] == "pyrometer"
    assert json.loads(attrs["engine_options"])["num_samples"] == 1000


def test_without_a_problem_only_the_draws_are_exported():
    bare = dataclasses.replace(global_posterior(), problem=None, log_evidence=None)
    exported = bare.to_arviz()
    assert groups(exported) == {"posterior", "sample_stats"}
    assert "log_evidence" not in exported.attrs
    assert "log_likelihood" in groups(bare.to_arviz(Problem(global_model, args=(Y,))))


def test_summary_reads_the_export():
    exported = global_posterior().to_arviz()
    interval = {"ci_kind": "hdi", "ci_prob": 0.94} if ONE else {"hdi_prob": 0.94}
    table = arviz.summary(exported, round_to="none", **interval)
    assert list(table.index) == ["mu"]
    assert {"mean", "sd", "r_hat", "ess_bulk", "ess_tail", "mcse_mean"} <= set(table.columns)
    assert float(table["mean"].iloc[0]) == pytest.approx(float(global_posterior().mean("mu")), abs=1e-10)
    assert float(table["r_hat"].iloc[0]) == pytest.approx(
        float(statistics.rhat(global_posterior().draws["mu"])), abs=1e-10
    )


def elpd(result):
    return float(result.elpd if ONE else result.elpd_loo)


def test_loo_of_a_global_latent_is_right():
    """Leaving y_i out, mu given the rest is normal, so the exact sum of log densities of each y_i is known. With
    100,000 exact draws the estimate scatters by 0.006 around it: 0.03 is 5 standard errors."""
    n, total = len(Y), float(Y.sum())
    exact = 0.0
    for y in Y.tolist():
        precision = n - 1 + 0.01
        sd = math.sqrt(1 + 1 / precision)
        exact += float(dist.Normal((total - y) / precision, sd).log_prob(torch.tensor(y, dtype=torch.float64)))
    assert elpd(arviz.loo(global_posterior(samples=25_000).to_arviz())) == pytest.approx(exact, abs=0.03)


def test_loo_runs_per_datum():
    """Leaving x_i out leaves z_i its prior, so the exact value is log N(x_i; 0, 2). The weights that leave a datum out
    of its own posterior are heavy, so only a rough figure can be had: within 0.3 nats a datum."""
    exported = local_posterior().to_arviz()
    assert exported["log_likelihood"]["x"].dims == ("chain", "draw", "batch_dim_0")
    assert exported["posterior"]["z"].dims == ("chain", "draw", "batch_dim_0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of k-hat, rightly
        result = arviz.loo(exported, pointwise=True)
    exact = dist.Normal(torch.tensor(0.0).double(), math.sqrt(2)).log_prob(Y)
    pointwise = (result.elpd_i if ONE else result.loo_i).values
    assert pointwise.shape == (len(Y),)
    assert np.abs(pointwise - exact.numpy()).mean() < 0.3


def test_weighted_draws_are_resampled_shuffled_and_marked():
    """arviz ignores weights: with raw draws the mean of z would be 0 (the prior's) where it is x / 2."""
    posterior = local_posterior()
    exported = posterior.to_arviz()
    z = exported["posterior"]["z"].values
    assert exported.attrs["resampled"] == 1
    assert exported.attrs["kind"] == "weighted"
    assert z.shape == (1, 2000, len(Y))
    np.testing.assert_allclose(z.mean((0, 1)), posterior.mean("z").numpy(), atol=0.03)
    np.testing.assert_allclose(z.mean((0, 1)), Y.numpy() / 2, atol=0.15)
    assert np.mean(z[0, 1:] == z[0, :-1]) < 0.02  # in systematic order about a half
    chosen = torch.from_numpy(z).flatten(0, 1)
    np.testing.assert_allclose(
        exported["log_likelihood"]["x"].values[0], dist.Normal(chosen, 1.0).log_prob(Y).numpy(), atol=1e-10
    )
    assert posterior.log_weights is not None


@pytest.mark.parametrize("kind", ["iid", "point"])
def test_other_kinds_are_one_chain(kind):
    exported = local_posterior(kind, samples=1 if kind == "point" else 50).to_arviz()
    assert exported["posterior"].sizes["chain"] == 1
    assert (exported.attrs["kind"], exported.attrs["resampled"]) == (kind, 0)


def test_latents_that_were_summed_out_leave_no_likelihood():
    """Running the program without k would draw k at random: a likelihood of nothing."""
    posterior = Posterior({"mu": randn(2, 10)}, problem=Problem(mixture_model, args=(Y,)))
    assert groups(posterior.to_arviz()) == {"posterior", "observed_data"}


def test_awkward_names_are_exported():
    draws = {"a/b": randn(2, 5, 3), "chain": randn(2, 5), "a.c": randn(2, 5, 2, 3)}
    exported = Posterior(draws).to_arviz()
    assert exported["posterior"]["a.b"].dims == ("chain", "draw", "a.b_dim_0")
    assert exported["posterior"]["a.c"].dims == ("chain", "draw", "a.c_dim_0", "a.c_dim_1")
    np.testing.assert_array_equal(exported["posterior"]["chain_"].values, draws["chain"].numpy())
    with pytest.raises(ValueError, match=r"'a/b' would be called 'a\.b' in arviz"):
        Posterior({"a.b": randn(2, 5), "a/b": randn(2, 5)}).to_arviz()


@pytest.mark.parametrize("make", [global_posterior, local_posterior])
def test_export_survives_a_file(make, tmp_path):
    exported = make().to_arviz()
    exported.to_netcdf(tmp_path / "export.nc", engine="h5netcdf")
    back = xarray.open_datatree(tmp_path / "export.nc", engine="h5netcdf")
    try:
        assert set(back.children) == groups(exported)
        for group in back.children:
            for name in exported[group].data_vars:
                np.testing.assert_array_equal(back[group][name].values, exported[group][name].values)
        assert back.attrs["resampled"] == exported.attrs["resampled"]
    finally:
        back.close()

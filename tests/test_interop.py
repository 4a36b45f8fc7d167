"""The border: figures equal arviz's, both lines of arviz read the exports."""

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

from pyrometer.inference import interop
from pyrometer.inference.posterior import Cost, Evidence, Posterior, evidence_from_weights
from pyrometer.inference.problem import Problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # arviz announces its next version at import
    import arviz
    import xarray

ONE = int(arviz.__version__.split(".")[0]) >= 1


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(rho, *shape, seed=0):
    """Stationary AR(1) chains (C, S, ...) of variance one; S draws are worth S (1 - rho) / (1 + rho) for the mean."""
    noise = randn(*shape, seed=seed)
    chains = noise.clone()
    for t in range(1, shape[1]):
        chains[:, t] = rho * chains[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return chains


def test_arviz_is_imported_only_when_it_is_needed():
    code = (
        "import sys, pyrometer.inference.interop as i; assert not {'arviz', 'xarray'} & set(sys.modules); "
        "import torch; i.rhat(torch.randn(2, 9)); assert 'arviz' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)


# Chain statistics


def test_chain_statistics_equal_arviz():
    draws = autoregressive(0.6, 4, 200, 3, 2) + 0.3 * torch.arange(4)[:, None, None, None]
    data = arviz.convert_to_dataset({"x": draws.numpy()})
    for ours, theirs in (
        (interop.rhat(draws), arviz.rhat(data)),
        (interop.ess(draws), arviz.ess(data, method="bulk")),
        (interop.ess(draws, "tail"), arviz.ess(data, method="tail", prob=(0.05, 0.95))),
        (interop.mcse(draws), arviz.mcse(data, method="mean")),
    ):
        assert ours.shape == (3, 2)
        np.testing.assert_allclose(ours.numpy(), theirs["x"].values, rtol=1e-10, atol=0)


def test_chain_statistics_are_the_same_on_both_lines_of_arviz():
    """Figures of fixed chains, written down on arviz 0.23.4: a change of definition must be seen."""
    t = torch.arange(400, dtype=torch.float64)
    draws = torch.stack([torch.sin(0.7 * t + c) + 0.3 * torch.cos(0.11 * t * (c + 1)) + 0.05 * c for c in range(4)])
    figures = [interop.rhat(draws), interop.ess(draws), interop.ess(draws, "tail"), interop.mcse(draws)]
    pinned = [1.0029064477796086, 584.7906309965655, 1073.0557178718343, 0.030775303463213922]
    assert [float(f) for f in figures] == pytest.approx(pinned, rel=1e-8)


def test_effective_sample_size_of_autoregressive_chains():
    """rho = 0.9, 4 x 2,500: the exact answer is 526. One estimate scatters by some 10 %, so the mean of 100 by 1 %."""
    draws = autoregressive(0.9, 4, 2500, 100)
    assert float(interop.ess(draws).mean()) == pytest.approx(526.3, rel=0.1)
    assert float(interop.mcse(draws).mean()) == pytest.approx(1 / math.sqrt(526.3), rel=0.1)


def test_chains_that_cannot_be_judged_are_nan_and_leave_the_others_alone(caplog):
    draws = randn(4, 100, 6)
    draws[:, :, 1] = 2.5  # constant
    draws[3, :, 2] = draws[3, 0, 2]  # one chain stuck
    draws[:, :, 3] = draws[:, :1, 3]  # all stuck, apart
    draws[0, 5, 4] = math.nan
    draws[0, 5, 5] = math.inf
    for statistic in (interop.rhat, interop.ess, lambda d: interop.ess(d, "tail"), interop.mcse):
        found = statistic(draws)
        assert found.isnan().tolist() == [False, True, True, True, True, True]
        assert found[0] == statistic(draws[..., 0])
        assert statistic(draws[:, :3]).isnan().all()
        assert statistic(draws[..., :0]).shape == (0,)
    assert interop.rhat(draws[:1]).isnan().all()
    assert not interop.ess(draws[:1, :, 0]).isnan()
    assert not caplog.records


def test_a_shift_is_seen_by_r_hat():
    draws = randn(4, 500, 2)
    draws[0, :, 1] += 1.0
    found = interop.rhat(draws)
    assert found[0] < 1.01
    assert found[1] > 1.05


def test_chains_that_move_once_are_never_well():
    """No variance within a half chain: a division by zero that must neither warn nor pass."""
    steps = torch.zeros(4, 100, 2, dtype=torch.float64)
    steps[:, 50:] = 1.0
    steps[:, :, 1] += torch.arange(4)[:, None]
    assert not (interop.rhat(steps) < 1.01).any()
    assert not (interop.ess(steps) > 100).any()
    assert not (interop.ess(steps[:, 48:52]) > 40).any()


def test_unknown_kind_of_ess_is_refused():
    with pytest.raises(ValueError, match="'mean': expected 'bulk' or 'tail'"):
        interop.ess(randn(4, 100), "mean")


# Pareto smoothing


def pareto(k, draws, data, seed=0):
    """Log weights whose tail has shape k: w = u^-k."""
    u = torch.rand(draws, data, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -k * u.log()


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8])
def test_k_hat_is_the_shape_of_the_tail(k):
    """Mean of 50 k-hats of 4,000 draws: standard error 0.014; the prior of the fit pulls 5 % of the way to 0.5."""
    found = interop.psis(pareto(k, 4000, 50))[1]
    assert float(found.mean()) == pytest.approx(k + 0.05 * (0.5 - k), abs=0.07)


def test_smoothing_equals_arviz_for_each_datum_by_itself():
    log_w = 2 * randn(500, 3, 2)
    smoothed, k_hat = interop.psis(log_w)
    assert smoothed.shape == (500, 3, 2)
    assert k_hat.shape == (3, 2)
    for index in np.ndindex(3, 2):
        column = log_w[(slice(None), *index)].numpy()
        if ONE:
            from arviz_stats.base import array_stats

            theirs, k = array_stats.psislw(-column)
        else:
            theirs, k = arviz.psislw(column)
        assert float(k_hat[index]) == pytest.approx(float(k), abs=1e-10)
        ours = torch.log_softmax(smoothed[(slice(None), *index)], 0).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_k_hat_of_known_weights():
    """Written down on arviz 0.23.4; 1.x cuts the tail a draw or two apart. The wrong sign would give a light tail."""
    log_w = -0.6 * torch.log((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    _, k_hat = interop.psis(log_w)
    assert float(k_hat) == pytest.approx(0.5838651961254637, abs=0.01 if ONE else 1e-8)


def test_smoothing_keeps_scale_body_and_order():
    log_w = 2 * randn(1000, 2) - 7600.0
    smoothed, k_hat = interop.psis(log_w)
    order = log_w.argsort(0)
    body, tail = order[:900], order[900:]
    torch.testing.assert_close(smoothed.gather(0, body), log_w.gather(0, body), atol=1e-8, rtol=0)
    assert (smoothed.gather(0, tail) != log_w.gather(0, tail)).sum() > 150
    assert (smoothed.gather(0, order).diff(dim=0) >= -1e-9).all()
    assert (smoothed <= log_w.max(0).values + 1e-9).all()
    shifted, same_k = interop.psis(log_w + 7600.0)
    torch.testing.assert_close(shifted - 7600.0, smoothed, atol=1e-8, rtol=0)
    torch.testing.assert_close(same_k, k_hat, atol=1e-8, rtol=0)


def test_smoothed_weights_still_estimate_the_evidence():
    """Weights of mean one, 64 runs of 1,000: the mean of the estimates within 4.9 standard errors, itself below 0.01,
    of the truth, save for the bias of smoothing (below 0.01 here)."""
    log_w = randn(1000, 64) - 0.5
    evidence = evidence_from_weights(interop.psis(log_w)[0])
    ratio = evidence.value.exp()
    assert abs(float(ratio.mean()) - 1) < 4.9 * float(ratio.std()) / 8 + 0.01
    assert float(ratio.std()) / 8 < 0.01


@pytest.mark.parametrize("level", [0.0, -1e4, 3.0])
def test_weights_without_a_tail_have_k_hat_zero_and_stay(level):
    equal = torch.full((100, 2), level, dtype=torch.float64)
    finite = level + torch.tensor([0.0, -1.0, 0.5]).double()[torch.arange(100) % 3]
    nearly = equal + 1e-11 * randn(100, 2)  # an exact guide, up to rounding
    for log_w in (equal, finite, nearly):
        smoothed, k_hat = interop.psis(log_w)
        assert torch.equal(smoothed, log_w)
        assert (k_hat == 0).all()


def test_draws_of_weight_zero_stay_so_and_are_left_out_of_the_fit():
    log_w = randn(400)
    padded = torch.full((1000,), -math.inf, dtype=torch.float64)
    where = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:400].sort().values
    padded[where] = log_w
    smoothed, k_hat = interop.psis(padded)
    alone, k_alone = interop.psis(log_w)
    assert k_hat == k_alone
    assert torch.equal(smoothed[where], alone)
    assert int((smoothed == -math.inf).sum()) == 600


def test_too_few_weights_give_no_k_hat():
    log_w = randn(24)
    smoothed, k_hat = interop.psis(log_w)
    assert k_hat.isnan()
    assert torch.equal(smoothed, log_w)
    assert not interop.psis(randn(25))[1].isnan()
    assert interop.psis(torch.full((50,), -math.inf))[1].isnan()
    assert interop.psis(torch.zeros(0, 3))[1].isnan().all()


def test_weights_apart_beyond_floating_point_are_infinitely_bad():
    smoothed, k_hat = interop.psis(5000 * randn(100))
    assert math.isinf(k_hat)
    assert smoothed.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused_by_place(value):
    log_w = torch.zeros(50, 3)
    log_w[7, 2] = value
    with pytest.raises(ValueError, match=r"1 of 150 log weights are nan or \+inf, the first at \(7, 2\)"):
        interop.psis(log_w)


def test_smoothing_leaves_its_input_alone():
    log_w = 2 * randn(500, 2)
    before = log_w.clone()
    interop.psis(log_w)
    assert torch.equal(log_w, before)


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
        float(interop.rhat(global_posterior().draws["mu"])), abs=1e-10
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

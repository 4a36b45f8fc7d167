"""Verdicts: what is wrong must be said, what is right must not be cried over."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

from pyrometer.inference.diagnostics import diagnose
from pyrometer.inference.engine import Draws
from pyrometer.inference.statistics import psis

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # arviz announces its next version at import
    import arviz

C, S = 4, 1000


def judged(values, kind="mcmc", batch_shape=(), notes=(), **told):
    return diagnose(Draws(values, kind, **told), batch_shape, notes)


def good_chains(*shape, chains=C, samples=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(chains, samples, *shape, generator=generator, dtype=torch.float64)


def test_good_chains_are_good():
    stats = {"diverging": torch.zeros(C, S, dtype=torch.bool), "energy": good_chains(seed=1)}
    found = judged({"mu": good_chains(3), "tau": good_chains(seed=2).exp()}, sample_stats=stats, notes=("float64",))
    assert found.level == "good"
    assert found["r_hat"] < 1.01
    assert found["ess_bulk"] > 3000
    assert found["ess_tail"] > 3000
    assert found["divergences"] == 0
    assert found["e_bfmi"] > 1.5
    assert found.notes == ("float64",)
    assert "should be" not in found.verdict
    json.dumps(found.figures, allow_nan=False)


def test_figures_are_the_worst_over_all_scalars_and_the_verdict_names_where():
    mu = good_chains(2, 3)
    mu[0, :, 1, 2] += 0.4
    found = judged({"fine": good_chains(seed=5), "mu": mu})
    ours = {name: found[name] for name in ("r_hat", "ess_bulk", "ess_tail")}
    each = arviz.convert_to_dataset({"mu": mu.numpy()})
    assert ours["r_hat"] == pytest.approx(float(arviz.rhat(each)["mu"].max()), abs=1e-10)
    assert ours["ess_bulk"] == pytest.approx(float(arviz.ess(each, method="bulk")["mu"].min()), rel=1e-10)
    assert ours["ess_tail"] == pytest.approx(
        float(arviz.ess(each, method="tail", prob=(0.05, 0.95))["mu"].min()), rel=1e-10
    )
    assert found.verdict.startswith(f"R-hat up to {ours['r_hat']:.3f} at mu[1, 2] (should be < 1.01): chains disagree")
    assert found.level != "good"


def stuck(mu):
    mu[2] = mu[2, :1]


def all_stuck_apart(mu):
    mu[:] = mu[:, :1]


def one_scalar_constant(mu):
    mu[..., 1] = 0.37


def shifted(mu):
    mu[1] += 1.0


def half_way_shifted(mu):
    mu[:, S // 2 :] += 1.0


def too_wide(mu):
    mu[3] *= 4.0


def has_nan(mu):
    mu[1, 500, 1] = math.nan


def has_infinity(mu):
    mu[0, 3, 0] = math.inf


def sluggish(mu):
    mu[:] = mu[:, :1] + mu.cumsum(1) * 0.05


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (stuck, "mu[0] never moves in chain 2 (nor do 2 more scalars)"),
        (all_stuck_apart, "mu[0] never moves in chain 0"),
        (one_scalar_constant, "mu[1] never moves in chain 0"),
        (shifted, "chains disagree"),
        (half_way_shifted, "chains disagree"),
        (too_wide, "chains disagree"),
        (has_nan, "1 of 12000 values of mu are not finite, the first at mu[1] in chain 1, draw 500"),
        (has_infinity, "the first at mu[0] in chain 0, draw 3"),
        (sluggish, "chains disagree"),
    ],
)
def test_broken_chains_are_bad(harm, told):
    mu = good_chains(3)
    harm(mu)
    found = judged({"mu": mu, "fine": good_chains(seed=9)})
    assert found.level == "bad"
    assert told in found.verdict.split(";")[0]
    assert not found.figures.get("r_hat", math.nan) < 1.01
    assert "nan" not in found.verdict


def test_an_r_hat_that_is_no_number_is_not_below_its_limit():
    """Chains that all jump once, half-way, from -1 to 1: no half varies, nor does the distance from the median."""
    values = torch.ones(4, 100, 1, dtype=torch.float64)
    values[:, :50] = -1
    found = judged({"mu": values})
    assert found.level == "bad"
    assert "R-hat up to nan at mu[0] (should be < 1.01): chains disagree" in found.verdict


def test_slow_chains_are_told_to_draw_more():
    """AR(1), rho = 0.95: 4,000 draws are worth about 100, below 400 and above 40."""
    noise = good_chains() * math.sqrt(1 - 0.95**2)
    mu = torch.zeros(C, S, dtype=torch.float64)
    mu[:, 0] = good_chains(seed=1)[:, 0]
    for t in range(1, S):
        mu[:, t] = 0.95 * mu[:, t - 1] + noise[:, t]
    found = judged({"mu": mu})
    assert 40 < found["ess_bulk"] < 250
    assert f"bulk ESS down to {found['ess_bulk']:.0f} at mu (should be > 400): draw more" in found.verdict
    assert found.level in ("caution", "bad")


def test_the_worst_is_told_first():
    mu = good_chains(2)
    mu[0, :, 0] += 5.0
    diverging = torch.zeros(C, S, dtype=torch.bool)
    diverging[0, :3] = True
    found = judged({"mu": mu}, sample_stats={"diverging": diverging})
    parts = found.verdict.split("; ")
    assert parts[0].startswith("R-hat up to")
    assert "3 of 4000 transitions diverged" in parts[-1]
    assert found["divergences"] == 3


@pytest.mark.parametrize(("count", "level"), [(0, "good"), (1, "caution"), (40, "caution"), (41, "bad")])
def test_divergences(count, level):
    diverging = torch.zeros(C, S, dtype=torch.bool)
    diverging.view(-1)[:count] = True
    assert judged({"mu": good_chains()}, sample_stats={"diverging": diverging}).level == level


def test_low_energy_fraction_is_a_caution_and_equals_arviz():
    energy = good_chains().cumsum(1)
    found = judged({"mu": good_chains()}, sample_stats={"energy": energy})
    squares = np.square(np.diff(energy.numpy(), axis=1)).mean(1) / energy.numpy().var(1, ddof=1)
    assert found["e_bfmi"] == pytest.approx(squares.min(), rel=1e-10)
    assert found["e_bfmi"] < 0.3
    assert found.level == "caution"
    assert "E-BFMI" in found.verdict
    assert judged({"mu": good_chains()}, sample_stats={"energy": torch.zeros(C, S)}).level == "caution"


def test_one_chain_is_never_better_than_a_caution():
    found = judged({"mu": good_chains(chains=1)})
    assert found.level == "caution"
    assert "r_hat" not in found
    assert found["ess_bulk"] > 800
    assert "one chain only" in found.verdict


def test_three_draws_are_too_few():
    found = judged({"mu": good_chains(samples=3)})
    assert (found.level, found.figures) == ("caution", {})
    assert "3 draws per chain are too few" in found.verdict


def cholesky_factors():
    x = good_chains(3)
    return torch.linalg.cholesky(x[..., None, :] * x[..., :, None] + torch.eye(3))


def test_the_zeros_of_a_cholesky_factor_are_not_stuck():
    factor = cholesky_factors()
    found = judged({"L": factor})
    assert found.level == "good"
    assert found["r_hat"] < 1.01
    assert judged({"L": torch.eye(3).expand(C, S, 3, 3)}).level != "good"  # unless nothing of it moves
    assert judged({"L": factor}, batch_shape=(3, 3)).level == "bad"  # nor are the scalars of nine data a matrix
    factor[2, :, 1, 0] = 0.3
    assert judged({"L": factor}).level == "bad"


def test_what_may_be_a_constant_of_the_model_is_a_caution():
    padded = torch.cat([torch.zeros(C, S, 1), good_chains(2)], -1)
    for draws in ({"mu": padded}, {"mu": good_chains(), "c": torch.full((C, S, 2), 0.37)}):
        found = judged(draws)
        assert found.level == "caution"
        assert "never moves in chain 0" in found.verdict
        assert "constant or stuck" in found.verdict
        assert found["r_hat"] < 1.01


def test_nothing_moves():
    found = judged({"mu": torch.full((C, S, 2), 0.37), "tau": torch.full((C, S), 0.1)})
    assert found.level == "bad"
    assert math.isnan(found["r_hat"])
    assert "stuck" in found.verdict


def test_one_datum_that_stands_still_is_bad():
    z = good_chains(5)
    z[:, :, 3] = 0.0
    found = judged({"z": z}, batch_shape=(5,))
    assert found.level == "bad"
    assert found.verdict.startswith("z[3] never moves in chain 0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_discrete_draws_that_keep_one_value_are_a_caution(dtype):
    z = (good_chains(2) > torch.tensor([0.0, 9.0])).to(dtype)
    found = judged({"z": z})
    assert found.level == "caution"
    assert "z[1] never moves in chain 0: constant or stuck" in found.verdict
    assert found["r_hat"] < 1.01  # of z[0]
    apart = z.clone()
    apart[1, :, 1] = 1
    assert judged({"z": apart}).level == "bad"


def test_no_draws_are_bad():
    for draws in ({}, {"mu": torch.zeros(4, 0, 3)}):
        found = judged(draws)
        assert (found.level, found.verdict) == ("bad", "there are no draws")


# Weights


def normal_weights(sd, shape, seed=0):
    """log N(z; 0, 1) - log N(z; 0, sd) at z from the second: k-hat tends to 1 - sd^2 where sd < 1."""
    z = good_chains(*shape[1:], chains=1, samples=shape[0], seed=seed)[0] * sd
    return (-0.5 * z.square() + 0.5 * (z / sd).square() + math.log(sd))[None]


def weights(log_weights, **options):
    draws = {"z": torch.zeros(log_weights.shape)}
    return judged(draws, "weighted", log_weights=log_weights, batch_shape=tuple(log_weights.shape[2:]), **options)


def test_light_weights_are_good():
    log_w = normal_weights(1.2, (S, 20))
    found = weights(log_w)
    w = log_w[0].exp().numpy()
    kish = w.sum(0) ** 2 / (w**2).sum(0)
    assert found.level == "good"
    assert found["ess"] == pytest.approx(kish.min(), rel=1e-10)
    assert found["ess_median"] == pytest.approx(np.sort(kish)[9], rel=1e-10)
    assert found["k_hat"] < 0.5
    assert found["k_hat_high"] == 0
    assert found["k_hat_threshold"] == pytest.approx(2 / 3)
    json.dumps(found.figures, allow_nan=False)


def test_heavy_weights_are_named_by_datum():
    log_w = normal_weights(1.2, (S, 20))
    log_w[..., 13] = 6 * good_chains(chains=1)
    found = weights(log_w)
    assert found.level == "bad"
    assert found["k_hat"] > 1
    assert found["k_hat_high"] == 1 / 20
    assert found.verdict.startswith(f"k-hat up to {found['k_hat']:.2f} at datum 13 (should be < 0.67, and above that")
    assert "above that at 1 of 20 data" in found.verdict


def test_a_few_large_k_hats_among_many_data_are_a_caution_and_two_in_a_hundred_are_bad():
    log_w = normal_weights(1.2, (S, 100))
    log_w[..., 0] = 6 * good_chains(chains=1)
    assert weights(log_w).level == "caution"
    log_w[..., 1] = 6 * good_chains(chains=1, seed=3)
    assert weights(log_w).level == "bad"


def test_k_hat_between_the_threshold_and_one_is_a_caution():
    """Pareto weights of shape 0.85, 4,000 draws: threshold 0.7, k-hat within 0.15 of 0.85 (2 standard errors)."""
    u = torch.rand(1, 4000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = weights(-0.85 * u.log())
    assert found["k_hat_threshold"] == 0.7
    assert 0.7 < found["k_hat"] < 1
    assert found.level == "caution"


def test_the_threshold_is_stricter_with_few_draws():
    assert weights(normal_weights(1.2, (100,)))["k_hat_threshold"] == pytest.approx(0.5)


def test_smoothed_weights_are_judged_by_the_raw_ones():
    """Shape 1.2, 100 draws of 50 data: mean k-hat 0.96 raw (error 0.03), 0.77 once smoothed."""
    u = torch.rand(100, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = -1.2 * u.log()
    smoothed = psis(raw)[0]
    found = weights(smoothed[None], log_ratio=raw)
    assert found["k_hat"] == weights(raw[None])["k_hat"]
    assert found["k_hat_high"] > weights(smoothed[None])["k_hat_high"]
    assert weights(torch.full((1, 100, 50), math.nan), log_ratio=raw).level == "bad"


def test_weight_on_few_draws_is_told():
    log_w = torch.full((1, S), -30.0, dtype=torch.float64) + good_chains(chains=1)
    log_w[0, :4] = 0.0
    found = weights(log_w)
    assert found["ess"] == pytest.approx(4, rel=1e-6)
    assert found.level == "bad"
    assert "Kish ESS down to 4.0 of 1000 draws (should be > 20)" in found.verdict


def test_too_few_draws_for_k_hat_are_a_caution():
    found = weights(normal_weights(1.2, (24, 2)))
    assert found.level == "caution"
    assert "k_hat" not in found
    assert "k-hat is not available at 2 of 2 data" in found.verdict


def test_equal_weights_are_good():
    found = weights(torch.full((2, S, 3), -700.0))
    assert (found.level, found["k_hat"], found["ess"]) == ("good", 0.0, pytest.approx(2 * S))


@pytest.mark.parametrize("deterministic", [False, True])
def test_broken_weights_are_bad(deterministic):
    for value, told in (
        (math.nan, "log weights are nan or infinite at datum 2 (1 of 3)"),
        (math.inf, "log weights are nan or infinite at datum 2 (1 of 3)"),
        (-math.inf, "no draw has any weight at datum 2 (1 of 3)"),
    ):
        log_w = torch.zeros(1, 50, 3)
        log_w[:, :, 2] = value
        found = weights(log_w, deterministic=deterministic)
        assert (found.level, found.figures) == ("bad", {})
        assert told in found.verdict


def test_exact_weights_have_no_sampling_error():
    found = weights(6 * good_chains(5, chains=1), deterministic=True)
    assert (found.level, found.figures) == ("good", {})
    assert "no sampling error" in found.verdict


# Independent draws and points


def test_a_guide_is_judged_by_its_ratio_to_the_model():
    draws = {"z": good_chains(8, chains=1)}
    unknown = judged(draws, kind="iid", batch_shape=(8,))
    assert unknown.level == "unknown"
    assert unknown["num_draws"] == S
    assert unknown.figures.keys() == {"num_draws", "likely_error"}
    close = judged(draws, kind="iid", batch_shape=(8,), log_ratio=normal_weights(1.1, (S, 8))[0])
    assert close.level == "good"
    assert close["num_draws"] == S
    narrow = judged(draws, kind="iid", batch_shape=(8,), log_ratio=normal_weights(0.3, (S, 8))[0])
    assert narrow.level != "good"
    assert narrow["k_hat"] > 0.7
    assert narrow.verdict.count("the guide misses part of the posterior") == 1, "though k-hat and error both say so"


def test_a_point_is_a_caution_and_a_broken_point_bad():
    point = judged({"z": torch.zeros(1, 1, 3)}, kind="point")
    assert (point.level, point.figures) == ("caution", {"num_draws": 1})
    assert judged({"z": torch.full((1, 1, 3), math.nan)}, kind="point").level == "bad"


def test_bad_calls_are_refused():
    draws = {"z": torch.zeros(1, 5)}
    with pytest.raises(ValueError, match="'weighted' needs log_weights"):
        judged(draws, kind="weighted")
    with pytest.raises(ValueError, match="kind 'vi': expected"):
        judged(draws, kind="vi")


def test_figures_over_data_are_told_by_quantiles_and_the_worst_data():
    """Datum (1, 2) has chains apart, datum (0, 3) moves slowly; all else is white noise."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((4, 500, 2, 5), generator=generator, dtype=torch.float64)
    z[0, :, 1, 2] += 3.0
    z[:, :, 0, 3] = z[:, :, 0, 3].cumsum(1)
    diverging = torch.zeros((4, 500, 2, 5), dtype=torch.bool)
    diverging[:, :7, 0, 1] = True
    told = judged({"z": z}, sample_stats={"diverging": diverging}, batch_shape=(2, 5)).over_data(worst=2)
    assert list(told) == ["r_hat", "ess_bulk", "ess_tail", "divergences"]
    assert {index for index, _ in told["r_hat"].worst} == {(1, 2), (0, 3)}
    assert told["r_hat"].worst[0][1] > told["r_hat"].worst[1][1] > 1.01
    assert {index for index, _ in told["ess_bulk"].worst} == {(1, 2), (0, 3)}
    assert told["divergences"].worst[0] == ((0, 1), 28.0)
    low, middle, high = told["ess_bulk"].quantiles
    assert low < 100 < 1500 < middle < high
    assert told["ess_bulk"].quantiles == tuple(
        float(judged({"z": z}, batch_shape=(2, 5))["ess_bulk_per_datum"].quantile(q)) for q in (0.05, 0.5, 0.95)
    )
    assert judged({"z": z[:, :, 0, 0]}).over_data() == {}

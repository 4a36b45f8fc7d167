"""R-hat, ESS, Monte Carlo errors and k-hat equal arviz's, and are right where the answer is known."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from pyrometer.inference import statistics
from pyrometer.inference.posterior import evidence_from_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # arviz announces its next version at import
    import arviz

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


# Chain statistics


def shapes_of_chains(chains, length):
    """(C, S, 2, 3): independent, wandering, alternating; rounded (ties), mostly zero, apart."""
    x = randn(chains, length, 2, 3, seed=length)
    x[..., 0, 1] = x[..., 0, 1].cumsum(1)
    x[..., 0, 2] *= (-1.0) ** torch.arange(length)
    x[..., 1, 0] = x[..., 1, 0].round()
    x[..., 1, 1] = (x[..., 1, 1] > 1.5).double()
    x[..., 1, 2] += torch.arange(chains)[:, None]
    return x


@pytest.mark.parametrize("chains", [1, 2, 4])
@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 100, 101, 500])
def test_chain_statistics_equal_arviz(chains, length):
    draws = shapes_of_chains(chains, length)
    moves = (draws != draws[:, :1]).any(1).all(0).numpy()  # arviz takes a constant for perfect mixing
    with np.errstate(all="ignore"):
        data = arviz.convert_to_dataset({"x": draws.numpy()})
        pairs = [
            (statistics.ess(draws), arviz.ess(data, method="bulk")),
            (statistics.ess(draws, "tail"), arviz.ess(data, method="tail", prob=(0.05, 0.95))),
            (statistics.mcse(draws), arviz.mcse(data, method="mean")),
        ]
        if chains > 1:
            pairs.append((statistics.rhat(draws), arviz.rhat(data)))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.numpy(), np.where(moves, theirs["x"].values, np.nan), rtol=1e-10, atol=0)


def test_one_scalar_is_judged_alike_among_many():
    draws = autoregressive(0.6, 4, 200, 3, 400) + 0.3 * torch.arange(4)[:, None, None, None]  # several blocks
    for statistic in (statistics.rhat, statistics.ess, lambda d: statistics.ess(d, "tail"), statistics.mcse):
        found = statistic(draws)
        assert found.shape == (3, 400)
        for at in ((0, 0), (1, 211), (2, 399)):
            assert float(found[at]) == pytest.approx(float(statistic(draws[(..., *at)])), rel=1e-12)


def test_chain_statistics_stay_as_they_are():
    """Figures of fixed chains, written down on arviz 0.23.4: a change of definition must be seen."""
    t = torch.arange(400, dtype=torch.float64)
    draws = torch.stack([torch.sin(0.7 * t + c) + 0.3 * torch.cos(0.11 * t * (c + 1)) + 0.05 * c for c in range(4)])
    figures = [statistics.rhat(draws), statistics.ess(draws), statistics.ess(draws, "tail"), statistics.mcse(draws)]
    pinned = [1.0029064477796086, 584.7906309965655, 1073.0557178718343, 0.030775303463213922]
    assert [float(f) for f in figures] == pytest.approx(pinned, rel=1e-8)


def test_effective_sample_size_of_autoregressive_chains():
    """rho = 0.9, 4 x 2,500: the exact answer is 526. One estimate scatters by some 10 %, so the mean of 100 by 1 %."""
    draws = autoregressive(0.9, 4, 2500, 100)
    assert float(statistics.ess(draws).mean()) == pytest.approx(526.3, rel=0.1)
    assert float(statistics.mcse(draws).mean()) == pytest.approx(1 / math.sqrt(526.3), rel=0.1)


def test_chains_that_cannot_be_judged_are_nan_and_leave_the_others_alone(caplog):
    draws = randn(4, 100, 6)
    draws[:, :, 1] = 2.5  # constant
    draws[3, :, 2] = draws[3, 0, 2]  # one chain stuck
    draws[:, :, 3] = draws[:, :1, 3]  # all stuck, apart
    draws[0, 5, 4] = math.nan
    draws[0, 5, 5] = math.inf
    for statistic in (statistics.rhat, statistics.ess, lambda d: statistics.ess(d, "tail"), statistics.mcse):
        found = statistic(draws)
        assert found.isnan().tolist() == [False, True, True, True, True, True]
        assert found[0] == statistic(draws[..., 0])
        assert statistic(draws[:, :3]).isnan().all()
        assert statistic(draws[..., :0]).shape == (0,)
    assert statistics.rhat(draws[:1]).isnan().all()
    assert not statistics.ess(draws[:1, :, 0]).isnan()
    assert not caplog.records


def test_a_shift_is_seen_by_r_hat():
    draws = randn(4, 500, 2)
    draws[0, :, 1] += 1.0
    found = statistics.rhat(draws)
    assert found[0] < 1.01
    assert found[1] > 1.05


def test_chains_that_move_once_are_never_well():
    """No variance within a half chain: a division by zero that must neither warn nor pass."""
    steps = torch.zeros(4, 100, 2, dtype=torch.float64)
    steps[:, 50:] = 1.0
    steps[:, :, 1] += torch.arange(4)[:, None]
    assert not (statistics.rhat(steps) < 1.01).any()
    assert not (statistics.ess(steps) > 100).any()
    assert not (statistics.ess(steps[:, 48:52]) > 40).any()


def test_unknown_kind_of_ess_is_refused():
    with pytest.raises(ValueError, match="'mean': expected 'bulk' or 'tail'"):
        statistics.ess(randn(4, 100), "mean")


# Pareto smoothing


def pareto(k, draws, data, seed=0):
    """Log weights whose tail has shape k: w = u^-k."""
    u = torch.rand(draws, data, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -k * u.log()


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8])
def test_k_hat_is_the_shape_of_the_tail(k):
    """Mean of 50 k-hats of 4,000 draws: standard error 0.014; the prior of the fit pulls 5 % of the way to 0.5."""
    found = statistics.psis(pareto(k, 4000, 50))[1]
    assert float(found.mean()) == pytest.approx(k + 0.05 * (0.5 - k), abs=0.07)


def test_smoothing_equals_arviz_for_each_datum_by_itself():
    log_w = 2 * randn(500, 3, 2)
    smoothed, k_hat = statistics.psis(log_w)
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
    _, k_hat = statistics.psis(log_w)
    assert float(k_hat) == pytest.approx(0.5838651961254637, abs=0.01 if ONE else 1e-8)


def test_smoothing_keeps_scale_body_and_order():
    log_w = 2 * randn(1000, 2) - 7600.0
    smoothed, k_hat = statistics.psis(log_w)
    order = log_w.argsort(0)
    body, tail = order[:900], order[900:]
    torch.testing.assert_close(smoothed.gather(0, body), log_w.gather(0, body), atol=1e-8, rtol=0)
    assert (smoothed.gather(0, tail) != log_w.gather(0, tail)).sum() > 150
    assert (smoothed.gather(0, order).diff(dim=0) >= -1e-9).all()
    assert (smoothed <= log_w.max(0).values + 1e-9).all()
    shifted, same_k = statistics.psis(log_w + 7600.0)
    torch.testing.assert_close(shifted - 7600.0, smoothed, atol=1e-8, rtol=0)
    torch.testing.assert_close(same_k, k_hat, atol=1e-8, rtol=0)


def test_smoothed_weights_still_estimate_the_evidence():
    """Weights of mean one, 64 runs of 1,000: the mean of the estimates within 4.9 standard errors, itself below 0.01,
    of the truth, save for the bias of smoothing (below 0.01 here)."""
    log_w = randn(1000, 64) - 0.5
    evidence = evidence_from_weights(statistics.psis(log_w)[0])
    ratio = evidence.value.exp()
    assert abs(float(ratio.mean()) - 1) < 4.9 * float(ratio.std()) / 8 + 0.01
    assert float(ratio.std()) / 8 < 0.01


@pytest.mark.parametrize("level", [0.0, -1e4, 3.0])
def test_weights_without_a_tail_have_k_hat_zero_and_stay(level):
    equal = torch.full((100, 2), level, dtype=torch.float64)
    finite = level + torch.tensor([0.0, -1.0, 0.5]).double()[torch.arange(100) % 3]
    nearly = equal + 1e-11 * randn(100, 2)  # an exact guide, up to rounding
    for log_w in (equal, finite, nearly):
        smoothed, k_hat = statistics.psis(log_w)
        assert torch.equal(smoothed, log_w)
        assert (k_hat == 0).all()


def test_draws_of_weight_zero_stay_so_and_are_left_out_of_the_fit():
    log_w = randn(400)
    padded = torch.full((1000,), -math.inf, dtype=torch.float64)
    where = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:400].sort().values
    padded[where] = log_w
    smoothed, k_hat = statistics.psis(padded)
    alone, k_alone = statistics.psis(log_w)
    assert k_hat == k_alone
    assert torch.equal(smoothed[where], alone)
    assert int((smoothed == -math.inf).sum()) == 600


def test_too_few_weights_give_no_k_hat():
    log_w = randn(24)
    smoothed, k_hat = statistics.psis(log_w)
    assert k_hat.isnan()
    assert torch.equal(smoothed, log_w)
    assert not statistics.psis(randn(25))[1].isnan()
    assert statistics.psis(torch.full((50,), -math.inf))[1].isnan()
    assert statistics.psis(torch.zeros(0, 3))[1].isnan().all()


def test_weights_apart_beyond_floating_point_are_infinitely_bad():
    smoothed, k_hat = statistics.psis(5000 * randn(100))
    assert math.isinf(k_hat)
    assert smoothed.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_refused_by_place(value):
    log_w = torch.zeros(50, 3)
    log_w[7, 2] = value
    with pytest.raises(ValueError, match=r"1 of 150 log weights are nan or \+inf, the first at \(7, 2\)"):
        statistics.psis(log_w)


def test_smoothing_leaves_its_input_alone():
    log_w = 2 * randn(500, 2)
    before = log_w.clone()
    statistics.psis(log_w)
    assert torch.equal(log_w, before)

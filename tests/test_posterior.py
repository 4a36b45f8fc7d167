"""Weighted draws: expectations, quantiles, resampling and evidence against sums written out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pyrometer.inference.posterior import Cost, Evidence, Posterior, Status, evidence_from_weights


def weighted(chains=2, samples=30, batch=(3,), event=(2,), seed=0, spread=1.5):
    """A posterior with weights per datum, and the same numbers as numpy arrays with chains and draws in one."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(chains, samples, *batch, *event, generator=generator, dtype=torch.float64)
    log_w = spread * torch.randn(chains, samples, *batch, generator=generator, dtype=torch.float64) + 50.0
    posterior = Posterior({"z": z}, log_w, kind="weighted", batch_shape=batch)
    w = np.exp(log_w.flatten(0, 1).numpy() - 50.0)
    return posterior, z.flatten(0, 1).numpy(), w / w.sum(0)


@pytest.mark.parametrize(("batch", "event"), [((3,), (2,)), ((), ()), ((), (4,)), ((2, 3), ()), ((5,), (2, 2))])
def test_mean_and_sd_weigh_each_datum_by_itself(batch, event):
    posterior, z, w = weighted(batch=batch, event=event)
    w = w.reshape(w.shape + (1,) * len(event))
    mean = (w * z).sum(0)
    np.testing.assert_allclose(posterior.mean("z").numpy(), mean, atol=1e-12)
    np.testing.assert_allclose(posterior.sd("z").numpy(), np.sqrt((w * (z - mean) ** 2).sum(0)), atol=1e-12)
    second = posterior.expectation(lambda draws: draws["z"].square())
    np.testing.assert_allclose(second.numpy(), (w * z**2).sum(0), atol=1e-12)


def test_weights_sum_to_one_over_chains_and_draws_at_any_scale():
    posterior, _, w = weighted(batch=(3,))
    np.testing.assert_allclose(posterior.weights().flatten(0, 1).numpy(), w, atol=1e-14)
    far = dataclasses.replace(posterior, log_weights=posterior.log_weights - 1e5)
    torch.testing.assert_close(far.weights(), posterior.weights(), atol=1e-9, rtol=0)


def test_without_weights_draws_count_alike():
    z = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    posterior = Posterior({"z": z}, batch_shape=(3,))
    assert posterior.weights().shape == (2, 5, 3)
    assert posterior.weights().unique().tolist() == [0.1]
    torch.testing.assert_close(posterior.mean("z"), z.double().mean((0, 1)))
    assert (posterior.num_chains, posterior.num_samples) == (2, 5)
    assert posterior.resample() is posterior


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_quantile_is_the_smallest_draw_whose_weight_reaches_q(q):
    posterior, z, w = weighted(batch=(3,), event=(2,))
    found = posterior.quantile("z", q).numpy()
    for datum in range(3):
        for axis in range(2):
            pairs = sorted(zip(z[:, datum, axis], w[:, datum], strict=True))
            reached = [value for i, (value, _) in enumerate(pairs) if sum(p for _, p in pairs[: i + 1]) >= q - 1e-12]
            assert found[datum, axis] == reached[0]


def test_quantiles_of_equal_weights_are_order_statistics():
    z = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(2))][None]
    posterior = Posterior({"z": z}, kind="iid")
    assert [float(posterior.quantile("z", q)) for q in (0.0, 0.05, 0.5, 0.95, 1.0)] == [1.0, 5.0, 50.0, 95.0, 100.0]


def test_extreme_quantiles_pass_over_draws_of_weight_zero():
    log_w = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    posterior = Posterior({"z": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}, log_w, kind="weighted")
    assert float(posterior.quantile("z", 0.0)) == 2.0
    assert float(posterior.quantile("z", 1.0)) == 3.0


def test_the_largest_quantile_is_the_largest_draw_though_rounded_weights_sum_to_less_than_one():
    for seed in range(5):
        posterior, z, _ = weighted(chains=1, samples=20_000, batch=(), event=(), seed=seed)
        assert float(posterior.quantile("z", 1.0)) == z.max()


def test_broken_weights_and_draws_never_give_a_number():
    posterior, _, _ = weighted(batch=(3,), event=())
    log_w = posterior.log_weights.clone()
    log_w[:, :, 1] = -math.inf
    no_weight = dataclasses.replace(posterior, log_weights=log_w)
    for figure in (no_weight.mean("z"), no_weight.sd("z"), no_weight.quantile("z", 0.5)):
        assert figure.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"1 of 3 data .* all zero or not finite"):
        no_weight.resample()
    z = posterior.draws["z"].clone()
    z[0, 7, 2] = math.nan
    broken = dataclasses.replace(posterior, draws={"z": z})
    for figure in (broken.mean("z"), broken.sd("z"), broken.quantile("z", 0.5)):
        assert figure.isnan().tolist() == [False, False, True]


def test_asking_for_what_is_not_there_says_what_is():
    posterior, _, _ = weighted()
    with pytest.raises(KeyError, match="no site 'y' among the draws; there are: z"):
        posterior.mean("y")
    with pytest.raises(ValueError, match=r"q = 1\.5: a quantile lies between 0 and 1"):
        posterior.quantile("z", 1.5)
    failed = Posterior({}, status=Status("failed", "density is nan at site mu"))
    for ask in (lambda: failed.mean("z"), failed.weights, failed.resample if failed.log_weights else failed.to_arviz):
        with pytest.raises(ValueError, match="failed: density is nan at site mu"):
            ask()
    assert (failed.num_chains, failed.num_samples) == (0, 0)


def test_resampling_takes_each_draw_as_often_as_its_weight_says():
    """Systematic resampling takes a draw of weight w floor(T w) or ceil(T w) times: no chance about it."""
    posterior, z, w = weighted(chains=2, samples=40, batch=(3,), event=())
    taken = posterior.resample(num_samples=1000, seed=3)
    assert taken.log_weights is None
    assert taken.draws["z"].shape == (1, 1000, 3)
    for datum in range(3):
        counts = (taken.draws["z"][0, :, datum].numpy()[:, None] == z[:, datum]).sum(0)
        assert counts.sum() == 1000
        assert (np.abs(counts - 1000 * w[:, datum]) < 1).all()


def test_resampling_is_unbiased():
    """Mean of 2,000 resampled means of 7 draws within 4.9 standard errors: false alarm 3e-6 for the three data."""
    posterior, z, w = weighted(chains=1, samples=25, batch=(3,), event=())
    means = torch.stack([posterior.resample(7, seed=s).draws["z"].mean((0, 1)) for s in range(2000)]).numpy()
    error = means.std(0, ddof=1) / math.sqrt(2000)
    assert (error < 0.01).all()
    assert (np.abs(means.mean(0) - (w * z).sum(0)) < 4.9 * error).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_resampling_never_takes_a_draw_of_weight_zero(u, monkeypatch):
    """Not even where the one uniform number of systematic resampling falls on its border."""
    rand = torch.rand
    first = iter([lambda shape, **_: torch.full(shape, u, dtype=torch.float64)])  # the later call shuffles
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: next(first, rand)(torch.Size(*shape), **options))
    log_w = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, -math.inf]])
    taken = Posterior({"z": torch.arange(5.0)[None]}, log_w, kind="weighted").resample(300).draws["z"]
    assert taken.unique().tolist() == [1.0, 2.0, 3.0]


def test_resampled_copies_do_not_stand_side_by_side():
    """Ten draws taken a thousand times: in systematic order 0.99 of the neighbours are equal, shuffled about 0.1."""
    z = torch.arange(10.0)[None]
    taken = Posterior({"z": z}, torch.zeros(1, 10), kind="weighted").resample(1000).draws["z"][0]
    equal = (taken[1:] == taken[:-1]).double().mean()
    assert 0.05 < equal < 0.16  # standard error 0.01


def test_resampling_keeps_sites_and_figures_of_a_draw_together():
    posterior, _, _ = weighted(batch=(3,), event=(2,))
    z = posterior.draws["z"]
    whole = dataclasses.replace(
        posterior,
        draws={"z": z, "twice": 2 * z[..., 0]},
        sample_stats={"lp": 3 * z[..., 1], "step": torch.ones(2, 30)},
    )
    taken = whole.resample(seed=1)
    assert torch.equal(taken.draws["twice"], 2 * taken.draws["z"][..., 0])
    assert torch.equal(taken.sample_stats["lp"], 3 * taken.draws["z"][..., 1])
    assert "step" not in taken.sample_stats  # a figure of the whole data set belongs to no datum's draw
    assert torch.equal(taken.draws["z"], whole.resample(seed=1).draws["z"])
    assert not torch.equal(taken.draws["z"], whole.resample(seed=2).draws["z"])


def test_resampling_leaves_the_global_random_state_alone():
    posterior, _, _ = weighted()
    before = torch.random.get_rng_state()
    posterior.resample()
    assert torch.equal(before, torch.random.get_rng_state())


def test_evidence_from_weights_is_the_log_mean_with_its_delta_method_error():
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(50, 4, generator=generator, dtype=torch.float64) - 7000.0
    evidence = evidence_from_weights(log_w)
    w = np.exp(log_w.numpy() + 7000.0)
    np.testing.assert_allclose(evidence.value.numpy(), np.log(w.mean(0)) - 7000.0, atol=1e-9)
    np.testing.assert_allclose(
        evidence.std_error.numpy(), w.std(0, ddof=1) / w.mean(0) / math.sqrt(50), rtol=1e-9, atol=0
    )
    assert evidence.kind == "estimate"
    assert math.isinf(float(evidence_from_weights(torch.zeros(1)).std_error))


def test_evidence_error_is_as_large_as_the_estimates_scatter():
    """z ~ N(0, 1), x = 1 ~ N(z, 1): log evidence is log N(1; 0, 2). 400 estimates of 400 prior draws: the mean of
    their standard errors equals their scatter within 15 % (its own error 4 %), and 4.9 errors bound the mean."""
    z = torch.randn(400, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    log_w = torch.distributions.Normal(z, 1.0).log_prob(torch.tensor(1.0))
    evidence = evidence_from_weights(log_w)
    exact = -0.25 - 0.5 * math.log(4 * math.pi)
    scatter = float((evidence.value - exact).exp().std())
    assert abs(float((evidence.value - exact).exp().mean()) - 1) < 4.9 * scatter / 20
    assert float(evidence.std_error.mean()) == pytest.approx(scatter, rel=0.15)


def test_evidence_adds_up_over_independent_data():
    evidence = Evidence(torch.tensor([-1.0, -2.0]), torch.tensor([0.3, 0.4]), "estimate")
    assert evidence.total() == (-3.0, pytest.approx(0.5, abs=1e-7))
    assert evidence.per_datum() == (-1.5, pytest.approx(0.25, abs=1e-7))
    assert Evidence(torch.zeros(3), torch.tensor(0.0), "exact").std_error.tolist() == [0.0, 0.0, 0.0]


def test_costs_add_and_peaks_do_not():
    total = Cost(1, 2, 3, 4, 5, 6, 7, 100) + Cost(10, 20, 30, 40, 50, 60, 70, 80)
    assert total == Cost(11, 22, 33, 44, 55, 66, 77, 100)
    assert (Cost() + Cost()).peak_memory is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Status("finished"),
        lambda: Evidence(torch.zeros(()), torch.zeros(()), "guess"),
        lambda: Posterior({}, kind="sampled"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(make):
    with pytest.raises(ValueError, match="expected one of"):
        make()

"""Likely errors against exact answers: how often the true one is larger, and at what it must, and must not, alarm."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrometer.inference import ABC, Problem, accuracy, infer
from pyrometer.inference.accuracy import CAUTION, SURE, of_chains, of_draws
from pyrometer.inference.diagnostics import diagnose
from pyrometer.inference.engine import Draws

REPEATS = 300
# of 300 runs 30 +- 5.2 are above the likely error: 4.9 sds either side is a false alarm of 1e-6, and sees a noise that
# is told 15 % too small, of which the share would be 0.2 with the twenty figures here, or 40 % too large
SHARE = (1 - SURE - 0.085, 1 - SURE + 0.085)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def errors(z, weights):
    """The largest error of means and sds of draws (1, S, D) of standard normals."""
    mean = (weights[..., None] * z).sum((0, 1))
    sd = (weights[..., None] * (z - mean).square()).sum((0, 1)).sqrt()
    return float(torch.cat([mean.abs(), (sd - 1).abs()]).max())


def independent(seed):
    z = draw(1, 200, 10, seed=seed)
    return z, None


def weighted(seed):
    """Ten latents of one weight each would leave no draws: the weight is that of the first."""
    z = draw(1, 400, 10, seed=seed)
    z[..., 0] *= 1.3
    return z, -0.5 * z[..., 0].square() * (1 - 1 / 1.69)


def copied(seed):
    """What multinomial resampling makes of 100 draws: copies, which count as one."""
    z = draw(1, 100, 10, seed=seed)
    index = torch.randint(100, (200,), generator=torch.Generator().manual_seed(seed))
    return z[:, index], None


@pytest.mark.parametrize("case", [independent, weighted, copied])
def test_the_true_error_is_above_the_likely_one_in_a_tenth_of_the_runs(case):
    above = 0
    for seed in range(REPEATS):
        z, log_w = case(seed)
        weights = torch.softmax((torch.zeros(z.shape[:2], dtype=z.dtype) if log_w is None else log_w).flatten(), 0)
        above += errors(z, weights.reshape(z.shape[:2])) > of_draws(({"z": z}, log_w)).likely
    assert SHARE[0] < above / REPEATS < SHARE[1]


@pytest.mark.parametrize("correlation", [0.6, -0.6])
def test_of_chains_too(correlation):
    """AR(1): the values of four times fewer draws, or of four times more; the squares of 2.1 times fewer in both."""
    steps = draw(4, 200, REPEATS, 10, seed=0)
    for i in range(1, 200):
        steps[:, i] = correlation * steps[:, i - 1] + 0.8 * steps[:, i]
    weights = torch.full((4, 200), 1 / 800, dtype=steps.dtype)
    above = 0
    for z in steps.unbind(2):
        above += errors(z, weights) > of_chains({"z": z}, {"z": torch.ones(10, dtype=torch.bool)}).likely
    assert SHARE[0] < above / REPEATS < SHARE[1]


def guide(mean, sd, samples=1000, seed=0):
    """Draws of N(mean, sd^2) and log N(z; 0, 1) - log N(z; mean, sd^2), in two latents."""
    noise = draw(samples, 2, seed=seed)
    z = mean + sd * noise
    ratio = (-0.5 * z.square() + 0.5 * noise.square()).sum(-1) + 2 * math.log(sd)
    return diagnose(Draws({"z": z[None]}, "iid", log_ratio=ratio))


def test_the_exact_guide_never_alarms():
    """Its noise is that of a thousand draws, 0.032: the likely error of four figures is 0.07."""
    for seed in range(50):
        found = guide(0.0, 1.0, seed=seed)
        assert found.level == "good", found.verdict
        assert found["moment_shift"] < 1e-9
        assert found["likely_error"] == pytest.approx(0.07, abs=0.02)


def test_a_guide_that_is_off_by_a_third_of_an_sd_always_alarms():
    """The shift is within five standard errors, 0.035 each, of 0.3."""
    for seed in range(50):
        found = guide(0.3, 1.0, seed=seed)
        assert found.level == "caution"
        assert found["moment_shift"] == pytest.approx(0.3, abs=0.18)
        assert "weighting the guide's draws moves the mean of z[" in found.verdict


@pytest.mark.parametrize(("sd", "factor"), [(0.75, 1 / 0.75), (1.4, 1 / 1.4)])
def test_a_guide_of_another_width_is_told_by_how_much(sd, factor):
    found = guide(0.0, sd, samples=20000)
    told = found.verdict.partition("multiplies the sd of z[")[2].partition(" by ")[2].partition(":")[0]
    assert found.level != "good"
    assert float(told) == pytest.approx(factor, rel=0.1)


def test_the_mean_field_guide_under_correlation_always_alarms():
    """Correlation 0.9: the best independent normals have sds 0.436 of the true, and their weights k-hat about 0.9."""
    for seed in range(50):
        z = math.sqrt(0.19) * draw(1000, 2, seed=seed)
        a, b = z.unbind(-1)
        quadratic = (a.square() + b.square() - 1.8 * a * b) / 0.19
        ratio = -0.5 * quadratic - 0.5 * math.log(0.19) + 0.5 * z.square().sum(-1) / 0.19 + math.log(0.19)
        found = diagnose(Draws({"z": z[None]}, "iid", log_ratio=ratio))
        assert found.level != "good"
        assert found["likely_error"] > CAUTION
        assert found["moment_shift"] > 0.1


def test_probabilities_of_a_discrete_latent():
    """q = (0.5, 0.3, 0.2), p = (0.2, 0.3, 0.5): total variation 0.3, to five standard errors of 4,000 draws."""
    q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    z = torch.multinomial(q, 4000, replacement=True, generator=torch.Generator().manual_seed(0))[None]
    ratio = (p / q).log()[z[0]].double()
    found = of_draws(({"z": z}, None), ({"z": z}, ratio))
    assert found.shift.of == "probability"
    assert found.shift.value == pytest.approx(0.3, abs=0.04)
    rare = of_draws(({"z": (z == 7).long()}, None))
    assert rare is None  # a value that never came leaves nothing to judge
    z[0, :10] = 1
    chains = of_chains({"z": z.reshape(4, 1000)}, {"z": torch.tensor(True)})
    assert 0.7 * 0.01 < chains.noise.value < 1.5 * 0.01  # sum of sqrt(p (1 - p) / 4000) / 2 = 0.011


def test_particles_of_few_ancestors_or_one():
    z = draw(1, 3, 2, seed=0)[:, torch.arange(999) % 3]
    few = of_draws(({"z": z}, None))
    assert few.likely > 0.5  # independent draws would say 0.06
    one = diagnose(Draws({"z": z[:, :1].expand(1, 999, 2)}, "weighted", torch.zeros(1, 999)))
    assert one["likely_error"] == math.inf
    assert one.level == "bad"
    factor = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=z.dtype).expand(1, 999, 2, 2).clone()
    factor[..., 1, 0] = draw(1, 999, seed=1)
    assert of_draws(({"L": factor}, None)).likely < 0.1  # the zeros and ones of a matrix are as they should be


def test_pieces_and_empty_sites_change_nothing(monkeypatch):
    z, log_w = draw(2, 50, 7, 3, seed=0), draw(2, 50, 7, seed=1)
    whole = of_draws(({"z": z}, None), ({"z": z}, log_w), 1)
    monkeypatch.setattr(accuracy, "AT_ONCE", 250)  # two columns at a time
    pieces = of_draws(({"none": z[..., :0], "z": z}, None), ({"none": z[..., :0], "z": z}, log_w), 1)
    assert pieces.likely == pytest.approx(whole.likely, rel=1e-9)
    assert (pieces.shift.where, pieces.noise.where) == (whole.shift.where, whole.noise.where)
    direct = (torch.softmax(log_w.reshape(100, 7), 0)[..., None] * z.reshape(100, 7, 3)).sum(0)
    assert float((direct - z.mean((0, 1))).abs().max()) > 0.1  # there is something to see
    chains = of_chains({"none": z[..., :0], "z": z}, {"none": torch.ones(7, 0) > 0, "z": torch.ones(7, 3) > 0}, 1)
    assert chains.noise.where.startswith("z[")


def test_one_datum_in_a_hundred_is_tolerated_and_one_in_fifty_is_not():
    z = draw(1, 2000, 200, seed=0)
    off = torch.zeros(2000, 200, dtype=z.dtype)
    off[:, :2] = 0.5 * z[0, :, :2]  # weights that move the first two means by 0.5
    assert of_draws(({"z": z}, None), ({"z": z}, off[None]), 1).likely < CAUTION
    assert of_draws(({"z": z[..., :50]}, None), ({"z": z[..., :50]}, off[None, :, :50]), 1).likely > 0.4


def test_all_weight_on_one_draw_is_no_number():
    log_w = torch.full((1, 50), -2000.0, dtype=torch.float64)
    log_w[0, 3] = 0.0
    assert of_draws(({"z": draw(1, 50, seed=0)}, None), ({"z": draw(1, 50, seed=0)}, log_w)).likely == math.inf


def normal_mean(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.3), obs=x)


def test_abc_at_a_large_tolerance_alarms_and_at_a_small_one_does_not():
    """x = 1.5, noise 0.3: the posterior is N(1.376, 0.287^2). The nearest half of the prior's draws is far from it; of
    the nearest hundredth, within 0.02, the tolerance is nothing beside the noise of 600 draws."""
    problem = Problem(normal_mean, args=(torch.tensor(1.5),))
    wide = infer(problem, ABC(num_samples=600, num_simulations=1200)).diagnostics
    assert wide.level == "bad"
    assert wide["moment_shift"] > 1
    assert "adjusting the draws to the observed data moves the mean of z" in wide.verdict
    near = infer(problem, ABC(num_samples=600, num_simulations=60000)).diagnostics
    assert near["likely_error"] < CAUTION
    assert near["moment_shift"] < 0.05
    assert near.level == "unknown"

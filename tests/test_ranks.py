"""The exact rank test tests itself: kernels that are right pass, planted bugs are found, and its p-values are honest.

The target is a hierarchical normal: mu ~ N(0, 1), s ~ Gamma(2, rate 2), five y_i ~ N(mu, s^2), in (mu, log s). The
bugs are those that real samplers have shipped with. Seeds are fixed: a test that passes once passes always.
"""

from __future__ import annotations

import numpy as np
import pytest
from ranks import FALSE_ALARM, LENGTH, SUSPICIOUS, Target, exact_ranks, p_value, rank_test, sequential
from scipy import stats

norm = stats.norm.logpdf


# -- kernels, some of them wrong -------------------------------------------------------------------------------------


def draw(count, rng):
    mu, s = rng.normal(size=count), rng.gamma(2.0, 0.5, count)
    return np.stack([mu, np.log(s)], -1), mu[:, None] + s[:, None] * rng.normal(size=(count, 5))


def log_prior(z):
    """Of (mu, log s), the Jacobian with it."""
    return -0.5 * z[..., 0] ** 2 + 2 * z[..., 1] - 2 * np.exp(z[..., 1])


def log_likelihood(z, x):
    residual = (x - z[..., :1]) * np.exp(-z[..., 1:])
    return -0.5 * (residual**2).sum(-1) - 5 * z[..., 1]


def quantities(z, x):
    mu, log_s = z[..., 0], z[..., 1]
    return {
        "mu": mu,
        "log s": log_s,
        "mu log s": mu * log_s,
        "log prior": log_prior(z),
        "log likelihood": log_likelihood(z, x[:, None]),
        "distance": (x[:, None] - z[..., :1]).max(-1) * np.exp(-log_s),
    }


NORMAL = Target(draw, quantities)


def log_joint(z, x):
    return log_prior(z) + log_likelihood(z, x)


def without_jacobian(z, x):
    return log_joint(z, x) - z[..., 1]


def gradient(z, x):
    s = np.exp(z[:, 1])
    residual = (x - z[:, :1]) / s[:, None]
    return np.stack([-z[:, 0] + residual.sum(1) / s, 2 - 2 * s + (residual**2).sum(1) - 5], -1)


def repeated(step):
    """A walk of a transition (z, x, rng) -> z."""

    def walk(z, x, steps, rng):
        path = []
        for _ in range(steps):
            z = step(z, x, rng)
            path.append(z)
        return np.stack(path, 1)

    return walk


def random_walk(log_joint=log_joint, forgives=0.0, tries=1, moving_scale=False):
    """Random-walk Metropolis. Wrong: `forgives` a share of its rejections; `tries` again until it accepts; moves by a
    scale that depends on where it stands, without Hastings' term."""

    def step(z, x, rng):
        waiting = np.ones(len(z), bool)
        for _ in range(tries):
            scale = 0.8 * np.where(z[:, 1:] > -0.5, 1.5, 0.7) if moving_scale else 0.8
            proposal = z + scale * rng.normal(size=z.shape)
            log_ratio = log_joint(proposal, x) - log_joint(z, x)
            accepted = np.log(rng.uniform(size=len(z))) < log_ratio
            accepted |= rng.uniform(size=len(z)) < forgives
            z = np.where((waiting & accepted)[:, None], proposal, z)
            waiting &= ~accepted
        return z

    return repeated(step)


def hmc(spread=1.0, half_step=True, accepts=True, kinetic=True, slope=1.0):
    """Hamiltonian Monte Carlo, eight steps of 0.25. Wrong: momenta drawn with another `spread` than they are judged
    by; the last half step, the accept step or the kinetic energy left out. A wrong `slope` is no bias."""

    def step(z, x, rng):
        momentum = spread * rng.normal(size=z.shape)
        q, p = z, momentum + 0.125 * slope * gradient(z, x)
        for i in range(8):
            q = q + 0.25 * p
            p = p + (0.25 if i < 7 else 0.125 * half_step) * slope * gradient(q, x)
        log_ratio = log_joint(q, x) - log_joint(z, x)
        if kinetic:
            log_ratio += 0.5 * (momentum**2 - p**2).sum(-1)
        accepted = np.log(rng.uniform(size=len(z))) < log_ratio
        return np.where((accepted | (not accepts))[:, None], q, z)

    return repeated(step)


RIGHT = {
    "random walk": random_walk(),
    "HMC": hmc(),
    "HMC with a gradient 1.1 times too long, still a valid kernel": hmc(slope=1.1),
}
WRONG = {
    "no Jacobian": random_walk(without_jacobian),
    "state-dependent step": random_walk(moving_scale=True),
    "retries until accepted": random_walk(tries=20),
    "accepts 5 % of its rejections": random_walk(forgives=0.05),
    "momenta of variance 1.2": hmc(spread=1.2**0.5),
    "last half step missing": hmc(half_step=False),
    "no accept step": hmc(accepts=False),
    "no kinetic energy": hmc(kinetic=False),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_kernel_that_is_right_passes(name):
    verdict = rank_test(NORMAL, RIGHT[name], 20_000)
    assert verdict.accepted, verdict


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_bug_is_found(name):
    """20,000 chains: the smallest of these bugs, the step that depends on the state, has p-values of 1e-16 to 1e-22.
    With 5,000 it, the momenta and the half step have 1e-2 to 1e-6, suspicious at best; with 1,000 nothing shows."""
    verdict = rank_test(NORMAL, WRONG[name], 20_000, rounds=1)
    assert not verdict.accepted, verdict


# -- samplers that draw independently: what must fail ----------------------------------------------------------------
# z ~ N(0, 1), four x_i ~ N(z, 1): z | x ~ N(sum(x) / 5, 1 / 5). Independent draws are a reversible kernel.


def draw_mean(count, rng):
    z = rng.normal(size=(count, 1))
    return z, z + rng.normal(size=(count, 4))


def mean_quantities(z, x):
    z, x = z[..., 0], x[:, None]
    log_likelihood = -0.5 * ((x - z[..., None]) ** 2).sum(-1)
    return {
        "z": z,
        "log prior": -0.5 * z**2,
        "log likelihood": log_likelihood,
        "z times the mean": z * x.mean(-1),
        "z above the last": z - x[..., -1],
    }


MEAN = Target(draw_mean, mean_quantities)
BLIND = Target(draw_mean, lambda z, x: {"z": z[..., 0]})


def independent(mean, sd):
    return lambda z, x, steps, rng: mean(x)[:, None, None] + sd * rng.normal(size=(len(z), steps, 1))


POSTERIOR = independent(lambda x: x.sum(1) / 5, 0.2**0.5)
PRIOR = independent(lambda x: 0 * x[:, 0], 1.0)
HALF_THE_DATA = independent(lambda x: x[:, :2].sum(1) / 3, 3**-0.5)
TOO_NARROW = independent(lambda x: x.sum(1) / 5, 0.8 * 0.2**0.5)
SHIFTED = independent(lambda x: x.sum(1) / 5 + 0.3 * 0.2**0.5, 0.2**0.5)


def test_exact_draws_pass():
    assert rank_test(MEAN, POSTERIOR, 5_000).accepted


@pytest.mark.parametrize("walk", [PRIOR, HALF_THE_DATA, TOO_NARROW, SHIFTED])
def test_a_wrong_posterior_is_refused(walk):
    """The prior, the posterior of half of the data, a sd of 0.8 sd, a mean off by 0.3 sd; in one round of 5,000."""
    verdict = rank_test(MEAN, walk, 5_000, rounds=1)
    assert not verdict.accepted, verdict


@pytest.mark.parametrize("walk", [PRIOR, HALF_THE_DATA])
def test_quantities_without_data_would_not_see_that_data_are_ignored(walk):
    """Why the likelihood is among the quantities: by the parameter alone both are calibrated."""
    assert rank_test(BLIND, walk, 20_000).accepted


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_draws_that_are_not_finite_are_refused(broken):
    def walk(z, x, steps, rng):
        path = POSTERIOR(z, x, steps, rng)
        path[:1, -1:] = broken  # one state of one chain in twenty
        return path

    verdict = rank_test(MEAN, walk, 5_000)
    assert verdict.p_values == (0.0,)
    assert not verdict.accepted


def test_a_chain_that_never_moves_has_uniform_ranks_by_breaking_ties():
    """A valid kernel of no use: all states tie, and the rank is drawn."""
    stuck = exact_ranks(
        MEAN, lambda z, x, steps, rng: np.repeat(z[:, None], steps, 1), 20_000, np.random.default_rng(1)
    )
    assert p_value(stuck) > SUSPICIOUS


def test_every_state_of_a_chain_comes_from_the_kernel():
    """A walk that tells its steps: forwards and backwards together make L - 1 of them, from the draw of its own row."""

    def draw(count, rng):
        return np.arange(count)[:, None].astype(float), np.arange(count)

    def walk(z, x, steps, rng):
        assert (z[:, 0] == x).all()
        return z[:, None] + np.arange(1, steps + 1)[None, :, None]

    def quantities(z, x):
        seen.append(np.sort(z[..., 0] - x[:, None], 1))
        return {"z": z[..., 0]}

    seen: list[np.ndarray] = []
    exact_ranks(Target(draw, quantities), walk, 500, np.random.default_rng(0), length=6)
    kinds = {tuple(row) for row in seen[0]}
    both_ways = {tuple(sorted([0.0, *range(1, left + 1), *range(1, 6 - left)])) for left in range(6)}
    assert kinds == both_ways


# -- p-values and the sequential rule --------------------------------------------------------------------------------


def test_p_values_of_uniform_ranks_are_honest():
    """4,000 sets of ranks that are uniform: below 0.05 and 0.008 by chance at most as often as promised, within 4.9
    binomial standard errors (1e-6), and, quantities being independent here, not half as often either."""
    rng = np.random.default_rng(0)
    p = np.array([p_value({q: rng.integers(LENGTH, size=1000) for q in "ab"}) for _ in range(4_000)])
    for level in (0.05, SUSPICIOUS):
        error = 4.9 * np.sqrt(level / len(p))
        assert 0.5 * level - error < (p < level).mean() < level + error


def test_too_few_replicates_are_refused():
    with pytest.raises(ValueError, match="too few"):
        rank_test(MEAN, POSTERIOR, 499)


@pytest.mark.parametrize(
    ("count", "shift", "width", "power"),
    [(5_000, 0.1, 1.0, 0.8), (5_000, 0.0, 0.9, 1.0), (20_000, 0.05, 1.0, 0.75), (20_000, 0.0, 0.95, 1.0)],
)
def test_errors_of_this_size_are_seen(count, shift, width, power):
    """Share of 40 runs that reject at once, for independent normal draws at L = 100: a mean off by 0.1 or 0.05 sd, a
    sd of 0.9 or 0.95. Over 200 and 60 other runs the shares were 0.94, 1, 0.93 and 1: the bounds leave 4 binomial
    standard errors. Of sd 0.97, 20,000 saw one half."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        rank = rng.binomial(99, stats.norm.cdf(rng.normal(size=count), shift, width))
        found.append(p_value({"z": rank}, length=100) < FALSE_ALARM / 2)
    assert np.mean(found) >= power


@pytest.mark.parametrize(
    ("p_values", "accepted"),
    [
        ([0.3], True),
        ([1e-7], False),
        ([0.002, 0.3], True),
        ([0.002, 1e-7], False),
        ([0.002, 0.002, 0.3], True),
        ([0.002, 0.002, 0.002], False),
    ],
)
def test_the_sequential_rule(p_values, accepted):
    """It stops where it can, takes four times as many fresh replicates where it cannot, and ends after three rounds."""
    asked, first = [], []

    def p_of(count, rng):
        asked.append(count)
        first.append(rng.random())
        return p_values[len(asked) - 1]

    verdict = sequential(p_of, 100, seed=0)
    assert verdict.accepted is accepted
    assert verdict.p_values == tuple(p_values)
    assert asked == [100, 400, 1600][: len(p_values)]
    assert len(set(first)) == len(first)


def test_the_false_alarm_of_the_sequential_rule_is_what_it_says():
    """By its limits: 5e-7 at once in any round, or suspicious in all three, for p-values that are uniform."""
    tiny, again = FALSE_ALARM / 2, SUSPICIOUS
    assert tiny * (1 + again + again**2) + again**3 == pytest.approx(1e-6, rel=0.01)

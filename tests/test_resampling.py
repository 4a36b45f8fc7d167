"""Resampling schemes: mean counts, what each promises beyond them, and what none may do.

Counts are compared with S w over 20,000 data at |z| < 4.9 (1e-6 for each figure, about 40 figures: 4e-5 in all); an
error of 0.04 descendants of one particle is seen.
"""

from __future__ import annotations

import math

import pytest
import torch

from pyrometer.inference.resampling import SCHEMES, ancestors, takes

F64 = torch.float64
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
WEIGHTS = torch.tensor([0.02, 0.30, 0.0, 0.17, 0.01, 0.25, 0.0, 0.25], dtype=F64)
DATA = 20_000


def uniforms(scheme: str, count: int, data: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((takes(scheme, count), data), generator=generator, dtype=F64)


def counts(index: torch.Tensor) -> torch.Tensor:
    """Descendants of each particle, (S, N)."""
    return torch.zeros(index.shape, dtype=F64).scatter_add_(0, index, torch.ones(index.shape, dtype=F64))


def drawn(scheme: str, weights: torch.Tensor, data: int = DATA) -> torch.Tensor:
    log_weights = weights.log()[:, None].expand(-1, data) - 700  # no scale is assumed
    return counts(ancestors(scheme, log_weights, uniforms(scheme, len(weights), data)))


@every_scheme
def test_every_particle_has_on_average_its_weight_in_descendants(scheme):
    found = drawn(scheme, WEIGHTS)
    assert bool((found.sum(0) == len(WEIGHTS)).all())
    expected = len(WEIGHTS) * WEIGHTS
    error = found.std(1) / math.sqrt(DATA)
    off = (found.mean(1) - expected).abs()
    assert bool((off <= 4.9 * error + 1e-12).all()), off / error


@every_scheme
def test_a_particle_of_weight_zero_has_no_descendants(scheme):
    assert bool((drawn(scheme, WEIGHTS)[WEIGHTS == 0] == 0).all())
    one = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=F64)
    for uniform in (1e-300, 0.5, 1 - 1e-16):
        index = ancestors(scheme, one.log()[:, None], torch.full((takes(scheme, 4), 1), uniform, dtype=F64))
        assert index.flatten().tolist() == [2, 2, 2, 2]


@every_scheme
def test_equal_weights_leave_all_but_multinomial_as_they_are(scheme):
    index = ancestors(scheme, torch.full((7, 50), -3.0, dtype=F64), uniforms(scheme, 7, 50))
    alike = bool((index == torch.arange(7)[:, None]).all())
    assert alike == (scheme != "multinomial")


@every_scheme
def test_data_are_resampled_each_for_itself(scheme):
    log_weights = torch.randn((9, 5), dtype=F64, generator=torch.Generator().manual_seed(1))
    uniform = uniforms(scheme, 9, 5)
    index = ancestors(scheme, log_weights, uniform)
    for datum in range(5):
        alone = ancestors(scheme, log_weights[:, [datum]], uniform[:, [datum]])
        assert torch.equal(alone[:, 0], index[:, datum])


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "multinomial"])
def test_ancestors_stand_in_their_order(scheme):
    index = ancestors(scheme, WEIGHTS.log()[:, None].expand(-1, 100), uniforms(scheme, 8, 100))
    assert bool((index.diff(dim=0) >= 0).all())


def test_systematic_takes_one_uniform_number_for_a_datum():
    """Its counts are within one of S w, and a single number tells all ancestors."""
    assert takes("systematic", 8) == 1
    found = drawn("systematic", WEIGHTS)
    assert float((found - 8 * WEIGHTS[:, None]).abs().max()) < 1
    index = ancestors("systematic", WEIGHTS.log()[:, None], torch.tensor([[0.37]], dtype=F64)).flatten()
    edges = WEIGHTS.cumsum(0)
    assert index.tolist() == [int((edges <= (k + 0.37) / 8).sum()) for k in range(8)]
    more = uniforms("stratified", 8, 1)
    assert torch.equal(
        ancestors("systematic", WEIGHTS.log()[:, None], more), ancestors("systematic", WEIGHTS.log()[:, None], more[:1])
    )


def test_stratified_takes_one_for_each_stratum():
    """Of two particles of weights 0.4 and 0.6 the first is taken in its own stratum with probability 0.8, and never in
    the other's, so that its count is one Bernoulli trial."""
    found = drawn("stratified", torch.tensor([0.4, 0.6], dtype=F64))
    assert set(found[0].tolist()) == {0.0, 1.0}
    assert abs(float(found[0].var()) - 0.16) < 0.01


def test_multinomial_counts_have_the_variance_of_a_multinomial_law():
    found = drawn("multinomial", WEIGHTS)
    expected = 8 * WEIGHTS * (1 - WEIGHTS)
    assert bool(((found.var(1) - expected).abs() <= 0.07 * expected + 1e-12).all())


def test_residual_gives_the_whole_part_for_certain_and_draws_the_rest():
    found = drawn("residual", WEIGHTS)
    due = 8 * WEIGHTS
    assert bool((found >= due.floor()[:, None]).all())
    rest = due - due.floor()
    number = rest.sum()
    expected = rest * (1 - rest / number)  # of a multinomial law of `number` trials
    assert bool(((found.var(1) - expected).abs() <= 0.07 * expected + 1e-12).all())


def test_residual_is_exact_where_all_is_due_in_whole_numbers():
    weights = torch.tensor([0.3, 0.1, 0.0, 0.2, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0], dtype=F64)
    assert torch.equal(drawn("residual", weights, 50), (10 * weights).round()[:, None].expand(-1, 50))


@every_scheme
@pytest.mark.parametrize("weight", [-math.inf, math.nan, math.inf])
def test_weights_that_are_none_are_refused_and_the_data_named(scheme, weight):
    log_weights = torch.zeros((4, 3), dtype=F64)
    log_weights[:, 1] = weight
    with pytest.raises(ValueError, match=r"1 data, first \[1\]"):
        ancestors(scheme, log_weights, uniforms(scheme, 4, 3))


def test_a_scheme_that_is_none_is_refused():
    with pytest.raises(ValueError, match="systematic, stratified, residual, multinomial"):
        ancestors("optimal", torch.zeros((2, 1), dtype=F64), torch.full((2, 1), 0.5, dtype=F64))

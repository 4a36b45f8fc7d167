"""The two-sided bracket of a cell: it holds the truth, is of the right data, and costs the answer nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pyrometer.benchmarks.bench import bench
from pyrometer.benchmarks.brackets import bracketed
from pyrometer.benchmarks.grid import grid
from pyrometer.inference import SMC, AnnealedImportance, Posterior, Problem, infer
from pyrometer.inference.posterior import Status
from pyrometer.models import conjugate_gaussian, skewed

SMALL = AnnealedImportance(num_samples=32, num_temperatures=40)


def answered(problem: Problem, engine=SMALL, seed: int = 0) -> tuple[Posterior, Posterior, float]:
    posterior = infer(problem, engine, seed=seed)
    reference = problem.reference_at(posterior.parameters)
    found = bracketed(posterior, problem, engine, reference, posterior.parameters, seed)
    return posterior, found, reference.log_evidence


def test_a_bracket_of_the_own_data_holds_the_truth():
    """-log mean w' is above log p(x) on average, by at most half its variance. Over 50 data and 32 chains the mean of
    (upper - truth) / its error is normal: below -4.5 once in 300,000 where it is unbiased; bounds that are swapped, or
    weights of the wrong sign, are off by tens."""
    problem = conjugate_gaussian.problem(num_data=50)
    posterior, found, truth = answered(problem)
    upper = found.log_evidence.refined
    assert upper.kind == "upper bound"
    for side, sign in ((upper, 1.0), (posterior.log_evidence, -1.0)):
        z = sign * (side.value - truth.value).sum() / side.std_error.square().sum().sqrt()
        assert -4.5 < float(z) < 12
    width = found.diagnostics.figures["bracket"]
    assert width.shape == (50,)
    assert abs(float(width.mean())) < 0.2
    beside = upper.value - posterior.log_evidence.value  # the lower side of the width comes from other chains
    error = (2 * posterior.log_evidence.std_error.square() + 1e-12).sum().sqrt()
    assert abs(float((width - beside).sum() / error)) < 5
    assert torch.equal(found.log_evidence.value, posterior.log_evidence.value)
    assert found.cost == posterior.cost


def test_backward_chains_begin_at_the_draws_that_are_given():
    """From points six sds away, with too few temperatures to forget them, the bound is another."""
    problem = conjugate_gaussian.problem(num_data=50)
    short = replace(SMALL, num_temperatures=5, kernel="random_walk")
    posterior = infer(problem, short, seed=0)
    truth = problem.reference_at(posterior.parameters)
    wrong = replace(truth, draws={"z": truth.draws["z"] + 6 * truth.sd["z"]})
    right, off = (bracketed(posterior, problem, short, t, posterior.parameters, 1) for t in (truth, wrong))
    assert abs(float((off.log_evidence.refined.value - right.log_evidence.refined.value).mean())) > 0.2


def test_elsewhere_it_is_of_a_twin_and_says_so():
    posterior, found, _ = answered(skewed.problem())
    assert found.log_evidence == posterior.log_evidence
    assert math.isfinite(float(found.diagnostics.figures["bracket"]))
    assert any("simulated from the model" in note for note in found.diagnostics.notes)


def test_others_and_failures_are_left_as_they_are():
    problem = conjugate_gaussian.problem(num_data=3)
    posterior, found, _ = answered(problem, SMC(num_samples=20))
    assert found is posterior
    failed = Posterior({}, status=Status("failed", "x"))
    assert bracketed(failed, problem, SMALL, problem.reference_at(posterior.parameters), {}, 0) is failed


def test_brackets_reach_records_and_repeat(tmp_path):
    one = grid({"cg": ("conjugate_gaussian", {"num_data": 5})}, ["annealed_importance"], budgets=[3000], seeds=1)
    records = [next(bench(one, tmp_path / name, backend="in-process").records()) for name in "ab"]
    assert records[0].figures["bracket"] == records[1].figures["bracket"]
    assert records[0].row.log_evidence.refined.kind == "upper bound"
    assert records[0].row.errors["bracket width"].average < 2.0
    assert records[0].row.cost.calls < 1.25 * 3000, "its calls are not the answer's"

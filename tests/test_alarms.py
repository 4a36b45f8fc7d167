"""Scored diagnostics: counts by hand, intervals, figures of real posteriors, and what is left out of the count."""

from __future__ import annotations

import math

import pytest
import torch

from pyrometer.benchmarks import alarms
from pyrometer.benchmarks.alarms import ALARMS, AlarmScore, figures_of, render, score, wilson, wrong
from pyrometer.benchmarks.cell import Cell, Record
from pyrometer.benchmarks.comparison import Row, Theta
from pyrometer.benchmarks.metrics import Score
from pyrometer.benchmarks.tabled import as_text
from pyrometer.inference import (
    MAP,
    NUTS,
    SMC,
    SVI,
    AnnealedImportance,
    Enumeration,
    ImportanceSampling,
    Posterior,
    Quadrature,
    infer,
)
from pyrometer.inference.engines.svi import still_rising
from pyrometer.inference.posterior import Evidence, Status
from pyrometer.models import conjugate_gaussian, gaussian_mixture


def record(error=0.01, level="good", state="done", reference_error=0.0, average=None, **figures):
    errors = {}
    if error is not None:
        errors = {"error of means": Score(error if average is None else average, error, "z", reference_error)}
    row = Row("", "e", errors=errors, level=level, status=Status(state))
    return Record(Cell("p", "p", "e"), "", Theta(), row, figures)


def test_counts_by_hand():
    records = [
        record(0.5, "bad", r_hat=1.3, ess=5.0),  # a hit of both
        record(0.5, "good", r_hat=1.0, ess=50.0),  # a miss of R-hat, a hit of ESS
        record(0.1, "good", r_hat=1.2, ess=200.0),  # a false alarm of R-hat, a silence of ESS
        record(0.1, "caution", r_hat=1.0),  # no ESS
        record(0.5, "unknown"),  # wrong without a word
        record(0.5, "bad", state="failed", r_hat=1.5),  # no answer: left out
        record(None, "bad", r_hat=1.5),  # nothing known
        record(0.5, "bad", reference_error=0.15, r_hat=1.5),  # not known well enough
    ]
    found = {one.name: one for one in score(records)}
    assert found["R-hat"] == AlarmScore("R-hat", "> 1.01", 1, 1, 1, 1, 1)
    assert found["ESS of a chain"] == AlarmScore("ESS of a chain", "< 100", 2, 0, 0, 1, 2)
    assert found["any of these"] == AlarmScore("any of these", "", 2, 0, 1, 1, 1)
    assert found["the verdict"] == AlarmScore("the verdict", "caution or bad", 1, 1, 1, 1, 1)
    assert found["the verdict, bad"] == AlarmScore("the verdict, bad", "bad", 1, 1, 0, 2, 1)
    assert found["R-hat, bad"] == AlarmScore("R-hat, bad", "> 1.05", 1, 1, 1, 1, 1)
    assert found["k-hat"] == AlarmScore("k-hat", "> min(1 - 1/log10 S, 0.7)", absent=5)
    assert len(found) == len(ALARMS) + 3
    assert found["any of these"].caught[0] == 1.0
    assert found["R-hat"].false[0] == 0.5
    assert found["k-hat"].caught is None


def test_what_is_wrong():
    assert wrong(record(0.21)) is True
    assert wrong(record(0.19)) is False
    assert wrong(record(math.inf, average=math.nan)) is True
    assert wrong(record(math.nan)) is True
    assert wrong(record(0.5, average=0.1), by="average") is False
    assert wrong(record(0.5), limit=0.6) is False
    assert wrong(record(None)) is None
    assert wrong(record(0.5, reference_error=math.inf)) is None
    assert wrong(record(0.5, state="timed out")) is None


@pytest.mark.parametrize(
    ("name", "quiet", "loud"),
    [
        ("R-hat", {"r_hat": 1.01}, {"r_hat": 1.011}),
        ("ESS of a chain", {"ess": 100.0}, {"ess": 99.0}),
        ("divergences", {"divergences": 0.0}, {"divergences": 0.001}),
        ("E-BFMI", {"e_bfmi": 0.31}, {"e_bfmi": 0.29}),
        ("k-hat", {"k_hat": 0.6, "k_hat_threshold": 0.67}, {"k_hat": 0.68, "k_hat_threshold": 0.67}),
        ("k-hat", {"k_hat": 0.69}, {"k_hat": math.inf}),
        ("Kish ESS", {"kish": 21.0}, {"kish": 19.0}),
        ("acceptance", {"acceptance": 0.5}, {"acceptance": 0.05}),
        ("ELBO convergence", {"elbo_drift": 0.0}, {"elbo_drift": 0.2}),
        ("gap of the bound", {"bound_gap": 0.1}, {"bound_gap": 0.9}),
        ("bracket width", {"bracket": 0.1}, {"bracket": 0.9}),
        ("R-hat, bad", {"r_hat": 1.05}, {"r_hat": 1.051}),
        ("likely error", {"likely_error": 0.19}, {"likely_error": 0.21}),
        ("no spread", {"num_draws": 2.0}, {"num_draws": 1.0}),
        ("the engine's own", {"alarms": 0.0}, {"alarms": 1.0}),
    ],
)
def test_each_alarm(name, quiet, loud):
    alarm = next(a for a in ALARMS if a.name == name)
    assert alarm.on(quiet) is False
    assert alarm.on(loud) is True
    assert alarm.on({**quiet, alarm.figure: math.nan}) is True
    assert alarm.on({}) is None


def test_wilson_intervals():
    """scipy.stats.binomtest(8, 10).proportion_ci(method='wilson') and of 0 and 20 of 20."""
    assert wilson(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 20) == pytest.approx((0.0, 0.0, 0.1611252), abs=1e-6)
    assert wilson(20, 20) == pytest.approx((1.0, 0.8388748, 1.0), abs=1e-6)
    assert wilson(0, 0) is None


PROBLEM = conjugate_gaussian.problem(num_data=4)


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        (NUTS(num_samples=60, warmup_steps=60), {"r_hat", "ess", "divergences", "e_bfmi", "acceptance"}),
        (ImportanceSampling(proposal="prior"), {"k_hat", "k_hat_threshold", "kish", "evidence_error"}),
        (
            SVI(num_steps=60),
            {"k_hat", "k_hat_threshold", "kish", "elbo_drift", "bound_gap", "evidence_error", "num_draws"},
        ),
        (SMC(num_samples=60), {"k_hat", "k_hat_threshold", "kish", "acceptance", "evidence_error"}),
        (AnnealedImportance(num_samples=20, num_temperatures=5), {"kish", "acceptance", "evidence_error"}),
    ],
)
def test_figures_of_engines(engine, names):
    found = figures_of(infer(PROBLEM, engine))
    assert set(found) == names | {"likely_error", "alarms"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_figures_are_the_worst_over_data():
    posterior = infer(PROBLEM, NUTS(num_samples=60, warmup_steps=60))
    found = figures_of(posterior)
    assert found["acceptance"] == pytest.approx(float(posterior.sample_stats["acceptance_rate"].mean(1).min()))
    assert found["ess"] == min(posterior.diagnostics["ess_bulk"], posterior.diagnostics["ess_tail"]) / 4
    weighted = infer(PROBLEM, ImportanceSampling(proposal="prior"))
    assert figures_of(weighted)["kish"] == pytest.approx(float((1 / weighted.weights().square().sum((0, 1))).min()))
    assert figures_of(weighted)["evidence_error"] == float(weighted.log_evidence.std_error.max())


def test_exact_answers_and_failures_have_no_alarms():
    exact = figures_of(infer(gaussian_mixture.problem(num_data=5), Enumeration()))
    assert exact == {"evidence_error": 0.0, "alarms": 0.0}
    assert figures_of(Posterior({}, status=Status("failed", "x"))) == {}


def test_a_point_and_a_rule_that_is_too_coarse_have_alarms():
    point = figures_of(infer(PROBLEM, MAP()))
    assert point == {"num_draws": 1.0, "alarms": 0.0}
    coarse = figures_of(infer(PROBLEM, Quadrature(num_nodes=3)))
    assert coarse["alarms"] == 1.0


def test_a_bracket():
    upper = Evidence(torch.tensor([1.0, 2.0]), torch.tensor(0.1), "upper bound")
    both = Evidence(torch.tensor([0.9, 1.2]), torch.tensor(0.1), "lower bound", upper)
    found = figures_of(Posterior({"z": torch.zeros(1, 1, 2)}, log_evidence=both, batch_shape=(2,)))
    assert found["bracket"] == pytest.approx(0.8)
    assert "bound_gap" not in found


def test_a_bound_that_still_rises_is_seen():
    """A learning rate far too small for so few steps; and one that is not."""
    short = figures_of(infer(PROBLEM, SVI(guide="AutoNormal", num_steps=200, learning_rate=0.01)))
    long = figures_of(infer(PROBLEM, SVI(guide="AutoNormal", num_steps=2000, learning_rate=0.03)))
    assert short["elbo_drift"] > alarms.STILL_RISING > long["elbo_drift"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator)
    assert still_rising(noise.tolist()) == 0.0
    falling = (noise - 0.01 * torch.arange(400)).tolist()  # a quarter lower by 1, whose error is 0.14
    assert still_rising(falling) == pytest.approx(0.6, abs=0.4)


def test_the_table():
    text = as_text(render(score([record(0.5, "bad", r_hat=1.3), record(0.1, r_hat=1.0)])))
    line = next(line for line in text.splitlines() if "R-hat" in line)
    assert "100% (21% to 100%)" in line
    assert "0% (0% to 79%)" in line
    assert max(len(line) for line in text.splitlines()) <= 110

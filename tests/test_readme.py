"""The code in README.md and CONTRIBUTING.md runs as it stands, and answers rightly."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pyro
import pytest
import torch
from torch.distributions import HalfNormal, MultivariateNormal

from pyrometer.benchmarks import compare
from pyrometer.benchmarks.metrics import METRICS
from pyrometer.benchmarks.serves import as_markdown, serves
from pyrometer.inference import infer
from pyrometer.models import conjugate_gaussian

ROOT = Path(__file__).resolve().parent.parent


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def executed(code, namespace=None):
    namespace = {"__name__": "example"} if namespace is None else namespace
    exec(compile(code, "example", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(scope="module")
def regression():
    first, second = blocks("README.md")
    assert sum(bool(line.strip()) for line in first.splitlines()) < 20
    namespace = executed(first)
    return executed(second, namespace)


def test_the_regression_is_compared_by_three_engines(regression):
    rows = {row.engine.partition("(")[0]: row for row in regression["comparison"].rows}
    assert set(rows) == {"svi", "nuts", "importance_sampling"}
    assert all(row.status.done for row in rows.values())
    assert rows["nuts"].log_evidence is None

    # Slope and intercept integrate out, given the noise; the noise by a fine sum.
    x, y = regression["x"].double(), regression["y"].double()
    noise = torch.linspace(0.005, 4.0, 2000, dtype=torch.float64)
    covariance = 4.0 * (1.0 + x[:, None] * x) + noise[:, None, None].square() * torch.eye(len(x), dtype=torch.float64)
    log_p = MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) + HalfNormal(1.0).log_prob(noise)
    truth = float(torch.logsumexp(log_p, 0)) + math.log(float(noise[1] - noise[0]))
    estimate, bound = rows["importance_sampling"].log_evidence, rows["svi"].log_evidence
    assert abs(estimate.value - truth) < 4.9 * estimate.std_error  # false alarm 1e-6
    assert estimate.std_error < 0.1
    assert truth - 1.0 < bound.value < truth + 4.9 * bound.std_error
    assert bound.kind == "lower bound"


def test_the_posterior_of_the_readme_is_right(regression):
    posterior = regression["posterior"]
    assert posterior.draws["slope"].shape == (4, 300)
    # Least squares is within 0.01 of the posterior mean with priors this wide; the sd is 0.07, so 1,200 draws are
    # within 0.02 of it unless fewer than 300 are worth anything.
    x, y = regression["x"], regression["y"]
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert float(posterior.mean("slope")) == pytest.approx(slope, abs=0.03)


def test_the_example_engine_is_right_on_the_conjugate_model():
    engine, _, _ = blocks("CONTRIBUTING.md")
    random_walk = executed(engine)["RandomWalk"]
    problem = conjugate_gaussian.problem(num_data=5)
    posterior = infer(problem, random_walk(num_samples=4000), seed=0)
    assert posterior.status.done
    truth = problem.reference_at(posterior.parameters)
    # 16,000 draws with an autocorrelation time below 10: se of a mean 0.025 sd, of an sd 0.018 sd; 4.9 se of 5 data.
    assert ((posterior.mean("z") - truth.mean["z"]) / truth.sd["z"]).abs().max() < 0.125
    assert (posterior.sd("z") / truth.sd["z"] - 1.0).abs().max() < 0.09


def test_the_example_model_has_the_truth_that_importance_sampling_finds():
    _, model, _ = blocks("CONTRIBUTING.md")
    problem = executed(model)["problem"](heads=3, tosses=12)
    (row,) = compare(problem, "importance", seed=2).rows
    (theta,) = compare(problem, "importance", seed=2).thetas
    assert row.status.done
    assert abs(row.log_evidence.value - theta.log_evidence.value) < 4.9 * row.log_evidence.std_error + 1e-9
    assert row.errors["error of means"].largest < 0.2


def test_the_example_metric_joins_the_table():
    _, _, metric = blocks("CONTRIBUTING.md")
    try:
        executed(metric)
        comparison = compare(conjugate_gaussian.problem(num_data=5), "importance", seed=0)
    finally:
        METRICS.pop("bias", None)
    bias = comparison.rows[0].errors["bias"]
    assert bias.where == "z"
    assert bias.average <= comparison.rows[0].errors["error of means"].average


def test_the_table_of_engines_and_models_is_what_the_engines_answer():
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- serves: .*? -->\n(.*?)\n<!-- end of serves -->", text, re.DOTALL)
    assert table == as_markdown(serves()), "run `pyrometer list --serves` and put its answer into README.md"


def test_an_engine_that_refuses_says_why_for_each_family():
    """Each reason once, whichever site it names; the families told are the fewer of the two kinds."""
    found = {
        "one": {"a": "", "b": "site 'p' is wide", "c": "site 'q' is wide"},
        "two": {"a": "", "b": "", "c": "odd"},
        "three": {"a": "", "b": "", "c": ""},
        "four": {"a": "odd", "b": "odd", "c": "site 'r' is wide"},
    }
    assert as_markdown(found).splitlines()[2:] == [
        "| `one` | `a` | `b`, `c` (1) |",
        "| `two` | all others | `c` (2) |",
        "| `three` | all |  |",
        "| `four` | none | `a`, `b` (2); `c` (1) |",
        "",
        "1. A site is wide.",
        "2. Odd.",
    ]


@pytest.fixture(autouse=True)
def _store_untouched():
    yield
    assert not list(pyro.get_param_store().keys())

"""`compare` and its metrics: the numbers by hand, rows that do not depend on each other, failures kept, strict JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from moved import Moved
from torch.distributions import constraints

from pyrometer.benchmarks import Comparison, compare
from pyrometer.benchmarks.comparison import PerDatum, Row, Theta, judge
from pyrometer.benchmarks.facts import plain
from pyrometer.benchmarks.methods import engines_from, label, learners_from, row_seed
from pyrometer.benchmarks.metrics import (
    METRICS,
    HeldOut,
    Score,
    held_out_log_likelihood,
    standardised_mean_error,
    standardised_sd_error,
    total_variation,
)
from pyrometer.benchmarks.tabled import as_text
from pyrometer.inference import EM, ML, NUTS, SVI, Enumeration, Posterior, Problem, ProblemError
from pyrometer.inference.chains import cut_short
from pyrometer.inference.engine import Draws, EngineError, as_chain
from pyrometer.inference.posterior import Cost, Evidence, Status
from pyrometer.inference.problem import Reference
from pyrometer.inference.settings import settings
from pyrometer.models import conjugate_gaussian, gaussian_mixture

MEANS, SDS = "error of means", "error of sds"

# -- engines of known error: each draws from the exact posterior of conjugate_gaussian, changed in a stated way -------


@settings
class Known:
    """The exact posterior, shifted and stretched in units of its sd; so its errors are known."""

    name: ClassVar[str] = "known"
    shift: float = 0.0
    stretch: float = 1.0
    num_samples: int = 100_000
    refuse: str = ""
    fail: str = ""

    def supports(self, density):
        return self.refuse

    def run(self, density, run):
        if self.fail:
            raise EngineError(self.fail)
        (x,) = density.args
        truth = conjugate_gaussian.reference(density.theta.values(), x)
        noise = torch.randn(self.num_samples, *x.shape, dtype=torch.float64)
        draws = truth.mean["z"] + truth.sd["z"] * (self.shift + self.stretch * noise)
        evidence = Evidence(truth.log_evidence.value - 0.5, torch.full(x.shape, 0.1), "lower bound", truth.log_evidence)
        return Draws({"z": draws[None]}, "iid", log_evidence=evidence)


@pytest.fixture
def problem():
    return conjugate_gaussian.problem(num_data=5)


def strip(row):
    """A row without what is measured by the clock."""
    return replace(row, cost=replace(row.cost, seconds=0.0, tuning_seconds=0.0, peak_memory=None))


# -- metrics ----------------------------------------------------------------------------------------------------------


def posterior_of(**draws):
    return Posterior({name: torch.tensor(value, dtype=torch.float64) for name, value in draws.items()})


def reference_of(mean, sd, **more):
    tensors = lambda d: {name: torch.tensor(value, dtype=torch.float64) for name, value in d.items()}  # noqa: E731
    return Reference("exact", mean=tensors(mean), sd=tensors(sd), **{key: tensors(d) for key, d in more.items()})


def test_errors_by_hand():
    # one chain of two draws: a has mean (1, 2) and sd (1, 2); b has mean 5 and sd 0.5
    posterior = posterior_of(a=[[[0.0, 0.0], [2.0, 4.0]]], b=[[4.5, 5.5]])
    reference = reference_of(
        {"a": [2.0, 2.0], "b": 1.0},
        {"a": [0.5, 4.0], "b": 2.0},
        mean_error={"a": [0.05, 0.4]},
        sd_error={"b": 0.6},
    )
    means = standardised_mean_error(posterior, reference)
    # |1 - 2| / 0.5 = 2, |2 - 2| / 4 = 0, |5 - 1| / 2 = 2; the truth's own: 0.1, 0.1 and 0
    assert means == Score(pytest.approx(4 / 3), pytest.approx(2.0), "a[0]", pytest.approx(0.2 / 3))
    sds = standardised_sd_error(posterior, reference)
    # |1 - 0.5| / 0.5 = 1, |2 - 4| / 4 = 0.5, |0.5 - 2| / 2 = 0.75; the truth's own: 0, 0 and 0.3
    assert sds == Score(pytest.approx(0.75), pytest.approx(1.0), "a[0]", pytest.approx(0.1))
    assert not sds.at_reference_precision


def test_errors_use_the_weights():
    posterior = replace(posterior_of(a=[[0.0, 1.0]]), log_weights=torch.tensor([[0.0, math.log(3.0)]]))
    assert standardised_mean_error(posterior, reference_of({"a": 0.25}, {"a": 0.5})).average == pytest.approx(1.0)
    # sd of a Bernoulli(3/4)
    expected = abs(math.sqrt(3 / 16) - 0.5) / 0.5
    assert standardised_sd_error(posterior, reference_of({"a": 0.25}, {"a": 0.5})).average == pytest.approx(expected)


def test_sites_without_truth_or_draws_are_left_out():
    posterior = posterior_of(a=[[0.0, 2.0]], c=[[9.0, 9.0]])
    both = standardised_mean_error(posterior, reference_of({"a": 0.0, "b": 7.0}, {"a": 1.0, "b": 1.0}))
    assert both == Score(1.0, 1.0, "a", 0.0)
    assert standardised_mean_error(posterior, reference_of({"b": 7.0}, {"b": 1.0})) is None
    assert standardised_mean_error(posterior, Reference("none")) is None


def test_an_undefined_mean_is_never_a_small_error():
    posterior = posterior_of(a=[[[math.nan, 0.0], [1.0, 2.0]]])
    score = standardised_mean_error(posterior, reference_of({"a": [0.0, 0.0]}, {"a": [1.0, 1.0]}))
    assert math.isnan(score.average)
    assert score.largest == math.inf
    assert score.where == "a[0]"
    assert not score.at_reference_precision


def test_total_variation_by_hand():
    # two data, three values; of four draws with weights 1/8, 1/8, 1/4, 1/2 for both data
    weights = torch.tensor([0.125, 0.125, 0.25, 0.5]).log()[None, :, None].expand(1, 4, 2)
    posterior = replace(posterior_of(k=[[[0.0, 2.0], [1.0, 2.0], [1.0, 1.0], [2.0, 0.0]]]), log_weights=weights)
    exact = torch.tensor([[0.125, 0.5], [0.375, 0.5], [0.5, 0.0]], dtype=torch.float64)
    reference = replace(reference_of({"k": [1.0, 1.0]}, {"k": [1.0, 1.0]}), log_weights=exact.log() + 7.0)
    # datum 0: exactly (1/8, 3/8, 1/2); datum 1: (1/2, 1/4, 1/4) for (1/2, 1/2, 0)
    score = total_variation(posterior, reference)
    assert score == Score(pytest.approx(0.125), pytest.approx(0.25), "k[1]", 0.0)
    assert total_variation(posterior, replace(reference, log_weights=None)) is None
    # and the moments of an index are not judged
    assert standardised_mean_error(posterior, reference) is None
    assert standardised_mean_error(posterior, replace(reference, log_weights=None)) is not None


def test_a_metric_of_ones_own_is_in_the_table(problem, monkeypatch):
    monkeypatch.setitem(METRICS, "number of draws", lambda posterior, reference: Score(posterior.num_samples, 77.0, ""))
    comparison = compare(problem, [Known(num_samples=42)])
    assert comparison.rows[0].errors["number of draws"].average == 42
    text = str(comparison)
    assert "number of draws" in text
    assert "42 (77)" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_wrong_shape_is_refused_not_broadcast():
    posterior = posterior_of(a=[[0.0, 2.0]])
    with pytest.raises(ProblemError, match=r"'a' has shape \(2,\), the posterior's \(\)"):
        standardised_mean_error(posterior, reference_of({"a": [0.0, 0.0]}, {"a": [1.0, 1.0]}))


def test_rounding_over_a_vanishing_sd_is_no_error():
    posterior = posterior_of(a=[[2.0 + 1e-15, 2.0 + 1e-15]])
    assert standardised_mean_error(posterior, reference_of({"a": 2.0}, {"a": 0.0})).largest < 1e-6


def test_held_out_is_exact_where_latents_can_be_listed():
    problem = replace(gaussian_mixture.problem(num_data=40), reference=None)
    train, test = problem.args[0][:30], problem.args[0][30:]
    theta = {
        "weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        "locs": torch.tensor([[-1.0, 0.0], [0.5, 1.0], [3.0, -2.0]], dtype=torch.float64),
        "scales": torch.tensor([[1.0, 2.0], [0.5, 1.0], [1.5, 1.0]], dtype=torch.float64),
    }
    found = held_out_log_likelihood(replace(problem, args=(train,), held_out=(test,)), theta)
    densities = dist.Normal(theta["locs"], theta["scales"]).to_event(1).log_prob(test[:, None, :])
    exact = torch.logsumexp(theta["weights"].log() + densities, 1)
    assert found.value == pytest.approx(float(exact.mean()), abs=1e-10)
    assert found.std_error == 0.0
    assert found.data_error == pytest.approx(float(exact.std()) / math.sqrt(10), rel=1e-10)
    assert (found.data, found.estimator) == (10, "enumeration")


def test_held_out_by_importance_sampling_agrees_with_the_truth():
    problem = conjugate_gaussian.problem(num_data=20)
    problem = replace(problem, held_out=(problem.args[0][:8] + 1.0,))
    theta = {"theta": torch.tensor(0.7, dtype=torch.float64)}
    exact = dist.Normal(theta["theta"], math.sqrt(2.0)).log_prob(problem.held_out[0]).mean()
    known = held_out_log_likelihood(problem, theta)
    assert known.value == pytest.approx(float(exact), abs=1e-12)
    assert (known.std_error, known.data, known.estimator) == (0.0, 8, "truth (exact)")

    found = held_out_log_likelihood(replace(problem, reference=None), theta, seed=3)
    # False alarm 1e-6; what it can see is an error of 4.9 x 0.01 nats.
    assert abs(found.value - float(exact)) < 4.9 * found.std_error
    assert found.std_error < 0.01
    assert (found.data, found.estimator) == (8, "importance_sampling")


def test_held_out_without_latents_is_the_log_likelihood():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    unseen = torch.tensor([1.0, 2.0, 4.0])
    theta = {"loc": torch.tensor(0.5), "scale": torch.tensor(2.0)}
    found = held_out_log_likelihood(Problem(model, args=(torch.zeros(3),), held_out=(unseen,)), theta)
    assert found.value == pytest.approx(float(dist.Normal(0.5, 2.0).log_prob(unseen).mean()), abs=1e-6)
    assert (found.std_error, found.data) == (0.0, 3)
    assert held_out_log_likelihood(Problem(model, args=(torch.zeros(3),)), theta) is None


# -- compare ----------------------------------------------------------------------------------------------------------


def test_rows_hold_the_known_errors_and_evidence(problem):
    comparison = compare(problem, [Known(shift=0.5, stretch=2.0)], seed=1)
    (theta,), (row,) = comparison.thetas, comparison.rows
    exact = float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(problem.args[0]).mean())
    # 100,000 draws with sd 2: each mean has se 0.0063, and 4.9 se (false alarm 1e-6) is 0.031: 10 % errors are seen.
    assert row.errors[MEANS].average == pytest.approx(0.5, abs=0.031)
    assert row.errors[SDS].average == pytest.approx(1.0, abs=0.031)
    assert row.log_evidence.value == pytest.approx(exact - 0.5, abs=1e-6)
    assert row.log_evidence.std_error == pytest.approx(0.1 / math.sqrt(5))
    assert (row.log_evidence.kind, row.log_evidence.data) == ("lower bound", 5)
    assert row.log_evidence.refined.value == pytest.approx(exact, abs=1e-6)
    assert theta == Theta(
        reference="exact", provenance=theta.provenance, log_evidence=PerDatum(pytest.approx(exact), 0.0, "exact", 5)
    )
    assert comparison.problem["data"] == [[5]]


def test_each_engine_is_judged_at_the_theta_that_was_learned(problem):
    comparison = compare(problem, [Known()], learn={"near": Moved(theta=1.0), "far": Moved(theta=9.0)})
    for theta, row, value in zip(comparison.thetas, comparison.rows, (1.0, 9.0), strict=True):
        exact = float(dist.Normal(torch.tensor(value).double(), math.sqrt(2.0)).log_prob(problem.args[0]).mean())
        assert theta.log_evidence.value == pytest.approx(exact)
        assert row.log_evidence.refined.value == pytest.approx(exact, abs=1e-6)
        # Judged at any other theta the means would be wrong by more than 0.5 / 0.71 sd.
        assert row.errors[MEANS].average < 0.02
        assert row.learner == theta.learner
        assert (theta.objective, theta.objective_kind) == (-5.0, "estimate")
        assert theta.held_out is None
        assert theta.held_out_reason
    assert [theta.learner for theta in comparison.thetas] == ["near", "far"]


def test_numbers_depend_on_neither_order_nor_other_rows(problem):
    quick = [Known(num_samples=n) for n in (10, 20, 30)]
    rows = {row.engine: strip(row) for row in compare(problem, quick, seed=5).rows}
    again = {row.engine: strip(row) for row in compare(problem, quick[::-1], seed=5).rows}
    alone = strip(compare(problem, quick[1], seed=5).rows[0])
    assert rows == again
    assert alone == rows[alone.engine]
    other = strip(compare(problem, quick[1], seed=6).rows[0])
    assert other.errors != alone.errors
    # and the same method under two names is two runs, not one shown twice
    first, second = compare(problem, {"first": quick[0], "second": quick[0]}, seed=5).rows
    assert first.errors != second.errors


def test_seeds_are_pinned_and_distinct():
    # Pinned: stored comparisons must be repeatable on other machines and by later versions.
    assert row_seed(0, "svi", "nuts") == 2419294539
    names = [("", "svi"), ("svi", ""), ("svi",), ("sv", "i"), ("svi", "nuts"), ("nuts", "svi")]
    seeds = [row_seed(seed, *name) for seed in range(50) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_what_cannot_run_or_fails_is_a_row_with_its_reason(problem):
    engines = {
        "refuses": Known(refuse="site 'z' is too blue"),
        "breaks": Known(fail="no finite start"),
        "works": Known(num_samples=10),
        "real": Enumeration(),
    }
    said = []
    rows = [step for step in judge(problem, engines, announce=said.append) if isinstance(step, Row)]
    states = {row.engine: row.status for row in rows}
    assert states["refuses"] == Status("unsupported", "site 'z' is too blue")
    assert states["breaks"] == Status("failed", "no finite start")
    assert states["works"].done
    assert states["real"].state == "unsupported"
    assert "continuous" in states["real"].reason
    assert "refuses cannot run: site 'z' is too blue" in said
    assert all(not row.errors and row.log_evidence is None for row in rows if not row.status.done)


def test_a_learner_that_fails_leaves_rows_that_say_so(problem):
    comparison = compare(problem, [Known(num_samples=10)], learn=[Moved(fail="NaN at step 3"), Moved()])
    failed, good = comparison.rows
    assert comparison.thetas[0].status == Status("failed", "NaN at step 3")
    assert failed.status.state == "failed"
    assert "no theta" in failed.status.reason
    assert good.status.done


def test_a_run_that_is_ended_keeps_what_was_ready(problem):
    found = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(judge(problem, {"first": Known(num_samples=10), "second": Interrupted()}))
    assert [type(step) for step in found] == [Theta, Row]


@settings
class CutShort:
    """Ctrl-C during the run of an engine that keeps the draws it has."""

    name: ClassVar[str] = "cut_short"

    def supports(self, density):
        return ""

    def run(self, density, run):
        return Draws(as_chain(density.prior(20).values), "mcmc", notes=tuple(cut_short(1, 1, 20, 1000)))


@pytest.mark.parametrize("second", ["CutShort", "Interrupted"])
def test_ctrl_c_ends_a_comparison_with_the_rows_that_are_there(problem, second):
    engines = {"first": Known(num_samples=10), "second": globals()[second](), "third": Known(num_samples=10)}
    comparison = compare(problem, engines)
    assert not comparison.complete
    assert [row.engine for row in comparison.rows] == ["first", "second"][: 2 if second == "CutShort" else 1]
    with pytest.raises(KeyboardInterrupt):
        compare(problem, {"only": Interrupted()})


@settings
class Interrupted:
    """Ctrl-C during the run."""

    name: ClassVar[str] = "interrupted"

    def supports(self, density):
        return ""

    def run(self, density, run):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engines": []}, "none given"),
        ({"engines": ["nutss"]}, "Did you mean 'nuts'"),
        ({"engines": [SVI(), "svi"]}, "given twice"),
        ({"engines": 3}, "no engine"),
        ({"engines": "svi", "learn": "nuts"}, "no learner"),
        ({"engines": "svi", "learn": "ml:nuts"}, "has no E-step"),
        ({"engines": "svi", "learn": "em:nutz"}, "Did you mean 'nuts'"),
        ({"engines": "svi", "seed": -1}, "seed"),
        ({"engines": "svi", "seed": 2**64}, "seed"),
        ({"engines": "svi", "seed": 0.5}, "seed"),
    ],
)
def test_mistakes_are_named_before_anything_runs(problem, arguments, words):
    with pytest.raises(ProblemError, match=words):
        judge(problem, arguments.pop("engines"), **arguments)


def test_names_classes_and_instances_are_the_same_method():
    assert engines_from("svi, nuts") == engines_from([SVI, NUTS()]) == {"svi": SVI(), "nuts": NUTS()}
    assert learners_from(["em:nuts", ML]) == {"em:nuts": EM(e_step=NUTS()), "ml": ML()}
    assert engines_from({"mine": "svi"}) == {"mine": SVI()}


def test_labels_show_the_settings_that_were_changed():
    assert label(SVI()) == "svi"
    assert label(SVI(num_steps=7, guide="AutoNormal")) == "svi(guide=AutoNormal, num_steps=7)"
    assert label(EM(e_step=NUTS(num_samples=9))) == "em:nuts(num_samples=9)"
    # A label with an address in it would change the seed from one process to the next.
    assert label(SVI(optimizer=torch.optim.SGD)) == "svi(optimizer=SGD)"


# -- the record and the table -----------------------------------------------------------------------------------------

LONG = "R-hat up to 1.08 at site z[17, 0] (should be < 1.01): chains disagree; " * 4 + "run a longer warm-up"


@pytest.fixture
def full():
    """A comparison with every kind of cell, made by hand."""
    score = Score(0.0123, 1.5, "z[3]", 0.0)
    below = Score(0.0004, 0.002, "z[3]", 0.0021)
    bound = PerDatum(-143.123, 0.012, "lower bound", 1437, PerDatum(-141.5, 0.03, "estimate", 1437))
    held_out = HeldOut(-24.0123, 0.0031, 0.41, 360, "importance_sampling", "good", "k-hat at most 0.31")
    rows = (
        Row("svi", "svi", errors={MEANS: score, SDS: below}, log_evidence=bound, level="caution", verdict=LONG),
        Row("svi", "a_very_long_engine_name_indeed(num_samples=100000)", level="good", cost=Cost(12_345, 1_230_000)),
        Row("svi", "infinite", errors={MEANS: Score(math.nan, math.inf, "z")}, level="bad", verdict="[bold]no[/bold]"),
        Row("svi", "enumeration", status=Status("unsupported", "site 'z' is continuous")),
        Row("em:nuts", "svi", status=Status("failed", "there is no theta to judge at")),
    )
    thetas = (
        Theta("svi", reference="quadrature", provenance="a grid", log_evidence=PerDatum(-140.0, 0.0, "exact", 1437)),
        Theta("em:nuts", status=Status("failed", "NaN at step 3")),
    )
    thetas = (replace(thetas[0], held_out=held_out), thetas[1])
    return Comparison(thetas, rows, problem={"name": "vae", "data": [[1437, 64]]}, seed=3)


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_table_fits_and_nothing_is_cut(full, width):
    text = as_text(full, width)
    assert max(map(len, text.splitlines())) <= width
    # The short columns stay whole: their heads stand in every table, and no number is broken.
    assert sum(line.count("evalu- gradi-") for line in text.splitlines()) == 3
    assert any("1.23M" in line and "12.3k" in line for line in text.splitlines())
    assert "\u2026" not in text
    flat = " ".join(text.split())
    for words in (" ".join(LONG.split()), "[bold]no[/bold]", "site 'z' is continuous", "NaN at step 3", "a grid"):
        assert words in flat, words
    # A name that is too long is folded: all of it is there, over several lines of one column.
    folded = ["".join(line[:column].strip() for line in text.splitlines()) for column in range(10, 25)]
    assert any("a_very_long_engine_name_indeed(num_samples=100000)" in column for column in folded)


def test_the_table_shows_the_numbers_as_they_are(full):
    lines = str(full).splitlines()
    row = next(line for line in lines if line.lstrip().startswith("svi ") and "0.012" in line)
    assert "0.012 (1.5)" in row
    assert "< 0.0021 (0.002)" in row
    assert "\u2265 -143.123 \u00b1 0.012" in row
    assert "caution" in row
    assert any("iw -141.500 \u00b1 0.030" in line for line in lines)
    assert any("truth (quadrature)" in line and "-140.0000" in line for line in lines)
    assert any("-24.0123 \u00b1 0.0031" in line and "0.41" in line and "importance_sampling" in line for line in lines)
    assert any("nan (inf)" in line for line in lines)
    assert any("cannot run" in line for line in lines)


def test_the_table_can_be_printed_in_ascii(full):
    words = [line for line in as_text(full.table(ascii_only=True)).splitlines() if any(c.isalnum() for c in line)]
    assert all(line.isascii() for line in words)


def test_json_is_strict_and_whole(full, tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    path = full.to_json(tmp_path / "out.json")
    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == full.to_dict()
    undefined = {"average": "nan", "largest": "inf", "where": "z", "reference_error": 0.0, "std_error": None}
    assert read["rows"][2]["errors"] == {MEANS: undefined}
    assert read["rows"][0]["log_evidence"]["refined"]["value"] == -141.5
    assert read["rows"][3]["status"] == {"state": "unsupported", "reason": "site 'z' is continuous"}
    assert read["versions"]["torch"] == torch.__version__
    assert read["machine"]["threads"] == torch.get_num_threads()
    assert read["seed"] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_json_file_that_cannot_be_written_leaves_the_old_one(full, tmp_path, monkeypatch, call):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full_disk)
    with pytest.raises(OSError, match="No space"):
        full.to_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_plain_values():
    assert plain({"a": (1, 2.5, None, True), 3: torch.tensor([1.0, math.inf])}) == {
        "a": [1, 2.5, None, True],
        "3": [1.0, "inf"],
    }
    assert plain(torch.optim.Adam) == "Adam"
    assert plain(object()) == "object"
    assert plain(torch.zeros(3, 40)) == "tensor of shape (3, 40)"

"""Calibration: engines that are right pass, those known to be wrong are rejected at 1e-6, failures are said."""

from __future__ import annotations

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from bad_engines import F64, WRONG, Planted, repeated
from click.testing import CliRunner
from scipy import stats

from pyrometer.benchmarks import calibrate_report
from pyrometer.benchmarks import ranks as module
from pyrometer.benchmarks.calibrate import calibrate
from pyrometer.benchmarks.cli import main
from pyrometer.benchmarks.ranks import Quantity, Ranked, Round, smallest_seen, uniformity
from pyrometer.inference import NUTS, SMC, SVI, Enumeration, ImportanceSampling, Problem, ProblemError
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Draws, isolated
from pyrometer.inference.settings import settings
from pyrometer.inference.twin import simulated
from pyrometer.models import conjugate_gaussian, eight_schools, gaussian_mixture, ppca

PROBLEM = repeated()


# -- right and wrong --------------------------------------------------------------------------------------------------
# One round of 1,000: the false alarm of a test is 5e-7; smallest errors seen: a mean off by 0.23 sd, an sd by 16 %.


@pytest.mark.parametrize(
    "engine",
    [
        Planted(),
        Planted(weighted=True, num_samples=3000),
        Planted(correlation=0.9, num_samples=500),
        Planted(correlation=-0.5),
    ],
)
def test_exact_draws_pass(engine):
    """Independent, weighted, and correlated, where only draws far enough apart may count."""
    found = calibrate(PROBLEM, engine, replicates=1000)
    assert found.state == "passed", str(found)
    assert found.rounds[0].replicates == 1000
    assert [q.name for q in found.quantities] == ["z", "log likelihood", "log prior", "z x z", "z x data"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_posterior_is_rejected(wrong):
    found = calibrate(PROBLEM, Planted(wrong=wrong), replicates=1000, rounds=1)
    assert found.state == "rejected", str(found)
    assert found.rounds[0].p_value < 1e-6


def test_what_is_wrong_is_said():
    shifted = calibrate(PROBLEM, Planted(wrong="shifted"), replicates=1000, rounds=1)
    assert "too high" in shifted.verdict
    # the truth stands 0.3 sd below an answer whose mean is 0.3 sd too high: 4.9 errors of 1,000 are 0.15
    z = shifted.quantities[0]
    assert z.shift == pytest.approx(-0.3, abs=0.15)
    narrow = calibrate(PROBLEM, Planted(wrong="narrow"), replicates=1000, rounds=1)
    assert "too narrow" in narrow.verdict
    assert narrow.quantities[0].spread == pytest.approx(1.25, abs=0.14)


@pytest.mark.parametrize("wrong", ["", "prior"])
def test_a_latent_of_all_data_is_calibrated_too(wrong):
    """One replicate for each inference; a hundred see gross errors."""
    found = calibrate(repeated(shared=True), Planted(wrong=wrong, num_samples=100), replicates=100, rounds=1)
    assert found.state == ("rejected" if wrong else "passed"), str(found)


def test_latents_alone_would_not_see_that_data_are_ignored(monkeypatch):
    """Why there are other quantities: by z alone the prior is calibrated."""
    found = calibrate(PROBLEM, Planted(wrong="prior"), replicates=1000, rounds=1)
    by_name = {q.name: q.p_value for q in found.quantities}
    assert by_name["z"] > 1e-4
    assert by_name["log likelihood"] < 1e-20
    assert by_name["z x data"] < 1e-20


def test_neighbours_in_a_chain_are_no_independent_draws(monkeypatch):
    """Why draws are thinned: of chains with correlation 0.99, 99 draws next to each other cannot pass."""
    monkeypatch.setattr(module, "APART", 1e-3)
    found = calibrate(PROBLEM, Planted(correlation=0.99, num_samples=60), replicates=1000, rounds=1)
    assert found.state == "rejected"


@pytest.mark.parametrize("weighted", [False, True])
def test_few_effective_draws_are_enough(weighted):
    """Three or so: ranks are still uniform."""
    engine = Planted(weighted=True, num_samples=40) if weighted else Planted(correlation=0.95, num_samples=100)
    found = calibrate(PROBLEM, engine, replicates=500, rounds=2)
    assert found.rounds[0].draws < 30
    assert weighted or found.state == "passed", str(found)  # weights of 40 draws are biased by one in 40


# -- discrete latents, real engines -----------------------------------------------------------------------------------


@settings
class PriorClusters:
    """Clusters drawn from their weights alone."""

    name = "prior_clusters"

    def supports(self, density):
        return ""

    def run(self, density, run):
        return Draws({"z": density.prior(100).values["z"][None]}, "iid")


def test_discrete_latents():
    problem = gaussian_mixture.problem(num_data=50, separation=2.0)
    exact = calibrate(problem, Enumeration(), replicates=1000)
    assert exact.state == "passed", str(exact)
    assert exact.rounds[0].draws == 99  # exact probabilities, however few values carry them
    assert calibrate(problem, PriorClusters(), replicates=1000, rounds=1).state == "rejected"


def test_an_engine_that_sums_a_latent_out():
    """The quantities are of what is left, the log likelihood too; a guide that was not fitted is refused."""

    def model(x):
        with pyro.plate("data", x.shape[0]):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=F64)))
            pyro.sample("x", dist.Normal(a + k, 0.7), obs=x)

    problem = Problem(model, args=(torch.zeros(5, dtype=F64),))
    found = calibrate(problem, ImportanceSampling(proposal="laplace", num_samples=1500), replicates=1000)
    assert found.state == "passed", str(found)
    assert [q.name for q in found.quantities] == ["a", "log likelihood", "log prior", "a x a", "a x data"]
    narrow = calibrate(problem, SVI(guide="AutoNormal", num_steps=1, num_samples=200), replicates=1000, rounds=1)
    assert narrow.state == "rejected"


@pytest.mark.parametrize(
    ("problem", "engine", "state"),
    [
        (conjugate_gaussian.problem(num_data=10), ImportanceSampling(proposal="prior"), "passed"),
        (conjugate_gaussian.problem(num_data=10, guide_error=0.3), ImportanceSampling(proposal="guide"), "passed"),
        (ppca.problem(num_data=20), ImportanceSampling(proposal="laplace"), "passed"),
    ],
)
def test_engines_of_ours(problem, engine, state):
    found = calibrate(problem, engine, replicates=1000)
    assert found.state == state, str(found)


def test_a_mean_field_guide_fails_as_it_must():
    """Of z ~ N(0, I) with z_1 + z_2 seen within 0.3 the posterior has the correlation -0.916, and a normal guide that
    factorises the sd sqrt(1 - 0.916^2) = 0.4 of what is due; 99 draws show a spread of no more than 2.5 times that of
    uniform ranks."""

    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)

    engine = SVI(guide="AutoNormal", num_steps=600, learning_rate=0.03)
    found = calibrate(Problem(model, args=(torch.zeros(5, dtype=F64),)), engine, replicates=500, rounds=1)
    assert found.state == "rejected"
    for quantity in found.quantities[:2]:
        assert 1.6 < quantity.spread < 2.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "engine"),
    [
        (conjugate_gaussian.problem(num_data=10), NUTS(num_samples=150, warmup_steps=200)),
        (ppca.problem(num_data=20), NUTS(num_samples=150, warmup_steps=200)),
        (conjugate_gaussian.problem(num_data=10), SMC(num_samples=1000)),
        (repeated(shared=True), ImportanceSampling(proposal="prior", num_samples=3000)),
        (eight_schools.problem(), ImportanceSampling(proposal="prior", num_samples=3000)),
    ],
)
def test_engines_of_ours_at_full_size(problem, engine):
    found = calibrate(problem, engine, replicates=1000, seed=1)
    assert found.state == "passed", str(found)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_posterior_of_one_latent_is_rejected_at_full_size(wrong):
    found = calibrate(repeated(shared=True), Planted(wrong=wrong, num_samples=100), replicates=1000, rounds=1)
    assert found.state == "rejected", str(found)


# -- how it goes about it ---------------------------------------------------------------------------------------------


def test_one_inference_serves_as_many_data_as_are_asked_for(monkeypatch):
    sizes = []
    monkeypatch.setattr(Planted, "supports", lambda self, density: sizes.append(tuple(density.batch_shape)) or "")
    calibrate(repeated(num_data=7), Planted(), replicates=150, rounds=1)
    assert sizes[1:] == [(150,)]  # the first asks whether the engine can run
    sizes.clear()
    calibrate(repeated(num_data=50, fixed=True), Planted(), replicates=150, rounds=1)
    assert sizes[1:] == [(50,)] * 3


def test_suspicious_ranks_are_followed_by_more_replicates(monkeypatch):
    p_values = iter([1e-4, 1e-4, 0.5])
    monkeypatch.setattr(Ranked, "round", lambda self: Round(self.total, {}, 99.0, next(p_values)))
    found = calibrate(PROBLEM, Planted(num_samples=100), replicates=100)
    assert [r.replicates for r in found.rounds] == [100, 400, 1600]
    assert found.state == "passed"
    assert len(found.quantities[0].u) == 1600
    p_values = iter([1e-4, 1e-4, 1e-4])
    assert calibrate(PROBLEM, Planted(num_samples=100), replicates=100).state == "rejected"


def test_the_same_seed_gives_the_same_ranks_and_another_does_not():
    ranks = [calibrate(PROBLEM, Planted(), replicates=100, seed=s).quantities[0].u for s in (0, 0, 1)]
    assert ranks[0] == ranks[1]
    assert not set(ranks[0]) & set(ranks[2])


def test_failures_leave_the_question_undecided():
    found = calibrate(repeated(num_data=20, fixed=True), Planted(fail_above=1.0), replicates=200, rounds=1)
    assert found.state == "undecided"
    assert 0 < found.rounds[0].failures["planted to fail"] < 200
    assert found.rounds[0].replicates + sum(found.rounds[0].failures.values()) == 200
    assert "planted to fail" in found.verdict
    assert not found.passed


def test_all_failures():
    found = calibrate(PROBLEM, Planted(fail_above=-1e9), replicates=100)
    assert (found.state, found.quantities, len(found.rounds)) == ("undecided", (), 1)
    assert "100 of 100" in str(found)


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        (Planted(), {"replicates": 99}, "replicates"),
        (Planted(), {"draws": 2}, "draws"),
        (Planted(), {"rounds": 0}, "rounds"),
        (Planted(), {"rounds": True}, "rounds"),
        (Planted(), {"false_alarm": 0.5}, "false_alarm"),
        (Enumeration(), {}, "is continuous"),
        (SVI(guide="AutoDelta", num_steps=5), {}, "a point"),
        ("nutz", {}, "Did you mean"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(engine, options, words):
    with pytest.raises(ProblemError, match=words):
        calibrate(PROBLEM, engine, **options)


def test_a_model_that_cannot_be_simulated_is_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    with pytest.raises(ProblemError, match="alone holds the data"):
        calibrate(Problem(model, args=(torch.ones(3),)), ImportanceSampling(proposal="prior"))


def sequence(x):
    """Three observations of a datum, each a part of x, and each a draw given the one before."""
    with pyro.plate("data", len(x)):
        last = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        for t in range(3):
            pyro.sample(f"x_{t}", dist.Gamma(1 + last.abs(), 2.0), obs=x[:, t])
            last = x[:, t]


def test_data_may_be_parts_of_an_argument_and_be_drawn_given_earlier_ones():
    """Means of 20,000 sequences against the law drawn by hand, |z| < 4.9; the last columns, which are nobody's data,
    stay as they are."""
    x = torch.ones(20_000, 5, dtype=F64)
    with Density(Problem(sequence, args=(x,))) as density, torch.no_grad(), isolated(3):
        data, truth = simulated(density)
        last = torch.randn(20_000, dtype=F64)
        for t in range(3):
            last = torch._standard_gamma(1 + last.abs()) / 2
            error = ((last.var() + data[0][:, t].var()) / 20_000).sqrt()
            assert abs(float((data[0][:, t].mean() - last.mean()) / error)) < 4.9
    assert float(torch.corrcoef(torch.stack([truth["z"].abs(), data[0][:, 0]]))[0, 1]) > 0.3
    assert bool((data[0][:, 3:] == 1).all())
    assert bool((x == 1).all())
    found = calibrate(Problem(sequence, args=(x[:20],)), ImportanceSampling(proposal="prior"), replicates=1000)
    assert found.state == "passed", str(found)


def test_data_that_cannot_be_told_from_other_arguments_are_refused():
    def twice(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x[:2])
        pyro.sample("b", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x[1:])

    def centred(x):
        z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)

    for model, words in ((twice, "that no other site observes"), (centred, "more than to observe them")):
        with pytest.raises(ProblemError, match=words):
            calibrate(Problem(model, args=(torch.ones(3, dtype=F64),)), ImportanceSampling(proposal="prior"))


def test_simulations_leave_deterministic_sites_alone():
    """Pyro has a deterministic site observed; drawn anew it would take the plate's shape twice."""
    problem = eight_schools.problem()
    with Density(problem) as density, torch.no_grad():
        simulated = density.simulate(4000)
        values = {name: simulated[name][:1].expand(4000, *simulated[name].shape[1:]) for name in density.latents}
        predicted = density.predict(values)["y"]
    assert simulated["y"].shape == predicted.shape == (4000, 8)
    theta = simulated["mu"][0] + simulated["tau"][0] * simulated["eta"][0]
    z = (predicted.mean(0) - theta) / problem.args[1] * 4000**0.5
    assert z.abs().max() < 4.9
    ratio = predicted.var(0) / problem.args[1].square()
    assert (ratio - 1).abs().max() < 4.9 * (2 / 4000) ** 0.5


# -- p-values, bands, pictures ----------------------------------------------------------------------------------------


def test_p_values_of_uniform_ranks_are_honest():
    """Each test on 1,000 sets of 200: below 0.05 and 0.005 as often as it should, within 4.9 binomial errors and a
    tenth (chi-squared and the spread are not quite their limits' laws)."""
    rng = np.random.default_rng(0)
    found = [uniformity(rng.uniform(size=200)) for _ in range(1000)]
    for name in found[0]:
        p = np.array([one[name] for one in found])
        for level in (0.05, 0.005):
            error = 4.9 * np.sqrt(level / len(p))
            assert abs((p < level).mean() - level) < error + 0.1 * level, name


def test_errors_of_the_size_that_is_promised_are_seen():
    """Of 60 runs at the two sizes that `smallest_seen` names at 1,000, at least 48 (95 % are promised) reject."""
    rng = np.random.default_rng(2)
    shift, width = smallest_seen(1000, 5, 5e-7)
    limit = 5e-7 / 25
    for mean, sd in ((shift, 1.0), (0.0, 1 / (1 + width))):
        runs = [uniformity(stats.norm.cdf(rng.normal(size=1000), mean, sd)) for _ in range(60)]
        assert sum(min(run.values()) < limit for run in runs) >= 48
        few = [uniformity(stats.norm.cdf(rng.normal(size=1000), mean / 3, 1 - (1 - sd) / 3)) for _ in range(60)]
        assert sum(min(run.values()) < limit for run in few) < 12


def test_the_band_holds_uniform_ranks_as_often_as_it_says():
    rng = np.random.default_rng(7)
    z, low, high = calibrate_report.band(300)
    inside = 0
    for _ in range(1000):
        gap = np.searchsorted(np.sort(rng.uniform(size=300)), z, side="right") / 300 - z
        inside += bool((gap >= low - 1e-12).all() and (gap <= high + 1e-12).all())
    assert abs(inside / 1000 - 0.95) < 4.9 * 0.007 + 0.01


def test_a_quantity_outside_of_its_band_is_marked():
    good = Quantity("a", tuple(np.linspace(0.001, 0.999, 400)), {"mean": 1.0}, 0.0, 1.0)
    bad = Quantity("b", tuple(np.linspace(0.2, 0.999, 400)), {"mean": 1e-9}, 0.5, 0.8)
    assert calibrate_report.leaves_band(good) is None
    assert calibrate_report.leaves_band(bad) == pytest.approx(0.2, abs=0.02)


def test_the_command(tmp_path):
    path = tmp_path / "out.json"
    words = ["calibrate", "conjugate_gaussian", "importance", "--set", "num_data=5", "--replicates", "200"]
    done = CliRunner().invoke(main, [*words, "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "passed" in done.output
    read = json.loads(path.read_text())
    assert read["state"] == "passed"
    assert len(read["quantities"][0]["u"]) == 200
    assert "--replicates 200" in read["command"]
    wrong = ["calibrate", "ppca", "svi", "--set", "svi.guide=AutoNormal", "--set", "svi.num_steps=3"]
    refused = CliRunner().invoke(main, [*wrong, "--set", "num_data=20", "--replicates", "500", "--rounds", "1"])
    assert refused.exit_code == 1
    assert "rejected" in refused.output
    two = CliRunner().invoke(main, ["calibrate", "ppca", "svi,nuts"])
    assert (two.exit_code, "one engine" in two.output) == (2, True)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ranks.png"
    words = ["calibrate", "conjugate_gaussian", "importance", "--set", "num_data=5", "--replicates", "100"]
    done = CliRunner().invoke(main, [*words, "--picture", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_report.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["calibrate", "vae", "nuts", "--picture", str(tmp_path / "ranks.png")])
    assert (done.exit_code, "matplotlib" in done.output) == (2, True)


def test_nothing_to_draw_is_said(tmp_path):
    found = calibrate(PROBLEM, Planted(fail_above=-1e9), replicates=100)
    with pytest.raises(ProblemError, match="nothing to draw"):
        calibrate_report.picture(found, tmp_path / "none.png")


def test_the_planted_engine_is_what_it_says():
    """The model's own density agrees with the posterior that the planted engines are made of."""
    problem = repeated(num_data=6)
    with Density(problem) as density, torch.no_grad():
        z = torch.linspace(-6, 6, 4001, dtype=F64)
        log_joint = density.log_joint({"z": z[:, None].expand(-1, 6)})
    truth = problem.reference_at({})
    evidence = torch.logsumexp(log_joint, 0) + (z[1] - z[0]).log()
    assert torch.allclose(evidence, truth.log_evidence.value, atol=1e-9)
    assert torch.allclose((torch.softmax(log_joint, 0) * z[:, None]).sum(0), truth.mean["z"], atol=1e-9)

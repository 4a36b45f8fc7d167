"""Gaps where they are known in closed form, their identity, their errors; and the data a guide misses, by k-hat.

    z ~ N(0, I_2),   x ~ N(W z, s^2 I_3):   z | x ~ N(A x, P^-1), P = I + W'W / s^2 with a correlation of about -0.8

of which the best mean-field member has sds 1 / sqrt P_jj, and loses (sum_j log P_jj - log det P) / 2. A guide with its
mean off by d and its sds multiplied by r loses d'P d / 2 + sum_j (r^2 - 1) / 2 - log r more.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyrometer.benchmarks.doubt import Doubtful, as_images, guide_weights, k_hats, picture, worst_data
from pyrometer.benchmarks.gaps import NAMES, Gap, gaps
from pyrometer.benchmarks.gaussian import climb, member_of, start_from_draws
from pyrometer.benchmarks.tabled import as_text
from pyrometer.inference import (
    EM,
    NUTS,
    SVI,
    ImportanceSampling,
    Problem,
    ProblemError,
    Reference,
    Status,
    infer,
    learn,
)
from pyrometer.inference.density import Density
from pyrometer.inference.engine import Draws
from pyrometer.inference.learn import Fit
from pyrometer.inference.posterior import Evidence
from pyrometer.inference.settings import settings
from pyrometer.inference.statistics import psis
from pyrometer.models import conjugate_gaussian, gaussian_mixture, ppca

W = torch.tensor([[1.0, 0.8], [0.5, 1.0], [0.2, 0.3]], dtype=torch.float64)
NOISE = 0.7


def posterior(w):
    precision = torch.eye(2).double() + w.T @ w / NOISE**2
    return precision, torch.linalg.solve(precision, w.T) / NOISE**2  # P, A


def reference(parameters, x):
    w = parameters["W"].double()
    covariance = w @ w.T + NOISE**2 * torch.eye(3).double()
    value = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)
    return Reference("exact", log_evidence=Evidence(value, torch.zeros(()), "exact"), provenance="closed form")


def model(x):
    w = pyro.param("W", W.clone)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=w.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ w.T, NOISE).to_event(1), obs=x)


def guide(x):
    weight = pyro.param("weight", torch.zeros(2, 3, dtype=torch.float64))
    scale = pyro.param("scale", torch.ones(2, dtype=torch.float64), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ weight.T, scale).to_event(1))


def problem(count=40, test=25, guide=guide):
    x = torch.randn(count + test, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5
    return Problem(model, (x[:count],), guide=guide, reference=reference, held_out=(x[count:],), name="correlated")


def fit_of(w=W, moved=0.0, stretched=1.0):
    """The best mean-field guide at W = w, its mean moved by `moved` x in each latent, its sds stretched."""
    precision, weight = posterior(w)
    phi = {"weight": weight + moved, "scale": stretched * precision.diagonal().rsqrt()}
    return Fit({"W": w}, phi, learner="made")


def losses(x, w=W, moved=0.0, stretched=1.0):
    """approximation () and amortisation (N) in closed form."""
    precision, _ = posterior(w)
    off = moved * x.sum(1, keepdim=True).expand(-1, 2)
    approximation = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    amortisation = 0.5 * ((off @ precision) * off).sum(1) + 2 * ((stretched**2 - 1) / 2 - math.log(stretched))
    return float(approximation), amortisation


@settings
class Noisy:
    """log p(x) with normal noise of a known sd for each datum."""

    name: ClassVar[str] = "noisy"
    sd: float = 0.1

    def supports(self, density):
        return ""

    def run(self, density, run):
        (x,) = density.args
        value = reference(density.theta.values(), x).log_evidence.value + self.sd * torch.randn(len(x))
        evidence = Evidence(value, torch.full((len(x),), self.sd), "estimate")
        return Draws({"z": torch.zeros(1, 5, len(x), 2)}, "iid", log_evidence=evidence)


def z_scores(gap, true):
    return (torch.tensor(gap.values) - true) / torch.tensor(gap.errors)


# -- the figures ------------------------------------------------------------------------------------------------------


def test_gaps_are_those_of_the_closed_form():
    p, other = problem(), W * 0.6
    fits = {"good": fit_of(moved=0.1, stretched=1.4), "worse": fit_of(other, moved=-0.05, stretched=0.8)}
    found = gaps(p, fits, seed=3, num_samples=2000)
    (x,) = p.held_out
    best, worse = (reference({"W": w}, x).log_evidence.value for w in (W, other))
    assert best.mean() > worse.mean()
    for name, evidence, of in (("good", best, (W, 0.1, 1.4)), ("worse", worse, (other, -0.05, 0.8))):
        row = found.row(name)
        approximation, amortisation = losses(x, *of)
        expected = {
            "learning": best - evidence,
            "approximation": torch.full_like(best, approximation),
            "amortisation": amortisation,
            "inference": approximation + amortisation,
            "total": best - evidence + approximation + amortisation,
        }
        assert row.status.done
        assert row.best == (name == "good")
        assert (row.below, row.notes, row.level) == (0, (), "good")
        assert row.slack < 1e-4
        for gap_name, true in expected.items():
            gap = row.gaps[gap_name]
            assert len(gap.values) == 25
            assert gap.value == pytest.approx(sum(gap.values) / 25)
            # 25 data, 2,000 draws: errors of at most 0.012, so that a gap that is off by 0.06 nats is seen; 1e-6 each.
            assert gap.std_error < 0.012
            assert abs(gap.value - float(true.mean())) <= 4.9 * gap.std_error + 1e-9, gap_name
            assert gap.data_error == pytest.approx(float(torch.tensor(gap.values).std()) / 5)
        assert row.gaps["amortisation"].value > 5 * row.gaps["amortisation"].std_error
        assert row.worst[0] == max(range(25), key=row.gaps["inference"].values.__getitem__)
    assert found.row("good").gaps["learning"].std_error == 0.0
    assert approximation > 0.02


def test_the_parts_add_up_for_every_datum():
    fits = {"a": fit_of(moved=0.1), "b": fit_of(0.6 * W), "c": fit_of(1.3 * W, stretched=2.0)}
    noisy = ImportanceSampling(proposal="laplace", num_samples=50)
    for row in gaps(problem(), fits, evaluator=noisy, num_samples=100, num_steps=60).rows:
        value = {name: torch.tensor(row.gaps[name].values) for name in NAMES}
        total = value["learning"] + value["approximation"] + value["amortisation"]
        assert torch.allclose(total, value["total"], atol=1e-9)
        assert torch.allclose(value["approximation"] + value["amortisation"], value["inference"], atol=1e-9)
        # the evidence's error is in the gaps that hold it, and cancels in the rest
        assert row.gaps["approximation"].std_error > 0
        assert (row.gaps["learning"].std_error == 0) == row.best


def test_errors_per_datum_cover():
    """200 data: squared errors in units of their standard error average 1, within 4.9 sqrt(2 / 200) = 0.49.

    The guide is almost the best member, so a difference at the same noise is far more precise than two ELBOs.
    """
    p = problem(test=200)
    row = gaps(p, fit_of(moved=0.02, stretched=1.05), evaluator=Noisy(), num_samples=500, seed=11).rows[0]
    approximation, amortisation = losses(p.held_out[0], W, 0.02, 1.05)
    inference = approximation + amortisation
    expected = {
        "approximation": approximation,
        "amortisation": amortisation,
        "inference": inference,
        "total": inference,
    }
    for name, true in expected.items():
        assert float(z_scores(row.gaps[name], true).square().mean()) == pytest.approx(1.0, abs=0.49), name
        # and the mean over data, by its own error
        assert abs(row.gaps[name].value - float(torch.as_tensor(true).mean())) < 4.9 * row.gaps[name].std_error
        errors = torch.tensor(row.gaps[name].errors)
        assert row.gaps[name].std_error == pytest.approx(float(errors.square().sum().sqrt()) / 200)
    assert row.gaps["amortisation"].std_error < 0.2 * row.gaps["inference"].std_error


def test_the_training_data_are_judged_when_asked_for():
    p = problem()
    by = {flag: gaps(p, fit_of(moved=0.2), held_out=flag, num_samples=500, num_steps=60) for flag in (True, False)}
    assert [len(by[flag].rows[0].gaps["total"].values) for flag in (True, False)] == [25, 40]
    for flag, x in ((True, p.held_out[0]), (False, p.args[0])):
        gap = by[flag].rows[0].gaps["amortisation"]
        assert abs(gap.value - float(losses(x, W, 0.2)[1].mean())) < 4.9 * gap.std_error + 1e-3
    assert [by[flag].judged for flag in (True, False)] == ["held-out", "training"]


def test_a_full_covariance_has_no_approximation_gap_here():
    p = problem()
    row = gaps(p, fit_of(), family="AutoMultivariateNormal", num_samples=500).rows[0]
    approximation, _ = losses(p.held_out[0])
    # at the exact posterior the weights do not vary at all
    assert row.gaps["approximation"].value == pytest.approx(0.0, abs=1e-4)
    assert abs(row.gaps["amortisation"].value - approximation) < 4.9 * row.gaps["amortisation"].std_error


def test_a_guide_richer_than_the_family_is_not_taken_for_a_member():
    p = ppca.problem(num_data=30, seed=2)
    theta = Density(p).theta.values()
    precision = torch.linalg.inv(ppca.posterior_map(theta["W"], theta["sigma"])[1])
    gap = float(0.5 * (precision.diagonal().log().sum() - precision.logdet()))
    fit = Fit(theta, Density(p).phi.values())
    full, mean_field = (
        gaps(p, fit, family=family, held_out=False).rows[0] for family in ("AutoMultivariateNormal", "AutoNormal")
    )
    assert all(abs(full.gaps[name].value) < 1e-6 for name in NAMES)
    assert full.notes == ()
    assert mean_field.gaps["approximation"].value == pytest.approx(
        gap, abs=4.9 * mean_field.gaps["approximation"].std_error
    )
    # the guide is exact, its best mean-field member is not
    assert mean_field.gaps["amortisation"].value == pytest.approx(
        -gap, abs=4.9 * mean_field.gaps["amortisation"].std_error
    )
    assert gap > 0.02
    assert "no member of the family" in mean_field.notes[0]
    assert (full.level, mean_field.level) == ("good", "caution")
    assert mean_field.below > 0


def test_which_guides_are_members():
    def dependent(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    def apart(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(x, 0.5))
            pyro.sample("a", dist.Normal(-x, 2.0))

    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = []
    for each in (dependent, apart, pyro.poutine.scale(apart, 0.5)):
        density = Density(Problem(two, (x,), guide=each))
        with density, torch.no_grad():
            found.append(member_of(density, "AutoNormal"))
    assert found[0] is None
    assert found[2] is None
    assert found[1].loc.tolist() == [[-1.0, 1.0], [-3.0, 3.0]]  # in the model's order
    assert found[1].tril.diagonal(dim1=-2, dim2=-1).tolist() == [[2.0, 0.5], [2.0, 0.5]]


def test_a_log_normal_guide_is_normal_in_the_unconstrained_space():
    def positive(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    def log_normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.LogNormal(x, 0.4))

    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    density = Density(Problem(positive, (x,), guide=log_normal))
    with density, torch.no_grad():
        found = member_of(density, "AutoNormal")
    assert found.loc[:, 0].tolist() == [0.5, -1.0]
    assert found.tril[:, 0, 0].tolist() == [0.4, 0.4]


def test_moments_of_draws_are_where_other_guides_start():
    density = Density(ppca.problem(num_data=4))
    with density, torch.no_grad():
        exact = member_of(density, "AutoMultivariateNormal")
        torch.manual_seed(0)
        drawn = start_from_draws(density, "AutoMultivariateNormal", 20_000)
        narrow = start_from_draws(density, "AutoNormal", 20_000)
    covariance = [g.tril @ g.tril.mT for g in (exact, drawn, narrow)]
    assert torch.allclose(drawn.loc, exact.loc, atol=0.04)  # 4.9 sds of at most 1 / sqrt(20,000) = 0.035
    assert torch.allclose(covariance[1], covariance[0], atol=0.06)
    assert torch.allclose(covariance[2], torch.diag_embed(covariance[0].diagonal(dim1=-2, dim2=-1)), atol=0.06)


def test_the_search_finds_the_best_member_from_far_away():
    density = Density(problem(test=6).on_held_out())
    precision, weight = posterior(W)
    with density, torch.no_grad():
        far = start_from_draws(density, "AutoNormal")  # the prior, as the guide stands
        far = far._replace(loc=far.loc + 2.0)
        member, left = climb(density, far, "AutoNormal", 300, 32)
    (x,) = density.args
    assert torch.allclose(member.loc, x @ weight.T, atol=1e-3)
    assert torch.allclose(member.tril.diagonal(dim1=-2, dim2=-1), precision.diagonal().rsqrt().expand(6, 2), atol=1e-3)
    assert float(left.max()) < 1e-5
    with density, torch.no_grad():
        # cut short, it says so, to the order of magnitude
        early, left = climb(density, far, "AutoNormal", 20, 32)
    off = early.loc - member.loc
    missing = 0.5 * ((off @ precision) * off).sum(-1)
    assert bool((left > 0.1 * missing).all())


# -- what cannot be split ---------------------------------------------------------------------------------------------


def test_what_cannot_be_split_keeps_its_learning_gap():
    p = replace(problem(), guide=guide)
    fits = {
        "good": fit_of(),
        "no guide": Fit({"W": 0.5 * W}),
        "broken": Fit({"W": W}, status=Status("failed", "NaN at step 3")),
        "far off": replace(fit_of(0.5 * W), guide_parameters={"weight": W.T, "scale": torch.tensor([1e200, 1.0])}),
    }
    found = gaps(p, fits, num_samples=100, num_steps=30)
    assert [row.learner for row in found.rows] == list(fits)
    exact = [reference({"W": w}, p.held_out[0]).log_evidence.value for w in (W, 0.5 * W)]
    row = found.row("no guide")
    assert row.status.state == "unsupported"
    assert "no guide" in row.status.reason
    assert set(row.gaps) == {"learning"}
    assert row.gaps["learning"].value == pytest.approx(float((exact[0] - exact[1]).mean()))
    assert "NaN at step 3" in found.row("broken").status.reason
    assert found.row("broken").gaps == {}
    assert found.row("far off").status.done or found.row("far off").status.reason
    text = " ".join(str(found).split())
    assert "NaN at step 3" in text
    assert "cannot run" in text


def test_discrete_latents_and_em_are_rows_with_a_reason():
    mixture = gaussian_mixture.problem(num_data=10)
    theta = Density(mixture).theta.values()
    row = gaps(mixture, Fit(theta, {"any": torch.zeros(1)}), held_out=False).rows[0]
    assert row.status.state == "unsupported"
    assert row.status.reason
    em = learn(conjugate_gaussian.problem(num_data=5), EM(num_steps=2))
    row = gaps(conjugate_gaussian.problem(num_data=5), em, held_out=False).rows[0]
    assert row.status.state == "unsupported"


def test_a_lower_bound_as_evidence_is_told():
    found = gaps(problem(), fit_of(), evaluator=SVI(guide="AutoNormal", num_steps=3), num_samples=50, num_steps=20)
    assert found.rows[0].kind == "lower bound"
    assert "lower bound" in found.rows[0].notes[0]
    # one step of SVI is a poor judge, and the gaps are no better than it
    assert found.rows[0].level in ("caution", "bad")
    assert found.rows[0].notes[1].startswith("the evidence: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "AutoNormall"}, "family"),
        ({"num_samples": 1}, "num_samples"),
        ({"num_steps": 0.5}, "num_steps"),
        ({"fits": []}, "none given"),
        ({"fits": [3]}, "got int"),
        ({"fits": [fit_of(), fit_of()]}, "tell them apart"),
        ({"evaluator": "nutss"}, "Did you mean 'nuts'"),
        ({"seed": -1}, "seed"),
        ({"problem": ppca.problem()}, "no held-out data"),
    ],
)
def test_mistakes_are_named(change, words):
    given = {"problem": problem(), "fits": fit_of(), **change}
    with pytest.raises(ProblemError, match=words):
        gaps(given.pop("problem"), given.pop("fits"), **given)


def test_json_and_table(tmp_path):
    found = gaps(problem(), {"a": fit_of(moved=0.1), "b": fit_of(0.6 * W)}, num_samples=100, num_steps=30)
    path = found.to_json(tmp_path / "gaps.json")
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read == found.to_dict()
    assert (
        Gap(**{k: tuple(v) if isinstance(v, list) else v for k, v in read["rows"][0]["gaps"]["total"].items()})
        == (found.rows[0].gaps["total"])
    )
    for width in (80, 120):
        text = as_text(found, width)
        assert max(map(len, text.splitlines())) <= width
        assert "\u2026" not in text
    for words in ("a *", "amortisation", "largest inference gap", "truth (exact)", f" {found.rows[0].worst[0]} "):
        assert words in str(found), words


# -- k-hat of each datum ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """A guide that is right for some data and ever narrower and further off for others."""
    return problem(test=60).on_held_out(), fit_of(moved=0.4, stretched=0.6)


def test_worst_data_by_k_hat(judged):
    target, fit = judged
    weighted = guide_weights(target, fit, seed=1)
    expected = psis(weighted.log_weights[0])[1]
    assert torch.equal(k_hats(weighted), expected)
    found = worst_data(weighted)
    assert found.threshold == pytest.approx(1 - 1 / 3)
    assert found.data == 60
    assert {index for index, _ in found.worst} == set((expected > 2 / 3).nonzero().flatten().tolist())
    assert [k for _, k in found.worst] == sorted((k for _, k in found.worst), reverse=True)
    assert all(k == float(expected[index]) for index, k in found.worst)
    assert 0 < len(found.worst) < 60
    assert found.share == len(found.worst) / 60
    assert worst_data(weighted, threshold=-10.0).share == 1.0
    assert worst_data(weighted, threshold=99.0).words() == ""
    assert f"at {len(found.worst)} of 60 data" in found.words()
    # the guide's own draws, from SVI's answer, tell the same of each datum
    with_guide = infer(replace(target, guide=guide), SVI(num_steps=1, learning_rate=1e-12), parameters=fit, seed=1)
    assert with_guide.kind == "iid"
    ratio = with_guide.sample_stats["lp"] - with_guide.sample_stats["log_q"]
    assert torch.equal(k_hats(with_guide), psis(ratio[0])[1])
    assert Doubtful.read(json.loads(json.dumps({"threshold": 0.5, "data": 2, "worst": [[1, "inf"]]}))).worst == (
        (1, math.inf),
    )


def test_where_k_hat_says_nothing_it_is_refused(judged):
    target, fit = judged
    smoothed = infer(target, ImportanceSampling(proposal="guide", pareto_smoothed=True), parameters=fit)
    chains = infer(target, NUTS(num_samples=5, warmup_steps=5, num_chains=1), parameters=fit)
    listed = infer(gaussian_mixture.problem(num_data=5), "enumeration")
    for answer, words in ((smoothed, "smoothed"), (chains, "no importance weights"), (listed, "computed, not drawn")):
        with pytest.raises(ProblemError, match=words):
            worst_data(answer)
    with pytest.raises(ProblemError, match="no guide"):
        guide_weights(target, replace(fit, guide_parameters={}))


def test_a_picture_of_the_worst(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    titles, shown = [], []
    patch = pytest.MonkeyPatch()
    add = figure.Figure.add_subplot

    def watched(self, *arguments):
        axes = add(self, *arguments)
        image, title = axes.imshow, axes.set_title
        axes.imshow = lambda data, **more: (shown.append(data.copy()), image(data, **more))
        axes.set_title = lambda text, **more: (titles.append(text), title(text, **more))
        return axes

    x = torch.arange(48.0).reshape(3, 16)
    found = Doubtful(0.7, 3, ((2, 1.5), (0, 0.9)))
    patch.setattr(figure.Figure, "add_subplot", watched)
    try:
        path = picture(tmp_path / "worst.png", x, found)
    finally:
        patch.undo()
    assert titles == ["2: 1.50", "0: 0.90"]
    assert [image.tolist() for image in shown] == [x[2].reshape(4, 4).tolist(), x[0].reshape(4, 4).tolist()]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for wrong, words in (((tmp_path / "a.jpg", x, found), "png"), ((path, x[:2], found), "2 images"),
                         ((path, x, Doubtful(0.7, 3, ())), "nothing to show")):  # fmt: skip
        with pytest.raises(ProblemError, match=words):
            picture(*wrong)


def test_what_is_an_image():
    assert as_images(torch.zeros(5, 64)).shape == (5, 8, 8)
    assert as_images(torch.zeros(5, 6), (2, 3)).shape == (5, 2, 3)
    assert as_images(torch.zeros(5, 7, 9)).shape == (5, 7, 9)
    assert as_images(torch.zeros(5, 1, 7, 9)).shape == (5, 7, 9)
    for wrong in (torch.zeros(5, 10), torch.zeros(5), torch.zeros(5, 1), torch.zeros(5, 3, 4, 4)):
        with pytest.raises(ProblemError, match="no images"):
            as_images(wrong)

"""Programs that are odd and legal: angles, mixtures as priors, guides that hold points or auxiliary draws, numpy.

Truths by sums on a grid of one latent, exact to 1e-6. A mean, a second moment or an evidence lies within 5 standard
errors: a false alarm once in a million; the errors, of 4,000 draws, see 10 % of a standard deviation.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from pyrometer.inference import (
    NUTS,
    SMC,
    SVI,
    AnnealedImportance,
    Enumeration,
    ImportanceSampling,
    Problem,
    ProblemError,
    RandomWalk,
    WakeSleep,
    infer,
    why_not,
)
from pyrometer.inference.density import Density

X = torch.tensor(2.5)


def angle(x: Tensor) -> None:
    """Of which the posterior lies on both sides of the seam at pi."""
    z = pyro.sample("z", dist.VonMises(0.0, 1.0))
    pyro.sample("x", dist.VonMises(z, 2.0), obs=x)


def angles(x: Tensor) -> None:
    """The same inside of an event."""
    z = pyro.sample("z", dist.VonMises(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("x", dist.VonMises(z[0], 2.0), obs=x)


def mixed(x: Tensor) -> None:
    mixing = dist.Categorical(torch.tensor([0.3, 0.7]))
    z = pyro.sample("z", dist.MixtureSameFamily(mixing, dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixed_positive(x: Tensor) -> None:
    mixing = dist.Categorical(torch.tensor([0.3, 0.7]))
    z = pyro.sample("z", dist.MixtureSameFamily(mixing, dist.Gamma(torch.tensor([2.0, 3.0]), 1.0)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def on_a_grid(program, low, high):
    """Mean, sd and log evidence by the trapezoid rule on the program's own log joint, by Pyro alone."""
    grid = torch.linspace(low, high, 20_001, dtype=torch.float64)
    trace = poutine.trace(poutine.condition(program, data={"z": grid})).get_trace(X)
    log_joint = trace.nodes["z"]["fn"].log_prob(grid) + trace.nodes["x"]["fn"].log_prob(X)
    mass = log_joint.exp()
    total = torch.trapezoid(mass, grid)
    mean = torch.trapezoid(mass * grid, grid) / total
    return mean, (torch.trapezoid(mass * (grid - mean) ** 2, grid) / total).sqrt(), total.log()


@pytest.mark.parametrize(
    ("program", "low", "high"),
    [(angle, -math.pi, math.pi), (angles, -math.pi, math.pi), (mixed, -9.0, 9.0), (mixed_positive, 1e-9, 15.0)],
)
@pytest.mark.parametrize(
    "engine",
    [
        NUTS(num_samples=1000),
        RandomWalk(),
        SMC(num_samples=4000),
        ImportanceSampling(num_samples=4000, proposal="prior"),
    ],
    ids=lambda e: e.name,
)
def test_latents_of_supports_that_torch_does_not_tell(program, low, high, engine):
    mean, sd, evidence = on_a_grid(angle if program is angles else program, low, high)
    posterior = infer(Problem(program, args=(X,)), engine, seed=1)
    assert posterior.status.done
    assert bool(((posterior.draws["z"] >= low) & (posterior.draws["z"] <= high)).all())
    ess = 600.0  # fewer than any of these has
    assert abs(float(posterior.mean("z").sum() - mean)) < 5 * float(sd) / math.sqrt(ess)
    assert abs(float(posterior.sd("z").sum() / sd) - 1) < 5 * math.sqrt(1.0 / ess)  # kurtosis below 5
    if posterior.log_evidence is not None:
        found = posterior.log_evidence
        assert abs(float(found.value - evidence)) < 5 * float(found.std_error)


def test_an_angle_is_weighed_once_wherever_the_proposal_lies():
    posterior = infer(Problem(angle, args=(X,)), ImportanceSampling(num_samples=4000, proposal="laplace"), seed=1)
    evidence = posterior.log_evidence
    assert abs(float(evidence.value - on_a_grid(angle, -math.pi, math.pi)[2])) < 5 * float(evidence.std_error)


# -- guides ----------------------------------------------------------------------------------------------------------


def regression(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, s), obs=x)


DATA = torch.tensor([0.3, -0.7, 1.2, 0.5, 0.1])


def with_auxiliary(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Normal(0.5 * a, 0.3))
    pyro.sample("s", dist.LogNormal(0.0, 0.3))


def half_a_point(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["s"])))
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["s"])))
    return guide


POINTS = {"delta": autoguide.AutoDelta, "laplace": autoguide.AutoLaplaceApproximation}
FLAWED = {**POINTS, "half a point": half_a_point, "auxiliary": lambda model: with_auxiliary}
DENSITIES = {
    "normal": autoguide.AutoNormal,
    "joint normal": autoguide.AutoMultivariateNormal,
    "flow": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[8]),
    "structured": autoguide.AutoStructured,
}


@pytest.mark.parametrize("name", FLAWED)
def test_a_guide_without_density_gives_no_bound_and_no_weights(name):
    problem = Problem(regression, args=(DATA,), guide=FLAWED[name](regression))
    posterior = infer(problem, SVI(num_steps=20), seed=1)
    assert posterior.status.done
    assert posterior.log_evidence is None
    assert (posterior.kind == "point") is (name in POINTS)
    methods = (ImportanceSampling(proposal="guide"), SMC(start="guide"), AnnealedImportance(start="guide"))
    reasons = [why_not(problem, method) for method in (*methods, SVI(objective="iwae"))]
    reasons.append(WakeSleep().supports(Density(problem)))
    told = "auxiliary site 'a'" if name == "auxiliary" else "a point, which has no density"
    assert all(told in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", DENSITIES)
def test_a_guide_of_pyros_that_maps_auxiliary_draws_has_a_density(name):
    """Its bound lies below log p(x), by a sum over a grid, and its draws' weights have that for their mean."""
    problem = Problem(regression, args=(DATA,), guide=DENSITIES[name](regression))
    assert Density(problem).guide_flaw == ""
    bound = infer(problem, SVI(num_steps=400, learning_rate=0.02, num_samples=4000), seed=1).log_evidence
    axes = torch.linspace(-6.0, 6.0, 601, dtype=torch.float64), torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    mu, u = torch.meshgrid(*axes, indexing="ij")
    joint = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(0.0, 0.5).log_prob(u)
    joint = joint + sum(dist.Normal(mu, u.exp()).log_prob(x) for x in DATA)
    truth = float(joint.flatten().logsumexp(0)) + math.log(0.02 * 0.02)
    assert float(bound.value) < truth + 5 * float(bound.std_error)
    assert abs(float(bound.refined.value) - truth) < 5 * float(bound.refined.std_error) < 0.2


def share(x: Tensor) -> None:
    pyro.sample("x", dist.Bernoulli(pyro.sample("p", dist.Beta(1.0, 1.0))), obs=x)


@pytest.mark.parametrize(("law", "narrow"), [(dist.Uniform(0.0, 0.5), True), (dist.Beta(2.0, 2.0), False)])
def test_a_guide_that_is_narrower_than_the_model_is_told(law, narrow):
    problem = Problem(share, args=(torch.tensor(1.0),), guide=lambda x: pyro.sample("p", law))
    verdict = infer(problem, ImportanceSampling(num_samples=2000, proposal="guide"), seed=1).diagnostics.verdict
    assert ("a part of its support alone" in verdict) is narrow


# -- programs --------------------------------------------------------------------------------------------------------


def test_a_program_that_goes_through_numpy_is_run_draw_by_draw():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.as_tensor(2.0 * z.detach().numpy()), 1.0), obs=x)

    posterior = infer(Problem(model, args=(X,)), ImportanceSampling(num_samples=1000, proposal="prior"), seed=1)
    truth = float(dist.Normal(0.0, math.sqrt(5.0)).log_prob(X))
    assert abs(float(posterior.log_evidence.value) - truth) < 5 * float(posterior.log_evidence.std_error)


class Line(PyroModule):
    """Priors that were made, and expanded, before the program runs keep torch's checks of values."""

    def __init__(self) -> None:
        super().__init__()
        self.line = PyroModule[torch.nn.Linear](2, 1)
        self.line.weight = PyroSample(dist.LogNormal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.line.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor) -> None:
        y = self.line(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(y, 1.0), obs=x[:, 0])


def test_a_module_of_pyros_is_compiled_like_any_program():
    posterior = infer(Problem(Line(), args=(torch.eye(2),)), NUTS(num_samples=20, warmup_steps=20), seed=1)
    assert posterior.cost.backend in ("native", "graph")  # graph where there is no compiler


def test_data_that_the_model_alters_in_place_are_named_among_the_reasons():
    def model(x):
        x += 1.0
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ProblemError, match="alters its data in place"):
        infer(Problem(model, args=(torch.tensor(1.0),)), NUTS())


def test_torchs_default_device_is_asked_to_stay_the_cpu():
    problem = Problem(share, args=(torch.tensor(1.0),))
    with pytest.raises(ProblemError, match=r"set it back by torch\.set_default_device"), torch.device("meta"):
        infer(problem, NUTS())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_listed_values_have_the_precision_of_the_run(default):
    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=x)

    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        posterior = infer(Problem(model, args=(X,)), Enumeration(), seed=1)
    finally:
        torch.set_default_dtype(before)
    assert posterior.draws["z"].dtype == torch.float64
    odds = 0.3 / 0.7 * math.exp(2.5 - 0.5)
    assert float(posterior.mean("z")) == pytest.approx(odds / (1 + odds), abs=1e-6)

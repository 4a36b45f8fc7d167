"""theta and phi: found wherever Pyro lets them live, named as the user knows them, lent to a run and given back."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from pyrometer.inference import ML, SVI, Problem, ProblemError, infer, learn
from pyrometer.inference.density import Density
from pyrometer.inference.parameters import Leaf, Parameters, find_parameters

F64 = torch.float64
X = torch.linspace(-1, 1, 6, dtype=F64)


def values_in(density):
    """theta as the run has it: outside the density the program's own values stand in the leaves."""
    with density:
        return density.theta.values()


def likelihood(x, mu, sd):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, sd), obs=x)


def log_likelihood(mu, sd):
    return float((-0.5 * ((X - mu) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)).sum())


# -- where parameters live -------------------------------------------------------------------------------------------
# Each maker answers (model, names) with mu = 0.5 and sd = 2; `names` are those of mu and of sd, and whether the user
# sees sd itself (constrained) or its logarithm.


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(0.5))
        self.log_sd = nn.Parameter(torch.tensor(math.log(2.0)))
        self.unused = nn.Parameter(torch.tensor(9.0))

    def forward(self, x):
        likelihood(x, self.mu, self.log_sd.exp())

    def model(self, x):
        likelihood(x, self.mu, self.log_sd.exp())


class Constrained(PyroModule):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(0.5))
        self.sd = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def forward(self, x):
        likelihood(x, self.mu, self.sd)

    def model(self, x):
        likelihood(x, self.mu, self.sd)


class Nested(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = Constrained()

    def forward(self, x):
        self.inner(x)


class Holder:
    """No module itself; it owns one."""

    def __init__(self):
        self.net = Plain()

    def model(self, x):
        likelihood(x, self.net.mu, self.net.log_sd.exp())


def module():
    return Plain(), "mu", "log_sd"


def bound_method():
    return Plain().model, "mu", "log_sd"


def closure():
    net = Plain()
    return (lambda x: likelihood(x, net.mu, net.log_sd.exp())), "net.mu", "net.log_sd"


def registered():
    net = Plain()

    def model(x):
        pyro.module("decoder", net)
        likelihood(x, net.mu, net.log_sd.exp())

    return model, "decoder.mu", "decoder.log_sd"


def pyro_module():
    return Constrained(), "mu", "sd"


def bound_method_of_a_pyro_module():
    return Constrained().model, "mu", "sd"


def nested_pyro_module():
    return Nested(), "inner.mu", "inner.sd"


def pyro_params():
    def model(x):
        mu = pyro.param("mu", torch.tensor(0.5))
        likelihood(x, mu, pyro.param("sd", lambda: torch.tensor(2.0), constraint=constraints.positive))

    return model, "mu", "sd"


def leaf_tensors():
    mu = torch.tensor(0.5, requires_grad=True)
    log_sd = torch.tensor(math.log(2.0), requires_grad=True)
    return (lambda x: likelihood(x, mu, log_sd.exp())), "mu", "log_sd"


def held_by_an_object():
    return Holder().model, "net.mu", "net.log_sd"


def partial():
    def model(net, x):
        likelihood(x, net.mu, net.log_sd.exp())

    return functools.partial(model, Plain()), "mu", "log_sd"


def inside_a_handler():
    return pyro.condition(Plain(), data={}), "mu", "log_sd"


PLACES = [
    module,
    bound_method,
    closure,
    registered,
    pyro_module,
    bound_method_of_a_pyro_module,
    nested_pyro_module,
    pyro_params,
    leaf_tensors,
    held_by_an_object,
    partial,
    inside_a_handler,
]


@pytest.fixture(params=PLACES, ids=lambda make: make.__name__)
def place(request):
    return request.param()


def own(name, sd):
    """The value that the user calls by this name for this standard deviation."""
    return math.log(sd) if "log_sd" in name else sd


def test_parameters_are_found_with_names_and_values(place):
    """Both parameters that the density depends on, by the user's names; the one that it does not depend on is no
    parameter of the model."""
    model, mu, sd = place
    theta = Density(Problem(model, args=(X,))).theta
    assert set(theta) == {mu, sd}
    values = theta.values()
    assert values[mu].item() == pytest.approx(0.5)
    assert values[sd].item() == pytest.approx(own(sd, 2.0), rel=1e-6)
    assert not values[mu].requires_grad
    positive = theta.by_name[sd].constraint
    assert bool(positive.check(torch.tensor(-1.0))) == ("log_sd" in sd)


def test_parameters_given_by_name_are_those_of_the_density(place):
    """The density at mu = -0.3, sd = 0.7 is the one at these values; the program keeps its own."""
    model, mu, sd = place
    density = Density(Problem(model, args=(X,)), parameters={mu: torch.tensor(-0.3), sd: torch.tensor(own(sd, 0.7))})
    with density, torch.no_grad():
        assert density.log_joint({}).sum().item() == pytest.approx(log_likelihood(-0.3, 0.7), rel=1e-6)
    assert values_in(density)[mu].item() == pytest.approx(-0.3)
    assert density.theta.by_name[mu].tensor.item() == 0.5


def test_parameters_are_learned_wherever_they_live(place):
    """The mean and the standard deviation of the data, by L-BFGS; the program's own values stay."""
    model, mu, sd = place
    fit = learn(Problem(model, args=(X,)), ML())
    assert fit.status.done, fit.status
    assert fit.parameters[mu].item() == pytest.approx(0.0, abs=1e-4)
    assert fit.parameters[sd].item() == pytest.approx(own(sd, float(X.std(correction=0))), rel=1e-4)
    again = Density(Problem(model, args=(X,))).theta.values()
    assert again[mu].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("constraint", "start", "new"),
    [
        (constraints.positive, torch.tensor(2.0), torch.tensor(0.3)),
        (constraints.unit_interval, torch.tensor(0.2), torch.tensor(0.9)),
        (constraints.interval(-1.0, 3.0), torch.tensor(0.2), torch.tensor(2.5)),
        (constraints.simplex, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.7, 0.2, 0.1])),
        (constraints.lower_cholesky, torch.eye(2), torch.tensor([[2.0, 0.0], [-1.0, 0.5]])),
        (dist.constraints.ordered_vector, torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-3.0, -2.0, 5.0])),
        (constraints.real, torch.tensor([1.0, 2.0]), torch.tensor([-4.0, 7.0])),
    ],
    ids=["positive", "unit", "interval", "simplex", "cholesky", "ordered", "real"],
)
@pytest.mark.parametrize("way", ["param", "module"])
def test_constrained_parameters_are_read_and_set_as_the_user_sees_them(constraint, start, new, way):
    class Owner(PyroModule):
        def __init__(self):
            super().__init__()
            self.p = PyroParam(start, constraint=constraint)

        def forward(self, x):
            likelihood(x, self.p.sum(), 1.0)

    def function(x):
        likelihood(x, pyro.param("p", start, constraint=constraint).sum(), 1.0)

    density = Density(Problem(function if way == "param" else Owner(), args=(X,)))
    torch.testing.assert_close(values_in(density)["p"].double(), start.double(), rtol=1e-6, atol=1e-6)
    density.set_parameters({"p": new})
    torch.testing.assert_close(values_in(density)["p"].double(), new.double(), rtol=1e-6, atol=1e-6)
    with density, torch.no_grad():
        assert density.log_joint({}).sum().item() == pytest.approx(log_likelihood(float(new.sum()), 1.0), rel=1e-5)


def test_values_that_the_user_has_in_the_param_store_are_where_a_run_starts():
    """`pyro.param` names a value in the store: what plain Pyro trained is what a run sees; the store keeps its own."""
    model, mu, sd = pyro_params()
    pyro.param(mu, torch.tensor(3.0))
    pyro.param(sd, torch.tensor(5.0), constraint=constraints.positive)
    density = Density(Problem(model, args=(X,)))
    assert values_in(density)[mu].item() == 3.0
    assert values_in(density)[sd].item() == pytest.approx(5.0)
    fit = learn(Problem(model, args=(X,)), ML())
    assert fit.parameters[mu].item() == pytest.approx(0.0, abs=1e-4)
    assert pyro.param(mu).item() == 3.0
    assert pyro.param(sd).item() == pytest.approx(5.0)


def test_two_parameters_of_one_name_are_both_found():
    """A module's `mu` and a `pyro.param("mu")`: neither may be lost, or it would stay unlearned in silence."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            likelihood(x, self.mu, pyro.param("mu", torch.tensor(0.3)).exp())

    theta = Density(Problem(Both(), args=(X,))).theta
    assert len(theta) == len(theta.values()) == 2
    assert sorted(v.item() for v in theta.values().values()) == pytest.approx([0.3, 0.5])


def test_weights_that_are_shared_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)
            self.b = nn.Linear(1, 1)
            self.b.weight = self.a.weight

        def forward(self, x):
            likelihood(x, self.b(self.a(x[:, None].to(self.a.weight)))[:, 0], 1.0)

    theta = Density(Problem(Tied(), args=(X,))).theta
    assert list(theta) == ["a.weight", "a.bias", "b.bias"]


def test_frozen_and_unused_weights_are_no_parameters():
    net = Plain()
    net.log_sd.requires_grad_(False)
    assert list(Density(Problem(net.model, args=(X,))).theta) == ["mu"]


def test_sampled_weights_are_latents_and_frozen_ones_stay_frozen():
    """Pyro's modules thaw what is frozen when they are called; a run gives it back frozen."""

    class Mixed(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
            self.free = nn.Parameter(torch.tensor(0.1))
            self.frozen = nn.Parameter(torch.tensor(0.2), requires_grad=False)

        def forward(self, x):
            likelihood(x, self.w + self.frozen, self.free.exp())

    mixed = Mixed()
    density = Density(Problem(mixed, args=(X,)))
    assert list(density.latents) == ["w"]
    assert "w" not in density.theta
    assert "free" in density.theta
    assert not mixed.frozen.requires_grad
    assert mixed.free.requires_grad


# -- model and guide -------------------------------------------------------------------------------------------------


def local_model(x):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, sd))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_guide(x):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
    gain = pyro.param("gain", torch.tensor(0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(gain * x, 0.3 * sd))


def test_what_model_and_guide_share_is_theta():
    density = Density(Problem(local_model, args=(X,), guide=local_guide))
    assert (list(density.theta), list(density.phi)) == (["sd"], ["gain"])


def test_a_module_that_holds_model_and_guide_is_split():
    class Vae(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 1)
            self.log_sd = nn.Parameter(torch.tensor(0.0))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z)[:, 0], self.log_sd.exp()), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x[:, None]), self.log_sd.exp()).to_event(1))

    vae = Vae()
    density = Density(Problem(vae.model, args=(X.float(),), guide=vae.guide))
    assert set(density.theta) == {"decoder.weight", "decoder.bias", "log_sd"}
    assert set(density.phi) == {"encoder.weight", "encoder.bias"}


def test_a_fit_gives_theta_and_phi_back_by_name():
    problem = Problem(local_model, args=(X,), guide=local_guide)
    fit = learn(problem, SVI(num_steps=25, num_samples=10))
    assert set(fit.parameters) == {"sd"}
    assert set(fit.guide_parameters) == {"gain"}
    expected = (fit.parameters["sd"].item(), fit.guide_parameters["gain"].item())
    given_fit = Density(problem)
    given_fit.set_parameters(fit)
    for density in (given_fit, Density(problem, parameters={**fit.parameters, **fit.guide_parameters})):
        assert density.guide_ready
        with density:
            found = (density.theta.values()["sd"].item(), density.phi.values()["gain"].item())
        assert found == pytest.approx(expected, rel=1e-6)
    assert not Density(problem).guide_ready
    assert not Density(problem, parameters=fit.parameters).guide_ready


def test_a_delta_guide_shows_its_parameters_in_its_values():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("point", torch.zeros(len(x)))))

    density = Density(Problem(local_model, args=(X,), guide=guide))
    assert list(density.phi) == ["point"]


# -- setting ---------------------------------------------------------------------------------------------------------


def some_parameters():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    raw = torch.tensor(0.0, requires_grad=True)
    return Parameters({"weight": Leaf("weight", weight, constraints.real), "sd": Leaf("sd", raw, constraints.positive)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weigth": torch.zeros(2)}, r"no parameter 'weigth'.*Did you mean 'weight'\?"),
        ({"zzz": torch.zeros(2)}, r"no parameter 'zzz'.*weight, sd"),
        ({"weight": torch.zeros(3)}, r"'weight': expected shape \(2,\), got \(3,\)"),
        ({"weight": torch.zeros(2, 1)}, r"'weight': expected shape \(2,\), got \(2, 1\)"),
        ({"sd": torch.tensor(-1.0)}, r"'sd': a value lies outside"),
        ({"sd": torch.tensor(0.0)}, r"'sd': a value lies outside"),
        ({"sd": torch.tensor(math.nan)}, r"'sd': a value lies outside"),
        ({"weight": torch.tensor([1.0, math.nan])}, r"'weight': a value lies outside"),
    ],
    ids=["near", "far", "length", "dims", "negative", "zero", "nan", "nan in a vector"],
)
def test_what_cannot_be_set_is_refused_by_name(values, message):
    with pytest.raises(ProblemError, match=message):
        some_parameters().set(values)


def test_numbers_and_lists_may_be_set_and_are_copied():
    parameters = some_parameters()
    mine = torch.tensor([3.0, 4.0])
    parameters.set({"sd": 2, "weight": mine})
    mine += 1
    assert parameters.values()["sd"].item() == pytest.approx(2.0)
    assert parameters.values()["weight"].tolist() == [3.0, 4.0]
    parameters.set({"weight": [5, 6]})
    assert parameters.values()["weight"].tolist() == [5.0, 6.0]


def test_values_are_copies():
    parameters = some_parameters()
    parameters.values()["weight"].add_(1)
    assert parameters.values()["weight"].tolist() == [1.0, 2.0]


# -- lending ---------------------------------------------------------------------------------------------------------


def snapshot(tensor):
    return (tensor.data_ptr(), tensor.detach().clone().tolist(), tensor.dtype, tensor.grad, tensor.requires_grad)


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "raises"])
def test_lent_leaves_come_back_as_they_were(fails):
    """Values, storage, dtype, gradient and requires_grad of the owner; the run's own values wait for the next time."""
    parameters = some_parameters()
    weight, raw = parameters.tensors
    weight.grad = torch.tensor([7.0, 8.0])
    before, gradient = [snapshot(t) for t in (weight, raw)], weight.grad

    def borrow():
        with parameters.lend():
            assert weight.grad is None
            weight.data = weight.data + 10
            raw.data = torch.full_like(raw, 3.0)
            weight.grad = torch.ones_like(weight)
            if fails:
                raise KeyError("stop")

    parameters.cast(F64, None)
    if fails:
        with pytest.raises(KeyError):
            borrow()
    else:
        borrow()
    assert [snapshot(t) for t in (weight, raw)] == before
    assert weight.grad is gradient
    assert gradient.tolist() == [7.0, 8.0]
    with parameters.lend():
        assert weight.tolist() == [11.0, 12.0]
        assert weight.dtype == raw.dtype == F64
        assert weight.grad is None
    assert [snapshot(t) for t in (weight, raw)] == before


def test_steps_of_an_optimiser_stay_with_the_run():
    parameters = some_parameters()
    weight = parameters.tensors[0]
    for _ in range(3):
        with parameters.lend():
            optimizer = torch.optim.SGD([weight], lr=1.0)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert weight.tolist() == [1.0, 2.0]
    with parameters.lend():
        assert weight.tolist() == [-2.0, -1.0]


@pytest.mark.parametrize("engine_fails", [False, True], ids=["done", "failed"])
def test_a_module_is_untouched_by_a_run(engine_fails):
    """Values, storage, dtype, gradient, requires_grad and training mode of every parameter and buffer, also where the
    model raises in the midst of the run."""

    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
            self.register_buffer("offset", torch.tensor(0.1))
            self.calls = 0

        def model(self, x):
            self.calls += 1
            if engine_fails and self.calls > 10 and torch.is_grad_enabled():  # not in the checks before the run
                raise RuntimeError("stop")
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z)[:, 0] + self.offset, 1.0), obs=x)

    owner = Fragile()
    first = next(owner.parameters())
    first.grad = torch.full_like(first, 7.0)
    before = [snapshot(t) for t in (*list(owner.parameters())[1:], *owner.buffers())]
    value = first.detach().clone()
    fit = learn(Problem(owner.model, args=(X,)), SVI(num_steps=15, num_samples=10, guide="AutoNormal"))
    assert fit.status.state == ("failed" if engine_fails else "done")
    posterior = infer(Problem(owner.model, args=(X,)), SVI(num_steps=3, num_samples=5)) if not engine_fails else None
    assert posterior is None or posterior.status.done
    assert [snapshot(t) for t in (*list(owner.parameters())[1:], *owner.buffers())] == before
    assert bool((first == value).all())
    assert first.dtype == torch.float32
    assert first.requires_grad
    assert bool((first.grad == 7.0).all())
    if not engine_fails:
        assert any(not torch.equal(fit.parameters[n], p.detach()) for n, p in owner.named_parameters())


# -- the search itself -----------------------------------------------------------------------------------------------


def test_find_parameters_follows_the_graph_to_its_leaves():
    a, b, c = (torch.tensor(v, requires_grad=True) for v in (1.0, 2.0, 3.0))
    outputs = [(a * b).exp(), a.detach() + c.detach(), b]
    found = find_parameters(outputs, lambda: None, exclude=[])
    assert {id(t) for t in found.tensors} == {id(a), id(b)}
    assert [id(t) for t in find_parameters(outputs, lambda: None, exclude=[a]).tensors] == [id(b)]
    assert len(find_parameters([a.detach()], lambda: None, exclude=[])) == 0
    assert find_parameters([a.detach()], lambda: None, exclude=[]).dtype is None


def test_the_widest_dtype_is_that_of_the_parameters():
    narrow, wide = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, dtype=F64, requires_grad=True)
    assert find_parameters([narrow * 2], lambda: None, []).dtype == torch.float32
    assert find_parameters([narrow * 2, wide * 2], lambda: None, []).dtype == F64


def test_deep_graphs_need_no_recursion():
    leaf = torch.tensor(1.0, requires_grad=True)
    value = leaf
    for _ in range(5000):
        value = value + 1
    assert [id(t) for t in find_parameters([value], lambda: None, []).tensors] == [id(leaf)]

"""Graphs against the programs they were traced from: the same bits, the same random numbers, the same counts."""

from __future__ import annotations

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyrometer.inference import ML, NUTS, SVI, Problem, infer, learn
from pyrometer.inference import compile as compile_module
from pyrometer.inference.compile import compiled, traced
from pyrometer.inference.density import Density
from pyrometer.inference.native.function import lowered
from pyrometer.inference.trace import trace

F64 = torch.float64
X = torch.linspace(-1, 2, 6, dtype=F64)
UNTRACED = "not traced: its operations depend on values"


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def v(*numbers):
    return torch.tensor(numbers, dtype=F64)


def seeded(run, *args, seed=7):
    torch.manual_seed(seed)
    return run(*args)


def assert_same(function, run, *args):
    """Bit for bit, with the same random numbers and the same generator afterwards."""
    expected, after = seeded(function, *args), torch.get_rng_state()
    actual = seeded(run, *args)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert torch.equal(torch.get_rng_state(), after)


# -- functions of tensors --------------------------------------------------------------------------------------------

BUFFER = v(0.5, 1.5)


def arithmetic(x):
    return (x * BUFFER.exp() + x.sum()).cumsum(0), x.sin()


def gradients(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        value = (leaf.exp() * BUFFER).sum()
        return value.detach(), torch.autograd.grad(value, leaf)[0]


def draws(x):
    return (x + torch.randn_like(x), torch.rand(3) + x.sum(), torch._standard_gamma(BUFFER) * x)


def in_place_draws(x):
    return (
        x + torch.empty(2, dtype=F64).normal_(),
        x * torch.zeros(2, dtype=F64).bernoulli_(0.5),
        torch.nn.functional.dropout(x, 0.5, True),
    )


def draws_into_a_view(x):
    whole = torch.zeros(4, dtype=F64)
    whole[:2].normal_()
    whole[2:].copy_(x)
    return (whole,)


def adds_into_a_view(x):
    whole = torch.zeros(4, dtype=F64)
    part = whole[1:3]
    part += x
    return (whole, whole * 2)


def shuffles(x):
    return (x[torch.randperm(2)],)


FUNCTIONS = [arithmetic, gradients, draws, in_place_draws, draws_into_a_view, adds_into_a_view, shuffles]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_graph_equals_its_function_call_after_call(function):
    run, why_not = traced(function, [(v(0.1, 0.2),), (v(-1.0, 3.0),)], [])
    assert why_not == "" or function is adds_into_a_view
    for args in (v(0.3, -0.4), v(2.0, 1.0), v(0.3, -0.4)):
        assert_same(function, run, args)


@pytest.mark.parametrize("function", [draws, in_place_draws, draws_into_a_view, shuffles], ids=lambda f: f.__name__)
def test_random_numbers_are_drawn_anew_at_every_call(function):
    """None is frozen into the graph: with 60 calls, every output takes several values."""
    run, why_not = traced(function, [(v(0.1, 0.2),)], [])
    assert why_not == ""
    outputs = [run(v(1.0, 2.0)) for _ in range(60)]
    for one in zip(*outputs, strict=True):
        stacked = torch.stack(one).reshape(60, -1)
        assert len({tuple(row.tolist()) for row in stacked}) > 1


def test_tracing_moves_no_random_number():
    before = torch.get_rng_state()
    traced(draws, [(v(0.1, 0.2),), (v(1.0, 0.2),)], [])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", ["in place", "data", "other dtype"])
@pytest.mark.parametrize("way", ["plain", "detach", "data", "gradient"])
def test_the_graph_reads_parameters_where_they_live(change, way):
    """After a step of an optimiser (in place) and after lending (`.data`), also where no gradient is asked for."""
    w = v(1.0, 2.0).requires_grad_(True)

    def function(x):
        if way == "gradient":
            with torch.enable_grad():
                value = (w.exp() * x).sum()
                return (value.detach(), *torch.autograd.grad(value, w))
        seen = {"plain": w, "detach": w.detach(), "data": w.data}[way]
        return ((seen.exp() * x).detach(),)

    run, why_not = traced(function, [(v(0.1, 0.2),), (v(1.0, 3.0),)], [w])
    assert why_not == ""
    first = run(v(1.0, 1.0))
    with torch.no_grad():
        if change == "in place":
            w.sub_(5.0)
        else:
            w.data = torch.tensor([-4.0, -3.0], dtype=torch.float32 if change == "other dtype" else F64)
    if change == "other dtype" and way == "gradient":
        return  # a graph with gradients is one of its dtype
    second = run(v(1.0, 1.0))
    assert not torch.equal(first[0], second[0])
    assert_same(function, run, v(1.0, 1.0))


def test_what_depends_on_a_moving_tensor_is_not_folded():
    """Chains of constants with a parameter at one end move with it; chains without are computed once."""
    w, constant = v(1.0).requires_grad_(True), v(3.0)
    calls = []

    def function(x):
        calls.append(1)
        return (((constant.exp() * 2).log() + w.exp() * constant).detach() * x,)

    run, why_not = traced(function, [(v(1.0),), (v(2.0),)], [w])
    assert why_not == ""
    count = len(calls)
    for value in (1.0, -2.0, 5.0):
        with torch.no_grad():
            w.fill_(value)
        expected = ((constant.exp() * 2).log() + w.exp() * constant).detach() * 2
        assert torch.equal(run(v(2.0))[0], expected)
    assert len(calls) == count  # the program itself did not run again


def branches_on_the_argument(x):
    return (x if x.sum() > 0 else -3 * x,)


def branches_on_an_entry(x):
    return (x * 2 if float(x[0]) > 0 else x,)


def loops_a_number_of_times(x):
    for _ in range(int(x[0].clamp(0, 5))):
        x = x + 1
    return (x,)


@pytest.mark.parametrize(
    "function",
    [branches_on_the_argument, branches_on_an_entry, loops_a_number_of_times],
    ids=lambda f: f.__name__,
)
def test_control_flow_on_values_keeps_the_program(function):
    run, why_not = traced(function, [(v(1.0, 2.0),), (v(3.0, 2.0),)], [])
    assert run is function
    assert why_not.startswith("not traced: ")
    assert len(why_not) > len("not traced: ")


@pytest.mark.parametrize("read", [lambda w: w.item(), lambda w: float(2 * w), lambda w: bool(w > 0)], ids=range(3))
def test_control_flow_on_a_parameter_keeps_the_program(read):
    """A number read off a parameter is one at the time of tracing: a step of an optimiser would not be seen."""
    w = v(1.0).requires_grad_(True)

    def function(x):
        with torch.no_grad():
            return ((w if read(w) > 0 else -3 * w) * x,)

    run, why_not = traced(function, [(v(1.0),), (v(2.0),)], [w])
    with torch.no_grad():
        w.fill_(-1.0)
    assert run(v(1.0))[0].item() == 3.0
    assert why_not.startswith("not traced: ")


def test_a_program_that_fails_at_other_parameters_is_no_obstacle():
    """A covariance of the user's own is positive definite where it stands, not wherever a check might move it."""
    covariance = torch.eye(2, dtype=F64).requires_grad_(True)

    def function(x):
        return (torch.linalg.cholesky(covariance.detach()) @ x,)

    run, _ = traced(function, [(v(1.0, 2.0),), (v(2.0, 1.0),)], [covariance])
    assert covariance.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with torch.no_grad():
        covariance.mul_(4.0)
    assert run(v(1.0, 2.0))[0].tolist() == [2.0, 4.0]


def test_what_changes_between_calls_outside_of_torch_keeps_the_program():
    """A counter, and Python's own random numbers: the trace would hold them still."""
    count = [0]

    def counts(x):
        count[0] += 1
        return (x * count[0],)

    def draws_in_python(x):
        return (x * random.random(),)

    for function in (counts, draws_in_python):
        run, why_not = traced(function, [(v(1.0),), (v(2.0),)], [])
        assert run is function
        assert why_not == UNTRACED


def test_a_function_that_raises_is_kept_with_its_reason():
    def function(x):
        raise ValueError("no such thing\nsecond line")

    run, why_not = traced(function, [(v(1.0),)], [])
    assert run is function
    assert why_not == "not traced: no such thing"


def test_a_check_of_constants_is_made_once_and_not_at_every_call():
    """The matrix comes of an operation that has no lowering, and needs none: it is a constant."""

    def function(x, shift):
        return ((torch.linalg.cholesky(torch.eye(3, dtype=F64) + shift) @ x).sum(),)

    example = (v(1, 2, 3),)
    run = compiled(lambda x: function(x, 0.5), [example], [])
    assert (run.backend, run.why) == ("native", "")
    torch.testing.assert_close(run(v(0.3, -1, 2)), function(v(0.3, -1, 2), 0.5), rtol=1e-12, atol=1e-12)
    graph = compile_module._trace(lambda x: function(x, 0.5), [example], [], 100).graph
    assert not any("check_errors" in str(node.target) or "eye" in str(node.target) for node in graph.nodes)
    refused = compiled(lambda x: function(x, -2.0), [example], [])
    assert refused.backend == "eager"
    with pytest.raises(torch.linalg.LinAlgError):
        refused(*example)


def test_programs_of_one_graph_keep_their_own_data():
    """The same operations on other constants: nothing is shared through a cache."""

    def make(data):
        return traced(lambda x: ((x * data).sum()[None],), [(v(1.0, 1.0),), (v(2.0, 1.0),)], [])[0]

    one, two = make(v(1.0, 2.0)), make(v(10.0, 20.0))
    for _ in range(2):
        assert one(v(1.0, 1.0))[0].item() == 3.0
        assert two(v(1.0, 1.0))[0].item() == 30.0


def test_outputs_are_not_overwritten_by_the_next_call():
    run, _ = traced(lambda x: (x * 2, torch.zeros(2, dtype=F64)), [(v(1.0, 1.0),)], [])
    first = run(v(1.0, 2.0))
    kept = [t.clone() for t in first]
    run(v(5.0, 6.0))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_graphs_under_vmap_draw_for_each_particle():
    def function(x):
        batched = torch.func.vmap(lambda row: row + torch.randn(2, dtype=F64), randomness="different")
        return (batched(x),)

    run, why_not = traced(function, [(torch.zeros(3, 2, dtype=F64),), (torch.ones(3, 2, dtype=F64),)], [])
    assert why_not == ""
    value = run(torch.zeros(3, 2, dtype=F64))[0]
    assert len(set(value.flatten().tolist())) == 6
    assert_same(function, run, torch.ones(3, 2, dtype=F64))


# -- programs --------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.encoder = nn.Linear(1, 2)
        self.dropout = dropout

    def model(self, x):
        sd = pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z)[:, 0], sd), obs=x)

    def guide(self, x):
        hidden = torch.nn.functional.dropout(x[:, None], self.dropout, True)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(hidden), 0.5).to_event(1))


def decoder_problem(dropout=0.0):
    torch.manual_seed(3)
    decoder = Decoder(dropout)
    return Problem(decoder.model, args=(X.float(),), guide=decoder.guide)


def mixture(x):
    """Discrete latents, summed out; shared locations."""
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample(
            "x", dist.Normal(loc[k], pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive)), obs=x
        )


def regression(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=3 * x + 1)


RUNS = {
    "svi": lambda **how: learn(decoder_problem(), SVI(num_steps=40, num_samples=10), **how),
    "svi particles": lambda **how: learn(decoder_problem(), SVI(num_steps=40, num_samples=10, num_particles=4), **how),
    "svi minibatch": lambda **how: learn(decoder_problem(), SVI(num_steps=40, num_samples=10, batch_size=4), **how),
    "svi dropout": lambda **how: learn(decoder_problem(0.5), SVI(num_steps=40, num_samples=10), **how),
    "svi autoguide": lambda **how: learn(Problem(mixture, args=(X,)), SVI(num_steps=40, num_samples=10), **how),
    "svi rank": lambda **how: learn(
        decoder_problem(), SVI(num_steps=40, num_samples=10, guide="AutoLowRankMultivariateNormal"), **how
    ),
    "ml": lambda **how: learn(Problem(regression, args=(X,)), ML(num_steps=40, optimizer=torch.optim.Adam), **how),
    "ml minibatch": lambda **how: learn(Problem(regression, args=(X,)), ML(num_steps=40, batch_size=4), **how),
}


@pytest.mark.parametrize("name", RUNS)
def test_learning_is_the_same_traced_and_plain(name):
    """Parameters, trail and counts of 40 steps, bit for bit: updates of parameters, minibatches, random numbers and
    several particles all go through the graph as through the program."""
    graph, eager = RUNS[name](backend="graph"), RUNS[name](backend="eager")
    assert graph.status.done, graph.status
    assert (graph.cost.backend, eager.cost.backend) == ("graph", "eager")
    for one, two in ((graph.parameters, eager.parameters), (graph.guide_parameters, eager.guide_parameters)):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.equal(value, two[key]), key
    assert torch.equal(graph.trail.value, eager.trail.value)
    assert len(set(graph.trail.value.tolist())) > 30  # nothing is frozen
    assert graph.cost.gradients == pytest.approx(eager.cost.gradients, rel=1e-12)
    assert graph.cost.evaluations == pytest.approx(eager.cost.evaluations, rel=1e-12)
    assert graph.cost.gradients > 0


@pytest.mark.parametrize("name", RUNS)
def test_learning_is_the_same_in_machine_code(name):
    """The same steps in C, Adam included, in float32: parameters and trail up to its rounding, the same counts."""
    native, graph = RUNS[name](backend="native"), RUNS[name](backend="graph")
    assert native.status.done, native.status
    assert native.cost.backend == ("graph" if name == "svi rank" else "native")  # it writes to a view
    for one, two in ((native.parameters, graph.parameters), (native.guide_parameters, graph.guide_parameters)):
        for key, value in one.items():
            torch.testing.assert_close(value, two[key], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(native.trail.value, graph.trail.value, rtol=1e-4, atol=1e-3)
    assert native.cost.gradients == pytest.approx(graph.cost.gradients, rel=1e-12)
    assert native.cost.evaluations == pytest.approx(graph.cost.evaluations, rel=1e-12)


@pytest.mark.parametrize("model", [mixture, None], ids=["discrete", "network"])
def test_pyro_nuts_is_the_same_traced_and_plain(model):
    problem = decoder_problem() if model is None else Problem(model, args=(X,))
    engine = NUTS(num_samples=8, warmup_steps=8, num_chains=2, backend="pyro")
    graph, eager = (infer(problem, engine, seed=5, backend=backend) for backend in ("graph", "eager"))
    assert graph.status.done, graph.status
    assert (graph.cost.backend, eager.cost.backend) == ("graph", "eager")
    for site, value in graph.draws.items():
        assert torch.equal(value, eager.draws[site])
    assert graph.cost.gradients == eager.cost.gradients
    assert graph.cost.gradients - graph.cost.tuning_gradients >= graph.sample_stats["n_steps"].sum().item() > 0
    assert graph.cost.evaluations == eager.cost.evaluations


@pytest.mark.parametrize("backend", ["graph", "native"])
def test_a_compiled_density_follows_the_parameters_of_the_run(backend):
    """`set_parameters` and steps in place between calls are seen; two densities of one program keep their own."""
    problem = decoder_problem()
    one, two = Density(problem, backend=backend), Density(problem, backend=backend)
    two.set_parameters({"sd": 3.0, "net.2.bias": torch.tensor([-2.0])})
    u = torch.randn(2, 6, 2, dtype=F64)
    runs = {}
    for name, density in (("one", one), ("two", two)):
        with density, torch.no_grad():
            runs[name] = density.compiled_value_and_grad(u)
            assert density.backend == backend
    for _ in range(2):
        for name, density in (("one", one), ("two", two)):
            with density, torch.no_grad():
                for a, b in zip(runs[name](u), density.value_and_grad(u), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        one.set_parameters({"sd": 0.2})
    with one, two, torch.no_grad():
        pass
    with one, torch.no_grad():
        first = runs["one"](u)[0]
    with two, torch.no_grad():
        assert not torch.allclose(first, runs["two"](u)[0])


def test_a_program_whose_branches_depend_on_its_latents_stays_eager_and_right():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu if mu.item() > 0 else 3 * mu, 1.0), obs=x)

    density = Density(Problem(model, args=(X,)))
    with density, torch.no_grad():
        run = density.compiled_value_and_grad(v(0.5))
        assert density.backend == "eager"
        for u in (v(0.5), v(-0.5)):
            scale = 1.0 if u.item() > 0 else 3.0
            expected = -0.5 * u.square().sum() - 0.5 * (X - scale * u).square().sum()
            value, gradient = run(u)
            constant = -0.5 * 7 * torch.log(torch.tensor(2 * torch.pi, dtype=F64))
            assert value.item() == pytest.approx(float(expected + constant), rel=1e-12)
            assert gradient.item() == pytest.approx(float(-u + scale * (X - scale * u).sum()), rel=1e-12)


@pytest.mark.parametrize("backend", ["auto", "graph"])
def test_another_shape_is_traced_anew(backend):
    density = Density(Problem(mixture, args=(X,)), backend=backend)
    with density, torch.no_grad():
        for shape in ((2,), (3, 2), (5, 2), (2,)):
            u = torch.randn(shape, dtype=F64)
            for a, b in zip(density.compiled_value_and_grad(u)(u), density.value_and_grad(u), strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_tracing_is_not_counted_and_each_call_is():
    density = Density(Problem(mixture, args=(X,)))
    with density, torch.no_grad():
        run = density.compiled_value_and_grad(torch.zeros(5, 2, dtype=F64))
        assert density.counts == {"evaluations": 0.0, "gradients": 0.0}
        for _ in range(3):
            run(torch.zeros(5, 2, dtype=F64))
    assert density.counts == {"evaluations": 0.0, "gradients": 15.0}


def test_a_graph_that_disagrees_is_not_used(monkeypatch):
    """Should folding ever go wrong, the comparison with the program finds it: the program is kept."""

    def spoil(graph, moving):
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is torch.ops.aten.mul.Tensor:
                node.target = torch.ops.aten.add.Tensor

    monkeypatch.setattr(compile_module, "fold_constants", spoil)
    found = compiled(arithmetic, [(v(0.1, 0.2),)], [])
    assert (found.backend, found.run) == ("eager", arithmetic)
    run, why_not = traced(arithmetic, [(v(0.1, 0.2),)], [])
    assert run is arithmetic
    assert why_not == UNTRACED


def test_one_comparison_that_disagrees_is_enough():
    """The branch is another at one of the four places that are compared: where the parameter is negative."""
    p = v(1.0)

    def branching(x):
        return (x * (2 if p.numpy()[0] > 0 else 3),)  # which no trace sees

    assert compiled(branching, [(v(0.1, 0.2),)], [p]).backend == "eager"


@pytest.mark.parametrize("backend", ["graph", "native"])
def test_a_compiled_density_follows_the_minibatch(backend):
    """The rows are read where they live: other rows of the same number need no new compilation, and are seen."""
    density = Density(decoder_problem(), backend=backend)
    with density, torch.no_grad():
        for rows in ([0, 2, 5], [3, 1, 4], [0, 2, 5], [1, 2]):
            with density.minibatch(torch.tensor(rows)):
                u = torch.randn(2, len(rows), 2, dtype=F64)
                run = density.compiled_value_and_grad(u)
                assert density.backend == backend
                before = density.counts["gradients"]
                found = run(u)
                assert density.counts["gradients"] - before == pytest.approx(2 * len(rows) / 6)
                for a, b in zip(found, density.value_and_grad(u), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert len(density._compilations.made) == 2


COMPOSED = {
    "silu": lambda x: torch.nn.functional.silu(x).sum(),
    "huber": lambda x: torch.nn.functional.huber_loss(x, x.detach().flip(0)),
    "cross_entropy": lambda x: torch.nn.functional.cross_entropy(x, torch.arange(7) % 4),
    "addcmul": lambda x: torch.addcmul(x, x, x.exp(), value=0.5).sum(),
    "lerp": lambda x: torch.lerp(x, x.square(), 0.3).sum(),
    "logit": lambda x: torch.logit(x).square().sum(),
    "mvlgamma": lambda x: torch.mvlgamma(x + 3, 2).sum(),
    "trace": lambda x: x.mT.mm(x).trace(),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_operations_that_torch_writes_by_others_become_machine_code(name):
    def function(x):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            value = COMPOSED[name](x)
            (gradient,) = torch.autograd.grad(value, x)
        return value.detach(), gradient

    torch.manual_seed(0)
    examples = [(torch.rand(7, 4, dtype=F64),), (torch.rand(7, 4, dtype=F64),)]
    assert not lowered(trace(function, examples[0]).graph)
    run = compiled(function, examples, [])
    assert (run.backend, run.why) == ("native", "")
    for a, b in zip(run(examples[1][0]), function(examples[1][0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

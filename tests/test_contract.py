"""One contract for every engine on every problem.

Engines and families of models are discovered, so one that is added is tested the moment it exists. Beside the
families stand tiny problems, written here as plain Pyro, each with its exact posterior and evidence. Every pair runs
once, and some of them again, for seeds and warm starts, with small settings; each promise has a test of its own.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrometer import inference, models
from pyrometer.inference import Evidence, Posterior, Problem, Reference, find_engine, infer, registry, why_not
from pyrometer.inference.diagnostics import LEVELS

F64 = torch.float64

# Small settings, by field name: a class takes those that it has.
ENGINE_SETTINGS = {
    "num_samples": 30, "num_steps": 6, "warmup_steps": 10, "num_chains": 2, "max_tree_depth": 3,
    "max_proposals": 100_000,
}  # fmt: skip
# What an engine cannot do although it serves the model: it ends as failed, with words like these.
HOPELESS = {("rejection_sampling", "deep_markov"): "none of"}
PROBLEM_SETTINGS = {"num_data": 6, "num_train": 4, "num_test": 2, "hidden": 5}


# ---------------------------------------------------------------------------------------------------------------
# Problems whose truth is known


def beta_bernoulli() -> Problem:
    """p ~ Beta(2, 3), x_i ~ Bernoulli(p): one latent for all data; the posterior is Beta(2 + ones, 3 + zeros)."""
    x = torch.tensor([1.0, 0, 1, 1, 0, 1, 1], dtype=F64)
    ones, zeros = float(x.sum()), float((1 - x).sum())

    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", lambda: torch.tensor(2.0 + ones, dtype=F64), constraint=dist.constraints.positive)
        b = pyro.param("b", lambda: torch.tensor(3.0 + zeros, dtype=F64), constraint=dist.constraints.positive)
        pyro.sample("p", dist.Beta(a, b))

    posterior = dist.Beta(torch.tensor(2.0 + ones, dtype=F64), 3.0 + zeros)
    log_beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    truth = exact({"p": posterior.mean}, {"p": posterior.stddev}, log_beta(2 + ones, 3 + zeros) - log_beta(2, 3))
    return Problem(model, args=(x,), guide=guide, reference=truth, name="beta_bernoulli")


def poisson_rates() -> Problem:
    """rate_i ~ Gamma(3, rate 2), x_i ~ Poisson(rate_i): one latent for each datum; the posterior is Gamma(3 + x, 3)."""
    x = torch.tensor([0.0, 2, 5, 1], dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    posterior = dist.Gamma(3 + x, torch.tensor(3.0, dtype=F64))
    evidence = dist.NegativeBinomial(torch.tensor(3.0, dtype=F64), probs=torch.tensor(1 / 3, dtype=F64)).log_prob(x)
    truth = exact({"rate": posterior.mean}, {"rate": posterior.stddev}, evidence)
    return Problem(model, args=(x,), reference=truth, name="poisson_rates")


def correlated() -> Problem:
    """z ~ N(0, 2 R), x ~ N(z, 2 R), R of correlation 0.9: the posterior is N(x / 2, R) and x is N(0, 4 R)."""
    x = torch.tensor([1.0, -0.5], dtype=F64)
    R = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros_like(x), 2 * R))
        pyro.sample("x", dist.MultivariateNormal(z, 2 * R), obs=x)

    evidence = dist.MultivariateNormal(torch.zeros(2, dtype=F64), 4 * R).log_prob(x)
    truth = exact({"z": x / 2}, {"z": torch.ones(2, dtype=F64)}, evidence)
    return Problem(model, args=(x,), reference=truth, name="correlated")


NET_A = torch.tensor(0.3, dtype=F64)
NET_B = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=F64)  # b given a
NET_C = torch.tensor([[0.1, 0.9], [0.5, 0.4], [0.7, 0.2]], dtype=F64)  # P(c = 1) given b, a


def discrete_net(guided: bool = True) -> Problem:
    """a ~ Bernoulli, b | a ~ Categorical(3), c | a, b ~ Bernoulli, x ~ N(a + 2 b - 3 c, 1), for each datum."""
    x = torch.tensor([0.4, -1.7, 3.2], dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(NET_A))
            b = pyro.sample("b", dist.Categorical(NET_B[a.long()]))
            c = pyro.sample("c", dist.Bernoulli(NET_C[b, a.long()]))
            pyro.sample("x", dist.Normal(a + 2 * b - 3 * c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.zeros(5, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(logits=logits[0]))
            pyro.sample("b", dist.Categorical(logits=logits[1:4]))
            pyro.sample("c", dist.Bernoulli(logits=logits[4]))

    name = "discrete_net" if guided else "discrete_net (no guide)"
    return Problem(model, args=(x,), guide=guide if guided else None, reference=net_reference, name=name)


def net_reference(parameters: Any, x: Tensor) -> Reference:
    """The sum over the 12 values of (a, b, c), written out."""
    states = list(itertools.product((0, 1), (0, 1, 2), (0, 1)))
    rows = []
    for a, b, c in states:
        prior = (NET_A if a else 1 - NET_A) * NET_B[a, b] * (NET_C[b, a] if c else 1 - NET_C[b, a])
        mean = torch.tensor(float(a + 2 * b - 3 * c), dtype=F64)
        rows.append(prior.log() - 0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi))
    log_joint = torch.stack(rows)  # (12, N)
    weight = torch.softmax(log_joint, 0)
    values = torch.tensor(states, dtype=F64)
    mean = {site: values[:, j] @ weight for j, site in enumerate("abc")}
    sd = {site: (values[:, j] ** 2 @ weight - mean[site] ** 2).sqrt() for j, site in enumerate("abc")}
    return exact(mean, sd, torch.logsumexp(log_joint, 0), log_weights=log_joint)


def asymmetric() -> Problem:
    """z ~ N(0, 1), a count of zero from Poisson(exp(1 + z)): a skewed target, against a fine trapezoidal rule."""
    x = torch.tensor(0.0, dtype=F64)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Poisson((1 + z).exp()), obs=x)

    grid = torch.linspace(-12, 8, 20_001, dtype=F64)
    log_joint = -0.5 * grid**2 - 0.5 * math.log(2 * math.pi) - (1 + grid).exp()
    return Problem(model, args=(x,), reference=integrated("z", grid, log_joint), name="asymmetric")


def dirichlet_multinomial() -> Problem:
    """p ~ Dirichlet(1, 2, 3), counts ~ Multinomial(p): a simplex of three in two unconstrained dimensions."""
    concentration, counts = torch.tensor([1.0, 2, 3], dtype=F64), torch.tensor([4.0, 0, 2], dtype=F64)

    def model(counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2, 3])))
        pyro.deterministic("largest", p.amax(-1))
        pyro.sample("counts", dist.Multinomial(6, p), obs=counts)

    posterior = dist.Dirichlet(concentration + counts)
    evidence = dist.DirichletMultinomial(concentration, 6).log_prob(counts)
    truth = exact({"p": posterior.mean}, {"p": posterior.variance.sqrt()}, evidence)
    return Problem(model, args=(counts,), reference=truth, name="dirichlet_multinomial")


def flat_prior() -> Problem:
    """mean ~ flat on the line, x_i ~ N(mean, 1): the posterior is N(mean(x), 1 / N); the prior has no draws."""
    x = torch.tensor([0.3, 1.9, -0.4, 1.0], dtype=F64)
    n, centre = len(x), float(x.mean())

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    evidence = -0.5 * float((x - centre).square().sum()) - (n - 1) / 2 * math.log(2 * math.pi) - 0.5 * math.log(n)
    truth = exact({"mean": torch.tensor(centre, dtype=F64)}, {"mean": torch.tensor(n**-0.5, dtype=F64)}, evidence)
    return Problem(model, args=(x,), reference=truth, name="flat_prior")


def switching() -> Problem:
    """z_i ~ N(0, 1) and a sign s_i, x_i ~ N(s_i z_i + 1, 1/2): a continuous and a discrete latent in every datum."""
    x = torch.tensor([0.2, 2.5], dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            s = pyro.sample("s", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal((2 * s - 1) * z + 1, 0.5), obs=x)

    grid = torch.linspace(-10, 10, 20_001, dtype=F64)[:, None]
    normal = lambda value, loc, sd: -0.5 * ((value - loc) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))  # noqa: E731
    plus, minus = (math.log(w) + normal(x, s * grid + 1, 0.5) for w, s in ((0.4, 1), (0.6, -1)))
    log_joint = normal(grid, 0.5, 1.0) + torch.logaddexp(plus, minus)
    return Problem(model, args=(x,), reference=integrated("z", grid, log_joint), name="switching")


def exact(mean: Any, sd: Any, log_evidence: Any, log_weights: Tensor | None = None) -> Reference:
    evidence = Evidence(torch.as_tensor(log_evidence, dtype=F64), torch.zeros(()), "exact")
    return Reference("exact", mean, sd, log_evidence=evidence, provenance="closed form", log_weights=log_weights)


def integrated(site: str, grid: Tensor, log_joint: Tensor) -> Reference:
    """Moments of a scalar site by the trapezoidal rule on a fine grid (G) or (G, 1); log_joint (G, *batch)."""
    log_sum = torch.logsumexp(log_joint, 0)
    weight = (log_joint - log_sum).exp()
    mean = (weight * grid).sum(0)
    sd = (weight * (grid - mean) ** 2).sum(0).sqrt()
    return exact({site: mean}, {site: sd}, log_sum + (grid.flatten()[1] - grid.flatten()[0]).log())


def family(module: Any, **settings: Any) -> Problem:
    """A family's problem, its settings made small where it has them."""
    known = inspect.signature(module.problem).parameters
    return module.problem(**{name: v for name, v in PROBLEM_SETTINGS.items() if name in known} | settings)


TINY: tuple[Callable[[], Problem], ...] = (
    beta_bernoulli,
    poisson_rates,
    correlated,
    discrete_net,
    asymmetric,
    dirichlet_multinomial,
    flat_prior,
    switching,
)
MAKERS: dict[str, Callable[[], Problem]] = {
    **{make.__name__: make for make in TINY},
    "discrete_net_without_guide": partial(discrete_net, guided=False),
    **{name: partial(family, module) for name, module in models.families().items()},
    "eight_schools_centred": partial(family, models.find("eight_schools"), centred=True),
    "gaussian_mixture_merging": partial(family, models.find("gaussian_mixture"), case="merging"),
    "vae_gaussian": partial(family, models.find("vae"), likelihood="gaussian"),
}
ENGINES = registry.engines()
PAIRS = [pytest.param(e, p, id=f"{e}-{p}") for e in ENGINES for p in MAKERS]
every_pair = pytest.mark.parametrize(("engine_name", "problem_name"), PAIRS)
# Promises that take more runs of a pair: every engine on the tiny problems, every problem by a sampler and by weights.
SOME = [
    pytest.param(e, p, id=f"{e}-{p}")
    for e in ENGINES
    for p in MAKERS
    if p in {make.__name__ for make in TINY} or e in ("nuts", "importance_sampling")
]
some_pairs = pytest.mark.parametrize(("engine_name", "problem_name"), SOME)


def small(cls: type) -> Any:
    return cls(**{f.name: ENGINE_SETTINGS[f.name] for f in fields(cls) if f.name in ENGINE_SETTINGS})


@cache
def problem_of(name: str) -> Problem:
    return MAKERS[name]()


# ---------------------------------------------------------------------------------------------------------------
# One run of each pair, and what it left behind


@dataclass(frozen=True)
class Surroundings:
    """Everything global that a run could disturb, and the problem's own tensors."""

    torch_rng: list[int]
    numpy_rng: Any
    python_rng: Any
    store: dict[str, Any]
    settings: tuple[Any, ...]
    tensors: dict[str, tuple[Any, ...]]

    @classmethod
    def of(cls, problem: Problem) -> Surroundings:
        store = pyro.get_param_store()
        state = store.get_state()
        numpy_state = np.random.get_state()
        return cls(
            torch.get_rng_state().tolist(),
            (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
            random.getstate(),
            {name: (id(t), t.tolist(), str(state["constraints"][name])) for name, t in state["params"].items()},
            (
                torch.get_default_dtype(),
                torch.get_default_device(),
                torch.is_grad_enabled(),
                torch.get_num_threads(),
                pyro.settings.get("validate_distributions_pyro"),
                torch.distributions.Distribution._validate_args,
                len(poutine.runtime._PYRO_STACK),
                np.geterr(),
            ),
            {
                name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, t.grad, t._version, t.detach().tolist())
                for name, t in tensors_of(problem).items()
            },
        )


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    """The data, and the parameters and buffers of every module that the programs own or close over."""
    found = {f"args[{i}]": a for i, a in enumerate(problem.args) if isinstance(a, Tensor)}
    for program in (problem.model, problem.guide):
        scope = inspect.getclosurevars(program).nonlocals if inspect.isfunction(program) else {}
        for name, value in scope.items():
            if isinstance(value, nn.Module):
                found |= {f"{name}.{n}": p for n, p in [*value.named_parameters(), *value.named_buffers()]}
    return found


@cache
def run(engine_name: str, problem_name: str, seed: int = 0) -> Posterior:
    return infer(problem_of(problem_name), small(ENGINES[engine_name]), seed=seed)


def finished(engine_name: str, problem_name: str, seed: int = 0) -> Posterior:
    """The posterior of a pair that runs; pairs that do not are another test's business."""
    posterior = run(engine_name, problem_name, seed)
    if posterior.status.state == "unsupported":
        pytest.skip(posterior.status.reason)
    if words := HOPELESS.get((engine_name, problem_name)):
        assert posterior.status.state == "failed"
        assert words in posterior.status.reason
        pytest.skip(posterior.status.reason)
    assert posterior.status.done, posterior.status
    return posterior


def assert_same(a: Any, b: Any) -> None:
    """Equal bit by bit: tensors with their dtype, containers element by element; nan equals nan."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert bool(torch.equal(a, b) or ((a == b) | (a.isnan() & b.isnan())).all())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b or (a != a and b != b), (a, b)


def numbers(posterior: Posterior) -> dict[str, Any]:
    """Every number of an answer but times and memory."""
    evidence, figures = [], posterior.log_evidence
    while figures is not None:
        evidence.append((figures.kind, figures.value, figures.std_error))
        figures = figures.refined
    return {
        "draws": dict(posterior.draws),
        "log_weights": posterior.log_weights,
        "evidence": evidence,
        "parameters": dict(posterior.parameters),
        "state": dict(posterior.state),
        "sample_stats": dict(posterior.sample_stats),
        "figures": dict(posterior.diagnostics.figures),
        "diagnostics": (posterior.diagnostics.level, posterior.diagnostics.verdict, posterior.diagnostics.notes),
        "counts": {n: v for n, v in asdict(posterior.cost).items() if n.endswith(("evaluations", "gradients"))},
        "status": (posterior.status.state, posterior.status.reason),
    }


# ---------------------------------------------------------------------------------------------------------------
# What is discovered


def test_every_file_of_the_engines_folder_gives_an_engine_with_a_public_name():
    folder = Path(inference.__file__).parent / "engines"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files <= {cls.__module__.rsplit(".", 1)[1] for cls in ENGINES.values()}
    assert {"enumeration", "importance_sampling", "nuts", "quadrature", "svi"} <= set(ENGINES)
    for name, cls in ENGINES.items():
        assert find_engine(name) is cls
        assert getattr(inference, cls.__name__) is cls


@pytest.mark.parametrize("engine_name", ENGINES)
def test_every_engine_serves_some_problem(engine_name):
    assert any(run(engine_name, name).status.done for name in MAKERS)


@pytest.mark.parametrize("problem_name", MAKERS)
def test_every_problem_is_served_by_some_engine(problem_name):
    assert any(run(name, problem_name).status.done for name in ENGINES)


@pytest.mark.parametrize("engine_name", ENGINES)
def test_an_engine_refuses_a_setting_it_does_not_know(engine_name):
    with pytest.raises(ValueError, match="no setting 'num_sampels'"):
        ENGINES[engine_name](num_sampels=3)


# ---------------------------------------------------------------------------------------------------------------
# The contract


@some_pairs
def test_a_run_leaves_nothing_behind(engine_name, problem_name):
    """Global generators, the param store with a user's entry in it, defaults, and the problem's tensors."""
    problem = problem_of(problem_name)
    for tensor in tensors_of(problem).values():
        if tensor.requires_grad:
            tensor.grad = torch.full_like(tensor, 3.0)  # a user's own: must come back
    pyro.param("mine", torch.tensor([1.0, 2.0]), constraint=dist.constraints.positive)
    pyro.param("theta", torch.tensor(7.5))  # a name that models here use too
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    torch.set_default_dtype(torch.float32)
    before = Surroundings.of(problem)
    run.__wrapped__(engine_name, problem_name)
    after = Surroundings.of(problem)
    for field in fields(Surroundings):
        if field.name != "tensors":
            assert getattr(before, field.name) == getattr(after, field.name), field.name
    for name, facts in before.tensors.items():
        now = after.tensors[name]
        assert facts[4] is now[4], f"{name}.grad was replaced"
        if facts[4] is not None:
            assert bool((now[4] == 3.0).all()), f"{name}.grad was written to"
        assert facts[:4] + facts[5:] == now[:4] + now[5:], name


@every_pair
def test_why_not_agrees_with_the_status(engine_name, problem_name):
    posterior = run(engine_name, problem_name)
    reason = why_not(problem_of(problem_name), small(ENGINES[engine_name]))
    assert bool(reason) == (posterior.status.state == "unsupported")
    if reason:
        assert reason == posterior.status.reason
        assert not posterior.draws
        assert posterior.log_weights is None
        assert posterior.log_evidence is None
        assert posterior.cost.evaluations == posterior.cost.gradients == 0


@every_pair
def test_the_record_says_what_was_run(engine_name, problem_name):
    engine, posterior = small(ENGINES[engine_name]), run(engine_name, problem_name)
    assert posterior.engine == engine_name
    assert list(posterior.engine_options) == [f.name for f in fields(engine)]
    for name in ENGINE_SETTINGS.keys() & posterior.engine_options.keys():
        assert posterior.engine_options[name] == ENGINE_SETTINGS[name]
    assert posterior.seed == 0
    assert posterior.problem is not None
    assert posterior.problem.model is problem_of(problem_name).model


@every_pair
def test_shapes_are_chain_draw_batch_event(engine_name, problem_name):
    posterior, problem = finished(engine_name, problem_name), problem_of(problem_name)
    batch = tuple(posterior.batch_shape)
    leading = (posterior.num_chains, posterior.num_samples)
    truth = problem.reference_at(posterior.parameters)
    if posterior.log_evidence is not None and truth.log_evidence is not None:
        assert batch == tuple(truth.log_evidence.value.shape)
    for site, draws in posterior.draws.items():
        assert tuple(draws.shape[:2]) == leading
        if site in truth.mean:
            assert draws.shape[2:] == truth.mean[site].shape
            assert tuple(posterior.mean(site).shape) == tuple(truth.mean[site].shape)
            assert tuple(posterior.sd(site).shape) == tuple(truth.sd[site].shape)
    for name in ("num_chains", "num_samples"):
        if name in posterior.engine_options and posterior.kind != "point":
            assert getattr(posterior, name) == posterior.engine_options[name]
    for name, figure in posterior.sample_stats.items():
        assert tuple(figure.shape[:2]) == leading, name
        assert tuple(figure.shape[2:]) in ((), batch), name


@cache
def plain_run(problem_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The program run once by Pyro alone: its latent sites' distributions, and its parameters, by name."""
    problem = problem_of(problem_name)
    improper = {"mean": torch.zeros(())} if problem_name == "flat_prior" else {}  # what cannot be drawn is given
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        trace = poutine.trace(poutine.condition(problem.model, data=improper)).get_trace(*problem.args)
        store = pyro.get_param_store()
        parameters = {name.replace("$$$", "."): value.detach().clone() for name, value in store.items()}
    latents = {
        name: node["fn"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and (name in improper or not node["is_observed"])
        and type(node["fn"]).__name__ != "_Subsample"
    }
    return latents, parameters


@every_pair
def test_every_latent_is_drawn_inside_its_support_or_said_to_be_summed_out(engine_name, problem_name):
    posterior = finished(engine_name, problem_name)
    notes = " ".join(posterior.diagnostics.notes)
    for site, fn in plain_run(problem_name)[0].items():
        if site not in posterior.draws:
            assert fn.support.is_discrete, f"{site} is missing"
            assert "summed out" in notes
            assert site in notes
            continue
        draws = posterior.draws[site]
        assert bool(draws.isfinite().all()), site
        assert bool(fn.support.check(draws).all()), site
        if fn.has_enumerate_support:
            assert len(draws.unique()) <= len(fn.enumerate_support(expand=False))
        else:
            assert len(draws.unique()) > 2 or posterior.kind == "point", f"{site} hardly moves"


@every_pair
def test_deterministic_sites_are_functions_of_the_draws(engine_name, problem_name):
    posterior = finished(engine_name, problem_name)
    if problem_name == "dirichlet_multinomial":
        torch.testing.assert_close(posterior.draws["largest"], posterior.draws["p"].amax(-1), rtol=1e-12, atol=0)
    if problem_name == "eight_schools":
        draws = {site: posterior.draws[site] for site in ("mu", "tau", "eta", "theta")}
        theta = draws["mu"][..., None] + draws["tau"][..., None] * draws["eta"]
        torch.testing.assert_close(draws["theta"], theta, rtol=1e-10, atol=1e-10)


@every_pair
def test_kind_and_weights_agree(engine_name, problem_name):
    posterior = finished(engine_name, problem_name)
    leading = (posterior.num_chains, posterior.num_samples, *posterior.batch_shape)
    assert posterior.kind in Posterior.KINDS
    assert (posterior.log_weights is not None) == (posterior.kind == "weighted")
    if posterior.log_weights is not None:
        assert tuple(posterior.log_weights.shape) == leading
        assert posterior.log_weights.dtype == F64
        assert not bool(posterior.log_weights.isnan().any())
        assert bool((posterior.log_weights < math.inf).all())
        assert bool(posterior.log_weights.amax((0, 1)).isfinite().all())
    if posterior.kind == "point":
        assert leading[:2] == (1, 1)
    w = posterior.weights()
    assert tuple(w.shape) == leading
    torch.testing.assert_close(w.sum((0, 1)), torch.ones(posterior.batch_shape, dtype=F64), rtol=1e-12, atol=0)


@every_pair
def test_evidence_is_of_a_legal_kind_or_not_there(engine_name, problem_name):
    """MCMC and points have none. An exact one equals the truth, a bound does not pass it by more than 6 of its
    standard errors (for 30 draws, Student's t with 29 degrees: 2e-6 a datum if normal)."""
    posterior = finished(engine_name, problem_name)
    evidence = posterior.log_evidence
    if posterior.kind in ("mcmc", "point"):
        assert evidence is None
        return
    truth = problem_of(problem_name).reference_at(posterior.parameters).log_evidence
    while evidence is not None:
        assert evidence.kind in Evidence.KINDS
        assert tuple(evidence.value.shape) == tuple(evidence.std_error.shape) == tuple(posterior.batch_shape)
        assert evidence.value.dtype == evidence.std_error.dtype == F64
        assert bool(evidence.value.isfinite().all())
        assert bool((evidence.std_error >= 0).all())
        if evidence.kind == "exact":
            assert bool((evidence.std_error == 0).all())
        if truth is not None and evidence.kind == "exact":
            torch.testing.assert_close(evidence.value, truth.value, rtol=1e-9, atol=1e-9)
        if truth is not None and evidence.kind == "lower bound":
            assert bool((evidence.value <= truth.value + 6 * evidence.std_error + 1e-9).all())
        evidence = evidence.refined


@every_pair
def test_parameters_are_those_of_the_program(engine_name, problem_name):
    posterior, (_, expected) = run(engine_name, problem_name), plain_run(problem_name)
    assert set(posterior.parameters) == set(expected)
    for name, value in expected.items():
        assert tuple(posterior.parameters[name].shape) == tuple(value.shape)
        torch.testing.assert_close(posterior.parameters[name].double(), value.double(), rtol=1e-6, atol=1e-7)
        assert not posterior.parameters[name].requires_grad


@every_pair
def test_cost_adds_up(engine_name, problem_name):
    cost = finished(engine_name, problem_name).cost
    assert cost.evaluations + cost.gradients > 0
    assert 0 <= cost.tuning_evaluations <= cost.evaluations
    assert 0 <= cost.tuning_gradients <= cost.gradients
    assert 0 <= cost.tuning_seconds <= cost.seconds
    assert 0 < cost.seconds < 60
    assert cost.peak_memory is None or cost.peak_memory >= 0
    assert cost.backend


@every_pair
def test_diagnostics_end_in_words(engine_name, problem_name):
    diagnostics = finished(engine_name, problem_name).diagnostics
    assert diagnostics.level in LEVELS
    assert diagnostics.verdict
    assert diagnostics.verdict != "not diagnosed"
    assert all(isinstance(note, str) and note for note in diagnostics.notes)


@every_pair
def test_saving_and_loading_keeps_every_bit(engine_name, problem_name, tmp_path):
    posterior = run(engine_name, problem_name)
    loaded = Posterior.load(posterior.save(tmp_path / "posterior.nc"))
    assert_same(numbers(posterior), numbers(loaded))
    assert asdict(loaded.cost) == asdict(posterior.cost)
    assert (loaded.kind, loaded.engine, loaded.seed) == (posterior.kind, posterior.engine, posterior.seed)
    assert loaded.batch_shape == posterior.batch_shape


@some_pairs
def test_arviz_gets_the_same_draws(engine_name, problem_name):
    posterior = finished(engine_name, problem_name)
    shown = posterior.to_arviz()
    group = shown["posterior"]
    assert set(group.data_vars) == set(posterior.draws)
    for site, draws in posterior.draws.items():
        values = group[site].values
        if posterior.log_weights is None:
            assert np.array_equal(values, draws.numpy())
        else:
            assert values.shape == (1, draws.shape[0] * draws.shape[1], *draws.shape[2:])
            assert np.isin(values, draws.numpy()).all()
    if hasattr(ENGINES[engine_name], "simulates"):
        return  # such a model may have no likelihood, and draws that are near the data one of zero
    if all(site in posterior.draws for site in plain_run(problem_name)[0]):
        assert all(np.isfinite(v.values).all() for v in shown["log_likelihood"].data_vars.values())


@some_pairs
def test_the_seed_is_all_the_randomness_there_is(engine_name, problem_name):
    """The same seed gives the same numbers, bit by bit; another seed other draws, unless the engine is exact."""
    first = finished(engine_name, problem_name)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    again = run.__wrapped__(engine_name, problem_name)
    assert_same(numbers(first), numbers(again))
    other = run(engine_name, problem_name, seed=1)
    assert other.seed == 1
    for site in first.draws:
        a, b = first.draws[site], other.draws[site]
        if getattr(ENGINES[engine_name], "exact", False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # a rule's nodes stand at a mode that was searched
        elif a.is_floating_point() and len(a.unique()) > 10 and first.kind != "point":
            assert not np.isin(a.numpy(), b.numpy()).any(), "two seeds share draws"


@some_pairs
def test_a_posterior_is_a_warm_start(engine_name, problem_name):
    """What `state` holds is taken up again: a warm run is done and has the shapes of a cold one."""
    first = finished(engine_name, problem_name)
    if not first.state:
        pytest.skip("the engine keeps no state")
    problem, engine = problem_of(problem_name), small(ENGINES[engine_name])
    steps: list[tuple[str, int, int]] = []
    warm = infer(problem, engine, seed=2, warm=first, progress=lambda *step: steps.append(step))
    assert warm.status.done, warm.status
    assert {n: v.shape for n, v in warm.draws.items()} == {n: v.shape for n, v in first.draws.items()}
    assert {n: v.shape for n, v in warm.state.items()} == {n: v.shape for n, v in first.state.items()}
    assert all(isinstance(stage, str) and 0 < step <= total for stage, step, total in steps)
    assert warm.cost.gradients <= first.cost.gradients

"""How often a program is run before anything begins, and what those runs must see all the same."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrometer.inference import EM, ForwardBackward, ParticleFilter, Problem, ProblemError, infer, learn, markov
from pyrometer.inference.density import Density
from pyrometer.inference.engine import isolated
from pyrometer.inference.markov import Chain, NotAChain
from pyrometer.models import conjugate_gaussian, hidden_markov, linear_gaussian_ssm

F64 = torch.float64


class Counted:
    """A model that counts its runs, without telling itself from the model."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.runs = problem.model, 0

    def __call__(self, *args: Tensor) -> None:
        self.runs += 1
        self.model(*args)


def counted(problem: Problem) -> tuple[Counted, Problem]:
    model = Counted(problem)
    return model, Problem(model, args=problem.args, m_step=problem.m_step)


def noisy(noise, size: int = 3) -> Problem:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + noise(), 1.0), obs=x)

    return Problem(model, args=(torch.ones(size, dtype=F64),))


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_density_takes_four_runs_of_its_program():
    """The survey, one that draws, one at each of two draws; where data stand in a plate, one more with them moved."""
    model, problem = counted(hidden_markov.problem(num_data=1))
    Density(problem)
    assert model.runs == 4
    model, problem = counted(conjugate_gaussian.problem(num_data=5))
    Density(problem)
    assert model.runs == 5


def test_long_programs_are_run_as_often_as_short_ones_or_less():
    """Forward-backward asks once for the chain, and once for values that follow from the draws; EM once in all."""
    runs = {}
    for steps in (20, 600):
        for name, run in (
            ("fb", lambda p: infer(p, ForwardBackward(num_samples=2)).status),
            ("em", lambda p: learn(p, EM(num_steps=3)).status),
        ):
            model, problem = counted(hidden_markov.problem(num_data=1, num_steps=steps))
            assert run(problem).done
            runs[name, steps] = model.runs
    assert runs == {("fb", 20): 6, ("fb", 600): 5, ("em", 20): 7, ("em", 600): 5}
    model, problem = counted(linear_gaussian_ssm.problem(num_data=1, num_steps=20))
    assert infer(problem, ParticleFilter(num_samples=20)).status.done
    assert model.runs == 6


# -- randomness --------------------------------------------------------------------------------------------------


def own_generator() -> Tensor:
    return 1e-3 * torch.randn((), dtype=F64, generator=OWN)


OWN = torch.Generator().manual_seed(1)
NUMPY = np.random.default_rng(1)


@pytest.mark.parametrize(
    "noise",
    [
        lambda: 1e-6 * torch.randn((), dtype=F64),
        lambda: torch.nn.functional.dropout(torch.ones((), dtype=F64)),
        own_generator,
        lambda: 1e-6 * float(np.random.randn()),
        lambda: 1e-6 * float(NUMPY.standard_normal()),
    ],
    ids=["torch", "a coin", "a generator of its own", "numpy", "a generator of numpy"],
)
def test_a_program_that_draws_by_itself_is_refused(noise):
    """The coin falls alike in 2 runs at each of 2 draws, 3 times over, once in 64."""
    problem = noisy(noise)
    with isolated(0), pytest.raises(ProblemError, match="random numbers outside of its sample sites"):
        Density(problem)


def test_numbers_that_are_drawn_and_not_used_are_no_fault():
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.rand((), dtype=F64) + 1.0)
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, scale).expand([3]).to_event(1), obs=x)

    density = Density(Problem(model, args=(torch.ones(3, dtype=F64),)))
    assert density.vectorised
    assert density.tried is not None


# -- all draws at once ---------------------------------------------------------------------------------------------


def test_a_program_that_tells_one_draw_from_several_is_run_one_by_one():
    """What a run over all draws at once gives is held against plain runs, at every draw."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        together = torch._C._functorch.is_batchedtensor(z)
        pyro.sample("x", dist.Normal(z + (0.5 if together else 0.0), 1.0), obs=x)

    density = Density(Problem(model, args=(torch.ones((), dtype=F64),)))
    assert not density.vectorised
    assert any("cannot be batched" in note for note in density.notes)
    z = torch.tensor([0.0, 1.0], dtype=F64)
    with density:
        expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.ones((), dtype=F64))
        torch.testing.assert_close(density.log_joint({"z": z}), expected)


def test_draws_that_must_be_made_one_by_one_leave_the_density_batched():
    """vmap draws no von Mises: draws are made in a loop, and log joints are told all at once."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.VonMises(torch.zeros((), dtype=F64), 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    density = Density(Problem(model, args=(torch.ones((), dtype=F64),)))
    assert density.vectorised


# -- chains --------------------------------------------------------------------------------------------------------


def chain_of(emission, steps: int = 8) -> Density:
    x = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model(x: Tensor) -> None:
        move = pyro.param("move", torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=F64))
        z = torch.zeros((), dtype=torch.long)
        for t in range(steps):
            z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
            pyro.sample(f"x_{t}", dist.Normal(emission(z.to(F64)), 1.0), obs=x[t])

    return Density(Problem(model, args=(x,)))


@pytest.mark.parametrize("long", [False, True])
def test_factors_are_held_against_the_density(long, monkeypatch):
    """An emission that takes the mean of all it is given sees every state at once, and is none of one chain."""
    if long:
        monkeypatch.setattr(markov, "COMPILE_FROM", 4)
    for emission, fits in ((lambda z: 2 * z, True), (lambda z: 2 * z.mean(), False)):
        density = chain_of(emission)
        with isolated(0), torch.no_grad(), density:
            if fits:
                assert Chain(density).states == 2
            else:
                with pytest.raises(NotAChain, match="not that of one chain"):
                    Chain(density)


def test_what_was_tried_at_another_theta_is_not_used(monkeypatch):
    monkeypatch.setattr(markov, "COMPILE_FROM", 4)
    density = chain_of(lambda z: 2 * z)
    with isolated(0), torch.no_grad(), density:
        tried = density.tried
        assert tried.holds(density)
        density.theta.set({"move": torch.tensor([[0.2, 0.8], [0.9, 0.1]], dtype=F64)})
        assert not tried.holds(density)
        assert Chain(density).states == 2


def test_state_numbers_and_values_are_each_others_inverse():
    density = Density(hidden_markov.problem(num_data=3, num_steps=5))
    with isolated(0), torch.no_grad(), density:
        chain = Chain(density)
        paths = torch.randint(3, (4, 3, 5))
        assert torch.equal(chain._paths(chain.values(paths)), paths)

"""Latents that are masked or scaled: padding is no part of the answer, and what does not follow its law is not drawn.

Exact answers by normal and enumerated sums; each estimate lies within 5 standard errors of them, false alarms below
1e-5.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrometer.inference import (
    ABC,
    EM,
    HMC,
    NUTS,
    SMC,
    SVI,
    AnnealedImportance,
    Enumeration,
    ForwardBackward,
    ImportanceSampling,
    ParticleFilter,
    Problem,
    ProblemError,
    RandomWalk,
    infer,
    learn,
    why_not,
)
from pyrometer.inference.density import Density
from pyrometer.inference.twin import twin

X = torch.tensor([[0.3, -0.7, 1.2], [0.5, 0.1, -0.4]])
SEEN = torch.tensor([[True, True, True], [True, False, False]])


def walk(x, seen):
    """Two sequences of a random walk, the second padded from its second step on."""
    z = torch.zeros(len(x))
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=seen[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def chain(x, seen):
    """The same of a chain of two states."""
    z, moves = torch.zeros(len(x), dtype=torch.long), torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=seen[:, t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(moves[z]))
                pyro.sample(f"x_{t}", dist.Normal(z.to(x.dtype), 1.0), obs=x[:, t])


def alone(program, engine):
    """The evidence of each sequence by itself, without padding."""
    lengths = SEEN.sum(1).tolist()
    problems = [Problem(program, args=(X[i : i + 1, :n], SEEN[i : i + 1, :n])) for i, n in enumerate(lengths)]
    return torch.cat([infer(problem, engine, seed=1).log_evidence.value for problem in problems])


def normal_evidence():
    """The walk's log p(x): normal, with covariance min(s, t) + 1 (s = t)."""
    covariance = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 4.0]])
    first = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X[0])
    return torch.stack([first, dist.Normal(0.0, math.sqrt(2.0)).log_prob(X[1, 0])]).double()


@pytest.mark.parametrize("engine", [Enumeration(), ForwardBackward()], ids=lambda e: e.name)
def test_padding_does_not_count_in_sums_over_states(engine):
    found = infer(Problem(chain, args=(X, SEEN)), engine, seed=1).log_evidence.value
    assert torch.allclose(found, alone(chain, Enumeration()), atol=1e-10)


def tutorial_walk(x, seen):
    """The first walk with the masks inside of events, as tutorials of deep Markov models have them."""
    z = torch.zeros(len(x), 1)
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0).mask(seen[:, t : t + 1]).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(seen[:, t : t + 1]).to_event(1), obs=x[:, t : t + 1])


def walk_guide(x, seen):
    """Each step alone, about its observation."""
    with pyro.plate("sequences", len(x)):
        for t in range(x.shape[1]):
            with poutine.mask(mask=seen[:, t]):
                pyro.sample(f"z_{t}", dist.Normal(0.6 * x[:, t], 0.8))


def walk_guide_without_masks(x, seen):
    with pyro.plate("sequences", len(x)):
        for t in range(x.shape[1]):
            pyro.sample(f"z_{t}", dist.Normal(0.6 * x[:, t], 0.8))


def normal_moments():
    """Means and sds of the first sequence given its three observations, and of the second's first step."""
    prior = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    precision = prior.inverse() + torch.eye(3, dtype=torch.float64)
    covariance = precision.inverse()
    return covariance @ X[0].double(), covariance.diagonal().sqrt(), 0.5 * X[1, 0].double(), math.sqrt(0.5)


MOVERS = [NUTS(num_samples=300), HMC(num_samples=500), SMC(num_samples=2000), RandomWalk(num_samples=4000)]


@pytest.mark.parametrize("program", [walk, tutorial_walk])
@pytest.mark.parametrize("engine", MOVERS, ids=lambda e: e.name)
def test_padding_has_its_prior_where_latents_move(program, engine):
    """An ESS above 600 each: sees 20 % of a posterior's sd."""
    posterior = infer(Problem(program, args=(X, SEEN)), engine, seed=2)
    assert posterior.status.done
    mean, sd, second, second_sd = normal_moments()
    for t in range(3):
        found, spread = posterior.mean(f"z_{t}").flatten(), posterior.sd(f"z_{t}").flatten()
        expected_sd = math.sqrt(second_sd**2 + t)  # padding walks on from the last step that is seen
        assert abs(float(found[0] - mean[t])) < 5 * float(sd[t]) / math.sqrt(600)
        assert abs(float(found[1] - second)) < 5 * expected_sd / math.sqrt(600)
        assert abs(float(spread[0] / sd[t]) - 1) < 5 / math.sqrt(2 * 600)
        assert abs(float(spread[1]) / expected_sd - 1) < 5 / math.sqrt(2 * 600)


@pytest.mark.parametrize("program", [walk, tutorial_walk])
@pytest.mark.parametrize("engine", [SMC(), AnnealedImportance()], ids=lambda e: e.name)
def test_padding_does_not_count_on_paths_from_the_prior(program, engine):
    evidence = infer(Problem(program, args=(X, SEEN)), engine, seed=1).log_evidence
    assert bool(((evidence.value - normal_evidence()).abs() < 5 * evidence.std_error).all())
    assert float(evidence.std_error.max()) < 0.2


def test_a_guide_under_the_same_masks_has_the_bound_of_the_sequences_alone():
    """ELBO of the second sequence: E_q log N(z; 0, 1) N(x; z, 1) - log q, of one step; 4,000 draws of it see 0.05."""
    problem = Problem(walk, args=(X, SEEN), guide=walk_guide)
    bound = infer(problem, SVI(num_steps=1, num_samples=4000), seed=1).log_evidence
    x, mean, var = float(X[1, 0]), 0.6 * float(X[1, 0]), 0.64
    exact = -math.log(2 * math.pi) - 0.5 * (mean**2 + var) - 0.5 * ((x - mean) ** 2 + var)
    exact += 0.5 * math.log(2 * math.pi * math.e * var)
    assert abs(float(bound.value[1]) - exact) < 5 * float(bound.std_error[1]) < 0.1
    weighed = infer(problem, ImportanceSampling(num_samples=4000, proposal="guide"), seed=1).log_evidence
    assert bool(((weighed.value - normal_evidence()).abs() < 5 * weighed.std_error).all())
    assert float(weighed.std_error.max()) < 0.1


def test_a_guide_without_the_masks_is_refused_and_an_autoguide_is_none_of_these():
    problem = Problem(walk, args=(X, SEEN), guide=walk_guide_without_masks)
    for engine in (SVI(), ImportanceSampling(proposal="guide")):
        with pytest.raises(ProblemError, match="guide site 'z_1' has a density where the model's is masked"):
            infer(problem, engine)
    bound = infer(problem, SVI(guide="AutoMultivariateNormal", num_steps=3000, num_samples=4000), seed=1).log_evidence
    assert torch.allclose(bound.value, normal_evidence(), atol=0.05)


def test_exact_em_learns_of_padded_sequences_what_it_learns_of_each_alone():
    """One step of EM on two chains, the second padded from its second step on, against both chains in one program."""

    def model(x, seen, lengths):
        p = pyro.param("p", torch.tensor([0.6, 0.3]), constraint=dist.constraints.unit_interval)
        for name, rows in (("together", slice(None)),) if lengths is None else (("0", slice(0, 1)), ("1", slice(1, 2))):
            steps = x.shape[1] if lengths is None else lengths[int(name)]
            z = torch.zeros(len(x[rows]), dtype=torch.long)
            with pyro.plate(f"sequences_{name}", len(x[rows])):
                for t in pyro.markov(range(steps)):
                    with poutine.mask(mask=seen[rows, t]):
                        z = pyro.sample(f"z_{name}_{t}", dist.Bernoulli(p[z])).long()
                        pyro.sample(f"x_{name}_{t}", dist.Normal(z.to(x.dtype), 1.0), obs=x[rows, t])

    learned = []
    for lengths in (None, SEEN.sum(1).tolist()):
        problem = Problem(model, args=(X.double(), SEEN, lengths))
        learned.append(learn(problem, EM(num_steps=3), seed=1).parameters["p"])
        pyro.clear_param_store()
    assert torch.allclose(learned[0], learned[1], atol=1e-4)


@pytest.mark.parametrize("engine", [ParticleFilter(), ImportanceSampling(proposal="prior")], ids=lambda e: e.name)
@pytest.mark.parametrize("program", [walk, chain])
def test_padding_does_not_count_in_weights(program, engine):
    truth = normal_evidence() if program is walk else alone(chain, Enumeration())
    evidence = infer(Problem(program, args=(X, SEEN)), engine, seed=1).log_evidence
    assert bool(((evidence.value - truth).abs() < 5 * evidence.std_error + 1e-9).all())
    assert float(evidence.std_error.max()) < 0.15


def test_a_padded_label_next_to_a_continuous_latent_counts_once():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(torch.ones(5) / 5).mask(seen))
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(k.to(x.dtype), 1.0), obs=x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def value(seen):
        density = Density(Problem(model, args=(X[0, :2], seen)))
        with density, torch.no_grad():
            return density.log_joint(torch.zeros(1, 2, 1))[0]

    padded, whole = value(torch.tensor([True, False])), value(torch.tensor([True, True]))
    assert padded[0] == pytest.approx(float(whole[0]), abs=1e-10)
    assert padded[1] == pytest.approx(float(-0.5 * X[0, 1] ** 2 - math.log(2 * math.pi)), abs=1e-6)


def by_handler(x, seen):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_distribution(x, seen):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1.0, 1.0).mask(seen))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def inside_an_event(x, seen):
    z = pyro.sample("z", dist.Normal(1.0, 1.0).expand(x.shape).mask(seen).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def scaled(x, seen):
    with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


MATTER = [by_handler, by_distribution, inside_an_event, scaled]


@pytest.mark.parametrize("program", MATTER)
@pytest.mark.parametrize(
    "engine", [SMC(), AnnealedImportance(), ImportanceSampling(proposal="prior"), ABC()], ids=lambda e: e.name
)
def test_no_engine_starts_from_draws_that_do_not_follow_the_density(program, engine):
    assert "'z' is masked or scaled" in why_not(Problem(program, args=(X[0], SEEN[1])), engine)


@pytest.mark.parametrize("program", MATTER)
def test_data_are_not_simulated_from_a_prior_that_has_no_law(program):
    with pytest.raises(ProblemError, match="masked or scaled"), torch.no_grad():
        twin(Density(Problem(program, args=(X[0], SEEN[1]))))


@pytest.mark.parametrize("program", [by_handler, by_distribution])
def test_a_masked_latent_that_matters_has_a_flat_prior(program):
    evidence = infer(Problem(program, args=(X[0], SEEN[1])), ImportanceSampling(), seed=1).log_evidence
    truth = torch.where(SEEN[1], dist.Normal(1.0, math.sqrt(2.0)).log_prob(X[0]), torch.zeros(3)).double()
    assert bool(((evidence.value - truth).abs() < 5 * evidence.std_error + 1e-9).all())


@pytest.mark.parametrize("how", ["handler", "distribution", "inside an event"])
def test_a_particle_filter_corrects_draws_that_a_mask_gives_no_density(how):
    def model(x):
        z = torch.zeros(())
        for t in pyro.markov(range(3)):
            law = dist.Normal(z, 1.0)
            with poutine.mask(mask=t != 1 or how != "handler"):
                if t == 1 and how == "inside an event":
                    z = pyro.sample("z_1", law.expand([1]).mask(False).to_event(1))[0]
                else:
                    z = pyro.sample(f"z_{t}", law.mask(False) if t == 1 and how == "distribution" else law)
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    # z_1 flat: x_0 is N(0, 2); x_1 says where z_1 is, and x_2 - x_1 is N(0, 3)
    truth = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X[0, 0]) + dist.Normal(0.0, math.sqrt(3.0)).log_prob(
        X[0, 2] - X[0, 1]
    )
    evidence = infer(Problem(model, args=(X[0],)), ParticleFilter(num_samples=4000), seed=1).log_evidence
    assert abs(float(evidence.value - truth)) < 5 * float(evidence.std_error)
    assert float(evidence.std_error) < 0.06


def test_entries_imputed_by_obs_mask_have_their_law():
    """1,200 draws of NUTS: sees 15 % of a standard deviation."""

    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)

    problem = Problem(model, args=(X[0], torch.tensor([True, False, True])))
    evidence = infer(problem, SMC(num_samples=200), seed=1).log_evidence
    truth = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(X[0, [0, 2]])
    assert abs(float(evidence.value - truth)) < 5 * float(evidence.std_error)
    posterior = infer(problem, NUTS(num_samples=300), seed=1)
    assert posterior.diagnostics.level == "good"
    mean, sd = float(X[0, [0, 2]].sum() / 3), math.sqrt(1 / 3)
    assert abs(float(posterior.mean("mu")) - mean) < 0.15 * sd
    assert abs(float(posterior.mean("x_unobserved")[1]) - mean) < 0.15 * math.sqrt(4 / 3)


def test_a_mask_that_hides_nothing_is_none():
    problem = Problem(by_handler, args=(X[0], torch.ones(3, dtype=torch.bool)))
    assert why_not(problem, SMC()) == ""


def test_where_another_prior_is_improper_what_matters_is_no_padding():
    """Such a program is tried at one point only, and its discrete latents have no values there."""

    def model(x, seen):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            idle = pyro.sample("idle", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(idle, 1.0 + k), obs=x)
        with pyro.plate("more", len(x)):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + mu, 1.0), obs=x)

    density = Density(Problem(model, args=(X[0], SEEN[1])))
    assert {n: s.padded for n, s in density.latents.items()} == {"mu": False, "k": False, "idle": True, "z": False}
    with density:
        assert bool(density.log_joint(torch.zeros(1, density.dim)).isfinite().all())

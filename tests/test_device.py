"""The same answers on a GPU, with `device="cuda"`, and in float32. Without a CUDA device only its refusal is tested."""

from __future__ import annotations

import pytest
import torch

from pyrometer.inference import (
    EM,
    HMC,
    NUTS,
    SMC,
    SVI,
    AnnealedImportance,
    Enumeration,
    ImportanceSampling,
    ProblemError,
    Quadrature,
    infer,
    learn,
)
from pyrometer.inference.statistics import ess
from pyrometer.models import conjugate_gaussian, eight_schools, gaussian_mixture, vae

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so nothing to refuse")
def test_a_missing_device_is_refused_before_work_starts():
    with pytest.raises(ProblemError, match="no CUDA device is available"):
        infer(conjugate_gaussian.problem(), ImportanceSampling(), device="cuda")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ProblemError, match=f"device='{device}'"):
        learn(conjugate_gaussian.problem(), SVI(), device=device)


@cuda
@pytest.mark.parametrize(
    ("problem", "engine"),
    [
        (gaussian_mixture.problem(), Enumeration()),
        (conjugate_gaussian.problem(), Quadrature()),
        (vae.problem(num_train=50), Quadrature()),
    ],
    ids=["mixture", "conjugate", "vae"],
)
def test_deterministic_engines_give_the_same_numbers(problem, engine):
    here, there = infer(problem, engine), infer(problem, engine, device="cuda")
    assert there.status.done, there.status
    torch.testing.assert_close(there.log_evidence.value, here.log_evidence.value, rtol=1e-9, atol=1e-9)
    for site in here.draws:
        assert there.draws[site].device.type == "cpu"
        torch.testing.assert_close(there.mean(site), here.mean(site), rtol=1e-7, atol=1e-7)


@cuda
@pytest.mark.parametrize(
    "engine",
    [
        ImportanceSampling(proposal="prior", num_samples=20_000),
        ImportanceSampling(proposal="laplace", num_samples=2_000),
        ImportanceSampling(proposal=SVI(guide="AutoMultivariateNormal", num_steps=300), num_samples=2_000),
        SVI(guide="AutoNormal", num_steps=300),
        NUTS(num_samples=100, warmup_steps=100, num_chains=2),
    ],
    ids=["prior", "laplace", "fitted", "svi", "nuts"],
)
def test_sampling_engines_run_and_bracket_the_truth(engine):
    """Evidence within six standard errors of the exact one (false alarm about 1e-8 a datum summed); NUTS runs."""
    problem = conjugate_gaussian.problem(num_data=20)
    posterior = infer(problem, engine, device="cuda")
    assert posterior.status.done, posterior.status
    truth = problem.reference_at(posterior.parameters).log_evidence.total()[0]
    if posterior.log_evidence is None:
        assert posterior.mean("z").shape == (20,)
        return
    evidence = posterior.log_evidence.refined or posterior.log_evidence
    value, error = evidence.total()
    assert abs(value - truth) < 6 * error


@cuda
@pytest.mark.parametrize(
    "learner",
    [SVI(num_steps=200, batch_size=50), EM(num_steps=3), EM(e_step=ImportanceSampling(num_samples=20), batch_size=50)],
    ids=["svi", "em", "em minibatch"],
)
def test_learners_move_theta_and_leave_the_module_on_the_cpu(learner):
    problem = vae.problem(num_train=200)
    fit = learn(problem, learner, device="cuda")
    assert fit.status.done, fit.status
    start = infer(problem, ImportanceSampling(num_samples=2)).parameters
    assert any(not torch.equal(fit.parameters[name].float(), start[name].float()) for name in start)
    assert all(value.device.type == "cpu" for value in fit.parameters.values())


@cuda
def test_generators_of_the_device_are_left_as_they_were():
    before = torch.cuda.get_rng_state()
    infer(eight_schools.problem(), ImportanceSampling(num_samples=100), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("engine", [HMC(num_steps=4), NUTS(num_samples=300), NUTS(backend="nutpie")], ids=repr)
def test_chains_in_float32_have_the_moments_of_the_posterior(engine):
    """First and second moments of 50 data, pooled: |z| < 4.9. Sees 2 % of an sd, and 3 % of a variance."""
    problem = conjugate_gaussian.problem(num_data=50)
    posterior = infer(problem, engine, dtype=torch.float32, seed=1)
    assert posterior.status.done, posterior.status
    assert posterior.draws["z"].dtype == torch.float32
    assert "computed in float32" in posterior.diagnostics.notes
    truth = problem.reference_at(posterior.parameters)
    z = (posterior.draws["z"].double() - truth.mean["z"]) / truth.sd["z"]
    for moment, variance in ((z, 1.0), (z.square() - 1, 2.0)):
        effective = ess(moment, kind="bulk").clamp_max(z.shape[0] * z.shape[1])
        error = (variance / effective).sum().sqrt()
        assert abs(float(moment.mean((0, 1)).sum() / error)) < 4.9


@pytest.mark.parametrize("engine", [SMC(num_samples=500), AnnealedImportance(), ImportanceSampling()], ids=repr)
def test_evidence_in_float32_is_that_of_the_truth(engine):
    """Within 4.9 standard errors, which are below 0.01 nats a datum."""
    problem = conjugate_gaussian.problem(num_data=50)
    posterior = infer(problem, engine, dtype=torch.float32, seed=1)
    value, error = posterior.log_evidence.per_datum()
    truth = problem.reference_at(posterior.parameters).log_evidence.per_datum()[0]
    assert abs(value - truth) < 4.9 * error
    assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, "float32"])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ProblemError, match=r"expected torch\.float64, torch\.float32 or None"):
        infer(conjugate_gaussian.problem(), ImportanceSampling(), dtype=dtype)

"""The measures of an answer, one function each: distance from the truth, and log-likelihood of data not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrometer.inference import Enumeration, ImportanceSampling, Posterior, Problem, ProblemError, infer
from pyrometer.inference.density import Density
from pyrometer.inference.engine import why_not
from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Reference

# Below this spread, relative to the mean, a reference sd is rounding: differences are not divided by less.
SMALLEST_SD = 1e-8


Metric = Callable[[Posterior, Reference], "Score | None"]

METRICS: dict[str, Metric] = {}  # title in the table -> metric, in the order of definition


def metric(title: str) -> Callable[[Metric], Metric]:
    """Make a function (posterior, reference) -> Score | None part of every comparison, under this title."""

    def register(function: Metric) -> Metric:
        METRICS[title] = function
        return function

    return register


@dataclass(frozen=True)
class Score:
    """An error over all entries of all sites: its average, its largest entry, and where that is.

    `reference_error` is the average error of the truth itself, in the same units. An average below it says only
    that the engine is as good as the reference can tell (`at_reference_precision`).
    """

    average: float
    largest: float
    where: str
    reference_error: float = 0.0

    @property
    def at_reference_precision(self) -> bool:
        return self.average <= self.reference_error


@metric("error of means")
def standardised_mean_error(posterior: Posterior, reference: Reference) -> Score | None:
    """|mean - true mean| / true sd, over every entry of the sites that both have; None where there are none.

    Nor is there one for a latent without order, of which the exact probabilities are known: see `total_variation`.
    Raises ProblemError where a site's shapes differ.
    """
    return _score(posterior.mean, reference.mean, reference.mean_error, posterior, reference)


@metric("error of sds")
def standardised_sd_error(posterior: Posterior, reference: Reference) -> Score | None:
    """|sd - true sd| / true sd, over every entry of the sites that both have; None as for the means.

    Raises ProblemError where a site's shapes differ.
    """
    return _score(posterior.sd, reference.sd, reference.sd_error, posterior, reference)


@metric("total variation")
def total_variation(posterior: Posterior, reference: Reference) -> Score | None:
    """1/2 sum_k |q(k) - p(k)| per datum, of a discrete latent whose exact probabilities are known; else None.

    From 0 to 1. Of a latent without order a mean and an sd say nothing, and where one value is all but certain its
    sd is all but zero.
    """
    sites = [site for site in reference.mean if site in posterior.draws]
    if reference.log_weights is None or len(sites) != 1:
        return None
    exact = torch.softmax(reference.log_weights.double(), 0).movedim(0, -1)  # (*batch, K)
    values = torch.arange(exact.shape[-1])
    found = posterior.expectation(lambda draws: draws[sites[0]].long()[..., None] == values)
    error = 0.5 * (found - exact).abs().sum(-1)
    return Score(float(error.mean()), _largest(error), sites[0] + _place(error))


def _score(
    estimate: Callable[[str], Tensor],
    truth: Mapping[str, Tensor],
    truth_error: Mapping[str, Tensor],
    posterior: Posterior,
    reference: Reference,
) -> Score | None:
    errors: dict[str, Tensor] = {}
    floors: list[Tensor] = []
    for site in truth:
        if site not in posterior.draws or site not in reference.sd or reference.log_weights is not None:
            continue
        value, true = estimate(site), truth[site].double()
        if value.shape != true.shape:
            raise ProblemError(
                f"reference site {site!r} has shape {tuple(true.shape)}, the posterior's {tuple(value.shape)}: "
                "give the reference in the shape (*batch, *event)."
            )
        smallest = SMALLEST_SD * reference.mean.get(site, true).double().abs().clamp(min=1.0)
        scale = torch.maximum(reference.sd[site].double(), smallest)
        errors[site] = (value - true).abs() / scale
        floors.append((torch.as_tensor(truth_error.get(site, 0.0)).double() / scale).flatten())
    if not errors:
        return None
    every = torch.cat([error.flatten() for error in errors.values()])
    site, error = max(errors.items(), key=lambda item: _largest(item[1]))
    return Score(
        average=float(every.mean()),
        largest=_largest(every),
        where=site + _place(error),
        reference_error=float(torch.cat(floors).mean()),
    )


def _largest(error: Tensor) -> float:
    """The largest entry, NaN counting as larger than any number: it must never be outdone by a finite one."""
    return math.inf if bool(error.isnan().any()) else float(error.max())


def _place(error: Tensor) -> str:
    """Where the largest entry is, as an index: '[17, 0]'; nothing for a scalar."""
    if error.dim() == 0:
        return ""
    flat = int(error.nan_to_num(nan=math.inf).argmax())
    return str([int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)])


@dataclass(frozen=True)
class HeldOut:
    """Mean log p_theta(x) in nats over `data` held-out data points, by one estimator for every learner.

    `std_error` is the estimator's own Monte Carlo error; `data_error` is the spread over the test data, sd / sqrt(n):
    what another test set of this size would change (None: one datum). `level` and `verdict` come with the estimate.
    """

    value: float
    std_error: float
    data_error: float | None
    data: int
    estimator: str
    level: str
    verdict: str


def held_out_log_likelihood(problem: Problem, parameters: Mapping[str, Tensor], seed: int = 0) -> HeldOut | None:
    """log p_theta(x) of the held-out data per datum, at this theta; None where there are no such data.

    The truth where the problem knows it at any theta; exact where there are no latents or they can be listed;
    elsewhere importance sampling with 1,000 draws per datum from a Laplace approximation, which owes nothing to any
    learner's guide. Which of these depends on the problem alone, so it is the same for all learners.
    Raises ProblemError where it cannot run.
    """
    if problem.held_out is None:
        return None
    unseen = problem.on_held_out()
    truth = unseen.reference_at(parameters)
    if truth.kind in ("exact", "quadrature") and truth.log_evidence is not None:
        return _held_out(truth.log_evidence, f"truth ({truth.kind})", "good", truth.provenance)
    density = Density(unseen, parameters=parameters)
    if not density.latents:
        with torch.no_grad():
            return _held_out(Evidence(density.log_likelihood({}), torch.zeros(()), "exact"), "exact", "good", "exact")
    exact = Enumeration()
    engine = ImportanceSampling(proposal="laplace", num_samples=1000) if why_not(unseen, exact) else exact
    posterior = infer(unseen, engine, seed=seed, parameters=parameters)
    if not posterior.status.done or posterior.log_evidence is None:
        raise ProblemError(f"held-out log-likelihood by {posterior.engine}: {posterior.status}.")
    diagnostics = posterior.diagnostics
    return _held_out(posterior.log_evidence, posterior.engine, diagnostics.level, diagnostics.verdict)


def _held_out(evidence: Evidence, estimator: str, level: str, verdict: str) -> HeldOut:
    value, std_error = evidence.per_datum()
    count = evidence.value.numel()
    data_error = float(evidence.value.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return HeldOut(value, std_error, data_error, count, estimator, level, verdict)

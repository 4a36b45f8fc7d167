"""The measures of an answer, one function each: distance from the truth, and log-likelihood of data not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyrometer.inference import Enumeration, ImportanceSampling, Posterior, Problem, ProblemError, infer
from pyrometer.inference.density import Density
from pyrometer.inference.engine import why_not
from pyrometer.inference.learn import Fit
from pyrometer.inference.posterior import Cost, Evidence, Status
from pyrometer.inference.problem import Reference
from pyrometer.inference.registry import as_engine

# Below this spread, relative to the mean, a reference sd is rounding: differences are not divided by less.
SMALLEST_SD = 1e-8


Metric = Callable[[Posterior, Reference], "Score | None"]

METRICS: dict[str, Metric] = {}  # title in the table -> metric, in the order of definition
BETTER: dict[str, str] = {}  # title -> 'lower', 'higher', or '' where neither is better
MORE: set[str] = set()  # titles of those that records have and the table on a terminal has no room for


def metric(title: str, *, shown: bool = True, better: str = "lower") -> Callable[[Metric], Metric]:
    """Make a function (posterior, reference) -> Score | None part of every comparison, under this title.

    `shown=False`: it is computed where all measures are asked for (`measure`), and not printed in the table. `better`
    is 'lower', 'higher' or ''.
    """

    def register(function: Metric) -> Metric:
        METRICS[title] = function
        BETTER[title] = better
        if not shown:
            MORE.add(title)
        return function

    return register


@dataclass(frozen=True)
class Score:
    """A measure over all entries of all sites: its average, its worst entry, and where that is.

    The worst is the largest, or the smallest of a measure of which more is better. `reference_error` is the average
    error of the truth itself, in the same units. An average below it says only that the engine is as good as the
    reference can tell (`at_reference_precision`). `std_error` is that of the average, where it can be told.
    """

    average: float
    largest: float
    where: str
    reference_error: float = 0.0
    std_error: float | None = None

    @property
    def at_reference_precision(self) -> bool:
        return self.average <= self.reference_error


def measure(posterior: Posterior, reference: Reference, every: bool = False) -> dict[str, Score]:
    """Title -> score, of the metrics that apply: those of the table, or `every` one there is, which takes seconds.

    Raises ProblemError where the reference's shapes are not the posterior's.
    """
    if every:
        from . import distances, scores  # noqa: F401  (they join METRICS by being imported)
    chosen = {title: of for title, of in METRICS.items() if every or title not in MORE}
    return {title: score for title, of in chosen.items() if (score := of(posterior, reference)) is not None}


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
    known = discrete(posterior, reference)
    if known is None:
        return None
    site, exact, found = known
    error = 0.5 * (found - exact).abs().sum(-1)
    return Score(float(error.mean()), _largest(error), site + _place(error))


def discrete(posterior: Posterior, reference: Reference) -> tuple[str, Tensor, Tensor] | None:
    """The site, its exact probabilities (*batch, K) and the answer's; None where they are not known."""
    sites = [site for site in reference.mean if site in posterior.draws]
    if reference.log_weights is None or not unordered(reference) or not sites:
        return None
    exact = torch.softmax(reference.log_weights.double(), 0).movedim(0, -1)
    values = torch.arange(exact.shape[-1])
    return sites[0], exact, posterior.expectation(lambda draws: draws[sites[0]].long()[..., None] == values)


def unordered(reference: Reference) -> bool:
    """Whether what is known is the probabilities of one latent's values, a cluster, say, whose moments mean nothing.
    Listed weights of several latents, or of a vector of them, are of their joint values: moments then serve."""
    if reference.log_weights is None or len(reference.mean) != 1:
        return False
    (mean,) = reference.mean.values()
    return mean.shape == reference.log_weights.shape[1:]


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
        if site not in posterior.draws or site not in reference.sd or unordered(reference):
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


@dataclass(frozen=True, eq=False)
class Judged:
    """log p_theta(x) of each datum by one estimator: `evidence` of shape (*batch), or None and a status that says why.

    `posterior` is the engine's answer, where an engine was asked.
    """

    evidence: Evidence | None
    estimator: str
    level: str = "unknown"
    verdict: str = ""
    status: Status = field(default_factory=lambda: Status("done"))
    cost: Cost = field(default_factory=Cost)
    posterior: Posterior | None = None


def log_likelihood(
    problem: Problem, parameters: Mapping[str, Tensor] | Fit, method: Any = "auto", seed: int = 0, **running: Any
) -> Judged:
    """log p_theta(x) of the problem's own data, at this theta, by

    'auto'       the truth where the problem knows it at any theta; exact where there are no latents or they can be
                 listed; elsewhere importance sampling, 1,000 draws per datum from a Laplace approximation
    'reference'  the truth and nothing else
    an engine    by name, class or instance; its evidence is of the kind that it says (a lower bound from SVI)

    theta alone is handed on, so that no learner is judged by a guide of its own making. Only a proposal that *is* the
    guide (`ImportanceSampling(proposal="guide")`) is given phi too, where a `Fit` brings it.
    What has no evidence, fails or is not finite somewhere is a status with the reason, never a number.
    `running` is for `infer`: progress, device. Raises ProblemError for an unknown name and an unusable problem.
    """
    theta = parameters.parameters if isinstance(parameters, Fit) else parameters
    if isinstance(method, str) and method in BY_PROBLEM:
        judged = _by_problem(problem, theta, method)
        if judged is not None:
            return _finite(judged)
        method = _unlisted_or_exact(problem)
    engine = as_engine(method)
    given = parameters if getattr(engine, "proposal", None) == "guide" else theta
    posterior = infer(problem, engine, seed=seed, parameters=given, **running)
    answer = Judged(posterior.log_evidence, posterior.engine, status=posterior.status, cost=posterior.cost)
    if not posterior.status.done:
        return replace(answer, evidence=None)
    diagnostics = posterior.diagnostics
    answer = replace(answer, posterior=posterior, level=diagnostics.level, verdict=diagnostics.verdict)
    if posterior.log_evidence is None:
        return replace(answer, status=_not_available(f"{engine.name} gives no evidence"))
    return _finite(answer)


BY_PROBLEM = ("auto", "reference")  # methods that are no engines


def _by_problem(problem: Problem, theta: Mapping[str, Tensor], method: str) -> Judged | None:
    """By the truth, or without latents; None where 'auto' has to ask an engine."""
    strict = method == "reference"
    # a fixed reference belongs to the theta that the problem came with, and theta is learned here
    fixed = isinstance(problem.reference, Reference)
    try:
        truth = Reference("none", provenance="it was given for one theta") if fixed else problem.reference_at(theta)
    except ProblemError:
        raise
    except Exception as error:
        return Judged(None, "truth", status=Status("failed", f"the reference: {type(error).__name__}: {error}"))
    if truth.log_evidence is not None and (strict or truth.kind in ("exact", "quadrature")):
        return Judged(truth.log_evidence, f"truth ({truth.kind})", "good", truth.provenance)
    if strict:
        reason = f"the reference has no evidence here: {truth.provenance or truth.kind}"
        return Judged(None, "truth", status=_not_available(reason))
    density = Density(problem, parameters=theta)
    if density.latents:
        return None
    with torch.no_grad():
        return Judged(Evidence(density.log_likelihood({}), torch.zeros(()), "exact"), "exact", "good", "exact")


def _unlisted_or_exact(problem: Problem) -> Any:
    """Enumeration where the latents can be listed; else the one estimator for all, which owes nothing to a guide."""
    exact = Enumeration()
    return ImportanceSampling(proposal="laplace", num_samples=1000) if why_not(problem, exact) else exact


def _not_available(reason: str) -> Status:
    return Status("unsupported", f"not available: {reason}")


def _finite(judged: Judged) -> Judged:
    if judged.evidence is None or bool(judged.evidence.value.isfinite().all()):
        return judged
    bad = (~judged.evidence.value.isfinite()).flatten().nonzero().flatten().tolist()
    reason = f"log p(x) is not finite at {len(bad)} of {judged.evidence.value.numel()} data, first {bad[:5]}"
    return replace(judged, evidence=None, status=Status("failed", reason))


@dataclass(frozen=True)
class HeldOut:
    """Mean log p_theta(x) in nats over `data` held-out data points, by one estimator for every learner.

    `std_error` is the estimator's own Monte Carlo error; `data_error` is the spread over the test data, sd / sqrt(n):
    what another test set of this size would change (None: one datum). `level` and `verdict` come with the estimate.
    `kind` is that of the evidence: 'exact', 'estimate' or 'lower bound'. Where `status` is not 'done' there is no
    number: `value` and both errors are None.
    """

    value: float | None
    std_error: float | None
    data_error: float | None
    data: int
    estimator: str
    level: str
    verdict: str
    kind: str = "estimate"
    status: Status = field(default_factory=lambda: Status("done"))


def held_out_log_likelihood(
    problem: Problem, parameters: Mapping[str, Tensor] | Fit, method: Any = "auto", seed: int = 0
) -> HeldOut | None:
    """log p_theta(x) of the held-out data per datum, at this theta; None where there are no such data.

    `method` as for `log_likelihood`. 'auto' depends on the problem alone, so it is the same for all learners, and
    raises ProblemError where it cannot run. Any other method that has no evidence says 'not available' and why.
    """
    if problem.held_out is None:
        return None
    judged = log_likelihood(problem.on_held_out(), parameters, method, seed)
    if judged.evidence is None:
        if isinstance(method, str) and method == "auto":
            raise ProblemError(f"held-out log-likelihood by {judged.estimator}: {judged.status}.")
        return HeldOut(None, None, None, 0, judged.estimator, "unknown", "", "", judged.status)
    value, std_error = judged.evidence.per_datum()
    return HeldOut(
        value,
        std_error,
        data_error(judged.evidence.value),
        judged.evidence.value.numel(),
        judged.estimator,
        judged.level,
        judged.verdict,
        judged.evidence.kind,
    )


def data_error(values: Tensor) -> float | None:
    """sd / sqrt(n) over data: what other data of this number would change in their mean; None for one datum."""
    count = values.numel()
    return float(values.std(correction=1)) / math.sqrt(count) if count > 1 else None

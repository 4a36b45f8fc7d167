"""What an answer is worth: its evidence, its effective draws, what it predicts, and, without a truth, Stein's test.

Where a measure needs the density it is that of the posterior's own problem, at the posterior's theta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyrometer.inference import Posterior
from pyrometer.inference.density import Density
from pyrometer.inference.engine import isolated
from pyrometer.inference.guides import AutoGuide, make_guide
from pyrometer.inference.posterior import Cost, Evidence, gathered
from pyrometer.inference.problem import ProblemError, Reference
from pyrometer.inference.statistics import k_hat_threshold, psis

from .alarms import bracket
from .distances import DATA, fewer, summary
from .methods import row_seed
from .metrics import Score, metric

DRAWS = 500
INTERVAL = 0.9


@contextmanager
def density_of(posterior: Posterior) -> Iterator[Density]:
    """The density that the posterior is of; its random numbers are the same every time, and not those of the draws."""
    assert posterior.problem is not None
    with (
        isolated(row_seed(posterior.seed, "measures")),
        torch.no_grad(),
        Density(posterior.problem, parameters=posterior.parameters) as density,
    ):
        yield density


def _places(shape: tuple[int, ...]) -> list[str]:
    """The data by their indices, '[17]'; '' for one without a batch."""
    return [str([int(i) for i in index]) if index else "" for index in np.ndindex(*shape)]


# -- evidence --------------------------------------------------------------------------------------------------------


@metric("error of evidence", shown=False)
def evidence_error(posterior: Posterior, reference: Reference) -> Score | None:
    """|log evidence - true log evidence| in nats per datum; of a bound, what it gives away."""
    found, truth = posterior.log_evidence, reference.log_evidence
    if found is None or truth is None:
        return None
    error = (found.value - truth.value).abs()
    return summary(error.flatten().tolist(), _places(tuple(error.shape)), float(truth.std_error.mean()))


@metric("evidence error / se", shown=False, better="")
def evidence_z(posterior: Posterior, reference: Reference) -> Score | None:
    """|log evidence - truth| in standard errors of the two together: about 0.8 on average where the error bar is
    honest. Of a bound it is the sharper estimate beside it, where there is one; None where nothing has an error."""
    found: Evidence | None = posterior.log_evidence
    truth = reference.log_evidence
    if found is not None and found.kind == "lower bound":
        found = found.refined
    if found is None or truth is None:
        return None
    error = (found.std_error.square() + truth.std_error.square()).sqrt()
    if not bool((error > 0).all()):
        return None
    z = (found.value - truth.value).abs() / error
    return summary(z.flatten().tolist(), _places(tuple(z.shape)))


@metric("bracket width", shown=False)
def bracket_width(posterior: Posterior, reference: Reference) -> Score | None:
    """Upper less lower bound of the log evidence, nats per datum; None where the answer does not have both."""
    width = bracket(posterior)
    if width is None:
        return None
    return summary(width.flatten().tolist(), _places(tuple(width.shape)))


# -- effective draws -------------------------------------------------------------------------------------------------


@metric("forward ESS", shown=False, better="higher")
def forward_ess(posterior: Posterior, reference: Reference) -> Score | None:
    """Share of the draws of q that carry the weight, 1 / (S sum w^2) with w = p / q normalised, per datum; None where
    an answer has no weights. It cannot see a mode that q never visits: see the reverse one."""
    log_w = _log_ratio(posterior)
    if log_w is None:
        return None
    share = torch.exp(2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0)) / len(log_w)
    return summary(share.flatten().tolist(), _places(tuple(share.shape)), better="higher")


def _log_ratio(posterior: Posterior) -> Tensor | None:
    """log p - log q of the draws, (S, *batch), where they are draws of a q."""
    if posterior.kind == "weighted" and posterior.log_weights is not None:
        drawn = "ess" in posterior.diagnostics.figures  # points of a rule have none
        return posterior.log_weights.double().flatten(0, 1) if drawn else None
    stats = posterior.sample_stats
    return (stats["lp"] - stats["log_q"]).double().flatten(0, 1) if {"lp", "log_q"} <= set(stats) else None


@metric("reverse ESS", shown=False, better="higher")
def reverse_ess(posterior: Posterior, reference: Reference) -> Score | None:
    """The same share by draws of the truth, 1 / (E_p[w] E_p[1 / w]): near 0 where q misses what p has. For a fitted
    guide and for weights from the prior, whose log q can be told, where the truth has draws; else None."""
    if reference.log_weights is not None or not len(reference.draws) or posterior.problem is None:
        return None
    try:
        with density_of(posterior) as density:
            if not all(n in reference.draws for n in density.latents):
                return None
            most = min(DRAWS, len(next(iter(reference.draws.values()))))
            z = {n: reference.draws[n][:most] for n in density.latents}
            log_w = _log_w(posterior, density, z)
    except ProblemError:
        return None
    if log_w is None:
        return None
    weights = torch.zeros_like(log_w)
    if reference.draw_log_weights is not None:
        weights = reference.draw_log_weights.double()[:most]
    weights = torch.log_softmax(weights, 0)
    share = torch.exp(-torch.logsumexp(weights + log_w, 0) - torch.logsumexp(weights - log_w, 0))
    return summary(share.flatten().tolist(), _places(tuple(share.shape)), better="higher")


def _log_w(posterior: Posterior, density: Density, z: Mapping[str, Tensor]) -> Tensor | None:
    """log p(x, z) - log q(z) of given latents, (S, *batch); None where log q cannot be told."""
    if posterior.engine == "importance_sampling" and posterior.engine_options.get("proposal") == "prior":
        return density.log_likelihood(z).double()
    if posterior.engine != "svi" or posterior.kind == "point":
        return None
    family = posterior.engine_options.get("guide")
    automatic = any(name.startswith("guide.") for name in posterior.state)
    if automatic and (family or "AutoNormal") not in AutoGuide.FAMILIES:
        return None
    guide = make_guide(density, (family or "AutoNormal") if automatic else None)
    guide.load(posterior.state)
    if automatic:
        u = density.unconstrain(z)
        return (density.log_joint(u) - guide.log_prob(u)).double()
    return (density.log_joint(z) - guide.log_prob(z)).double()


def effective(posterior: Posterior) -> Tensor | None:
    """Effective number of draws of each datum, its worst latent, (*batch) or (); None where it cannot be told."""
    figures = posterior.diagnostics.figures
    if posterior.kind == "mcmc" and "ess_bulk" in figures:
        return torch.as_tensor(figures.get("ess_bulk_per_datum", figures["ess_bulk"])).double()
    if posterior.kind == "iid":
        return torch.tensor(float(posterior.num_chains * posterior.num_samples), dtype=torch.float64)
    if posterior.kind == "weighted" and not posterior.is_rule:
        return 1 / posterior.weights().square().sum((0, 1))
    return None


@metric("ESS", shown=False, better="higher")
def effective_draws(posterior: Posterior, reference: Reference) -> Score | None:
    """Effective number of draws of a datum's worst latent; of independent draws, their number, however wrong q is."""
    return _rate(posterior, 1.0)


@metric("ESS per call", shown=False, better="higher")
def ess_per_call(posterior: Posterior, reference: Reference) -> Score | None:
    """The same for each call of the density, a value or a gradient, tuning with it."""
    return _rate(posterior, posterior.cost.calls)


def per_second(ess: Score, cost: Cost) -> Score | None:
    """ESS for each second, tuning with it, compilation left out. No metric, for those are the same in every run."""
    seconds = cost.seconds - cost.compile_seconds
    return replace(ess, average=ess.average / seconds, largest=ess.largest / seconds) if seconds > 0 else None


def _rate(posterior: Posterior, cost: float) -> Score | None:
    ess = effective(posterior)
    if ess is None or not cost > 0:
        return None
    return summary((ess / cost).flatten().tolist(), _places(tuple(ess.shape)), better="higher")


# -- prediction ------------------------------------------------------------------------------------------------------


@metric("elpd", shown=False, better="higher")
def elpd(posterior: Posterior, reference: Reference) -> Score | None:
    """Log density of each observation by the posterior of the others, nats per observation, by Pareto smoothed
    importance sampling (Vehtari et al. 2017, doi:10.1007/s11222-016-9696-4), the weights of the draws honoured.
    `std_error` is sd / sqrt(n) over observations; where k-hat is too large for some, `where` says for how many. None
    where each datum has a latent of its own: without the datum that is the prior, and the evidence says it all."""
    if posterior.problem is None or posterior.batch_shape or posterior.kind == "point":
        return None
    with density_of(posterior) as density:
        if not all(name in posterior.draws for name in density.latents):
            return None
        flat = {name: posterior.draws[name].flatten(0, 1) for name in density.latents}
        terms = density.pointwise(flat)
    if not terms:
        return None
    log_likelihood = torch.cat([t.double().reshape(len(t), -1) for t in terms.values()], 1)  # (S, n)
    log_w = posterior.weights().flatten().log()[:, None]
    if bool((log_likelihood == -math.inf).any()) or bool(log_likelihood.isnan().any()):
        return None
    smoothed, k_hat = psis(log_w - log_likelihood)
    values = torch.logsumexp(smoothed + log_likelihood, 0) - torch.logsumexp(smoothed, 0)
    high = int((k_hat > k_hat_threshold(len(log_likelihood))).sum())
    n = values.numel()
    note = f"k-hat is too large at {high} of {n}" if high else ""
    error = float(values.std() / math.sqrt(n)) if n > 1 else None
    return Score(float(values.mean()), float(values.min()), note, std_error=error)


@metric("predictive coverage", shown=False, better="")
def predictive_coverage(posterior: Posterior, reference: Reference) -> Score | None:
    """Share of the observations between the 5 % and 95 % points of what is predicted for them: 0.9 where predictions
    are calibrated, more where an observation has had a part in its own prediction. The worst is the lowest over data.
    None where a latent has no draws. Discrete observations are put at a random place of their jump."""
    if posterior.problem is None or posterior.kind == "point":
        return None
    with density_of(posterior) as density:
        if not all(name in posterior.draws for name in density.latents):
            return None
        shown = posterior.resample(DRAWS) if posterior.log_weights is not None else posterior
        flat = {name: shown.draws[name].flatten(0, 1) for name in density.latents}
        total = len(next(iter(flat.values())))
        at = torch.linspace(0, total - 1, min(DRAWS, total)).round().long()
        predicted = density.predict({name: value[at] for name, value in flat.items()})
        observed = density.observed
        inside, batch = [], tuple(density.batch_shape)
        for name, value in predicted.items():
            x = observed[name]
            below, same = (value.cpu() < x).double().mean(0), (value.cpu() == x).double().mean(0)
            pit = below + same * torch.rand(below.shape, dtype=torch.float64)
            inside.append(((pit - 0.5).abs() <= INTERVAL / 2).double().reshape(*batch, -1))
    if not inside:
        return None
    share = torch.cat(inside, -1).mean(-1)
    return summary(share.flatten().tolist(), _places(batch), better="higher")


# -- without a truth -------------------------------------------------------------------------------------------------


@metric("kernel Stein discrepancy", shown=False)
def kernel_stein(posterior: Posterior, reference: Reference) -> Score | None:
    """sqrt(E k_p(u, u')), with k_p Stein's form of k(u, v) = (1 + |u - v|^2)^(-1/2), the inverse multiquadric, and the
    gradients of the log joint, where the truth has no draws: 0 only for the posterior (Gorham and Mackey 2017,
    arXiv:1703.01717). In unconstrained space, in the answer's own sds; a perfect answer of S draws has about
    sqrt(D / S) and more."""
    if len(reference.draws) or posterior.problem is None or posterior.kind == "point":
        return None
    with density_of(posterior) as density:
        if not density.continuous or not all(name in posterior.draws for name in density.continuous):
            return None
        weights = posterior.weights().flatten(0, 1)  # (S, *batch)
        batch = tuple(density.batch_shape)
        flat = {name: posterior.draws[name].flatten(0, 1) for name in density.continuous}
        number = math.prod(batch)
        chosen = torch.arange(number)
        if number > DATA:
            chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:DATA].sort().values
        picked = [
            fewer(weights.reshape(-1, number)[:, i], DRAWS, posterior.log_weights is not None) for i in chosen.tolist()
        ]
        most = max(len(at) for at, _ in picked)
        index = torch.zeros(most, number, dtype=torch.long)
        for i, (at, _) in zip(chosen.tolist(), picked, strict=True):
            index[: len(at), i] = at
        z = {n: gathered(v, index.reshape(most, *batch)) for n, v in flat.items()}
        u = density.unconstrain(z)
        gradient = density.value_and_grad(u)[1]
    u, gradient = (t.double().cpu().reshape(most, number, -1)[:, chosen] for t in (u, gradient))
    values = [stein(u[: len(w), i], gradient[: len(w), i], w) for i, (_, w) in enumerate(picked)]
    return summary(values, [_places(batch)[i] for i in chosen.tolist()])


def stein(u: Tensor, gradient: Tensor, w: Tensor) -> float:
    """The discrepancy of points u (S, D) of weights w (S) with gradients of the log density there, (S, D)."""
    centre = w @ u
    scale = (w @ (u - centre).square()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    u, s = (u - centre) / scale, gradient * scale
    if not bool(u.isfinite().all() and s.isfinite().all()):
        return math.inf
    square = torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist").square()
    base = 1 + square
    along = (s * u).sum(1)
    drift = along[:, None] + along - s @ u.T - u @ s.T  # (s_i - s_j) . (u_i - u_j)
    form = s @ s.T * base**-0.5 + base**-1.5 * (drift + u.shape[1]) - 3 * square * base**-2.5
    return math.sqrt(max(float(w @ form @ w), 0.0))

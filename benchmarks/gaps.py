"""Where the nats go: what a learned model and its amortised guide lose, split into three gaps per datum.

    total          log p_best(x) - ELBO(theta, phi)            = learning + approximation + amortisation
    learning       log p_best(x) - log p_theta(x)              best: the fit of largest mean evidence
    approximation  log p_theta(x) - max_q ELBO(theta, q)       over the family, a member for each datum
    amortisation   max_q ELBO(theta, q) - ELBO(theta, phi)     what one network for all data gives away
    inference      approximation + amortisation                = KL(q_phi(z | x) || p_theta(z | x))

All in nats per datum. Cremer, Li & Duvenaud 2018, arXiv:1801.03558. A mean-field family on a Gaussian posterior of
precision P has the approximation gap (sum_j log P_jj - log det P) / 2.

Errors: `std_error` of a mean over n data is sqrt(sum_i s_i^2) / n with s_i that of datum i. The amortisation gap is
the mean of differences between two members at the same noise, so its s_i is the paired one; the evidence and the ELBO
have draws of their own, so there errors add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrometer.inference import Problem, ProblemError
from pyrometer.inference.density import Density
from pyrometer.inference.engine import EngineError, check_problem, isolated
from pyrometer.inference.guides import PairedGuide
from pyrometer.inference.learn import Fit
from pyrometer.inference.posterior import Status

from .facts import describe, machine, versions
from .gaussian import FAMILIES, best_members, log_weights, member_of, start_from_draws
from .methods import row_seed
from .metrics import Judged, data_error, log_likelihood
from .tabled import Tabled

if TYPE_CHECKING:
    from rich.console import RenderableType

NAMES = ("learning", "approximation", "amortisation", "inference", "total")
SIGNIFICANT = 4.0  # standard errors by which a figure must be out before it is called so
SLACK = 0.003  # nats that the search for the best member may have left


@dataclass(frozen=True)
class Gap:
    """The mean over data in nats, `std_error` by the draws, `data_error` the spread sd / sqrt(n) over data (None: one
    datum); `values` and `errors` are those of each datum."""

    value: float
    std_error: float
    data_error: float | None
    values: tuple[float, ...] = field(default=(), repr=False)
    errors: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, values: Tensor, errors: Tensor) -> Gap:
        values, errors = values.flatten().double(), errors.expand(values.shape).flatten().double()
        std_error = float(errors.square().sum().sqrt()) / len(values)
        value = float(values.mean())
        return cls(value, std_error, data_error(values), tuple(values.tolist()), tuple(errors.tolist()))


@dataclass(frozen=True)
class Losses:
    """One fit: its gaps by name. What is not to be had is missing, and `status` or `notes` say why.

    `kind` is that of the evidence; `best` marks the fit that the others are compared with.
    `below` counts data whose best member found is below the guide by more than its error (0 where the search worked);
    `slack` is an estimate of the nats per datum that the search left. `worst` are data by index, largest inference gap
    first. `level` is 'good' only where evidence and search both are.
    """

    learner: str
    status: Status = field(default_factory=lambda: Status("done"))
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    kind: str = ""
    best: bool = False
    level: str = "unknown"
    below: int = 0
    slack: float = 0.0
    worst: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gaps(Tabled):
    """The gaps of several fits on the same data. Print it for the table; `to_json` keeps everything."""

    rows: tuple[Losses, ...]
    family: str = "AutoNormal"
    evaluator: str = "auto"
    judged: str = "held-out"
    problem: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)

    def row(self, learner: str) -> Losses:
        """Raises KeyError."""
        return {row.learner: row for row in self.rows}[learner]

    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        from .report_square import render_gaps

        return render_gaps(self, width, ascii_only)


def gaps(
    problem: Problem,
    fits: Fit | Sequence[Fit] | Mapping[str, Fit],
    *,
    evaluator: Any = "auto",
    family: str = "AutoNormal",
    held_out: bool = True,
    num_samples: int = 1000,
    num_steps: int = 200,
    num_particles: int = 64,
    seed: int = 0,
) -> Gaps:
    """The gaps of each fit on the held-out (or training) data.

    fits           of the problem, by label; with one of them the learning gap is zero
    evaluator      who tells log p_theta(x), as for `log_likelihood`; a lower bound makes gaps too small
    family         over which the best member for each datum is sought, in the unconstrained space: 'AutoNormal' or
                   'AutoMultivariateNormal'
    num_samples    draws for each ELBO; num_steps and num_particles: of the search for the best members
    A fit that cannot be split is a row with its reason. Raises ProblemError for settings that cannot be used, and
    where there are no held-out data.
    """
    check_problem(problem)
    if family not in FAMILIES:
        raise ProblemError(f"family={family!r}: expected one of {', '.join(FAMILIES)}.")
    for name, count in (("num_samples", num_samples), ("num_steps", num_steps), ("num_particles", num_particles)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ProblemError(f"{name}={count!r}: expected a whole number of at least 2.")
    named = _named(fits)
    row_seed(seed)
    if held_out and problem.held_out is None:
        raise ProblemError(f"problem {problem.name!r} has no held-out data; use held_out=False for the training data.")
    target = problem.on_held_out() if held_out else problem
    evidence = {name: _evidence(target, fit, evaluator, row_seed(seed, "gaps", name)) for name, fit in named.items()}
    known = {name: judged for name, judged in evidence.items() if judged.evidence is not None}
    means = {name: judged.evidence.per_datum()[0] for name, judged in known.items() if judged.evidence is not None}
    best = max(means, key=lambda name: means[name], default="")
    rows = []
    for name, fit in named.items():
        if name not in known:
            rows.append(Losses(name, evidence[name].status))
            continue
        rows.append(
            _losses(
                target, name, fit, (known[name], known[best]), family, (num_samples, num_steps, num_particles),
                row_seed(seed, "gaps", name, "guide"),
            )
        )  # fmt: skip
    estimator = known[best].estimator if best else str(evaluator)
    judged_on = "held-out" if held_out else "training"
    return Gaps(tuple(rows), family, estimator, judged_on, describe(problem), seed)


def _named(fits: Any) -> dict[str, Fit]:
    if isinstance(fits, Fit):
        fits = [fits]
    if not isinstance(fits, Mapping):
        labels = [fit.learner or "fit" if isinstance(fit, Fit) else "" for fit in fits]
        if len(set(labels)) < len(labels):
            raise ProblemError("fits: two of the same learner; tell them apart by a dict from labels to fits.")
        fits = dict(zip(labels, fits, strict=True))
    wrong = [fit for fit in fits.values() if not isinstance(fit, Fit)]
    if wrong or not fits:
        what = f"got {type(wrong[0]).__name__}" if wrong else "none given"
        raise ProblemError(f"fits: expected what `learn` answers, {what}.")
    return {str(name): fit for name, fit in fits.items()}


def _evidence(target: Problem, fit: Fit, evaluator: Any, seed: int) -> Judged:
    if not fit.status.done:
        return Judged(None, "", status=Status("failed", f"there is no theta to judge: {fit.status}"))
    return log_likelihood(target, fit, evaluator, seed)


def _losses(
    target: Problem, name: str, fit: Fit, judged: tuple[Judged, Judged], family: str, counts: tuple[int, int, int],
    seed: int,
) -> Losses:  # fmt: skip
    """`judged` is the evidence at this fit's theta and at the best one's, both with a number."""
    level, top = (one.evidence for one in judged)
    if level is None or top is None:
        raise ValueError("gaps need the evidence of this fit and of the best.")
    is_best = judged[0] is judged[1]
    learning = Gap.of(
        top.value - level.value,
        torch.zeros(()) if is_best else torch.hypot(top.std_error, level.std_error),
    )
    row = Losses(name, gaps={"learning": learning}, kind=level.kind, best=is_best, level=judged[0].level)
    if level.kind == "lower bound":
        row = replace(row, notes=("the evidence is a lower bound, so the gaps below it are too small",))
    if row.level != "good":
        row = replace(row, notes=(*row.notes, f"the evidence: {judged[0].verdict}"))
    try:
        with isolated(seed), torch.no_grad():
            density = Density(target)
            density.set_parameters(fit)
            with density:
                bounds = _bounds(density, family, *counts)
    except (ProblemError, EngineError) as error:
        return replace(row, status=Status("unsupported", str(error)))
    except Exception as error:
        return replace(row, status=Status("failed", f"{type(error).__name__}: {error}"))
    elbo, elbo_error = bounds.guide.mean(0), _error(bounds.guide)
    if not bool(elbo.isfinite().all()):
        bad = int((~elbo.isfinite()).sum())
        return replace(row, status=Status("failed", f"the ELBO of the guide is not finite at {bad} data"))
    if elbo.shape != level.value.shape:
        reason = f"the evidence is of shape {tuple(level.value.shape)}, the guide's ELBO {tuple(elbo.shape)}"
        return replace(row, status=Status("unsupported", reason))
    member, member_error = bounds.member.mean(0), _error(bounds.member)
    shortfall, shortfall_error = member - elbo, torch.hypot(member_error, elbo_error)
    if bounds.paired:  # the same noise in both: the error of a mean of differences
        shortfall_error = _error(bounds.member - bounds.guide)
    found = {
        "learning": learning,
        "approximation": Gap.of(level.value - member, torch.hypot(level.std_error, member_error)),
        "amortisation": Gap.of(shortfall, shortfall_error),
        "inference": Gap.of(level.value - elbo, torch.hypot(level.std_error, elbo_error)),
        "total": Gap.of(top.value - elbo, torch.hypot(top.std_error, elbo_error)),
    }
    below = int((shortfall < -SIGNIFICANT * shortfall_error - 1e-9).sum())
    findings = _findings(bounds, below, elbo.numel())
    order = torch.tensor(found["inference"].values).argsort(descending=True, stable=True)
    return replace(
        row,
        gaps=found,
        below=below,
        slack=bounds.slack,
        worst=tuple(order[:10].tolist()),
        level="caution" if row.level == "good" and findings else row.level,
        notes=(*row.notes, *findings),
    )


@dataclass(frozen=True)
class _Bounds:
    """log p(x, z) - log q(z), (S, *batch): of the guide and of the best member, and whether at the same noise."""

    guide: Tensor
    member: Tensor
    paired: bool
    slack: float


def _bounds(density: Density, family: str, count: int, num_steps: int, num_particles: int) -> _Bounds:
    density.require_guide()
    if not density.guide_ready:
        raise ProblemError("this learner trained no guide, so there is no ELBO to explain")
    if density.discrete or not density.continuous:
        raise ProblemError("discrete latents: no Gaussian family holds their posterior")
    own = member_of(density, family)
    start = own if own is not None else start_from_draws(density, family)
    member, slack = best_members(density, start, family, own is not None, num_steps, num_particles)
    noise = torch.randn((count, *member.loc.shape), dtype=density.dtype, device=density.device)
    of_member = log_weights(density, member, noise)
    if own is not None:
        return _Bounds(log_weights(density, own, noise), of_member, True, slack)
    z, log_q, _ = PairedGuide(density).draw(count)
    return _Bounds((density.log_joint(z) - log_q).double().cpu(), of_member, False, slack)


def _findings(bounds: _Bounds, below: int, count: int) -> tuple[str, ...]:
    notes = []
    if not bounds.paired:
        notes.append(
            "the guide is no member of the family: its best member may be below the guide, and errors are not paired"
        )
    elif below:
        notes.append(f"the best member found is below the guide at {below} of {count} data: raise num_steps")
    if bounds.slack > SLACK:
        notes.append(
            f"the search for the best members was {bounds.slack:.2g} nats from its end: raise num_steps; until then "
            "approximation is too large and amortisation too small"
        )
    return tuple(notes)


def _error(draws: Tensor) -> Tensor:
    """Standard error of the mean over draws, (S, *batch) -> (*batch)."""
    return draws.std(0, correction=1) / math.sqrt(len(draws))

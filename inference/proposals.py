"""Proposals q of a posterior, for draws that are weighted or rejected by

    log w = log p_theta(x, z) - log q(z).

'prior': the likelihood is the weight. 'guide': the problem's own as it stands. 'laplace': a multivariate t at each
datum's mode. A fitted `Posterior`: its guide, or a t with its moments. An engine: fitted first, then as its posterior.
'auto': the guide where `parameters=Fit` brought a learned one or it has nothing to learn, else laplace or prior,
whichever a pilot of 200 draws finds more effective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from .density import Density, Values
from .engine import EngineError, Run
from .guides import AutoGuide, Guide, PairedGuide, make_guide
from .laplace import GaussianFit, laplace, moments, student_t, student_t_log_density
from .learning import flat_draws
from .posterior import Posterior
from .problem import ProblemError
from .program import is_fixed
from .registry import as_engine
from .settings import options

NAMES = ("auto", "prior", "guide", "laplace")
PILOT = 200  # draws by which proposals are compared

Z = Tensor | Values  # u (S, *batch, D), or site -> (S, *batch, *event)


class Proposal(NamedTuple):
    """draw       count -> z and log w (count, *batch); inside a minibatch those of its rows
    log_ratio  log w at given z, laid out as `draw` gives them
    alarms     what speaks against it"""

    draw: Callable[[int], tuple[Z, Tensor]]
    log_ratio: Callable[[Any], Tensor]
    alarms: tuple[str, ...] = ()


def check_proposal(engine: Any) -> None:
    """Raises `ProblemError` where the setting `proposal` is none of the above."""
    if isinstance(engine.proposal, str):
        if engine.proposal not in NAMES:
            raise ProblemError(
                f"{type(engine).__name__}(proposal={engine.proposal!r}): expected one of {', '.join(NAMES)}, "
                "a fitted posterior or an engine."
            )
    elif not isinstance(engine.proposal, Posterior):
        as_engine(engine.proposal)


def why_not_propose(density: Density, proposal: Any) -> str:
    """Why this proposal does not serve the model, in words; '' where it does. Raises `ProblemError` for a posterior
    that is another model's."""
    proposal = settled(density, proposal)
    if proposal == "guide":
        density.require_guide()
        if density.guide_flaw:
            return density.guide_flaw
        missing = [n for n in density.latents if n not in density.guide_sites]
        unlisted = [n for n in missing if n in density.unlisted]
        if unlisted:
            return f"the guide does not propose site {unlisted[0]!r}"
    if proposal == "prior" and density.prior_fault:
        return density.prior_fault
    if proposal == "laplace" or isinstance(proposal, Posterior):
        if not density.continuous:
            return "the latents are discrete: a t proposal does not apply; use proposal='prior' or 'guide'"
        if density.unlisted:
            return f"discrete site {density.unlisted[0]!r} can be neither proposed nor summed out"
    if isinstance(proposal, Posterior) and not proposal.draws:
        raise ProblemError(f"the posterior given as proposal has no draws; status: {proposal.status}.")
    if isinstance(proposal, Posterior):
        lacking = [n for n in density.continuous if n not in proposal.draws]
        if lacking:
            raise ProblemError(f"the posterior given as proposal lacks site {lacking[0]!r}: it is another model's.")
        if tuple(proposal.batch_shape) != tuple(density.batch_shape):
            raise ProblemError(
                f"the proposal is a posterior over data of shape {tuple(proposal.batch_shape)}, this problem has "
                f"{tuple(density.batch_shape)}: fit it to the same data."
            )
    if proposal == "auto" and density.prior_fault and density.unlisted:
        return f"{density.prior_fault}; and a discrete site cannot be summed out"
    if not isinstance(proposal, str | Posterior):
        reason = as_engine(proposal).supports(density)
        return f"the proposal engine cannot run: {reason}" if reason else ""
    return ""


def propose(proposal: Any, density: Density, run: Run, degrees: float) -> tuple[Proposal, tuple[str, ...]]:
    """The proposal, made ready, and a note on what 'auto' chose. degrees: of freedom of a t."""
    proposal = settled(density, proposal)
    if proposal != "auto":
        return ready(proposal, density, run, degrees), ()
    chosen = _pilot(density, run, degrees)
    return ready(chosen, density, run, degrees), (f"proposal: {chosen}, the best of a pilot",)


def weighted(proposal: Proposal, count: int) -> tuple[Z, Tensor]:
    """Draws and their log weights, (count, *batch). Raises `EngineError` where a datum has no usable weight."""
    z, log_weights = proposal.draw(count)
    refuse_undefined(log_weights)
    best = log_weights.amax(0)
    if not bool(best.isfinite().all()):
        bad = (~best.isfinite()).flatten().nonzero().flatten().tolist()
        what = "a weight is infinite" if bool((best == math.inf).any()) else "all weights are zero"
        raise EngineError(f"{what} for {len(bad)} of {best.numel()} data, first {bad[:5]}")
    return z, log_weights


def refuse_undefined(log_weights: Tensor) -> None:
    undefined = int(log_weights.isnan().sum())
    if undefined:
        raise EngineError(f"the log joint is undefined (NaN) at {undefined} of {log_weights.numel()} draws")


def settled(density: Density, proposal: Any) -> Any:
    """The setting, settled where no trial is needed: 'auto' is the learned guide where there is one."""
    return "guide" if isinstance(proposal, str) and proposal == "auto" and _serves(density) else proposal


def _narrow(density: Density) -> tuple[str, ...]:
    """The sites that the guide draws from a part of the model's support alone: weights cannot tell of the rest."""
    found = []
    for name, site in density.guide_latents.items():
        if name not in density.continuous or site.point or not is_fixed(density.latents[name].domain):
            continue
        there = density.latents[name]
        u = torch.linspace(-8.0, 8.0, 33, dtype=density.dtype, device=density.device)
        u = u.reshape(-1, *[1] * len(there.unconstrained_shape)).expand(-1, *there.unconstrained_shape)
        if not bool(site.domain.check(biject_to(there.domain)(u)).all()):
            found.append(
                f"the guide draws site {name!r} from a part of its support alone, and misses what lies outside"
            )
    return tuple(found)


def _serves(density: Density) -> bool:
    return density.guide_ready and not density.guide_flaw


def ready(proposal: Any, density: Density, run: Run, degrees: float) -> Proposal:
    """The proposal, what has to be fitted fitted."""
    if isinstance(proposal, str) and proposal == "prior":
        return _prior(density)
    if isinstance(proposal, str) and proposal == "guide":
        return _guide(density, PairedGuide(density))._replace(alarms=_narrow(density))
    if isinstance(proposal, str):
        with run.tuning():
            fit = laplace(density)
        return _t(density, fit, degrees)._replace(alarms=fit.alarms)
    if isinstance(proposal, Posterior):
        values, weights = flat_draws(proposal, proposal.batch_shape)
        name, family, state = proposal.engine, proposal.engine_options.get("guide"), proposal.state
    else:
        engine = as_engine(proposal)
        with run.tuning():
            fitted = engine.run(density, run.child(0))
        values, weights = flat_draws(fitted, tuple(density.batch_shape))
        name, family, state = engine.name, options(engine).get("guide"), fitted.state
    if name == "svi" and family != "AutoDelta" and (family is None or family in AutoGuide.FAMILIES):
        automatic = any(n.startswith("guide.") for n in state)
        guide = make_guide(density, (family or "AutoNormal") if automatic else None)
        guide.load(state)
        return _guide(density, guide)
    fit = moments(density.unconstrain({n: values[n] for n in density.continuous}), weights.to(density.dtype))
    return _t(density, fit, degrees)


def _prior(density: Density) -> Proposal:
    def draw(count: int) -> tuple[Z, Tensor]:
        draws = density.prior(count)
        return draws.values, draws.log_likelihood

    return Proposal(draw, density.log_likelihood)


def _guide(density: Density, guide: Guide) -> Proposal:
    def draw(count: int) -> tuple[Z, Tensor]:
        z, log_q, _ = guide.draw(count)
        return z, density.log_joint(z) - log_q

    return Proposal(draw, lambda z: density.log_joint(z) - guide.log_prob(z))


def _t(density: Density, fit: GaussianFit, degrees: float) -> Proposal:
    def of_rows() -> GaussianFit:
        return GaussianFit(density.rows(fit.mean), density.rows(fit.tril))

    def draw(count: int) -> tuple[Z, Tensor]:
        u, log_q = student_t(of_rows(), count, degrees)
        return u, density.log_joint(u) - log_q

    return Proposal(draw, lambda u: density.log_joint(u) - student_t_log_density(of_rows(), u, degrees))


def candidates(density: Density) -> list[str]:
    """What 'auto' has to choose from where no guide stands ready."""
    names = ["laplace"] if density.continuous and not density.unlisted else []
    return names + ([] if density.prior_fault else ["prior"])


def _pilot(density: Density, run: Run, degrees: float) -> str:
    """Laplace or the prior, whichever gives the larger mean effective sample size in a few draws."""
    names = candidates(density)
    if len(names) == 1:
        return names[0]
    found: dict[str, float] = {}
    with run.tuning():
        for name in names:
            try:
                log_weights = weighted(ready(name, density, run, degrees), PILOT)[1]
            except EngineError:
                continue
            found[name] = float(1 / torch.softmax(log_weights, 0).square().sum(0).mean())
    if not found:
        raise EngineError("neither a Laplace nor the prior proposal has a draw with finite weight")
    return max(found, key=lambda name: found[name])

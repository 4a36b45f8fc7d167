"""The other side of an estimate of the log evidence: chains that run backwards from exact draws of the posterior.

Such draws there are where the truth gives draws of its own; the bracket is then of the problem's own data. Elsewhere it
is of a synthetic twin, as many data drawn from the model at theta with the latents that they were drawn with, and says
how well the engine does on data as the model sees them. Either is a judgement, as the measures are: the engine runs
once more in each direction, with the settings that it had, and these calls are not among those of the answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyrometer.inference import Posterior, Problem, ProblemError, Reference
from pyrometer.inference.density import Density
from pyrometer.inference.engine import EngineError, Run, isolated, seed_all
from pyrometer.inference.posterior import Evidence
from pyrometer.inference.twin import twin

SIZES = ("num_samples", "num_temperatures")  # what an engine is sized by


def bracketed(
    posterior: Posterior, problem: Problem, engine: Any, reference: Reference, parameters: Any, seed: int
) -> Posterior:
    """The answer with the figure `bracket`, (*batch) in nats, where the engine can give both sides (`both_sides`) and
    exact draws are to be had; with the upper bound beside its evidence (`refined`) where these are of its own data.
    `parameters`: theta, or a fit, as `infer` was given them."""
    evidence = posterior.log_evidence
    if not hasattr(engine, "both_sides") or not posterior.status.done or evidence is None:
        return posterior
    ran = posterior.engine_options
    method = replace(engine, **{name: ran[name] for name in SIZES if name in ran})
    try:
        lower, upper, own = _sides(problem, method, reference, parameters, seed)
    except (ProblemError, EngineError) as error:
        return _noted(posterior, f"no bracket: {error}")
    diagnostics = replace(
        posterior.diagnostics, figures={**posterior.diagnostics.figures, "bracket": upper.value - lower.value}
    )
    posterior = replace(posterior, diagnostics=diagnostics)
    if own and evidence.refined is None:
        return replace(posterior, log_evidence=replace(evidence, refined=upper))
    return _noted(posterior, "the bracket is of data simulated from the model at theta")


def _sides(
    problem: Problem, method: Any, reference: Reference, parameters: Any, seed: int
) -> tuple[Evidence, Evidence, bool]:
    """Lower and upper bound, and whether they are of the problem's own data."""
    with isolated(seed), torch.no_grad():
        density = Density(problem)
        density.set_parameters(parameters)
        with density:
            run = Run(density, np.random.SeedSequence(seed))
            known = {name: reference.draws[name] for name in density.continuous if name in reference.draws}
            if len(known) == len(density.latents) and reference.draw_log_weights is None:
                return *method.both_sides(density, known, run.child(0)), True
            seed_all(run.child(1).seed)
            simulated, latents = twin(density)
        other = Density(simulated)
        other.set_parameters(parameters)
        with other:
            exact = {name: value[None] for name, value in latents.items()}
            return *method.both_sides(other, exact, Run(other, np.random.SeedSequence(seed)).child(2)), False


def _noted(posterior: Posterior, note: str) -> Posterior:
    return replace(posterior, diagnostics=replace(posterior.diagnostics, notes=(*posterior.diagnostics.notes, note)))

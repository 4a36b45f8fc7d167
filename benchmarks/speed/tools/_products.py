"""How many gradients are to be had of the products alone: as many as a tool of kind 'hmc' takes leapfrog steps."""

from __future__ import annotations

from types import ModuleType

from ..record import Plan


def steps_of(case: ModuleType, plan: Plan) -> int:
    """Leapfrog steps of each chain of a run, warm-up among them."""
    warmup = case.LONGEST if plan.warmup is None else plan.warmup
    return case.NUM_STEPS * (plan.draws + warmup)

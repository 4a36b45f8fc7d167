"""How much is to be had of the products alone: as much as a tool of that kind has to do."""

from __future__ import annotations

from types import ModuleType

from ..record import Plan


def amount(case: ModuleType, plan: Plan, count: int) -> tuple[int, int, bool]:
    """Rows of a matrix, how often they pass the decoder, and whether they come back, as for a gradient.

    Of HMC all chains of all `count` data, and the leapfrog steps of a run, warm-up among them; of weights all data, and
    the draws.
    """
    if case.KIND == "latents-importance":
        return count, case.NUM_DRAWS, False
    warmup = case.LONGEST if plan.warmup is None else plan.warmup
    return plan.chains * count, case.NUM_STEPS * (plan.draws + warmup), True

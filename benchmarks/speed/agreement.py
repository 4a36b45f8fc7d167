"""Do all tools sample the same distribution? A fast sampler of another one must not win."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .record import Estimate

LIMIT = 4.9  # standard errors: exceeded by chance about once in a million scalars


@dataclass(frozen=True)
class Disagreement:
    """The estimate that differs most from the others', and by how many standard errors."""

    name: str
    z: float


def disagreements(
    estimates: Mapping[str, Mapping[str, Estimate]], truth: Mapping[str, Estimate] | None = None
) -> dict[str, Disagreement]:
    """For each tool the largest |z| over what is estimated: against the truth where that is known, and else the

        median over the other tools j of |m_ik - m_jk| / sqrt(s_ik^2 + s_jk^2),   largest over estimates k

    over those who estimate it. A tool that is wrong differs from all others and is seen; one that is right differs
    from the few that are wrong, which the median ignores. Of two tools that differ, both are seen. A tool without
    another to compare is left out.
    """
    found = {}
    for tool, mine in estimates.items():
        others = [truth] if truth else [theirs for other, theirs in estimates.items() if other != tool]
        shared = [name for name in mine if any(name in other for other in others)]
        if shared:
            z = {n: statistics.median_low([_z(mine[n], o[n]) for o in others if n in o]) for n in shared}
            worst = max(z, key=lambda name: z[name])
            found[tool] = Disagreement(worst, z[worst])
    return found


def _z(a: Estimate, b: Estimate) -> float:
    """Infinite where a value or an error is not finite: that agrees with nothing."""
    error = math.hypot(a.error, b.error)
    if not (math.isfinite(a.value) and math.isfinite(b.value) and math.isfinite(error)):
        return math.inf
    if error == 0:
        return 0.0 if a.value == b.value else math.inf
    return abs(a.value - b.value) / error

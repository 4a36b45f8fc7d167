"""What changed between two folders of runs beyond its error: a release against the last, a machine against another.

    t = (mean' - mean) / sqrt(s'^2 / n' + s^2 / n)     over seeds, with Welch's degrees of freedom

of the logarithms where a figure is positive at all seeds (errors, calls, seconds), else of the figure itself. A figure
has changed where p < FALSE_ALARM / m, m the number of figures compared (Bonferroni): where nothing changed, a page says
so with a probability of 99 %. z is the normal quantile of p. A figure that is the same at every seed on both sides has
no spread: any difference beyond rounding is a change. One seed on a side tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .summary import Group, Interval, Summary

FALSE_ALARM = 0.01
ROUNDING = 1e-9  # relative


@dataclass(frozen=True)
class Change:
    """One figure of one group, before and after; `z` is signed, infinite where neither side has a spread."""

    problem: str
    learner: str
    engine: str
    budget: str
    figure: str
    before: Interval
    after: Interval
    z: float


@dataclass(frozen=True)
class Ended:
    """A group whose answers are no longer all there, or are all there now."""

    problem: str
    learner: str
    engine: str
    budget: str
    before: str
    after: str


@dataclass(frozen=True)
class Changes:
    """`compared` figures, of which `changed` are beyond their error; `untold` have one seed on a side."""

    changed: tuple[Change, ...]
    ended: tuple[Ended, ...]
    new: tuple[tuple[str, str, str, str], ...]
    gone: tuple[tuple[str, str, str, str], ...]
    compared: int
    untold: int
    other_machine: bool


def changes(before: Summary, after: Summary) -> Changes:
    """Between groups of the same name; the rest is new or gone."""
    old = {group.name: group for group in before.groups}
    now = {group.name: group for group in after.groups}
    tests, untold, ended = [], 0, []
    for name in [name for name in now if name in old]:
        first, second = old[name], now[name]
        if _answered(first)[:2] != _answered(second)[:2]:
            ended.append(Ended(*name, _words(first), _words(second)))
        values, values_now = first.values(), second.values()
        for figure in [figure for figure in values_now if figure in values]:
            tested = welch(values[figure], values_now[figure])
            if tested is None:
                untold += 1
            else:
                tests.append((name, figure, values[figure], values_now[figure], *tested))
    limit = FALSE_ALARM / max(len(tests), 1)
    found = [Change(*name, figure, _interval(a), _interval(b), z) for name, figure, a, b, z, p in tests if p < limit]
    found.sort(key=lambda change: (change.problem, change.learner, -abs(change.z)))
    machines = [{str(sorted(g.machine.items())) for g in side.groups} for side in (before, after)]
    return Changes(
        tuple(found),
        tuple(ended),
        tuple(name for name in now if name not in old),
        tuple(name for name in old if name not in now),
        len(tests),
        untold,
        machines[0] != machines[1],
    )


def welch(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """z, signed by the direction, and p; None where a side has one value or one that is not finite."""
    from scipy.stats import norm, t

    if min(len(before), len(after)) < 2 or not all(map(math.isfinite, (*before, *after))):
        return None
    if min(*before, *after) > 0:
        before, after = [math.log(v) for v in before], [math.log(v) for v in after]
    means, squares = zip(*(_mean_and_square(side) for side in (before, after)), strict=True)
    difference = means[1] - means[0]
    error = math.sqrt(sum(squares))
    if error <= ROUNDING * max(1.0, *map(abs, means)):
        if abs(difference) <= ROUNDING * max(1.0, *map(abs, means)):
            return 0.0, 1.0
        return math.copysign(math.inf, difference), 0.0
    freedom = sum(squares) ** 2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, (before, after), strict=True))
    log_p = float(t.logsf(abs(difference) / error, freedom))
    z = -float(norm.ppf(math.exp(log_p))) if log_p > -700 else math.inf
    return math.copysign(z, difference), 2 * math.exp(log_p)


def _mean_and_square(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the square of its standard error."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)


def _interval(values: Sequence[float]) -> Interval:
    found = Interval.of(values)
    if found is None:
        raise ValueError("a figure without values was compared.")
    return found


def _answered(group: Group) -> tuple[bool, bool, int]:
    return bool(group.done), group.complete, len(group.done)


def _words(group: Group) -> str:
    reasons = sorted({f"{e.state}: {e.reason}" if e.reason else e.state for e in group.entries if not e.done})
    return f"{len(group.done)} of {len(group.entries)} seeds answered" + (f" ({'; '.join(reasons)})" if reasons else "")

"""The verdict on one model in sentences: which engine to trust, at which cost; or why nobody can tell.

Every number in a sentence stands in the table below it. An engine is *accurate* at a budget where it answered at every
seed and the interval of each judged error ends below `ENOUGH`; of these the cheapest is named. There is no overall
score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..report import count, seconds, state
from .summary import Block, Group, Interval

JUDGED = ("error of means", "error of sds", "total variation")  # where they are known
ENOUGH = 0.1  # a tenth of an error bar; of total variation, a tenth of all probability
ROUNDING = 1e-9  # below it a number is that of the machine
WRONG = 1.0  # a latent this far out, in true sds, is named

UNITS = {"error of means": " sd", "error of sds": " sd"}
PHRASES = {"error of means": "means off by", "error of sds": "sds off by", "total variation": "total variation"}


def verdict(block: Block) -> list[str]:
    """The sentences, the one that matters most first."""
    if not any(group.done for group in block.groups):
        states = sorted({state(entry.state) for group in block.groups for entry in group.entries})
        return [f"No engine gave an answer ({', '.join(states)}): the reasons are below."]
    judged = [metric for metric in JUDGED if metric in block.metrics]
    if not judged:
        why = block.theta.provenance or "no truth is known for this model"
        known = "the truth is not known here" if block.theta.reference == "none" else "the truth gives no moments"
        return [f"No verdict: {known} ({why}), so no engine can be called right. {_agreement(block)}".strip()]
    ranked = [group for group in block.groups if all(group.error(m) is not None for m in judged)]
    if not ranked:
        return ["No verdict: no engine has draws that could be compared with the truth."]
    coarse = max(group.reference_error(m) for group in ranked for m in judged)
    if coarse > ENOUGH / 2:
        return [
            f"The reference is not good enough: its own error is {coarse:.2g} sd ({block.theta.reference}: "
            f"{block.theta.provenance}), and an engine would have to be within {ENOUGH:g} to be called accurate."
        ]
    accurate = [group for group in ranked if is_accurate(group, judged)]
    sentences = _trust(block, accurate, judged) if accurate else _none(ranked, judged)
    return sentences + _tied(accurate, judged) + _false_good(ranked, judged) + _absent(block)


def is_accurate(group: Group, judged: Sequence[str]) -> bool:
    errors = [error for metric in judged if (error := group.error(metric)) is not None]
    return group.complete and bool(errors) and all(error.upper <= ENOUGH for error in errors)


def _trust(block: Block, accurate: list[Group], judged: list[str]) -> list[str]:
    first = _cheapest(accurate, Group.calls)
    able, engines = len({group.engine for group in accurate}), len(block.engines)
    rank = (
        f"It is the cheapest in calls of the {able} engines (of {engines}) that are accurate to {ENOUGH:g}"
        if able > 1
        else f"No other of the {engines} engines is accurate to {ENOUGH:g}"
    )
    sentences = [f"Trust {first.engine} at {_cost(first)}: {_errors(first, judged)} ({_seeds(first)})."]
    sentences += [f"{rank}."] if engines > 1 else []
    if first.level() in ("caution", "bad"):
        sentences.append(f"Its own diagnosis there is '{first.level()}': without the truth one would not have known.")
    quick = _cheapest(accurate, Group.seconds)
    clocks = quick.seconds(), first.seconds()
    if quick.engine != first.engine and clocks[0] and clocks[1] and clocks[0].upper < clocks[1].lower:
        sentences.append(f"On the clock {quick.engine} is the quickest of them: {_cost(quick)}.")
    for metric in judged:
        largest = first.largest(metric)
        if largest is not None and not largest[0] <= WRONG and metric != "total variation":
            sentences.append(
                f"But not all of it: at {largest[1] or 'one latent'} the {metric} is {largest[0]:.2g} sd at one seed."
            )
    return sentences


def _none(ranked: list[Group], judged: list[str]) -> list[str]:
    def furthest(group: Group) -> float:
        errors = [error.upper for metric in judged if (error := group.error(metric)) is not None]
        return math.inf if any(map(math.isnan, errors)) else max(errors)

    closest = min(ranked, key=lambda group: (not group.complete, furthest(group)))
    answered = len(closest.done)
    at = "" if closest.complete else f", at the {answered} of {len(closest.entries)} seeds that gave an answer"
    return [
        f"Trust none yet: no engine is accurate to {ENOUGH:g} at a budget that was tried. The closest is "
        f"{closest.engine} at {_cost(closest)}: {_errors(closest, judged)} ({_seeds(closest)}{at})."
    ]


def _tied(accurate: list[Group], judged: list[str]) -> list[str]:
    tied = sorted({g.engine for g in accurate if any(g.at_reference_precision(m) for m in judged)})
    if len(tied) < 2:
        return []
    return [f"The reference is not good enough to rank {_and(tied)}: they are as close to it as its own error."]


def _false_good(ranked: list[Group], judged: list[str]) -> list[str]:
    """An error beside a diagnosis of 'good': the case that people cannot see for themselves."""
    found: dict[str, tuple[Group, str, float]] = {}
    for group in ranked:
        if group.level() != "good":
            continue
        for metric in judged:
            error = group.error(metric)
            if error is not None and error.lower > ENOUGH:
                seen = found.get(group.engine)
                if seen is None or error.mean > seen[2]:
                    found[group.engine] = (group, metric, error.mean)
    if not found:
        return []
    listed = [f"{name} ({g.budget}: {metric} {mean:.2g})" for name, (g, metric, mean) in sorted(found.items())]
    return [f"No alarm, yet beyond {ENOUGH:g}: {_and(listed)}."]


def _absent(block: Block) -> list[str]:
    """Engines that never answered, by how they ended."""
    silent = [name for name in block.engines if not any(group.done for group in block.ladder(name))]
    ends = {name: {entry.state for group in block.ladder(name) for entry in group.entries} for name in silent}
    refused = [name for name in silent if ends[name] == {"unsupported"}]
    failed = [name for name in silent if name not in refused]
    words = [f"Cannot run here: {_and(refused)}; the reasons are below."] if refused else []
    return words + ([f"Never came to an answer: {_and(failed)}; the reasons are below."] if failed else [])


def _agreement(block: Block) -> str:
    """Without a truth: the evidence of those that estimate it, at the largest budget of each."""
    found = {}
    for group in block.groups:
        evidence = group.evidence()
        if evidence is not None and group.evidence_kind() in ("exact", "estimate"):
            found[group.engine] = evidence
    if len(found) < 2:
        return ""
    low = min(found, key=lambda name: found[name].mean)
    high = max(found, key=lambda name: found[name].mean)
    spread = found[high].mean - found[low].mean
    return f"Estimates of log p(x) differ by {spread:.2g} nats per datum, from {low} to {high}."


def _cheapest(groups: list[Group], cost: Callable[[Group], Interval | None]) -> Group:
    def of(group: Group) -> float:
        interval = cost(group)
        return math.inf if interval is None else interval.mean

    return min(groups, key=lambda group: (of(group), group.engine))


def _cost(group: Group) -> str:
    calls, clock = group.calls(), group.seconds()
    words = f"{count(calls.mean)} calls" if calls else "unknown cost"
    return words + (f" ({time(clock.mean)})" if clock else "")


def time(value: float) -> str:
    """'0.31 s', '2.5 ms'."""
    return f"{seconds(value)} s" if value >= 0.1 else f"{1e3 * value:.2g} ms"


def _errors(group: Group, judged: Sequence[str]) -> str:
    words = []
    for metric in judged:
        error = group.error(metric)
        if error is not None:
            words.append(f"{PHRASES[metric]} {with_interval(error)}{UNITS.get(metric, '')}")
    return ", ".join(words)


def short(value: float) -> str:
    """Two digits; what is rounding is said to be no more than that."""
    return f"{value:.2g}" if not abs(value) < ROUNDING else "0" if value == 0 else f"< {ROUNDING:g}"


def ends(interval: Interval) -> str:
    """'[0.01, 0.02]'; '' where there is no interval, or none that could be seen."""
    if interval.low is None or interval.high is None or not interval.high - interval.low > ROUNDING:
        return ""
    return f"[{interval.low:.2g}, {interval.high:.2g}]"


def with_interval(interval: Interval) -> str:
    return f"{short(interval.mean)} {ends(interval)}".rstrip()


def _seeds(group: Group) -> str:
    n = len(group.entries)
    return f"{n} seeds" if n > 1 else "one seed, so without an interval"


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)

"""One tool on one case, alone in its process: `python -m pyrometer.benchmarks.speed.worker RESULT < JOB`, both JSON.

The clock runs around the tool's calls only; figures about the answers are made afterwards.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import cases, tools
from .record import (
    Answer,
    Draws,
    Estimate,
    Kept,
    LogWeights,
    Measurement,
    Particles,
    Plan,
    Products,
    Steps,
    Timing,
    Weights,
    together,
)

EACH_DATUM = ("per-datum", "hmc")  # kinds of which every datum has chains of its own
SEED_STRIDE = 1000  # some seed chain c with seed + c: seeds far apart share none


def main() -> None:
    job = json.loads(sys.stdin.read())
    plan = Plan(**job.pop("plan"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: plan.cores])
    Path(sys.argv[1]).write_text(json.dumps(asdict(measure(plan=plan, **job))))


def measure(case: str, tool: str, round: int, empty: bool, plan: Plan) -> Measurement:
    """The measurement of one process; whatever breaks in the tool becomes its reason."""
    chosen_case = cases.load(case)
    plan = _fitted(plan, chosen_case)
    chosen = tools.find(tool, chosen_case.KIND)
    blank = Measurement(case, tool, chosen.precision, round, empty, load=os.getloadavg()[0], versions=chosen.versions())
    try:
        return _measured(chosen_case, chosen, plan, blank)
    except Exception as error:
        return replace(blank, state="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _fitted(plan: Plan, case: Any) -> Plan:
    """The plan within the case's own limits."""
    plan = replace(plan, repeats=max(plan.repeats, getattr(case, "REPEATS", 0)))
    longest = getattr(case, "LONGEST", None)
    if longest is None:
        return plan
    warmup = longest if plan.warmup is None else min(plan.warmup, longest)
    return replace(plan, draws=min(plan.draws, longest), warmup=warmup)


def _measured(case: Any, tool: tools.Tool, plan: Plan, blank: Measurement) -> Measurement:
    clock = time.perf_counter
    start = clock()
    for module in tool.requires.values():
        importlib.import_module(module)
    import_seconds = clock() - start

    seeds = iter(range(plan.seed + SEED_STRIDE * plan.repeats * 3 * blank.round, sys.maxsize, SEED_STRIDE))
    begin = clock()

    def repeated(run: Callable[[int], Answer]) -> list[tuple[float, Answer]]:
        """Wall seconds and answer of each run: at least one, and none begun once patience has ended."""
        done: list[tuple[float, Answer]] = []
        while not done or (len(done) < plan.repeats and clock() - begin < plan.patience):
            start = clock()
            answer = run(next(seeds))
            done.append((clock() - start, answer))
        return done

    prepared = tool.prepare(case, plan)
    answer = prepared.called(next(seeds))
    first = clock() - begin
    if not tool.compiles and first > plan.patience:
        called = warm = [(first, answer)]
    else:
        called = repeated(prepared.called)
        warm = called
        if prepared.warm is not prepared.called:
            prepared.warm(next(seeds))  # compiles
            warm = repeated(prepared.warm)

    answers = [answer for _, answer in warm]
    found = [judged(case, answer) for answer in answers]
    least = min(found, key=lambda f: f.work)
    return replace(
        blank,
        import_seconds=import_seconds,
        first=first,
        called=tuple(seconds for seconds, _ in called),
        warm=tuple(
            Timing(answer.seconds or seconds, judgement.work, getattr(answer, "gradients", None))
            for (seconds, answer), judgement in zip(warm, found, strict=True)
        ),
        warmup=getattr(answers[0], "warmup", None),
        r_hat=max((f.r_hat for f in found if f.r_hat is not None), default=None),
        least_scalar=least.least_scalar,
        ess=least.ess,
        note="; ".join(filter(None, (answers[-1].note, found[-1].note))),
        estimates=together([f.estimates for f in found]),
    )


@dataclass(frozen=True)
class Judgement:
    """The work in one answer, the scalar that sets it, R-hat, and the estimates that all tools must agree on."""

    work: float
    estimates: Mapping[str, Estimate]
    least_scalar: str = ""
    r_hat: float | None = None
    ess: tuple[float | None, float] | None = None
    note: str = ""


def judged(case: Any, answer: Answer) -> Judgement:
    """Raises ValueError where the answer is no answer: draws that are not finite, a chain that never moves."""
    if isinstance(answer, Products):
        return Judgement(answer.count, {})
    if isinstance(answer, Steps):
        return Judgement(answer.count, {"loss": Estimate(answer.loss, 0.0)})
    if isinstance(answer, Weights):
        return Judgement(answer.count, {"log evidence": Estimate(answer.log_evidence, answer.std_error)})
    if isinstance(answer, LogWeights):
        return _judged_weights(answer)
    if isinstance(answer, Particles):
        return _judged_particles(case, answer)
    if isinstance(answer, Kept):
        return _judged_kept(case, answer)
    return _judged_draws(case, answer)


def _judged_weights(answer: LogWeights) -> Judgement:
    """Means over all data of log w and its square: unlike the mean of w itself, both have errors that are known."""
    values = np.asarray(answer.values, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError("the log weights are not all finite.")
    estimates = {
        name: Estimate(float(v.mean()), math.sqrt(v.var(0, ddof=1).mean() / v.size))
        for name, v in (("log weight", values), ("log weight^2", values**2))
    }
    return Judgement(values.size, estimates)


def _judged_particles(case: Any, answer: Particles) -> Judgement:
    """The log evidence and how far it is off, in nats; their errors are told from the spread of several runs."""
    if not math.isfinite(answer.log_evidence):
        raise ValueError(f"the log evidence is {answer.log_evidence}.")
    off = abs(answer.log_evidence - case.truth()["log evidence"].value)
    estimates = {"log evidence": Estimate(answer.log_evidence, 0.0), "evidence off": Estimate(off, 0.0)}
    return Judgement(answer.count, estimates)


def _judged_kept(case: Any, answer: Kept) -> Judgement:
    """How far the mean is off, root mean square over coordinates in posterior sds, and the mean ratio of the sds."""
    draws = np.asarray(answer.draws, dtype=float)
    if not np.isfinite(draws).all():
        raise ValueError("the draws are not all finite.")
    weights = np.full(len(draws), 1 / len(draws)) if answer.weights is None else np.asarray(answer.weights)
    true_mean, true_sd = case.posterior(case.data())
    mean = weights @ draws
    off = np.sqrt(np.mean(((mean - true_mean) / true_sd) ** 2))
    ratio = np.mean(np.sqrt(weights @ (draws - mean) ** 2) / true_sd)
    return Judgement(answer.count, {"mean off": Estimate(float(off), 0.0), "sd ratio": Estimate(float(ratio), 0.0)})


def _judged_draws(case: Any, answer: Draws) -> Judgement:
    """Smallest bulk ESS and largest R-hat over the identified scalars; means of them and of their squares. Where each
    datum has chains of its own, a chain in thousands may stand still."""
    import torch

    from pyrometer.inference import statistics

    names, columns = [], []
    for name, values in case.identified({n: np.asarray(v, dtype=float) for n, v in answer.values.items()}).items():
        flat = values.reshape(*values.shape[:2], -1)
        names += [name] if values.ndim == 2 else [f"{name}[{k}]" for k in range(flat.shape[2])]
        columns.append(flat)
    draws = torch.from_numpy(np.concatenate(columns, -1))  # (C, S, K)
    ess = statistics.ess(draws)
    moved = ess.isfinite()
    if not bool(moved.any() if case.KIND in EACH_DATUM else moved.all()):
        broken = names[int(moved.int().argmin())]
        raise ValueError(f"{broken} has no effective draws: they are not finite, or a chain never moves.")
    names, draws, ess = [n for n, m in zip(names, moved, strict=True) if m], draws[..., moved], ess[moved]
    estimates: dict[str, Estimate] = {}
    for suffix, values in (("", draws), ("^2", draws.square())):
        means, errors = values.mean((0, 1)).tolist(), statistics.mcse(values).tolist()
        estimates |= {n + suffix: Estimate(m, e) for n, m, e in zip(names, means, errors, strict=True)}
    r_hat = statistics.rhat(draws).max().item()
    judged = Judgement(float(ess.min()), estimates, names[int(ess.argmin())], r_hat if math.isfinite(r_hat) else None)
    return _by_datum(case, judged, answer) if case.KIND in EACH_DATUM else judged


def _by_datum(case: Any, judged: Judgement, answer: Draws) -> Judgement:
    """Of every datum the smallest ESS of its scalars; a chain that stands still is told, and leaves the worst datum
    without a figure. The work of HMC is gradients of a datum, that of NUTS the median datum's ESS times all data,
    which of some of the data can be told as well."""
    import torch

    from pyrometer.inference import statistics

    (values,) = answer.values.values()
    draws = torch.from_numpy(np.asarray(values, dtype=float))  # (C, S, N, D)
    if not bool(draws.isfinite().all()):
        raise ValueError("the draws are not all finite.")
    ess = statistics.ess(draws.flatten(2)).reshape(draws.shape[2:]).amin(1)
    stuck = int((~ess.isfinite()).sum())
    median = float(np.nanmedian(ess.numpy()))  # torch's is the smaller of two
    work = median * case.DATA if case.KIND == "per-datum" else (answer.gradients or 0) * len(ess)
    if not work:
        raise ValueError("the number of gradients is not known.")
    return replace(
        judged,
        work=work,
        ess=(None if stuck else float(ess.min()), median),
        note=f"{stuck} of {len(ess)} data have a chain that never moves" if stuck else "",
    )


if __name__ == "__main__":
    main()

"""What passes between the parts of the benchmark: the plan, a tool's answers, one process's measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plan:
    """What is run.

    chains, draws  of every sampler; `warmup` draws before them, None: each sampler's own default
    rounds         processes for each case and tool; in the first, third .. caches on disk are empty, in the others
                   they are those that the process before has left
    repeats        timed answers in each process after its first; fewer once a process has run for `patience` seconds
    limit          seconds after which a process is ended
    cores          that a process may run on
    """

    chains: int = 4
    draws: int = 1000
    warmup: int | None = None
    rounds: int = 4
    repeats: int = 3
    patience: float = 60.0
    limit: float = 600.0
    cores: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Draws:
    """Draws by latent, (C, S, *event) and constrained; gradients of all data, with those of the warm-up, where known.

    `seconds` is the sampler's own figure where it can leave out what the clock around the call cannot; `note` says how
    it ran, where that is not always the same. So below.
    """

    values: Mapping[str, np.ndarray]
    warmup: int
    gradients: int | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Steps:
    """`count` steps of a fit, and the mean loss of the last hundred, in nats per datum."""

    count: int
    loss: float
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """`count` weighted draws, and the log evidence they give, in nats, with its standard error."""

    count: int
    log_evidence: float
    std_error: float
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LogWeights:
    """log p(x, z) - log q(z) of draws of each datum's own q, (S, N)."""

    values: np.ndarray
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Particles:
    """`count` particles carried from prior to posterior, and the log evidence they give, in nats."""

    count: int
    log_evidence: float
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Kept:
    """`count` simulations, and the draws of one posterior that were kept of them, (S, D), with weights that sum to one;
    None: equal ones."""

    count: int
    draws: np.ndarray
    weights: np.ndarray | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Products:
    """The matrix products of `count` gradients or weights of a datum, and nothing else."""

    count: int
    seconds: float | None = None
    note: str = ""


Answer = Draws | Steps | Weights | LogWeights | Particles | Kept | Products


@dataclass(frozen=True)
class Estimate:
    """A number with its Monte Carlo standard error."""

    value: float
    error: float


def together(parts: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """The mean of independent runs' estimates. Where none of them knows its error, it is told from their spread."""
    return {name: _mean([part[name] for part in parts]) for name in parts[0]}


def _mean(parts: Sequence[Estimate]) -> Estimate:
    values = np.array([part.value for part in parts])
    error = math.sqrt(sum(part.error**2 for part in parts)) / len(parts)
    if error == 0 and len(parts) > 1:
        error = float(values.std(ddof=1)) / math.sqrt(len(parts))
    return Estimate(sum(values.tolist()) / len(parts), error)


@dataclass(frozen=True)
class Timing:
    """One timed answer: its seconds, and the work in them: effective draws, steps, weighted draws, particles,
    simulations or gradients of a datum."""

    seconds: float
    work: float
    gradients: int | None = None

    @property
    def rate(self) -> float:
        return self.work / self.seconds


@dataclass(frozen=True)
class Measurement:
    """What one process of one tool on one case gave.

    import_seconds  until the libraries were there
    first           the first answer in the process: model built, compiled, sampled
    called, warm    seconds of later answers, as `tools.Prepared` tells them apart
    empty           whether the caches on disk were
    estimates       of what all tools must agree on, from the warm answers
    least_scalar    which has the fewest effective draws
    ess             effective draws of the worst datum (None: a chain stands still) and of the median one, per datum
    load            of the machine when it began, as `uptime` tells it: others' work falls on all alike, or shows here
    state, reason   'done', or why there is no answer: 'not installed', 'failed', 'timed out'
    """

    case: str
    tool: str
    precision: str
    round: int = 0
    empty: bool = True
    import_seconds: float = 0.0
    first: float = 0.0
    called: tuple[float, ...] = ()
    warm: tuple[Timing, ...] = ()
    warmup: int | None = None
    r_hat: float | None = None
    least_scalar: str = ""
    ess: tuple[float | None, float] | None = None
    note: str = ""
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    load: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    state: str = "done"
    reason: str = ""

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> Measurement:
        return cls(
            **{
                **read,
                "called": tuple(read["called"]),
                "ess": tuple(read["ess"]) if read["ess"] else None,
                "warm": tuple(Timing(**timing) for timing in read["warm"]),
                "estimates": {name: Estimate(**estimate) for name, estimate in read["estimates"].items()},
            }
        )


@dataclass(frozen=True)
class Begun:
    """What is measured next, and how far the whole is."""

    case: str
    tool: str
    round: int
    step: int
    total: int

    def __str__(self) -> str:
        return f"{self.step}/{self.total}  {self.case}, round {self.round + 1}: {self.tool}"

"""The answer of every engine: weighted draws, evidence, diagnostics, cost and status."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import Diagnostics
from .resampling import reached

if TYPE_CHECKING:
    from .problem import Problem


@dataclass(frozen=True)
class Status:
    """How a run ended: 'done', 'failed', 'unsupported' or 'timed out', with the reason in words."""

    state: str
    reason: str = ""

    STATES = ("done", "failed", "unsupported", "timed out")

    def __post_init__(self) -> None:
        if self.state not in self.STATES:
            raise ValueError(f"status {self.state!r}: expected one of {', '.join(self.STATES)}.")

    @property
    def done(self) -> bool:
        return self.state == "done"

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


@dataclass(frozen=True)
class Evidence:
    """log p_theta(x) in nats, per batch element: `value` and `std_error` of shape (*batch).

    `kind`: 'exact', 'estimate', 'lower bound' or 'upper bound' (bounds hold in expectation).
    `refined` is a sharper figure from the same draws, where there is one (beside the ELBO, the
    importance-weighted estimate).
    """

    value: Tensor
    std_error: Tensor
    kind: str
    refined: Evidence | None = None

    KINDS = ("exact", "estimate", "lower bound", "upper bound")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"evidence kind {self.kind!r}: expected one of {', '.join(self.KINDS)}.")
        object.__setattr__(self, "value", torch.as_tensor(self.value, dtype=torch.float64, device="cpu"))
        error = torch.as_tensor(self.std_error, dtype=torch.float64, device="cpu")
        object.__setattr__(self, "std_error", error.expand(self.value.shape))

    def total(self) -> tuple[float, float]:
        """The evidence of all data together and its standard error (batch elements are independent)."""
        return float(self.value.sum()), float(self.std_error.square().sum().sqrt())

    def per_datum(self) -> tuple[float, float]:
        """The mean over the batch and its standard error."""
        value, error = self.total()
        n = max(self.value.numel(), 1)
        return value / n, error / n


@dataclass(frozen=True)
class Cost:
    """What an answer cost.

    One evaluation is the log joint of *all* data once, so that methods which move one datum at a time and
    methods which move all together are counted alike; a minibatch of B of N data counts B/N.
    `tuning_*` (warm-up, fitting a guide) are included in the totals and listed apart. Times in seconds,
    memory in bytes (peak growth of the process; None where the platform does not tell).
    """

    evaluations: float = 0.0
    gradients: float = 0.0
    tuning_evaluations: float = 0.0
    tuning_gradients: float = 0.0
    seconds: float = 0.0
    tuning_seconds: float = 0.0
    compile_seconds: float = 0.0
    peak_memory: int | None = None
    backend: str = "eager"

    @property
    def calls(self) -> float:
        """Evaluations and gradients together, tuning included: what a budget is given in."""
        return self.evaluations + self.gradients

    def __add__(self, other: Cost) -> Cost:
        peaks = [p for p in (self.peak_memory, other.peak_memory) if p is not None]
        summed = {
            name: getattr(self, name) + getattr(other, name)
            for name in (
                "evaluations",
                "gradients",
                "tuning_evaluations",
                "tuning_gradients",
                "seconds",
                "tuning_seconds",
                "compile_seconds",
            )
        }
        return Cost(**summed, peak_memory=max(peaks) if peaks else None, backend=self.backend)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Weighted draws from p_theta(z | x), with all that is needed to judge them.

    draws         site -> (C, S, *batch, *event), in constrained space, on the CPU
    log_weights   (C, S, *batch), unnormalised, or None: equal weights
    log_evidence  per batch element, or None: the engine has none
    parameters    theta at which this is the posterior
    kind          'mcmc', 'iid', 'weighted' or 'point': what the draws are
    sample_stats  figures per draw, (C, S) or (C, S, *batch), under arviz's names
    state         tensors that continue the run (`infer(..., warm=posterior)`)
    """

    draws: Mapping[str, Tensor]
    log_weights: Tensor | None = None
    log_evidence: Evidence | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    cost: Cost = field(default_factory=Cost)
    status: Status = field(default_factory=lambda: Status("done"))
    state: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = "mcmc"
    sample_stats: Mapping[str, Tensor] = field(default_factory=dict)
    batch_shape: tuple[int, ...] = ()
    engine: str = ""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    problem: Problem | None = field(default=None, repr=False)

    KINDS = ("mcmc", "iid", "weighted", "point")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"posterior kind {self.kind!r}: expected one of {', '.join(self.KINDS)}.")

    @property
    def num_chains(self) -> int:
        return next(iter(self.draws.values())).shape[0] if self.draws else 0

    @property
    def num_samples(self) -> int:
        return next(iter(self.draws.values())).shape[1] if self.draws else 0

    @property
    def is_rule(self) -> bool:
        """Whether the draws are the weighted points of a rule (every state, a quadrature), without sampling error.

        Exact draws that have weights, since some data have fewer of them, are none.
        """
        return self.kind == "weighted" and not {"ess", "num_draws"} & set(self.diagnostics.figures)

    def weights(self) -> Tensor:
        """Normalised weights (C, S, *batch): they sum to one over chains and draws, per batch element."""
        self._require_draws()
        if self.log_weights is None:
            n = self.num_chains * self.num_samples
            shape = (self.num_chains, self.num_samples, *self.batch_shape)
            return torch.full(shape, 1.0 / n, dtype=torch.float64)
        log_w = self.log_weights.double()
        flat = log_w.reshape(-1, *log_w.shape[2:])
        return torch.softmax(flat, 0).reshape(log_w.shape)

    def expectation(self, function: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """E[f(z)] under the weights; `function` maps draws to a tensor (C, S, *batch, ...)."""
        self._require_draws()
        value = function(dict(self.draws)).double()
        w = self.weights()
        w = w.reshape(w.shape + (1,) * (value.dim() - w.dim()))
        return (w * value).sum((0, 1))

    def mean(self, site: str) -> Tensor:
        """Posterior mean of a site, (*batch, *event)."""
        return self.expectation(lambda draws: draws[self._site(site)])

    def sd(self, site: str) -> Tensor:
        """Posterior standard deviation of a site, (*batch, *event)."""
        centre = self.mean(site)
        return self.expectation(lambda draws: (draws[site] - centre).square()).sqrt()

    def quantile(self, site: str, q: float) -> Tensor:
        """Weighted quantile of a site, (*batch, *event): the smallest draw whose cumulative weight reaches q."""
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q = {q}: a quantile lies between 0 and 1.")
        values = self.draws[self._site(site)].double()
        w = self.weights()
        w = w.reshape(w.shape + (1,) * (values.dim() - w.dim())).expand(values.shape).flatten(0, 1)
        ordered, index = values.flatten(0, 1).sort(0)
        w = w.gather(0, index)
        cumulative = w.cumsum(0)
        reached = (cumulative >= q - 1e-12) & (w > 0)  # rounding keeps the last sum from being one
        first = reached.to(torch.int8).argmax(0, keepdim=True)
        found = ordered.gather(0, first).squeeze(0)
        return found.masked_fill(ordered[-1].isnan() | cumulative[-1].isnan(), math.nan)  # sort puts nan last

    def resample(self, num_samples: int | None = None, seed: int = 0) -> Posterior:
        """Equally weighted draws: systematic resampling per batch element, then shuffled (one chain).

        Shuffling matters: in systematic order copies stand side by side and look like autocorrelation.
        """
        if self.log_weights is None:
            return self
        generator = torch.Generator().manual_seed(seed)
        w = self.weights().flatten(0, 1)
        if w.isnan().any():
            count = int(w.isnan().any(0).sum())
            raise ValueError(
                f"cannot resample: at {count} of {w[0].numel()} data the weights are all zero or not finite."
            )
        total = w.shape[0] if num_samples is None else num_samples
        batch = w.shape[1:]
        columns = w.reshape(w.shape[0], -1)
        start = torch.rand((1, columns.shape[1]), generator=generator, dtype=torch.float64)
        index = reached(columns, (torch.arange(total)[:, None] + start) / total)
        order = torch.rand(index.shape, generator=generator, dtype=torch.float64).argsort(0)
        index = index.gather(0, order).reshape(total, *batch)
        draws = {name: gathered(value.flatten(0, 1), index)[None] for name, value in self.draws.items()}
        stats = {
            name: gathered(value.flatten(0, 1), index)[None]
            for name, value in self.sample_stats.items()
            if value.dim() >= 2 + len(batch)
        }
        return replace(self, draws=draws, log_weights=None, sample_stats=stats)

    def to_arviz(self, problem: Problem | None = None) -> Any:
        """This posterior for arviz (`InferenceData` on 0.x, `DataTree` on 1.x); weighted draws are resampled first.

        With the problem at hand (kept from `infer`, or given) the groups log_likelihood, log_prior and
        observed_data are added, per datum, so that `az.loo` works.
        """
        self._require_draws()
        from .interop import to_arviz

        return to_arviz(self, problem or self.problem)

    def save(self, path: str | Path) -> Path:
        """Write to one netCDF file, atomically; returns the path."""
        from .storage import save

        return save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Posterior:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is not a whole posterior."""
        from .storage import load

        return load(Path(path))

    def _require_draws(self) -> None:
        if not self.draws:
            raise ValueError(f"this posterior has no draws; status: {self.status}.")

    def _site(self, site: str) -> str:
        self._require_draws()
        if site not in self.draws:
            raise KeyError(f"no site {site!r} among the draws; there are: {', '.join(self.draws)}.")
        return site


def gathered(values: Tensor, index: Tensor) -> Tensor:
    """Draws by their numbers, datum by datum: values (S, *batch, *event), index (T, *batch) -> (T, *batch, *event)."""
    expanded = index.reshape(index.shape + (1,) * (values.dim() - index.dim()))
    return values.gather(0, expanded.expand(index.shape[0], *values.shape[1:]))


def evidence_from_weights(log_weights: Tensor, kind: str = "estimate") -> Evidence:
    """log mean(w) over the first dimension, with the delta-method standard error sd(w) / (mean(w) sqrt(S))."""
    count = log_weights.shape[0]
    log_w = log_weights.double()
    value = torch.logsumexp(log_w, 0) - math.log(count)
    relative = torch.exp(log_w - value)
    error = relative.std(0, correction=1) / math.sqrt(count) if count > 1 else torch.full_like(value, math.inf)
    return Evidence(value, error, kind)

"""Annealed importance sampling, per datum: chains that drift from the prior or the guide to the posterior.

    log w = sum_k log f_k(u_{k-1}) - log f_{k-1}(u_{k-1}),   u_0 ~ f_0,   u_k ~ T_k(. | u_{k-1}),   T_k keeps f_k

so that E[w] = p_theta(x): unbiased on the natural scale, and log mean w a stochastic lower bound of the log evidence
(Neal 2001, doi:10.1023/A:1008923215028). From an exact draw of the posterior the same chain run backwards has
E[w'] = 1 / p_theta(x), and -log mean w' is a stochastic upper bound: together a bracket (Grosse, Ghahramani & Adams
2015, arXiv:1511.02543). Such draws there are of data that were simulated from the model itself.

Temperatures, step sizes and masses come from particles that are carried along the path first, with random numbers of
their own, and then stand still: what is weighted has learned nothing from its own chains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain, check_problem, isolated, seed_all
from ..groups import Bound, as_kernel
from ..kernels import streams
from ..kernels.metropolis import Point
from ..kernels.paths import PATHS, STARTS, begin, choose, why_not_start
from ..posterior import Evidence, evidence_from_weights
from ..problem import Problem, ProblemError
from ..registry import as_engine
from ..settings import check_choice, settings
from ..tempering import PathPlan, Tuning, added, carry, seed_of
from ..twin import twin

SCHEDULES = ("adaptive", "sigmoid", "linear")
STEEPNESS = 4.0  # of the sigmoid
PILOT, PILOT_LEAST, PILOT_MOST = 64, 16, 256  # particles of the tuning run, where there are too few or too many chains
PILOT_STAGES = 25  # of a schedule that is given
PILOT_ESS = 0.8
SETTLING = 10  # moves of reverse chains at the posterior, to part from the one draw that they begin at


@settings
class AnnealedImportance:
    """Anneal chains of each datum from a density that can be drawn from to the posterior, and weight them.

    num_samples        chains of each datum
    num_temperatures   steps from b = 0 to b = 1
    schedule           'adaptive', spaced evenly in the conditional effective sample size of a tuning run, for each
                       datum; 'sigmoid' (Grosse et al. 2015) or 'linear' in b
    start              'prior', 'guide', or 'auto': a guide that stands ready, else the prior
    path               'geometric' or 'arithmetic'
    kernel             'hmc', 'langevin', 'random_walk', 'nuts', or a kernel with its settings
    num_moves          transitions at each temperature
    """

    name: ClassVar[str] = "annealed_importance"
    num_samples: int = 64
    num_temperatures: int = 200
    schedule: str = "adaptive"
    start: str = "auto"
    path: str = "geometric"
    kernel: Any = "hmc"
    num_moves: int = 1

    def __post_init__(self) -> None:
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "start", STARTS)
        check_choice(self, "path", PATHS)
        as_kernel(self, self.kernel)

    def supports(self, density: Density) -> str:
        return why_not_start(density, self.start)

    def sized(self, calls: float, density: Density) -> Self:
        """Chains S and temperatures K in the own proportion, from 3 m S (K + 20) calls: m moves of three leapfrogs, and
        a tuning run that takes as many as twenty temperatures."""
        ratio = self.num_temperatures / self.num_samples
        each = calls / (3 * self.num_moves)
        chains = max(PILOT_LEAST, int((math.sqrt(400 + 4 * ratio * each) - 20) / (2 * ratio)))
        return replace(self, num_samples=chains, num_temperatures=max(5, int(each / chains - 20)))

    def run(self, density: Density, run: Run) -> Draws:
        bound, u, tuning = self.prepared(density, run)
        u, log_weights, acceptance = self.chains(bound, tuning, u, seed_of(run, 1), run)
        batch = tuple(density.batch_shape)
        raw = log_weights.double().reshape(-1, *batch).cpu()
        return Draws(
            as_chain(density.complete(u.reshape(-1, *batch, density.dim))),
            "weighted",
            raw[None],
            evidence_from_weights(raw),
            log_ratio=raw,
            figures={"acceptance": acceptance},
        )

    def both_sides(self, density: Density, exact: Mapping[str, Tensor], run: Run) -> tuple[Evidence, Evidence]:
        """The log evidence from below and, by chains that run backwards from `exact` draws of the posterior, site ->
        (n, *batch, *event), from above; each backward chain begins at one of them, in turn. Raises `EngineError` where
        a weight is undefined."""
        bound, u, tuning = self.prepared(density, run)
        forward = self.chains(bound, tuning, u, seed_of(run, 1), run)[1]
        ends = density.unconstrain(exact)  # (n, *batch, D)
        u = ends[torch.arange(self.num_samples) % len(ends)].reshape(-1, density.dim)
        backward = self.chains(bound, tuning, u, seed_of(run, 5), run, reverse=True)[1]
        batch = tuple(density.batch_shape)
        lower, inverse = (
            evidence_from_weights(w.reshape(-1, *batch).cpu(), "lower bound") for w in (forward, backward)
        )
        if not bool((lower.value.isfinite() & inverse.value.isfinite()).all()):
            raise EngineError("a chain of the bracket has no finite weight")
        return lower, Evidence(-inverse.value, inverse.std_error, "upper bound")

    def prepared(self, density: Density, run: Run) -> tuple[Bound, Tensor, Tuning]:
        """The kernel bound to all lanes, where the chains start (total, D), and the frozen tuning."""
        parts, draw = begin(density, choose(density, self.start))
        kernel, path, few = as_kernel(self, self.kernel), PATHS[self.path], self.num_samples
        with run.tuning():
            seed_all(run.child(2).seed)
            pilots = few if PILOT_LEAST <= few <= PILOT_MOST else PILOT
            trial = draw(pilots).reshape(-1, density.dim)
            bound = Bound.of(density, pilots, parts, kernel, path, trial)
            tuning = self._tuned(bound, trial, run)
        seed_all(run.child(0).seed)
        u = draw(few).reshape(-1, density.dim)
        return bound if pilots == few else Bound.of(density, few, parts, kernel, path, u), u, tuning

    def _tuned(self, bound: Bound, u: Tensor, run: Run) -> Tuning:
        key = streams.keys(seed_of(run, 3), bound.lanes.total, u.device)
        datum_key = streams.keys(seed_of(run, 4), bound.lanes.data, u.device)
        betas = None
        if self.schedule != "adaptive":
            stages = min(self.num_temperatures, PILOT_STAGES)
            betas = torch.tensor([self.given_beta(k / stages) for k in range(stages + 1)])
        plan, found = PathPlan(betas, target=PILOT_ESS, at_start=True), []
        for data, ids, count in bound.groups():
            at = ids.to(u.device)
            _, carried = carry(bound, bound.point(u[at]), key[at], datum_key[data.to(u.device)], plan)
            found.append(Tuning.of(carried).first(count))
        return Tuning.joined(found)

    def given_beta(self, share: float) -> float:
        """b at a share of the steps, of a schedule that is the same for all data."""
        if self.schedule == "linear" or share in (0.0, 1.0):
            return share
        low, high = (1 / (1 + math.exp(s * STEEPNESS)) for s in (1, -1))
        return (1 / (1 + math.exp(-STEEPNESS * (2 * share - 1))) - low) / (high - low)

    def chains(
        self, bound: Bound, tuning: Tuning, u: Tensor, seed: int, run: Run, reverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where chains from u (total, D) end, their log weights (S, N), and the mean acceptance at each temperature,
        (K,). `reverse`: from the posterior to the start."""
        key = streams.keys(seed, bound.lanes.total, u.device)

        def move(data: Tensor, lanes: Tensor, point: Point) -> tuple[Point, tuple[Tensor, Tensor]]:
            return self._anneal(bound, tuning.rows(data), point, key[lanes], reverse)

        ended, told = bound.through(u, move, run.progress)
        log_weights, acceptance = (torch.cat([t[i][:, : len(data)] for data, t in told], 1) for i in (0, 1))
        return ended, log_weights, acceptance.mean(1)

    def _anneal(
        self, bound: Bound, tuning: Tuning, point: Point, key: Tensor, reverse: bool
    ) -> tuple[Point, tuple[Tensor, Tensor]]:
        S, G, K = bound.count, bound.data, self.num_temperatures
        log_w = torch.zeros(S * G, dtype=point.u.dtype, device=point.u.device)
        counter = torch.zeros_like(key)

        def at(k: int) -> tuple[Tensor, Tensor, Tensor]:
            beta, step, mass = tuning.at(k / K)
            if self.schedule != "adaptive":
                beta = torch.full_like(beta, self.given_beta(k / K))
            return bound.lane(beta), bound.lane(step), bound.lane(mass)

        def move(times: int, beta: Tensor, step: Tensor, mass: Tensor) -> Tensor:
            nonlocal point, counter
            total: Any = 0.0
            for _ in range(times):
                point, moved = bound.transition(point, beta, step, mass, key, counter)
                counter = counter + bound.transition.takes()
                total = total + moved.acceptance / times
            return total.reshape(S, G).mean(0)

        def weigh(old: Tensor, new: Tensor) -> None:
            nonlocal log_w
            log_w = added(log_w, bound.path(new, point.values)[0] - bound.path(old, point.values)[0])

        acceptance = []
        if reverse:
            move(SETTLING, *at(K))
        for k in range(K, 0, -1) if reverse else range(1, K + 1):
            before, here = at(k - 1)[0], at(k)
            if not reverse:
                weigh(before, here[0])
            acceptance.append(move(self.num_moves, *here))
            if reverse:
                weigh(here[0], before)
        return point, (log_w.reshape(S, G), torch.stack(acceptance))


@dataclass(frozen=True)
class Bracket:
    """The log evidence of simulated data from below and above, per datum, in nats.

    lower, upper  bounds in expectation, of data drawn from the model at theta: a synthetic twin of the problem
    problem       the twin: the same model with these data
    own           the lower bound on the problem's own data, of which no exact posterior draw is to be had
    note          what these are, in words
    """

    lower: Evidence
    upper: Evidence
    problem: Problem
    own: Evidence
    note: str

    @property
    def gap(self) -> Tensor:
        """Upper minus lower, (*batch), in nats."""
        return self.upper.value - self.lower.value


def bracket(
    problem: Problem,
    engine: AnnealedImportance | type[AnnealedImportance] | str = "annealed_importance",
    *,
    seed: int = 0,
    parameters: Mapping[str, Tensor] | Any = None,
) -> Bracket:
    """Bracket the log evidence of a synthetic twin of the problem: as many data, drawn from the model at theta.

    The reverse chains of a datum all begin at the one latent that its data were drawn with; their standard error is
    that of the chains. It says how well the method does on data as the model sees them; on real data, which the model
    may not describe, only the lower side can be had, and is given beside. Raises `ProblemError` where the model cannot
    be drawn from, `EngineError` where a weight is undefined.
    """
    method = as_engine(engine)
    check_problem(problem)
    if not isinstance(method, AnnealedImportance):
        raise ProblemError(f"a bracket needs annealed importance sampling, not {type(method).__name__}.")
    with isolated(seed), torch.no_grad():
        density = Density(problem)
        if parameters is not None:
            density.set_parameters(parameters)
        root = np.random.SeedSequence(seed)
        with density:
            reason = method.supports(density) if density.latents else "the model has no latent sites"
            if reason:
                raise ProblemError(f"no bracket: {reason}.")
            method = replace(method, start=choose(density, method.start))
            own = method.run(density, Run(density, root).child(0)).log_evidence
            seed_all(Run(density, root).child(1).seed)
            simulated, latents = twin(density)
            theta = density.theta.values() | (density.phi.values() if method.start == "guide" else {})
        other = Density(simulated)
        other.set_parameters(theta)
        with other:
            exact = {name: value[None] for name, value in latents.items()}
            lower, upper = method.both_sides(other, exact, Run(other, root).child(2))
    assert own is not None
    note = (
        f"the bracket is of {max(1, lower.value.numel())} data simulated from the model at theta; of the problem's own "
        "data only the lower bound is known"
    )
    return Bracket(lower, upper, simulated, Evidence(own.value, own.std_error, "lower bound"), note)

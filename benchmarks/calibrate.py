"""Is an engine right on a model? Simulation-based calibration, for any engine and any latents.

Draw latents z and data x from the model at its theta, infer z from x, and take the rank of a test quantity f(z, x) at
the true z among its values at L independent draws of the answer. If the answer is the posterior, every rank is equally
likely (`ranks`).

Quantities: each latent (some entries of many), and what sees an engine that ignores data, which latents alone do not:
the log likelihood, the log prior, a product of two latents, and a latent times the data (Modrak et al. 2023,
doi:10.1214/23-BA1404). The false alarm is that of all tests of all of them together.

Where data have latents of their own, one inference on N simulated data is N replicates.

Cook, Gelman and Rubin (2006), doi:10.1198/106186006X136976; Talts et al. (2018), arXiv:1804.06788; sequential rule:
Gandy and Scott (2020), arXiv:2001.06465.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrometer.inference import Problem, ProblemError, infer, why_not
from pyrometer.inference.chains import interrupted
from pyrometer.inference.density import Density
from pyrometer.inference.engine import check_problem, isolated
from pyrometer.inference.registry import as_engine
from pyrometer.inference.twin import observing, simulated

from .facts import machine, versions
from .methods import label, row_seed, settings
from .ranks import FEWEST, Quantity, Ranked, Round, heaviest, near_independent, smallest_seen
from .tabled import Tabled

if TYPE_CHECKING:
    from rich.console import RenderableType

Progress = Callable[[str, int, int], None]

FALSE_ALARM = 1e-6
ENTRIES = 8  # of the latents, at most
AT_ONCE = 1000  # data of one inference, at most
SUMMARISED = 200  # data sets that tell what data are like on average
HEAVIEST = 1 / 8  # of a rule's points: ranks among draws of fewer, heavier ones come in lumps that are to be seen


@dataclass(frozen=True)
class Calibration(Tabled):
    """How it ended: 'passed', 'rejected' or 'undecided' (replicates failed, or
    Ctrl-C came), the last round's quantities, in words."""

    problem: str
    engine: str
    state: str
    verdict: str
    rounds: tuple[Round, ...]
    quantities: tuple[Quantity, ...]
    false_alarm: float = FALSE_ALARM
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    complete: bool = True  # False: Ctrl-C came before its last round was whole
    versions: Mapping[str, str] = field(default_factory=versions)
    machine: Mapping[str, Any] = field(default_factory=machine)

    @property
    def passed(self) -> bool:
        return self.state == "passed"

    def table(self, width: int = 120, ascii_only: bool = False) -> RenderableType:
        from .calibrate_report import render

        return render(self)


def calibrate(
    problem: Problem, engine: Any, *, replicates: int = 200, draws: int = 99, rounds: int = 3,
    false_alarm: float = FALSE_ALARM, seed: int = 0, progress: Progress | None = None, command: str = "",
) -> Calibration:  # fmt: skip
    """Simulation-based calibration of an engine on a problem, at the problem's own theta.

    replicates   simulated data sets; data, where each has its own latents
    draws        L, that each truth is ranked among, at most
    rounds       p-values between tiny and harmless are followed by another round of four times as many fresh
                 replicates, up to so many; suspicious in all is rejected
    false_alarm  of all rounds, quantities and tests together, for an engine that is right
    Failed inferences are counted, and leave the question undecided: ranks of the others alone would be biased. So
    does Ctrl-C, which ends it with the replicates that are there, if there are enough to be told of.
    Raises `ProblemError` where the model cannot be simulated, the engine cannot run, or an argument is out of range.
    """
    method = as_engine(engine)
    check_problem(problem)
    for name, value, least in (("replicates", replicates, FEWEST), ("draws", draws, 9), ("rounds", rounds, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProblemError(f"{name}={value!r}: expected a whole number of at least {least}.")
    if not 0 < false_alarm < 0.1:
        raise ProblemError(f"false_alarm={false_alarm!r}: expected a number between 0 and 0.1.")
    with isolated(row_seed(seed, "theta")), torch.no_grad():
        theta = Density(problem).theta.values()
    if reason := why_not(problem, method, theta):
        raise ProblemError(f"{method.name} cannot run on {problem.name}: {reason}.")
    tiny = false_alarm / 2
    suspicious = tiny ** (1 / rounds)
    done: list[Round] = []
    for index in range(rounds):
        number = replicates * 4**index
        ranked, complete = Ranked(draws), True
        try:
            for seeds, simulator in _calls(problem, theta, number, seed, index):
                simulator.replicate(method, theta, ranked, seeds)
                if progress is not None:
                    progress(f"round {index + 1}", min(ranked.total, number), number)
        except KeyboardInterrupt:
            if not done and not ranked.quantities():
                raise
            complete = False
        if complete or ranked.quantities():
            found, last = ranked.quantities(), ranked.round()
            done.append(last)
        if not complete or last.failures or not (tiny <= last.p_value < suspicious):
            break
    state, verdict = _verdict(done[-1], found, tiny, suspicious)
    if not complete:
        state = "rejected" if last.p_value < tiny else "undecided"
        told = verdict if state == "rejected" else f"the smallest p so far is {last.p_value:.2g}"
        verdict = f"interrupted after {ranked.total} of {number} replicates of round {index + 1}; {told}"
    return Calibration(
        problem.name, label(method), state, verdict, tuple(done), found, false_alarm, seed, settings(method), command,
        complete,
    )  # fmt: skip


# -- simulate and infer ----------------------------------------------------------------------------------------------


def _calls(
    problem: Problem, theta: Mapping[str, Tensor], number: int, seed: int, index: int
) -> Iterator[tuple[tuple[int, int, int], _Simulator]]:
    """A simulator for each inference that is to be made, and its seeds, until there are so many replicates."""
    simulator: _Simulator | None = None
    left, call = number, 0
    while left > 0:
        if simulator is None or simulator.data > left:
            simulator = _Simulator.of_size(problem, theta, min(left, AT_ONCE), seed)
        names = ("simulate", "infer", "rank")
        a, b, c = (row_seed(seed, what, str(index), str(call)) for what in names)
        yield (a, b, c), simulator
        left -= simulator.data
        call += 1


@dataclass
class _Simulator:
    """A problem at one theta, of which data are simulated."""

    density: Density
    centre: Mapping[str, tuple[float, float]]  # mean and sd of the data of each observed site
    entries: list[tuple[str, int]]  # latents that are test quantities

    @property
    def data(self) -> int:
        return max(math.prod(self.density.batch_shape), 1)

    @classmethod
    def of_size(cls, problem: Problem, theta: Mapping[str, Tensor], size: int, seed: int) -> _Simulator:
        """With so many data, where data have their own latents and the program takes any number of them."""
        with isolated(row_seed(seed, "entries")), torch.no_grad():
            density = Density(problem, parameters=theta)
            if len(density.batch_shape) == 1 and density.batch_shape[0] != size:
                rows = torch.arange(size) % density.batch_shape[0]
                try:
                    resized = Density(_of_rows(problem, rows, density.batch_shape[0]), parameters=theta)
                except ProblemError:
                    resized = density
                density = resized if tuple(resized.batch_shape) == (size,) else density
            with density:
                sets = density.simulate(max(2, SUMMARISED // max(math.prod(density.batch_shape), 1)))
        moments = {
            n: (float(v.double().mean()), float(v.double().std()) or 1.0)
            for n, v in sets.items()
            if density.sites[n].role == "observed"
        }
        return cls(density, moments, _entries(density, sets))

    def replicate(self, engine: Any, theta: Mapping[str, Tensor], ranked: Ranked, seeds: tuple[int, int, int]) -> None:
        """Simulate, infer, and add the ranks of each datum."""
        with isolated(seeds[0]), torch.no_grad(), self.density:
            data, truth = simulated(self.density)
        posterior = infer(observing(self.density.problem, data), engine, seed=seeds[1], parameters=theta)
        if interrupted(posterior.diagnostics.notes):
            raise KeyboardInterrupt  # which the engine kept to itself, for the sake of its draws
        if posterior.status.done and posterior.kind == "point":
            raise ProblemError(f"{posterior.engine} answers with a point: it has no distribution to be calibrated.")
        if not posterior.status.done:
            ranked.fail(posterior.status.reason, self.data)
            return
        if self.density.continuous and heaviest(posterior) > HEAVIEST:
            raise ProblemError(
                f"{posterior.engine} answers with the points of a rule, which are no draws, and too few to rank a "
                "latent among: its moments may be exact all the same. Take more points."
            )
        with isolated(seeds[2]), torch.no_grad(), self.density:
            values, kept = near_independent(posterior, ranked.draws, self.entries)
            joined = {n: torch.cat([truth[n].to(v)[None], v]) for n, v in values.items() if n in self.density.latents}
            with self.density.substituted(data):
                found = self._quantities(joined)
        ranked.add(found, kept, np.random.default_rng(seeds[2]))

    def _quantities(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> (1 + L, data): the truth first, then the draws."""
        density = self.density
        number = self.data
        scalars = {
            _name(site, i, values[site][0].numel() // number): _flat(values[site], number)[..., i].double()
            for site, i in self.entries
            if site in values
        }
        prior = density.log_prior(values)
        if len(values) == len(density.latents):
            likelihood = density.log_likelihood(values)
        else:  # the engine has summed out some
            likelihood = density.log_joint(values, jacobian=False) - prior
        first, second = (list(scalars.items()) * 2)[:2]
        observed = torch.zeros(number, dtype=torch.float64)
        for site, data in density.observed.items():
            mean, sd = self.centre[site]
            observed = observed + ((data.double() - mean) / sd).reshape(number, -1).mean(1)
        return {
            **scalars,
            "log likelihood": likelihood.reshape(-1, number).double().cpu(),
            "log prior": prior.reshape(-1, number).double().cpu(),
            f"{first[0]} x {second[0]}": first[1] * second[1],
            f"{first[0]} x data": first[1] * observed,
        }


def _of_rows(problem: Problem, rows: Tensor, size: int) -> Problem:
    """The problem on these rows of its data."""

    def taken(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    return observing(problem, {i: taken(v) for i, v in enumerate(problem.args) if isinstance(v, Tensor)})


def _entries(density: Density, sets: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """(site, entry of its event) of up to ENTRIES latents, evenly over all sites; entries that never move left out."""
    number, every = max(math.prod(density.batch_shape), 1), []
    for site in density.latents:
        flat = _flat(sets[site], number).double().flatten(0, 1)
        every.append([(site, i) for i in range(flat.shape[1]) if bool((flat[:, i] != flat[0, i]).any())])
    chosen: list[tuple[str, int]] = []
    depth = 0
    while len(chosen) < ENTRIES and any(depth < len(own) for own in every):
        chosen += [own[depth] for own in every if depth < len(own)]
        depth += 1
    return sorted(chosen[:ENTRIES], key=lambda entry: (list(density.latents).index(entry[0]), entry[1]))


def _flat(values: Tensor, number: int) -> Tensor:
    """(S, *batch, *event) -> (S, data, entries)."""
    return values.reshape(len(values), number, -1).cpu()


def _name(site: str, entry: int, of: int) -> str:
    return site if of == 1 else f"{site}[{entry}]"


# -- judge -----------------------------------------------------------------------------------------------------------


def _verdict(last: Round, found: tuple[Quantity, ...], tiny: float, suspicious: float) -> tuple[str, str]:
    if last.failures:
        count, of = sum(last.failures.values()), last.replicates + sum(last.failures.values())
        reason = max(last.failures, key=lambda r: last.failures[r])
        words = f"{count} of {of} replicates failed ({reason}), and ranks of the others alone would be biased"
        return ("rejected", f"{words}; {_wrong(found)}") if found and last.p_value < tiny else ("undecided", words)
    if last.p_value >= suspicious:
        shift, width = smallest_seen(last.replicates, len(found), tiny)
        return "passed", (
            f"no error seen in {last.replicates} replicates; a mean off by {shift:.2g} sd or an sd off by "
            f"{width:.0%} would have been, in 19 of 20 runs"
        )
    return "rejected", f"this is not the posterior (p = {last.p_value:.1g}): {_wrong(found)}"


def _wrong(found: tuple[Quantity, ...]) -> str:
    """The quantity that says it most clearly, and what is wrong with it."""
    worst = min(found, key=lambda quantity: quantity.p_value)
    test = min(worst.p_values, key=lambda name: worst.p_values[name])
    side = "low" if worst.shift > 0 else "high"
    width = "narrow" if worst.spread > 1 else "wide"
    size = f"{abs(worst.shift):.2g} of its sds too {side}"
    share = f"too {width}, its sd {1 / worst.spread:.2g} of what it should be"
    off, wide = worst.p_values["mean"], worst.p_values["normal scores"]
    what = size if off < 1e-3 <= wide else share if wide < 1e-3 <= off else f"{size} and {share}"
    return f"'{worst.name}' is {what} ({test})"

"""Gibbs sampling: each latent, or block of them, is drawn from its distribution given all others.

    z_b' ~ p(z_b | z_-b, x),   block after block, in random order

Geman & Geman 1984, doi:10.1109/TPAMI.1984.4767596; Gelfand & Smith 1990, doi:10.1080/01621459.1990.10476213. Discrete
latents are drawn by listing their values, continuous ones in closed form where their conditionals are found to be of an
exponential family, and the others by a Metropolis kernel within Gibbs (Müller 1991). Elements of a plate that are
independent given the rest are drawn together, so that a sweep costs as much as a few evaluations of the log joint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from .. import recorded
from ..density import Density
from ..engine import Draws, EngineError, Run
from ..groups import KERNELS, as_kernel
from ..kernels import adaptation
from ..kernels.metropolis import HMC, Kernel
from ..posterior import gathered
from ..problem import ProblemError
from ..settings import check_choice, check_positive, settings
from ..starts import CHOICE
from ..sweep import Blocks, Sweep, some_draws

FEWEST = 4  # draws of a chain that can be judged

WITHIN = KERNELS | {"hmc": HMC(num_steps=4)}  # a chain goes on, and longer trajectories pay


@settings
class Gibbs:
    """Blocks are found from the model, or given.

    num_samples, warmup_steps  sweeps of each chain, every block once; the warm-up tunes kernels, and is thrown away.
                   `warm=` goes on from an earlier run's last state and tuning, without warm-up
    blocks         latents that are drawn together: [('z',), ('mu', 'tau')], or a mapping from a latent, or several, to
                   the kernel that moves them: {'mu': 'hmc', ('a', 'b'): 'random_walk'}. Discrete latents of one block
                   are listed jointly, continuous ones moved jointly by a kernel. Latents that are not named: None
    scan           'random': a new order of the blocks in each sweep, which makes the chain reversible; 'fixed'
    kernel         'hmc', 'nuts', 'langevin', 'random_walk', or a kernel with its settings, for what has no closed form
    step_size      where its tuning begins; without warm-up, the step size
    initial_tries  draws of the prior that are tried for a start of finite density
    """

    name: ClassVar[str] = "gibbs"
    persistent: ClassVar[bool] = True  # the state is per chain and datum
    num_samples: int = 1000
    warmup_steps: int = 500
    num_chains: int = 4
    blocks: Any = None
    scan: str = "random"
    kernel: Any = "hmc"
    step_size: float = 0.1
    initial_tries: int = 100

    def __post_init__(self) -> None:
        check_choice(self, "scan", ("random", "fixed"))
        check_positive(self, "step_size")
        as_kernel(self, self.kernel, WITHIN)
        self._by_hand()

    def _by_hand(self) -> Blocks:
        """The given blocks. Raises `ProblemError` where they are none."""
        if self.blocks is None:
            return []
        mapping = isinstance(self.blocks, Mapping)
        items = self.blocks.items() if mapping else [(b, None) for b in self.blocks] if _is_list(self.blocks) else None
        if items is None:
            kind = type(self.blocks).__name__
            raise ProblemError(f"Gibbs(blocks=...): expected a list of blocks, or block -> kernel; got {kind}.")
        found: list[tuple[tuple[str, ...], Kernel | None]] = []
        for names, kernel in items:
            block = (names,) if isinstance(names, str) else tuple(names) if _is_list(names) else ()
            if not block or not all(isinstance(n, str) for n in block):
                raise ProblemError(f"Gibbs(blocks=...): expected names of latents in {names!r}.")
            found.append((block, None if kernel is None else as_kernel(self, kernel, WITHIN)))
        seen: set[str] = set()
        for name in (n for block, _ in found for n in block):
            if name in seen:
                raise ProblemError(f"Gibbs(blocks=...): site {name!r} is in two blocks, or twice in one.")
            seen.add(name)
        return found

    def supports(self, density: Density) -> str:
        for names, kernel in self._by_hand():
            for name in names:
                if name not in density.latents:
                    there = ", ".join(density.latents)
                    raise ProblemError(f"Gibbs(blocks=...): the model has no latent site {name!r}; it has {there}.")
            discrete = [n for n in names if n in density.discrete]
            if discrete and (len(discrete) < len(names) or kernel is not None):
                raise ProblemError(
                    f"Gibbs(blocks=...): site {discrete[0]!r} is discrete: it is listed, alone or with discrete ones, "
                    "and not moved by a kernel."
                )
            if len(names) > 1 and any(n in density.unlisted for n in names):
                raise ProblemError(
                    f"Gibbs(blocks=...): {', '.join(names)} cannot be listed together: their supports cannot be listed."
                )
        if density.improper and density.unlisted:
            site, other = density.unlisted[0], density.improper[0]
            return f"site {site!r} has no draws to start from: the prior of {other!r} is improper"
        return ""

    def sized(self, calls: float, density: Density) -> Self:
        """About `calls` evaluations and gradients: as many sweeps as they pay for, a third of them warm-up."""
        with density, torch.no_grad(), torch.random.fork_rng(devices=[]):
            each = self._sweep(density).calls + self.num_chains  # the log joint of each draw is told too
        sweeps = max(FEWEST, int((calls - CHOICE * self.num_chains) / each))
        warmup = sweeps // 3
        return replace(self, num_samples=sweeps - warmup, warmup_steps=warmup)

    def _sweep(self, density: Density) -> Sweep:
        """The blocks, kept for the next run on this density."""
        kernel = as_kernel(self, self.kernel, WITHIN)
        key = (
            "gibbs",
            repr(self.blocks),
            kernel,
            self.num_chains,
            tuple(density.batch_shape),
            density.row_numbers is None,
        )
        if key not in density.kept:
            density.kept[key] = Sweep(density, self.num_chains, self._by_hand(), kernel)
        return density.kept[key]

    def run(self, density: Density, run: Run) -> Draws:
        with run.tuning():
            sweep = self._sweep(density)
            seeds = [int(s) >> 1 for s in run.seed.generate_state(len(sweep.within) + 1, np.uint64)][1:]
            start = self._earlier(run.warm, density) if run.warm else self._start(density)
            sweep.begin(start, seeds, self.step_size)
            if run.warm:
                self._tuned(run.warm, sweep)
            else:
                sweep.settle()
            inside, ends = adaptation.schedule(self.warmup_steps)
            for t in range(0 if run.warm else self.warmup_steps):
                self._once(sweep)
                for within in sweep.within:
                    within.learn(bool(inside[t]), bool(ends[t]), t == self.warmup_steps - 1)
                run.progress("warm-up", t + 1, self.warmup_steps)
        kept: dict[str, list[Tensor]] = {name: [] for name in sweep.state}
        moved = []
        for s in range(self.num_samples):
            self._once(sweep)
            for name, value in sweep.state.items():
                kept[name].append(value.clone())
            moved.append([within.moved for within in sweep.within])
            run.progress("draws", s + 1, self.num_samples)
        return self._answer(density, sweep, {name: torch.stack(v, 1) for name, v in kept.items()}, moved)

    def _once(self, sweep: Sweep) -> None:
        """One sweep: every block, and every slot of a block whose elements take turns, once."""
        count = len(sweep.turns)
        for i in torch.randperm(count).tolist() if self.scan == "random" else range(count):
            block, turn = sweep.turns[i]
            block.move(sweep.state, turn)

    def _start(self, density: Density) -> dict[str, Tensor]:
        """Of some draws of the prior the one that explains the data best, for each chain and datum. Raises
        `EngineError` where none has a finite density."""
        chains, batch = self.num_chains, density.batch_shape
        best, score = dict[str, Tensor](), None
        for _ in range(0, self.initial_tries, CHOICE):
            values = some_draws(density, CHOICE * chains)
            likely = torch.where(density.log_joint(values).isfinite(), _likely(density, values), -math.inf)
            top, at = likely.reshape(CHOICE, chains, *batch).max(0)
            better = top > score if score is not None else torch.ones_like(top) > 0
            for name, value in values.items():
                rows = value.reshape(CHOICE, chains, *value.shape[1:])
                one = gathered(rows, at[None])[0]
                wide = (*at.shape, *[1] * (one.dim() - at.dim()))
                best[name] = torch.where(better.reshape(wide), one, best.get(name, one))
            score = top if score is None else torch.maximum(score, top)
            if bool(score.isfinite().all()):
                return best
        raise EngineError(
            f"no start with a finite log density in {self.initial_tries} draws of the prior; check the scale of the "
            "prior and the support of the data"
        )

    def _earlier(self, state: Mapping[str, Tensor], density: Density) -> dict[str, Tensor]:
        """The values that the earlier run ended at. Raises `ProblemError` where they do not fit."""
        found = {}
        for name, site in density.latents.items():
            value = state.get(f"value.{name}")
            own = site.own_shape(site.shape, site.event_dim)[len(density.batch_shape) :]
            shape = (self.num_chains, *density.batch_shape, *own)
            if value is None or tuple(value.shape) != shape:
                there = "no values" if value is None else f"values of shape {tuple(value.shape)}"
                raise ProblemError(
                    f"the warm start holds {there} of site {name!r}, this run needs {shape}: same model, same data, "
                    "same num_chains."
                )
            found[name] = value.to(device=density.device)
        return found

    def _tuned(self, state: Mapping[str, Tensor], sweep: Sweep) -> None:
        for i, within in enumerate(sweep.within):
            step, mass = state.get(f"step_size.{i}"), state.get(f"inverse_mass.{i}")
            if (
                step is None
                or mass is None
                or step.numel() != within.step.numel()
                or mass.numel() != within.mass.numel()
            ):
                raise ProblemError("the warm start was tuned for other blocks: use the same blocks and kernel.")
            within.step = step.reshape(within.step.shape).to(within.step)
            within.mass = mass.reshape(within.mass.shape).to(within.mass)

    def _answer(self, density: Density, sweep: Sweep, kept: Mapping[str, Tensor], moved: Sequence[Any]) -> Draws:
        chains, batch = self.num_chains, tuple(density.batch_shape)
        values = {
            name: torch.func.vmap(torch.func.vmap(lambda v, s=site: s.to_own(v, s.event_dim)))(kept[name])
            for name, site in density.latents.items()
        }
        stats = {"lp": density.log_joint(values)}
        state = {f"value.{name}": value[:, -1] for name, value in values.items()}
        if sweep.within:
            shape = (self.num_samples, chains, *batch)
            parts = [
                [torch.stack(column) for column in zip(*of_one, strict=True)] for of_one in zip(*moved, strict=True)
            ]
            acceptance, _, steps, diverging = (
                torch.stack(column).reshape(-1, *shape).transpose(1, 2) for column in zip(*parts, strict=True)
            )
            stats |= {"acceptance_rate": acceptance.mean(0), "n_steps": steps.sum(0), "diverging": diverging.any(0)}
            for i, within in enumerate(sweep.within):
                state[f"step_size.{i}"] = within.step.reshape(chains, *batch)
                state[f"inverse_mass.{i}"] = within.mass.reshape(chains, *batch, -1)
        return Draws(
            density.complete(values),
            "mcmc",
            sample_stats=stats,
            state=state,
            notes=tuple(sweep.notes()),
            alarms=(*recorded.not_finite(stats["lp"]), *recorded.stuck(stats["lp"])),
        )


def _likely(density: Density, values: Mapping[str, Tensor]) -> Tensor:
    """How well each draw explains the data, (n, *batch): by its continuous latents where the others can be summed out,
    for a chance draw of many labels says nothing of the places that it was drawn with."""
    given = {n: values[n] for n in density.continuous}
    if given and density.discrete and not density.unlisted:
        try:
            joint = density.log_joint(given)
            return joint if density.improper else joint - density.log_prior(given)
        except (RuntimeError, ValueError, NotImplementedError):
            pass  # elements that interact cannot be summed out
    return density.log_joint(values) if density.improper else density.log_likelihood(values)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)

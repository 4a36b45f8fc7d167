"""What is kept of the chains of every datum while they move, and the answer that is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .chains import MANY_DEEP, below, cut_short, mapped, most_together
from .density import Density
from .engine import Draws, Run
from .lanes import Lanes


class Record:
    """What is kept of L chains: positions (C, S, N, D), and figures (C, S, N) under arviz's names."""

    def __init__(self, lanes: Lanes, draws: int, start: Tensor, figures: Mapping[str, torch.dtype]) -> None:
        self.lanes = lanes
        shape = (lanes.per_datum, draws, lanes.data)
        self.positions = start.new_empty((*shape, start.shape[1]))
        self.stats = {name: torch.zeros(shape, dtype=dtype, device=start.device) for name, dtype in figures.items()}
        self.drawn = torch.zeros_like(start[:, 0], dtype=torch.int64)  # draws of each lane that are there
        self.step_size = torch.empty_like(start[:, 0])
        self.inverse_mass = torch.empty_like(start)
        self.figures: dict[str, float] = {}

    def write(self, ids: Tensor, draw: int | Tensor, u: Tensor, **figures: Tensor) -> None:
        """Draw number `draw` of the lanes `ids`."""
        chain, datum = ids // self.lanes.data, ids % self.lanes.data
        self.positions[chain, draw, datum] = u
        for name, value in figures.items():
            self.stats[name][chain, draw, datum] = value.to(self.stats[name].dtype)
        self.drawn[ids] = draw + 1

    def settle(self, ids: Tensor, step_size: Tensor, inverse_mass: Tensor) -> None:
        """What the lanes `ids` draw with."""
        self.step_size[ids], self.inverse_mass[ids] = step_size, inverse_mass

    @property
    def lengths(self) -> list[int]:
        """Draws of each chain that all data have."""
        return self.drawn.reshape(self.lanes.per_datum, -1).amin(1).tolist()

    @contextmanager
    def until_interrupted(self, run: Run) -> Iterator[None]:
        """On Ctrl-C what is there is kept, if any chain has a draw of all data and the run stands alone."""
        try:
            yield
        except KeyboardInterrupt:
            if run.nested or not any(self.lengths):
                raise


def answer(density: Density, record: Record) -> Draws:
    """The draws of all chains of all data; `state` for a warm start, per chain and datum."""
    lanes = record.lanes
    batch = tuple(density.batch_shape)
    asked, num_samples = record.positions.shape[:2]
    length = most_together(record.lengths)
    which = [c for c, m in enumerate(record.lengths) if m >= length]
    chains = slice(None) if len(which) == asked else which  # no copy where all are there
    positions = record.positions[chains, :length].reshape(-1, *batch, record.positions.shape[-1])
    values = {site: v.unflatten(0, (len(which), -1)) for site, v in mapped(density, positions).items()}
    stats = {name: value[chains, :length].reshape(len(which), length, *batch) for name, value in record.stats.items()}
    stats["step_size"] = record.step_size.reshape(asked, *batch)[chains, None].expand_as(stats["lp"])
    state = {
        "position": record.positions[chains, length - 1].reshape(len(which), *batch, -1).clone(),
        "step_size": record.step_size.reshape(asked, *batch)[chains],
        "inverse_mass": record.inverse_mass.reshape(asked, *batch, -1)[chains],
    }
    return Draws(
        values,
        "mcmc",
        sample_stats=stats,
        state=state,
        notes=lanes.notes(),
        alarms=(
            *cut_short(len(which), asked, length, num_samples),
            *not_finite(stats["lp"]),
            *stuck(stats["lp"]),
            *too_deep(stats),
        ),
        figures={name: torch.tensor(value) for name, value in record.figures.items()},
    )


def not_finite(lp: Tensor) -> Iterator[str]:
    """Data at which a chain never came to a finite log density; lp (C, S, *batch)."""
    broken = (~lp.isfinite()).all(1).any(0).reshape(-1)
    if bool(broken.any()):
        whose = "its" if int(broken.sum()) == 1 else "their"
        yield f"the log density is not finite at {_listed(broken)}: {whose} draws mean nothing"


def stuck(lp: Tensor) -> Iterator[str]:
    """Data at which a chain stays far below the others."""
    lost = below(lp)[1].any(0).reshape(-1)
    if bool(lost.any()):
        yield (
            f"a chain stays far below the others at {_listed(lost)}: it is stuck; run a longer warm-up, or start it "
            "elsewhere (initial=...)"
        )


def too_deep(stats: Mapping[str, Tensor]) -> Iterator[str]:
    """Data at which many trajectories were cut short; of samplers that do not say, nothing."""
    if "reached_max_treedepth" in stats:
        deep = stats["reached_max_treedepth"].double().mean((0, 1)).reshape(-1) > MANY_DEEP
        if bool(deep.any()):
            yield (
                f"more than {MANY_DEEP:.0%} of the trajectories were cut short at max_tree_depth at {_listed(deep)}: "
                "raise it, or reparameterise the model"
            )


def _listed(which: Tensor) -> str:
    at = which.nonzero()[:, 0].tolist()
    more = f" and {len(at) - 5} more" if len(at) > 5 else ""
    return f"{'data' if len(at) > 1 else 'datum'} {', '.join(map(str, at[:5]))}{more}"

"""Warm-up: each lane tunes its own step size and diagonal mass matrix, then both stand still.

Step size by dual averaging (Nesterov 2009; Hoffman & Gelman 2014, section 3.2, jmlr.org/papers/v15/hoffman14a.html);
mass by the variance of the draws in windows that double, shrunk towards a small one (Stan reference manual, "HMC
algorithm parameters"). All is arithmetic on lanes, each at its own draw.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GAMMA, DELAY, FORGETTING = 0.05, 10.0, 0.75  # of dual averaging,
AHEAD = math.log(10.0)  # which looks for step sizes around ten times the first
SHRINK_FROM, SMALL = 5.0, 1e-3  # draws that the small variance counts for, and its size
FIRST, SECOND, LAST = 0.1, 0.15, 0.25  # shares of the warm-up: before the windows, the first window at most, the end


class Warmup(NamedTuple):
    """What a lane has learned so far, (W,) and (W, D)."""

    log_step: Tensor  # in use
    log_step_mean: Tensor  # what is kept in the end
    shift: Tensor  # of dual averaging: mu, the mean error so far, and steps since it was begun
    error: Tensor
    steps: Tensor
    inverse_mass: Tensor
    mean: Tensor  # of the draws in this window, and the sum of their squared distances
    squares: Tensor
    draws: Tensor
    windows: Tensor  # that have ended


def begin(step_size: Tensor, inverse_mass: Tensor) -> Warmup:
    """From step sizes (W,) and inverse masses (W, D)."""
    log_step, zero = step_size.log(), torch.zeros_like(step_size)
    none = torch.zeros_like(inverse_mass)
    # one tensor each: they are written apart
    return Warmup(
        log_step, log_step.clone(), log_step + AHEAD, zero, zero.clone(), inverse_mass, none, none.clone(),
        zero.clone(), zero.clone(),
    )  # fmt: skip


def schedule(warmup_steps: int) -> tuple[Tensor, Tensor]:
    """For each draw of the warm-up, whether it is in a window and whether a window ends with it: (T,) bool each."""
    inside = torch.zeros(max(1, warmup_steps), dtype=torch.bool)
    ends = inside.clone()
    first, last = int(FIRST * warmup_steps), warmup_steps - int(LAST * warmup_steps)
    if warmup_steps >= 20:
        inside[first:last] = True
        width, at = max(5, min(25, int(SECOND * warmup_steps))), first
        while at < last:
            end = at + width
            if end + 2 * width > last:  # no room for the next: this one takes all
                end = last
            ends[end - 1] = True
            at, width = end, 2 * width
    return inside, ends


def update(
    w: Warmup, position: Tensor, acceptance: Tensor, target: float, active: Tensor, inside: Tensor, ends: Tensor
) -> Warmup:
    """After a draw at `position` (W, D) with mean `acceptance` (W,): lanes that are `active` learn from it.
    inside, ends: (W,) of `schedule` at each lane's draw."""
    acceptance = torch.where(acceptance.isfinite(), acceptance, 0.0).clamp(0, 1)
    steps = w.steps + 1
    error = w.error + (target - acceptance - w.error) / (steps + DELAY)
    log_step = w.shift - steps.sqrt() / GAMMA * error
    share = steps**-FORGETTING
    log_step_mean = share * log_step + (1 - share) * w.log_step_mean

    draws = w.draws + 1
    off = position - w.mean
    mean = w.mean + off / draws[:, None]
    squares = w.squares + off * (position - mean)
    inside = inside & active
    mean, squares = (torch.where(inside[:, None], new, old) for new, old in ((mean, w.mean), (squares, w.squares)))
    draws = torch.where(inside, draws, w.draws)

    ends = ends & active
    variance = (squares / (draws - 1).clamp_min(1)[:, None] * draws[:, None] + SMALL * SHRINK_FROM) / (
        draws[:, None] + SHRINK_FROM
    )
    inverse_mass = torch.where(ends[:, None] & (draws > 2)[:, None], variance, w.inverse_mass)
    # the first mass wants another step size: dual averaging begins again around the one found so far; later ones
    # change little, and it goes on
    anew = ends & (w.windows == 0)
    shift = torch.where(anew, log_step_mean + AHEAD, w.shift)
    return Warmup(
        torch.where(active, torch.where(anew, log_step_mean, log_step), w.log_step),
        torch.where(active, log_step_mean, w.log_step_mean),
        shift,
        torch.where(anew, 0.0, torch.where(active, error, w.error)),
        torch.where(anew, 0.0, torch.where(active, steps, w.steps)),
        inverse_mass,
        torch.where(ends[:, None], 0.0, mean),
        torch.where(ends[:, None], 0.0, squares),
        torch.where(ends, 0.0, draws),
        w.windows + ends.to(w.windows.dtype),
    )


def settled(w: Warmup) -> tuple[Tensor, Tensor]:
    """The step sizes and inverse masses that the draws are made with."""
    return w.log_step_mean.exp(), w.inverse_mass

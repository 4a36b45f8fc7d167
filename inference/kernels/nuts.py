"""The No-U-Turn sampler on lanes: every lane grows a tree of its own, one leapfrog step of all lanes at a time.

Multinomial trajectories with biased progression (Betancourt 2017, arXiv:1701.02434; Hoffman & Gelman 2014), the
recursion unrolled by keeping the momenta at the left edges of the subtrees that are still open (Phan, Pradhan &
Jankowiak 2019, arXiv:1912.11554). A lane whose tree is complete can start its next draw while its neighbours go on
with theirs, so no lane waits for another.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..lanes import Lanes
from . import streams
from .metropolis import DIVERGENT, MIDDLE, Moved, Path, Point, Transition, force, kinetic, leapfrog

PER_LEAF = 3  # random numbers


class Tree(NamedTuple):
    """Trees that lanes are growing. Vectors are (W, D), figures (W,); r is momentum, slope the force.

    Energies are relative to where the trajectory began: the log weight of that point is zero.
    """

    key: Tensor
    counter: Tensor
    start: Tensor  # log density minus kinetic energy at the beginning
    left_u: Tensor
    left_r: Tensor
    left_slope: Tensor
    right_u: Tensor
    right_r: Tensor
    right_slope: Tensor
    u: Tensor  # the proposal of the tree, with the parts and their gradients
    values: Tensor
    gradients: Tensor
    log_weight: Tensor
    momenta: Tensor  # the sum of all r
    energy: Tensor  # of the proposal
    depth: Tensor
    leaves: Tensor
    acceptance: Tensor  # summed over the leaves
    # the subtree that is being added
    forward: Tensor  # 1 to the right, -1 to the left
    at_u: Tensor  # its last leaf
    at_r: Tensor
    at_slope: Tensor
    sub_u: Tensor
    sub_values: Tensor
    sub_gradients: Tensor
    sub_log_weight: Tensor
    sub_momenta: Tensor
    sub_energy: Tensor
    leaf: Tensor  # number of the next leaf
    edge_r: Tensor  # (W, K, D): momentum at the left edges of open subtrees, and the sum of momenta up to there
    edge_momenta: Tensor
    diverging: Tensor
    done: Tensor


def plant(
    point: Point, path: Path, beta: Tensor, inverse_mass: Tensor, key: Tensor, counter: Tensor, max_depth: int
) -> Tree:
    """Trees of one point, with fresh momenta."""
    dim, dtype = point.u.shape[1], point.u.dtype
    normal = streams.normals(key, counter, dim, dtype)
    coin = streams.uniforms(key, counter + streams.normals_take(dim), 1, dtype)[:, 0]
    r = normal / inverse_mass.sqrt()
    zero, none = torch.zeros_like(beta), torch.zeros_like(r)
    start = path(beta, point.values)[0] - kinetic(r, inverse_mass)
    slope = force(path, beta, point.values, point.gradients)
    edges = torch.zeros((len(r), max(1, max_depth - 1), dim), dtype=dtype, device=r.device)
    count = torch.zeros_like(counter)
    never = zero != zero
    return Tree(
        key, counter + streams.normals_take(dim) + 1, start,
        point.u, r, slope, point.u, r, slope,
        point.u, point.values, point.gradients, zero, r, -start, count, count, zero,
        torch.where(coin < 0.5, -1.0, 1.0).to(dtype), point.u, r, slope,
        point.u, point.values, point.gradients, zero - math.inf, none, zero, count, edges, edges, never, never,
    )  # fmt: skip


def grow(
    t: Tree, lanes: Lanes, path: Path, beta: Tensor, step_size: Tensor, inverse_mass: Tensor, max_depth: int
) -> Tree:
    """One leapfrog step of every lane, and what follows from it. Lanes that are done go on computing, to no effect."""
    u, r, values, gradients, slope = leapfrog(
        lanes, path, t.at_u, t.at_r, t.at_slope, beta, t.forward * step_size, inverse_mass
    )
    random = streams.uniforms(t.key, t.counter, PER_LEAF, u.dtype)
    energy = path(beta, values)[0] - kinetic(r, inverse_mass)
    gain = energy - t.start
    gain = torch.where(gain.isnan(), -math.inf, gain)
    lost = ~(gain > -DIVERGENT)

    # the leaf joins the subtree
    sub_log_weight = torch.logaddexp(t.sub_log_weight, gain)
    takes = random[:, 0].log() < gain - sub_log_weight
    sub_u = torch.where(takes[:, None], u, t.sub_u)
    sub_values = torch.where(takes[:, None], values, t.sub_values)
    sub_gradients = torch.where(takes[:, None, None], gradients, t.sub_gradients)
    sub_energy = torch.where(takes, -energy, t.sub_energy)
    sub_momenta = t.sub_momenta + r
    opens, closes = (table.to(r)[t.leaf] for table in _tables(max_depth))  # (W, K)
    edge_r = torch.where(opens[..., None] > 0, r[:, None], t.edge_r)
    edge_momenta = torch.where(opens[..., None] > 0, sub_momenta[:, None], t.edge_momenta)
    span = sub_momenta[:, None] - edge_momenta + edge_r
    turned = ((closes > 0) & _turns(edge_r, r[:, None], span, inverse_mass[:, None])).sum(1) > 0
    acceptance = t.acceptance + gain.clamp_max(0.0).exp()
    leaf = t.leaf + 1
    complete = (leaf >> t.depth) > 0  # 2**depth leaves
    ends = turned | lost

    # the subtree joins the tree
    joins = complete & ~ends
    prefers = joins & (random[:, 1].log() < sub_log_weight - t.log_weight)
    momenta = torch.where(joins[:, None], t.momenta + sub_momenta, t.momenta)
    right, left = joins & (t.forward > 0), joins & (t.forward < 0)
    left_u, left_r, left_slope = (
        torch.where(left[:, None], new, old) for new, old in ((u, t.left_u), (r, t.left_r), (slope, t.left_slope))
    )
    right_u, right_r, right_slope = (
        torch.where(right[:, None], new, old) for new, old in ((u, t.right_u), (r, t.right_r), (slope, t.right_slope))
    )
    depth = torch.where(complete, t.depth + 1, t.depth)
    done = ends | (joins & _turns(left_r, right_r, momenta, inverse_mass)) | (complete & (depth == max_depth))

    # or another begins, at an end chosen by a coin
    forward = torch.where(joins, torch.where(random[:, 2] < 0.5, -1.0, 1.0).to(r.dtype), t.forward)
    rightwards = (joins & (forward > 0))[:, None]
    leftwards = (joins & (forward < 0))[:, None]
    at_u, at_r, at_slope = (
        torch.where(rightwards, b, torch.where(leftwards, a, old))
        for a, b, old in ((left_u, right_u, u), (left_r, right_r, r), (left_slope, right_slope, slope))
    )
    log_weight = torch.where(joins, torch.logaddexp(t.log_weight, sub_log_weight), t.log_weight)
    grown = Tree(
        t.key,
        t.counter + PER_LEAF,
        t.start,
        left_u,
        left_r,
        left_slope,
        right_u,
        right_r,
        right_slope,
        torch.where(prefers[:, None], sub_u, t.u),
        torch.where(prefers[:, None], sub_values, t.values),
        torch.where(prefers[:, None, None], sub_gradients, t.gradients),
        log_weight,
        momenta,
        torch.where(prefers, sub_energy, t.energy),
        depth,
        t.leaves + 1,
        acceptance,
        forward,
        at_u,
        at_r,
        at_slope,
        sub_u,
        sub_values,
        sub_gradients,
        torch.where(joins, -math.inf, sub_log_weight),
        torch.where(joins[:, None], 0.0, sub_momenta),
        sub_energy,
        torch.where(joins, 0, leaf),
        edge_r,
        edge_momenta,
        lost,
        done,
    )
    return grown


def _turns(left: Tensor, right: Tensor, momenta: Tensor, inverse_mass: Tensor) -> Tensor:
    """Whether the ends of a trajectory no longer move apart: momenta (..., D), their sum between the ends' middles."""
    along = inverse_mass * (momenta - (left + right) / 2)
    return ((left * along).sum(-1) <= 0) | ((right * along).sum(-1) <= 0)


@functools.cache
def _tables(max_depth: int) -> tuple[Tensor, Tensor]:
    """For each leaf of a subtree (N, K): which open left edge it becomes, and which spans it closes.

    An even leaf opens a span, kept at the place that tells how many others are open; an odd one closes as many as it
    has ones at its end."""
    edges = max(1, max_depth - 1)
    opens, closes = np.zeros((2, 2**edges + 1, edges))
    for leaf in range(2**edges):
        place = (leaf >> 1).bit_count()
        if leaf % 2 == 0:
            opens[leaf, place] = 1
        else:
            trailing = ((leaf ^ (leaf + 1)).bit_length()) - 1
            closes[leaf, place - trailing + 1 : place + 1] = 1
    return torch.from_numpy(opens), torch.from_numpy(closes)


@dataclass(frozen=True)
class NUTS:
    """Settings of the kernel, where it moves lanes in step."""

    max_depth: int = 10
    target_acceptance: float = 0.8
    gradient: bool = True

    def bind(self, lanes: Lanes, path: Path, example: Point) -> Transition:
        return _InStep(self.max_depth, lanes, path, example)


class _InStep:
    """One draw of every lane: those that are done wait for the others."""

    def __init__(self, max_depth: int, lanes: Lanes, path: Path, example: Point) -> None:
        self.max_depth, self.lanes, self.path, self.dim = max_depth, lanes, path, example.u.shape[1]
        ones = torch.ones_like(example.u[:, 0])
        mass = torch.ones_like(example.u)

        def step(*args: Tensor) -> tuple[Tensor, ...]:
            old = Tree(*args[3:])
            new = grow(old, lanes, path, args[0], args[1], args[2], max_depth)
            kept = old.done
            return tuple(
                torch.where(kept.reshape(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(old, new, strict=True)
            )

        trees = [
            plant(
                example,
                path,
                ones,
                mass,
                streams.keys(k, len(ones), ones.device),
                torch.zeros_like(lanes.ids, device=ones.device),
                max_depth,
            )
            for k in range(2)
        ]
        self.step = lanes.compile(step, [(ones, 0.1 * ones, mass, *tree) for tree in trees])

    def takes(self) -> int:
        return streams.normals_take(self.dim) + 1 + PER_LEAF * 2**self.max_depth

    def __call__(
        self, point: Point, beta: Tensor, step_size: Tensor, inverse_mass: Tensor, key: Tensor, counter: Tensor,
        common: float = MIDDLE,
    ) -> tuple[Point, Moved]:  # fmt: skip
        tree = plant(point, self.path, beta, inverse_mass, key, counter, self.max_depth)
        while not bool(tree.done.all()):
            tree = Tree(*self.step(beta, step_size, inverse_mass, *tree))
            self.lanes.count(1)
        steps = tree.leaves.to(point.u.dtype)
        return Point(tree.u, tree.values, tree.gradients), Moved(
            tree.acceptance / steps, tree.energy, steps, tree.diverging
        )

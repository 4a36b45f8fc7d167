"""What our machinery costs: an SVI step against the same loss written by hand, and prior-weighted draws.

Both sides of the comparison run in turn in one process, so that whatever else the machine does falls on both alike.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from pyrometer.inference import SVI, ImportanceSampling, infer, learn
from pyrometer.models import eight_schools, vae

BATCH_SIZE = 128
NUM_DATA = 1437  # the digits to learn from
LATENT_DIM = 2
HIDDEN = 64
STEPS = 200  # of each side in turn; a trail of up to 200 steps holds the time of every one
DRAWS = 100_000


@dataclass(frozen=True)
class Race:
    """Seconds of every step: ours, and each peer's by name."""

    case: str
    ours: list[float]
    peers: dict[str, list[float]]

    def ratio(self, peer: str) -> float:
        return statistics.median(self.ours) / statistics.median(self.peers[peer])


def svi_step(data_dim: int, rounds: int) -> Race:
    """The VAE's step on `data_dim` pixels: batch of 128, one particle, Adam; rounds of 200 steps, alternating.

    By hand the optimiser is torch's Adam as it comes, and once more fused, which is what ours asks for.
    Steps are timed from the second on: the first traces the program, a cost of a run and not of a step.
    """
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(NUM_DATA, data_dim, generator=generator) < 0.5).float()
    problem = vae.problem(data=x, num_test=0, latent_dim=LATENT_DIM, hidden=HIDDEN)
    engine = SVI(num_steps=STEPS, batch_size=BATCH_SIZE, num_samples=2)
    by_hand = {
        name: plain_torch(x, engine.learning_rate, fused) for name, fused in (("by hand", None), ("fused Adam", True))
    }
    race = Race(f"SVI step, VAE on {data_dim} pixels", [], {name: [] for name in by_hand})
    for turn in range(rounds):
        race.ours.extend(learn(problem, engine, seed=turn).trail.seconds.diff().tolist())
        for name, run in by_hand.items():
            race.peers[name].extend(run(STEPS))
    return race


def plain_torch(x: Tensor, learning_rate: float, fused: bool | None) -> Callable[[int], list[float]]:
    """The same networks, minibatches, loss and optimiser, without Pyro and without us.

    A function that takes a number of steps and returns the seconds of each from the second on.
    """
    decoder = vae.Decoder(LATENT_DIM, HIDDEN, x.shape[1])
    encoder = vae.Encoder(x.shape[1], HIDDEN, LATENT_DIM)
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=learning_rate, fused=fused)
    scale = len(x) / BATCH_SIZE

    def run(steps: int) -> list[float]:
        order = torch.randperm(len(x))
        ends = []
        for step in range(steps):
            first = (step * BATCH_SIZE) % (len(x) - BATCH_SIZE)
            rows = x[order[first : first + BATCH_SIZE]]
            loc, sd = encoder(rows)
            noise = torch.randn_like(sd)
            z = loc + sd * noise
            # log p(z) - log q(z | x), the constants of both normals cancelling
            log_ratio = (0.5 * noise.square() + sd.log() - 0.5 * z.square()).sum()
            loss = scale * (cross_entropy(decoder(z), rows, reduction="sum") - log_ratio)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not torch.isfinite(loss.detach()):  # ours looks too
                raise RuntimeError(f"the loss became {float(loss)} at step {step}.")
            ends.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(ends)]

    return run


def prior_draws(rounds: int) -> list[float]:
    """Seconds for 100,000 prior draws of eight schools, each weighted by its likelihood; one figure a round."""
    problem, engine = eight_schools.problem(), ImportanceSampling(proposal="prior", num_samples=DRAWS)
    return [infer(problem, engine, seed=turn).cost.seconds for turn in range(rounds + 1)][1:]


def report(rounds: int) -> RenderableType:
    """Both cases as a table, with the number of threads they ran on."""
    races = [svi_step(data_dim, rounds) for data_dim in (64, 784)]
    steps = Table("ms per step", "ours", "(least)", *(h for p in races[0].peers for h in (p, "(least)", "ratio")))
    steps.box = box.SIMPLE
    for race in races:
        cells = [f"{1e3 * statistics.median(race.ours):.3f}", f"{1e3 * min(race.ours):.3f}"]
        for name, peer in race.peers.items():
            cells += [f"{1e3 * statistics.median(peer):.3f}", f"{1e3 * min(peer):.3f}", f"{race.ratio(name):.2f}"]
        steps.add_row(race.case, *cells)
    seconds = prior_draws(rounds)
    median = statistics.median(seconds)
    draws = (
        f"{DRAWS:,} prior-weighted draws on eight schools: {median:.3f} s (least {min(seconds):.3f} s), "
        f"{DRAWS / median:,.0f} draws/s"
    )
    facts = (
        f"medians and their ratios; {rounds} rounds of {STEPS} steps, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}"
    )
    return Group(steps, Text(draws), Text(facts, style="dim"))

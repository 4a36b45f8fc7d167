"""The demonstration: a variational autoencoder on handwritten digits, learned in three ways, judged by five engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from pyrometer.inference import EM, NUTS, SVI, ImportanceSampling, Problem, Quadrature
from pyrometer.models import vae

from .comparison import Progress, Row, Theta, judge

SUBSET = 500  # digits that the E-step by NUTS learns from: it moves all of them at once, and takes its time
JUDGED = 100  # digits that every engine is judged on

LEARNERS = {
    "svi": SVI(num_steps=3000, batch_size=128),
    "em: importance": EM(
        e_step=ImportanceSampling(proposal="laplace", num_samples=10),
        num_steps=100,
        gradient_steps=10,
        batch_size=256,
        learning_rate=0.02,
    ),
}
LEARNERS_ON_SUBSET = {
    f"em: nuts, {SUBSET} digits": EM(
        e_step=NUTS(num_samples=5, warmup_steps=10, num_chains=1),
        num_steps=100,
        gradient_steps=5,
        learning_rate=0.02,
    ),
}
ENGINES = {
    "svi (its own guide)": SVI(num_steps=1000),
    "svi (AutoNormal)": SVI(guide="AutoNormal", num_steps=1000),
    "importance (laplace)": ImportanceSampling(proposal="laplace"),
    "quadrature": Quadrature(),
    "nuts": NUTS(num_samples=150, warmup_steps=150, num_chains=2),
}


def steps(seed: int, announce: Callable[[str], None], progress: Progress) -> tuple[Problem, Iterator[Theta | Row]]:
    """The problem that is judged, and its thetas and rows as they are ready."""
    digits = vae.problem()
    judged = vae.problem(num_train=JUDGED)
    judged = replace(judged, name=f"{judged.name}, engines judged on {JUDGED} of {len(digits.args[0])} digits")
    parts = [
        judge(problem, ENGINES, learn=learners, seed=seed, on=judged, announce=announce, progress=progress)
        for problem, learners in (
            (digits, LEARNERS),
            (vae.problem(num_train=SUBSET), LEARNERS_ON_SUBSET),
        )
    ]
    return judged, chain.from_iterable(parts)

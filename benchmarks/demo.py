"""The demonstration: a variational autoencoder on handwritten digits, three ways to learn it, eight engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pyrometer.inference import EM, HMC, NUTS, SMC, SVI, AnnealedImportance, ImportanceSampling, Problem, Quadrature
from pyrometer.inference.engines.annealed_importance import Bracket, bracket
from pyrometer.inference.learn import Fit
from pyrometer.models import vae

from .comparison import Progress, Row, Theta, judge
from .methods import row_seed

JUDGED = 100  # digits that every engine is judged on

LEARNERS = {
    "svi": SVI(num_steps=3000, batch_size=128),
    "svi: iwae, 5 draws": SVI(objective="iwae", num_particles=5, num_steps=3000, batch_size=128),
    "em: hmc": EM(
        e_step=HMC(num_samples=5, warmup_steps=20, num_chains=2),
        num_steps=200,
        gradient_steps=5,
        batch_size=256,
        learning_rate=0.02,
    ),
}
ENGINES = {
    "svi (its own guide)": SVI(num_steps=1000),
    "svi (AutoNormal)": SVI(guide="AutoNormal", num_steps=1000),
    "importance (laplace)": ImportanceSampling(proposal="laplace"),
    "quadrature": Quadrature(),
    "annealed importance": AnnealedImportance(start="prior"),
    "smc": SMC(num_samples=300),
    "hmc": HMC(num_samples=250, warmup_steps=250),
    "nuts": NUTS(num_samples=150, warmup_steps=150, num_chains=4),
}


def steps(
    seed: int, announce: Callable[[str], None], progress: Progress, fits: dict[str, Fit]
) -> tuple[Problem, Iterator[Theta | Row]]:
    """The problem that is judged, and its thetas and rows as they are ready; `fits` collects what was learned."""
    digits, judged = vae.problem(), vae.problem(num_train=JUDGED)
    judged = replace(judged, name=f"{judged.name}, engines judged on {JUDGED} of {len(digits.args[0])} digits")
    found = judge(
        digits, ENGINES, learn=LEARNERS, seed=seed, on=judged, announce=announce, progress=progress, fits=fits
    )
    return judged, found


def bracketed(problem: Problem, fits: dict[str, Fit], seed: int) -> Bracket:
    """The evidence from below and above at the first learner's theta."""
    name = next(iter(LEARNERS))
    engine = AnnealedImportance(start="prior", num_samples=32)
    return bracket(problem, engine, seed=row_seed(seed, name, "bracket"), parameters=fits[name])


def in_words(found: Bracket) -> str:
    """The bracket as a paragraph, in nats per datum."""
    (low, low_error), (high, high_error), (own, own_error) = (
        side.per_datum() for side in (found.lower, found.upper, found.own)
    )
    data = found.gap.numel()
    return (
        f"Bracketed log evidence per datum at the theta learned by {next(iter(LEARNERS))}, by annealed importance "
        "sampling from the prior\n"
        f"  {data} digits simulated from the model   between {low:.4f} ± {low_error:.4f} and {high:.4f} ± "
        f"{high_error:.4f}; largest gap of a digit {float(found.gap.max()):.2f}\n"
        f"  {data} real digits                       at least {own:.4f} ± {own_error:.4f}; no upper side, for want of "
        "an exact draw of the posterior"
    )

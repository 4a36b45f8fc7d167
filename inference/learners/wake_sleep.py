"""Reweighted wake-sleep: theta by weighted draws of the guide, the guide by the same draws or by the model's dreams.

    w_k = p_theta(x, z_k) / q_phi(z_k | x),   z_k ~ q_phi(z | x),   w~_k = w_k / sum_j w_j,   for each datum

    wake theta   sum_k w~_k grad log p_theta(x, z_k)       at K -> infinity the gradient of log p_theta(x)
    wake phi     sum_k w~_k grad log q_phi(z_k | x)        at K -> infinity that of -KL(p_theta(z | x) || q_phi(z | x))
    sleep phi    grad log q_phi(z | x),  (z, x) ~ p_theta  that of -E_{p_theta(x)} KL(p_theta(z | x) || q_phi(z | x))

Bornschein & Bengio 2015, arXiv:1406.2751; the sleep phase is Hinton et al. 1995, doi:10.1126/science.7761831. No draw
has to be reparameterised, so discrete latents are as good as any. For finite K the wake gradients are biased, by
O(1 / K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..engine import NO_LATENTS, EngineError, Run
from ..engines.svi import guide_draws
from ..guides import PairedGuide
from ..learning import Learned, TrailWriter, descend
from ..objectives import log_mean, weighted, with_gradient
from ..preflight import check_minibatch
from ..problem import ProblemError
from ..settings import check_optimizer, check_positive, settings
from ..twin import Place, as_arguments, observing_arguments


@settings
class WakeSleep:
    """Learn theta and the problem's own guide without gradients through its draws.

    The trail is the importance-weighted bound, log mean_k w_k, in nats over all data. A tensor that model and guide
    share gets the gradients of both.

    num_particles  draws of z for each datum and gradient; few of them leave a bias
    batch_size     data for each gradient; None: all
    optimizer      any torch optimiser class, called as optimizer(tensors, lr=learning_rate)
    wake_phi       fit the guide to the weighted draws
    sleep_phi      fit the guide to latents and data drawn from the model, one pair in the place of each datum; both
                   may be on, and then their gradients add
    num_samples    draws from the fitted guide, which also give the evidence
    """

    name: ClassVar[str] = "wake_sleep"
    num_steps: int = 1000
    num_particles: int = 10
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    wake_phi: bool = True
    sleep_phi: bool = False
    num_samples: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate")
        check_optimizer(self)
        for phase in ("wake_phi", "sleep_phi"):
            if not isinstance(getattr(self, phase), bool):
                raise ProblemError(f"WakeSleep({phase}={getattr(self, phase)!r}): expected True or False.")
        if not (self.wake_phi or self.sleep_phi):
            raise ProblemError("WakeSleep(wake_phi=False, sleep_phi=False): nothing fits the guide; turn one on.")

    def supports(self, density: Density) -> str:
        if not density.latents:
            return NO_LATENTS
        if density.problem.guide is None:
            return "wake-sleep trains the problem's own guide and there is none: pass guide=... to Problem"
        density.require_guide()
        if density.guide_flaw:
            return density.guide_flaw
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
            if not density.batch_plates:
                return "minibatches need latents that belong to one datum each; this model has global latents"
        return _cannot_sleep(density) if self.sleep_phi else ""

    def fit(self, density: Density, run: Run) -> Learned:
        guide = PairedGuide(density)
        tensors = list({id(t): t for t in (*density.theta.tensors, *guide.tensors)}.values())
        places = observing_arguments(density)[0] if self.sleep_phi else {}
        writer = TrailWriter("lower bound", self.num_steps)
        losses = descend(
            density, lambda: self.loss(density, guide, places), tensors, self.optimizer, self.learning_rate,
            self.batch_size, self.num_steps,
        )  # fmt: skip
        for step, value in enumerate(losses):
            if not math.isfinite(value):
                advice = "try a smaller learning_rate" if step else "no draw of the guide has weight where it starts"
                raise EngineError(f"the bound became {-value} at step {step}: {advice}")
            writer.add(step, -value)
            run.progress("gradient steps", step + 1, self.num_steps)
        with torch.no_grad():
            return Learned(writer.trail(), guide_draws(density, guide, self.num_samples))

    def loss(self, density: Density, guide: PairedGuide, places: dict[str, Place]) -> Tensor:
        """Minus the importance-weighted bound of all data, () in nats, with minus the gradients of the phases.
        `places` maps each observed site to the argument that holds its data; only the sleep phase asks for them."""
        with torch.no_grad():
            z, log_q, _ = guide.draw(self.num_particles)
        log_p = density.log_joint(z)
        log_w = log_p.detach() - log_q
        weights = torch.softmax(log_w, 0)
        surrogate = weighted(weights, log_p).sum()
        if self.wake_phi:
            surrogate = surrogate + weighted(weights, guide.log_prob(z)).sum()
        if self.sleep_phi:
            surrogate = surrogate + dream(density, places).sum()
        return -with_gradient(log_mean(log_w).sum(), surrogate) * density.data_scale


def dream(density: Density, places: dict[str, Place]) -> Tensor:
    """log q_phi(z | x), (*batch), of one pair (z, x) in the place of each datum, drawn from the model at theta."""
    with torch.no_grad():
        drawn = {n: v[0] for n, v in density.simulate(1).items()}
    with density.substituted(as_arguments(density, drawn, places)):
        return density.log_guide({n: v for n, v in drawn.items() if n in density.guide_latents})


def _cannot_sleep(density: Density) -> str:
    """Why the guide cannot be run on data drawn from the model, in words; '' where it can."""
    own = [n for n in density.guide_latents if n not in density.latents]
    if own:
        return f"the sleep phase needs the guide's density, and its site {own[0]!r} is none of the model's"
    places, lost = observing_arguments(density)
    if lost:
        return (
            f"the sleep phase runs the guide on simulated data, and no argument alone holds the data of site {lost!r}"
            ": observe an argument as it is passed (obs=x), or use sleep_phi=False"
        )
    drawn, data = [], dict[Place, Tensor]()
    with density.uncounted(), torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**31, ()))
        for _ in range(2):
            torch.manual_seed(seed)
            try:
                with density.substituted(data):
                    drawn.append({n: v[0] for n, v in density.simulate(1).items()})
                data = as_arguments(density, drawn[0], places)
            except (ProblemError, NotImplementedError, RuntimeError) as error:
                return f"the sleep phase cannot draw data from the model: {error}"
    # the second draw had the first as its data, and the same random numbers
    if not all(torch.equal(drawn[0][n], drawn[1][n]) for n in places):
        return "the sleep phase cannot draw data from the model, which reads its data for more than observing them"
    return ""

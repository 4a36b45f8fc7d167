"""The mode: the most probable value of the latents, and of theta with them.

    z_MAP = argmax_z log p_theta(x, z);      as a learner,  argmax_{theta, z} log p_theta(x, z)

A mode depends on the coordinates: that of the constrained values leaves the Jacobian of the transform out. With
minibatches of B of N data under latents that all share, the gradient is unbiased:

    grad log p(z) + (N / B) sum_{i in batch} grad log p(x_i | z)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..density import Density
from ..em_steps import maximise
from ..engine import Draws, EngineError, Run, as_chain, no_sum
from ..laplace import earlier_mode, laplace, starting_points
from ..learning import Learned, TrailWriter, descend, share_of_data
from ..preflight import check_minibatch
from ..settings import check_choice, check_optimizer, check_positive, settings

NEWTON_TO = 50  # dimensions of a datum up to which a Hessian at every step pays
NEWTON_STEPS = 200  # at most; a climb ends by itself, most after about
EXPECTED_STEPS = 20


@settings
class MAP:
    """Climb to the mode; one point, without spread or evidence. As a learner, theta climbs along.

    On all data by damped Newton steps, from several starts for each datum, up to 50 latents in one; L-BFGS from the
    best start beyond, and as a learner. With `batch_size` or `optimizer` by stochastic gradients from the best start.

    space        'constrained': the mode of p(z | x) in the model's own coordinates; 'unconstrained': with the Jacobian
    num_starts   points to climb from; the best two of some prior draws and others as they come
    num_steps    steps of L-BFGS, at most, or of the optimiser; Newton's end by themselves
    batch_size   data for each gradient; None: all
    optimizer    any torch optimiser class, called as optimizer(tensors, lr=learning_rate); None: Newton or L-BFGS on
                 all data, Adam on minibatches
    """

    name: ClassVar[str] = "map"
    space: str = "constrained"
    num_starts: int = 6
    num_steps: int = 1000
    batch_size: int | None = None
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        check_choice(self, "space", ("constrained", "unconstrained"))
        check_positive(self, "learning_rate")
        check_optimizer(self)

    def supports(self, density: Density) -> str:
        if not density.continuous:
            return "the latents are discrete: a point cannot climb; enumeration lists them"
        if density.unlisted:
            return no_sum(density)
        if self.batch_size is not None:
            check_minibatch(density, self.batch_size)
            if not density.batch_plates and density.data_plate is not None:
                inside = [n for n in density.continuous if density.data_plate in density.latents[n].plates]
                if inside:
                    return (
                        f"site {inside[0]!r} lies in the minibatched plate beside global latents: use batch_size=None"
                    )
        return ""

    def sized(self, calls: float, density: Density) -> MAP:
        if self._newton(density):
            return replace(self, num_starts=max(1, int(calls / (EXPECTED_STEPS * (1 + density.dim)))))
        return replace(self, num_steps=max(1, int((calls - 22) / share_of_data(density, self.batch_size))))

    def run(self, density: Density, run: Run) -> Draws:
        start = earlier_mode(density, run)
        alarms: tuple[str, ...] = ()
        if self._newton(density):
            fit = laplace(density, NEWTON_STEPS, start=start, num_starts=self.num_starts, jacobian=self._jacobian)
            u, alarms = fit.mean, (*fit.alarms, *fit.no_modes)
        else:
            u = self._best(density) if start is None else start
            u.requires_grad_()
            for _ in self._climb(density, u, [u], run):
                pass
            u = u.detach()
        return self._answer(density, u, alarms)

    def fit(self, density: Density, run: Run) -> Learned:
        """theta and the latents climb together to the mode of log p_theta(x, z)."""
        with torch.no_grad():
            u = self._best(density).requires_grad_()
        writer = TrailWriter("estimate", 1 if self._whole else self.num_steps)
        for step, value in enumerate(self._climb(density, u, [*density.theta.tensors, u], run)):
            writer.add(step, value)
        with torch.no_grad():
            answer = self._answer(density, u.detach(), ())
        return Learned(writer.trail(), answer, ("the trail is the log joint at the point, not the evidence",))

    @property
    def _jacobian(self) -> bool:
        return self.space == "unconstrained"

    @property
    def _whole(self) -> bool:
        """All data at every step, by a deterministic method."""
        return self.batch_size is None and self.optimizer is None

    def _newton(self, density: Density) -> bool:
        return self._whole and density.dim <= NEWTON_TO

    def _best(self, density: Density) -> Tensor:
        """The best of the starting points, (*batch, D)."""
        return starting_points(density, 1, tries=max(20, self.num_starts))[0].clone()

    def _climb(self, density: Density, u: Tensor, tensors: list[Tensor], run: Run) -> list[float]:
        """Move u and what climbs with it; the objective on the way, in nats over all data."""

        def objective() -> Tensor:
            return density.log_joint(density.rows(u), jacobian=self._jacobian).sum() * density.data_scale

        values: list[float] = []
        if self._whole:

            def told() -> Tensor:
                value = objective()
                values.append(float(value.detach()))
                return value

            maximise(told, tensors, self.num_steps)
        else:
            optimizer = self.optimizer or torch.optim.Adam
            for step, loss in enumerate(
                descend(
                    density, lambda: -objective(), tensors, optimizer, self.learning_rate, self.batch_size,
                    self.num_steps,
                )
            ):  # fmt: skip
                values.append(-loss)
                if not math.isfinite(loss):
                    raise EngineError(f"the log joint became {-loss} at step {step}; try a smaller learning_rate")
                if step % 50 == 49:
                    run.progress("gradient steps", step + 1, self.num_steps)
        if not bool(u.isfinite().all()):
            raise EngineError("the climb left for infinity: the density has no mode that it could find")
        return values

    def _answer(self, density: Density, u: Tensor, alarms: tuple[str, ...]) -> Draws:
        return Draws(as_chain(density.complete(u[None])), "point", state={"mode": u}, alarms=alarms)

"""Deep Markov model: a hidden chain that moves and emits through neural networks, with a recurrent guide.

    z_1 ~ N(0, 1),   z_t ~ N(z_{t-1} + f(z_{t-1}), s(z_{t-1})^2),   x_t ~ N(g(z_t), r^2 I_D),   t = 1..T, N sequences
    q(z_t | z_{t-1}, x_{t..T}) = N(m(z_{t-1}, h_t), v(z_{t-1}, h_t)^2),   h_t = tanh(W x_t + U h_{t+1})

The latent has one dimension, so that a filter and a smoother on a grid give the truth at any theta: with weights w,

    a_t(i) = p(x_t | z_i) sum_j w a_{t-1}(j) p(z_i | z_j),    p(z_t = z_i | x) ~ a_t(i) b_t(i)

Source: Krishnan, Shalit & Sontag 2017, arXiv:1609.09869.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn import functional

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, Reference

from . import _settings

GRID_EDGE, GRID_POINTS = 12.0, 1201  # odd: every other point makes the coarse grid
LEAST_SCALE = 0.2  # of a transition: several points of the grid


class Step(nn.Module):
    """The mean and the sd of z_t, from z_{t-1} and perhaps what the guide has seen."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, hidden), nn.Linear(hidden, 2)

    def forward(self, z: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = z[..., None] if seen is None else torch.cat([z[..., None], seen], -1)
        move, raw = self.outer(torch.tanh(self.inner(inputs))).unbind(-1)
        return z + move, LEAST_SCALE + functional.softplus(raw)


class Networks(nn.Module):
    """What the model is made of: transition and emission."""

    def __init__(self, data_dim: int, hidden: int) -> None:
        super().__init__()
        self.step = Step(1, hidden)
        self.inner, self.outer = nn.Linear(1, hidden), nn.Linear(hidden, data_dim)

    def emit(self, z: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(z[..., None])))


class Recogniser(nn.Module):
    """What the guide is made of: a recursion back over the data, and a step of the chain given it."""

    def __init__(self, data_dim: int, hidden: int) -> None:
        super().__init__()
        self.read, self.recall = nn.Linear(data_dim, hidden), nn.Linear(hidden, hidden)
        self.step = Step(1 + hidden, hidden)

    def seen(self, x: Tensor) -> list[Tensor]:
        """h_t of all t, each (N, hidden)."""
        h = [torch.tanh(self.read(x[:, -1]))]
        for t in range(x.shape[1] - 2, -1, -1):
            h.append(torch.tanh(self.read(x[:, t]) + self.recall(h[-1])))
        return h[::-1]


def problem(
    *, num_data: int = 3, num_steps: int = 6, data_dim: int = 2, hidden: int = 8, noise: float = 0.5, seed: int = 0
) -> Problem:
    """N sequences of T observations in D dimensions, made by networks of their own draw.

    theta is the networks of the model, `model.*`, and `noise`; phi is `guide.*`. Both start at random, not at the
    truth. The latents are z_0 .. z_{T-1}, the data x (N, T, D). Raises `ProblemError` on a setting out of range.
    """
    n, steps = _settings.count("num_data", num_data), _settings.count("num_steps", num_steps, 2)
    d, width = _settings.count("data_dim", data_dim), _settings.count("hidden", hidden)
    r = _settings.number("noise", noise, above=0.0)
    start = _settings.seed("seed", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        truth, networks = Networks(d, width).double(), Networks(d, width).double()
        recogniser = Recogniser(d, width).double()
        with torch.no_grad():
            truth.inner.weight.mul_(2.0)
            truth.outer.weight.mul_(4.0)
            x = _make_data(n, steps, truth, r)

    def model(x: Tensor) -> None:
        pyro.module("model", networks)
        sd = pyro.param("noise", lambda: x.new_tensor(r), constraint=constraints.positive)
        with pyro.plate("data", x.shape[0]):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = (x.new_zeros(()), x.new_ones(())) if z is None else networks.step(z)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, scale))
                pyro.sample(f"x_{t}", dist.Normal(networks.emit(z), sd).to_event(1), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pyro.module("guide", recogniser)
        with pyro.plate("data", x.shape[0]):
            z = x.new_zeros(x.shape[0])
            for t, seen in enumerate(recogniser.seen(x)):
                z = pyro.sample(f"z_{t}", dist.Normal(*recogniser.step(z, seen)))

    def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
        own = {n.removeprefix("model."): v.detach().double() for n, v in parameters.items() if n.startswith("model.")}
        return _reference(networks, own, parameters["noise"].detach().double(), x.double())

    return Problem(model, args=(x,), guide=guide, reference=reference, name="deep_markov")


def _make_data(n: int, steps: int, networks: Networks, r: float) -> Tensor:
    z, rows = torch.randn(n, dtype=torch.float64), []
    for t in range(steps):
        if t:
            loc, scale = networks.step(z)
            z = loc + scale * torch.randn_like(z)
        emitted = networks.emit(z)
        rows.append(emitted + r * torch.randn_like(emitted))
    return torch.stack(rows, 1)


def _reference(networks: Networks, own: Mapping[str, Tensor], noise: Tensor, x: Tensor) -> Reference:
    """Smoothed moments and evidence on a grid, with the error of twice its step."""
    grid = torch.linspace(-GRID_EDGE, GRID_EDGE, GRID_POINTS, dtype=torch.float64)
    step = {n.removeprefix("step."): v for n, v in own.items() if n.startswith("step.")}
    loc, scale = torch.func.functional_call(networks.step, step, (grid,))
    emitted = functional.linear(
        torch.tanh(functional.linear(grid[:, None], own["inner.weight"], own["inner.bias"])),
        own["outer.weight"],
        own["outer.bias"],
    )
    transition = dist.Normal(loc[:, None], scale[:, None]).log_prob(grid)  # (from, to)
    likelihood = dist.Normal(emitted, noise).to_event(1).log_prob(x[:, :, None])  # (N, T, G)
    prior = dist.Normal(0.0, 1.0).log_prob(grid)
    fine = _smooth(grid, prior, transition, likelihood)
    coarse = _smooth(grid[::2], prior[::2], transition[::2, ::2], likelihood[..., ::2])
    error = [(a - b).abs() for a, b in zip(fine, coarse, strict=True)]
    names = [f"z_{t}" for t in range(x.shape[1])]

    def by_site(moments: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, moments.unbind(1), strict=True))

    return Reference(
        "quadrature",
        mean=by_site(fine[0]),
        sd=by_site(fine[1]),
        mean_error=by_site(error[0]),
        sd_error=by_site(error[1]),
        log_evidence=Evidence(fine[2], error[2], "estimate"),
        provenance=f"filter on a grid of {GRID_POINTS} points to +-{GRID_EDGE:g}; error from twice the step",
    )


def _smooth(grid: Tensor, prior: Tensor, transition: Tensor, likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means and sds (N, T) of the z_t, and log evidence (N,); likelihood (N, T, G)."""
    width = grid[1] - grid[0]
    move = transition.exp() * width
    n, steps, points = likelihood.shape
    top = likelihood.amax(-1)
    seen = (likelihood - top[..., None]).exp()
    forward: list[Tensor] = []
    log_evidence = top.sum(1)
    for t in range(steps):
        a = (prior.exp() * width if t == 0 else forward[-1] @ move) * seen[:, t]
        total = a.sum(1)
        log_evidence = log_evidence + total.log()
        forward.append(a / total[:, None])
    backward = [likelihood.new_ones(n, points)]
    for t in range(steps - 1, 0, -1):
        b = (seen[:, t] * backward[-1]) @ move.T
        backward.append(b / b.amax(1, keepdim=True))
    weight = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
    weight = weight / weight.sum(2, keepdim=True)
    mean = weight @ grid
    return mean, (weight * (grid - mean[..., None]).square()).sum(2).sqrt(), log_evidence

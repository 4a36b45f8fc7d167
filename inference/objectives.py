"""What a guide is fitted to: bounds on the evidence of each datum, and estimates of their gradients.

    w_k = p_theta(x, z_k) / q_phi(z_k | x),   z_k ~ q_phi(z | x),   k = 1..K, for each datum

    elbo    mean_k log w_k                        Kingma & Welling 2014, arXiv:1312.6114
    stl     the same, its gradient without the score of phi           Roeder et al. 2017, arXiv:1703.09194
    iwae    log mean_k w_k                        Burda et al. 2016, arXiv:1509.00519
    dreg    the same, doubly reparameterised in phi                   Tucker et al. 2019, arXiv:1810.04152
    vimco   the same, with a baseline for each draw                   Mnih & Rezende 2016, arXiv:1602.06725
    renyi   log mean_k w_k^(1 - alpha) / (1 - alpha)                  Li & Turner 2016, arXiv:1602.02311

    enumerated   sum_z q(z | x) (log p(x, z) - log q(z | x)), over every z of a guide of discrete latents: the ELBO
                 without noise

Weights belong to a datum, never to the data set: a joint weight would be the product over all data. Each loss is a pure
function of tensors. Its value is minus the bound; its gradient is unbiased for that of the bound's mean, in theta and
in phi.
"""

from __future__ import annotations

import difflib
import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .density import Density
from .engines.enumeration import every_value
from .guides import Guide
from .problem import ProblemError

OBJECTIVES = ("elbo", "iwae", "dreg", "stl", "renyi", "vimco", "enumerated")
PATHWISE = ("dreg", "stl")  # need draws that are reparameterised
LINEAR = ("elbo", "stl", "enumerated")  # in log w: so also right where log w is itself an unbiased estimate


def check_objective(engine: Any) -> None:
    """Raises `ProblemError` on an unknown objective, and on settings that it does not have or cannot work with."""
    name, objective, alpha = type(engine).__name__, engine.objective, engine.alpha
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(str(objective).lower(), OBJECTIVES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(OBJECTIVES)}."
        raise ProblemError(f"{name}(objective={objective!r}): {hint}")
    if objective == "vimco" and engine.num_particles < 2:
        raise ProblemError(f"{name}(objective='vimco') needs num_particles >= 2: each draw is judged by the others.")
    if alpha is None:
        return
    if objective != "renyi":
        raise ProblemError(f"{name}(alpha={alpha!r}) belongs to objective='renyi'; {objective!r} has no alpha.")
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not math.isfinite(float(alpha)):
        raise ProblemError(f"{name}(alpha={alpha!r}): expected a number.")


def loss(density: Density, guide: Guide, count: int, objective: str = "elbo", alpha: float = 0.5) -> Tensor:
    """An estimate of minus the objective of all data, from `count` draws for each datum; () in nats."""
    if objective in PATHWISE:
        return -pathwise(density, guide, count, objective) * density.data_scale
    if objective == "enumerated":
        return -enumerated(density, guide).sum() * density.data_scale
    z, log_q, log_score = guide.draw(count)
    log_w = density.log_joint(z, jacobian=not guide.point) - log_q
    if objective == "elbo" or (objective == "renyi" and alpha == 1):
        if log_score is not None:
            log_w = with_gradient(log_w, log_w + _beside_the_others(log_w.detach()) * log_score)
        return -log_w.sum() * (density.data_scale / count)
    bound = log_mean(log_w, alpha if objective == "renyi" else 0.0)
    if log_score is not None:
        # each draw has a say in the whole bound; what the bound would be without it may be taken off
        signal = bound.detach()
        if objective == "vimco":
            signal = signal - without_each(log_w.detach())
        bound = with_gradient(bound, bound + (signal * log_score).sum(0))
    return -bound.sum() * density.data_scale


def enumerated(density: Density, guide: Guide) -> Tensor:
    """The ELBO of each datum, (*batch), summed over every value of the latents, which the guide samples all."""
    values = every_value(density)
    log_q = guide.log_prob(values)
    return weighted(log_q.exp(), density.log_joint(values) - log_q)


def log_mean(log_w: Tensor, alpha: float = 0.0) -> Tensor:
    """log mean_k w_k^(1 - alpha) / (1 - alpha): (K, *batch) -> (*batch); at alpha = 1 its limit, mean_k log w_k."""
    if alpha == 1:
        return log_w.mean(0)
    power = 1.0 - alpha
    return (torch.logsumexp(power * log_w, 0) - math.log(len(log_w))) / power


def without_each(log_w: Tensor) -> Tensor:
    """log mean_j w_j with w_k replaced by the geometric mean of the others, for each k: (K, *batch) -> (K, *batch).
    It does not depend on draw k. Mnih & Rezende 2016, arXiv:1602.06725."""
    count = len(log_w)
    own = torch.eye(count, dtype=torch.bool, device=log_w.device).reshape(count, count, *[1] * (log_w.dim() - 1))
    others = torch.where(own, 0.0, log_w).sum(1, keepdim=True) / (count - 1)
    return torch.logsumexp(torch.where(own, others, log_w), 1) - math.log(count)


def _beside_the_others(value: Tensor) -> Tensor:
    """Each draw's value less the mean of the others', which its score does not depend on; (K, *batch)."""
    count = len(value)
    return value if count == 1 else (value - value.mean(0)) * (count / (count - 1))


def pathwise(density: Density, guide: Guide, count: int, objective: str) -> Tensor:
    """The bound, summed over data, (), whose gradient leaves out the score of phi.

    theta   sum_k a_k grad log p_theta(x, z_k),               a = w / sum w (dreg), 1 / K (stl)
    phi     sum_k b_k (d log w_k / dz_k) (dz_k / dphi),       b = a^2 (dreg), 1 / K (stl)

    The derivative in z is taken at values cut off from phi, so whatever phi is (networks, sites that depend on one
    another), its direct path into log q is stopped and the path through every z is kept.
    """
    z, _, _ = guide.draw(count)
    path = {"u": z} if isinstance(z, Tensor) else {n: v for n, v in z.items() if v.is_floating_point()}
    cut = {n: v.detach().requires_grad_() for n, v in path.items()}
    here: Any = cut["u"] if isinstance(z, Tensor) else {**z, **cut}
    log_p, log_q = density.log_joint(here), guide.log_prob(here)
    log_w = (log_p - log_q).detach()
    if objective == "dreg":
        bound, a = log_mean(log_w), torch.softmax(log_w, 0)
        b = a.square()
    else:
        bound, a = log_w.mean(0), torch.full_like(log_w, 1 / count)
        b = a
    slopes = torch.autograd.grad((b * (log_p - log_q)).sum(), list(cut.values()), retain_graph=True, allow_unused=True)
    moved = [(s * path[n]).sum() for n, s in zip(cut, slopes, strict=True) if s is not None]
    surrogate = weighted(a, log_p).sum() + sum(moved)
    return with_gradient(bound.sum(), surrogate)


def weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """sum_k weights_k terms_k, (*batch). A draw of weight zero may have a term of minus infinity: it counts for
    nothing."""
    return torch.where(weights > 0, weights * terms, torch.zeros_like(terms)).sum(0)


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of the first with the gradient of the second."""
    return value.detach() + (surrogate - surrogate.detach())

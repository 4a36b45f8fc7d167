"""Probabilistic principal component analysis: a linear decoder under normal latents.

    z_i ~ N(0, I_k),   x_i ~ N(W z_i + mu, sigma^2 I_D),   i = 1..N

    posterior   z_i | x_i ~ N(M^-1 W' (x_i - mu), sigma^2 M^-1),   M = W'W + sigma^2 I_k
    evidence    x_i ~ N(mu, W W' + sigma^2 I_D)
    learning    mu = mean(x), sigma^2 = mean of the D - k smallest eigenvalues of the sample covariance,
                W = U (L - sigma^2 I)^(1/2) R from the k largest (L, U), with any rotation R

Source: Tipping and Bishop (1999), "Probabilistic principal component analysis", doi:10.1111/1467-9868.00196.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Later, Problem, ProblemError, Reference

from . import _draws, _settings

BENCH = {"num_data": 50}  # settings that it joins a benchmark with


def problem(
    *,
    num_data: int = 200,
    data_dim: int = 5,
    latent_dim: int = 2,
    noise: float = 1.0,
    data: Tensor | None = None,
    seed: int = 0,
) -> Problem:
    """N points in D dimensions around a k-dimensional plane, to be learned from a small random W.

    The true components are orthogonal with lengths k, k - 1 .. 1, and the noise has sd `noise`. By default the
    eigenvalues are 5, 2, 1, 1, 1, apart but not large, where EM is fast (1e-8 within 100 steps): its rate tends to
    1 both as eigenvalues meet and as the noise vanishes. `data` (N, D) is used in place of all this where given.
    The guide is linear with a full covariance: it holds the exact posterior, and starts there.
    theta is `W` (D, k), `mu` (D), `sigma` ().

    Raises `ProblemError` on a setting out of range; k < D is needed for the noise to be told from the plane.
    """
    n, k = _settings.count("num_data", num_data, 2), _settings.count("latent_dim", latent_dim)
    sd = _settings.number("noise", noise, above=0.0)
    generator = _settings.generator("seed", seed)
    d = _settings.count("data_dim", data_dim, 2) if data is None else _settings.data_matrix("data", data).shape[1]
    if k >= d:
        raise ProblemError(f"latent_dim={k} must be smaller than the {d} dimensions of the data.")
    x = _make_data(n, d, k, sd, generator) if data is None else data.double()
    start = {
        "W": 0.5 * torch.randn(d, k, generator=generator, dtype=torch.float64),
        "mu": torch.zeros(d, dtype=torch.float64),
        "sigma": torch.ones((), dtype=torch.float64),
    }
    weight, covariance = posterior_map(start["W"], start["sigma"])
    bias = torch.zeros(k, dtype=torch.float64)  # -weight @ mu
    guide_start = {"weight": weight, "bias": bias, "scale_tril": torch.linalg.cholesky(covariance)}

    def model(x: Tensor) -> None:
        W = pyro.param("W", start["W"].clone)
        mu = pyro.param("mu", start["mu"].clone)
        sigma = pyro.param("sigma", start["sigma"].clone, constraint=constraints.positive)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(W.new_zeros(W.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.T + mu, sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("weight", guide_start["weight"].clone)
        bias = pyro.param("bias", guide_start["bias"].clone)
        scale_tril = pyro.param("scale_tril", guide_start["scale_tril"].clone, constraint=constraints.lower_cholesky)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.MultivariateNormal(x @ weight.T + bias, scale_tril=scale_tril))

    return Problem(model, args=(x,), guide=guide, reference=reference, name="ppca", m_step=m_step)


def posterior_map(W: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """A (k, D) and V (k, k) with z | x ~ N(A (x - mu), V), which does not depend on x otherwise."""
    M = W.T @ W + sigma.square() * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    covariance = sigma.square() * torch.linalg.inv(M)
    return torch.linalg.solve(M, W.T), covariance


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """Posterior and evidence per datum in closed form; x (N, D), z (N, k)."""
    W, mu, sigma = (parameters[name].double() for name in ("W", "mu", "sigma"))
    x = x.double()
    weight, covariance = posterior_map(W, sigma)
    mean = (x - mu) @ weight.T
    marginal = W @ W.T + sigma.square() * torch.eye(W.shape[0], dtype=W.dtype)
    return Reference(
        "exact",
        mean={"z": mean},
        sd={"z": covariance.diagonal().sqrt().expand_as(mean)},
        log_evidence=Evidence(dist.MultivariateNormal(mu, marginal).log_prob(x), torch.zeros(()), "exact"),
        provenance="closed form, Tipping and Bishop (1999), doi:10.1111/1467-9868.00196",
        draws=Later(lambda: {"z": mean + _draws.normal(*mean.shape) @ torch.linalg.cholesky(covariance).T}),
    )


def maximum_likelihood(x: Tensor, latent_dim: int) -> tuple[dict[str, Tensor], float]:
    """The theta of greatest likelihood, by eigendecomposition (R = I), and its total log-likelihood in nats.

    log L = -N/2 (D log 2 pi + sum_{j<=k} log l_j + (D - k) log sigma^2 + D), with eigenvalues l_1 >= l_2 >= ..

    Raises `ProblemError` unless 1 <= k < D.
    """
    n, d = x.shape
    if not 1 <= latent_dim < d:
        raise ProblemError(f"latent_dim={latent_dim}: expected 1 to {d - 1} for data of {d} dimensions.")
    mu = x.mean(0)
    eigenvalues, vectors = torch.linalg.eigh((x - mu).T @ (x - mu) / n)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    large, variance = eigenvalues[:latent_dim], eigenvalues[latent_dim:].mean()
    W = vectors[:, :latent_dim] * (large - variance).sqrt()
    log_determinant = large.log().sum() + (d - latent_dim) * variance.log()
    log_likelihood = -n / 2 * (d * math.log(2 * math.pi) + log_determinant + d)
    return {"W": W, "mu": mu, "sigma": variance.sqrt()}, float(log_likelihood)


def m_step(draws: Mapping[str, Tensor], weights: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The regression of x on (z, 1) under the weights; draws['z'] (S, N, k), weights (S, N).

        B = (sum_i x_i E[t_i]') (sum_i E[t_i t_i'])^-1 with t = (z, 1) and B = (W, mu)
        sigma^2 = (sum_i |x_i|^2 - tr(B' sum_i x_i E[t_i]')) / (N D)

    Solved about the mean of x, for precision; W, mu and sigma are the joint maximiser of the expected log joint.
    """
    z = draws["z"]
    centre = x.mean(0)
    y = x - centre
    t = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    second = torch.einsum("sn,sni,snj->ij", weights, t, t)
    cross = y.T @ torch.einsum("sn,sni->ni", weights, t)
    B = torch.linalg.solve(second, cross.T).T
    variance = (y.square().sum() - (B * cross).sum()) / y.numel()
    return {"W": B[:, :-1], "mu": B[:, -1] + centre, "sigma": variance.sqrt()}


def _make_data(n: int, d: int, k: int, noise: float, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = torch.linalg.qr(normal(d, k)).Q * torch.arange(k, 0, -1, dtype=torch.float64)
    return normal(n, k) @ W.T + 1.0 + noise * normal(n, d)

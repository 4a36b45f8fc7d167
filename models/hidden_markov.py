"""Hidden Markov model: a chain of discrete states, seen through noise.

    z_1 ~ Categorical(initial),   z_t ~ Categorical(transition[z_{t-1}]),   t = 1..T, for each of N sequences
    x_t ~ N(locs[z_t], diag(scales[z_t])^2)          emissions='normal'
    x_t ~ Categorical(emission[z_t])                 emissions='categorical'

    evidence    the forward algorithm: a_t(j) = p(x_t | z_t = j) sum_i a_{t-1}(i) transition[i, j],  p(x) = sum_j a_T(j)
    posterior   p(z_t = j | x) = a_t(j) b_t(j) / p(x), with b_t(i) = sum_j transition[i, j] p(x_{t+1} | j) b_{t+1}(j)
    learning    Baum-Welch: initial, transition and emissions from the expected counts of states and of pairs

Sources: Baum, Petrie, Soules & Weiss 1970, doi:10.1214/aoms/1177697196; Rabiner 1989, doi:10.1109/5.18626.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings

MOST_LISTED = 2**14  # state sequences, of which the reference lists the weights
SMOKE = {"num_steps": 6}  # settings that it joins a smoke test with


def problem(
    *,
    num_data: int = 4,
    num_steps: int = 8,
    num_states: int = 3,
    emissions: str = "normal",
    data_dim: int = 1,
    num_symbols: int = 4,
    separation: float = 2.0,
    stay: float = 0.8,
    seed: int = 0,
) -> Problem:
    """N sequences of T observations of a chain of K states.

    emissions    'normal', in `data_dim` dimensions with centres `separation` apart, or 'categorical', of `num_symbols`
    stay         the true chance to remain in a state

    theta is `initial` (K), `transition` (K, K) and `locs`, `scales` (K, D) or `emission` (K, M), starting away from
    the truth. The latents are z_0 .. z_{T-1}; the data x (N, T, D), or (N, T) symbols.
    Raises `ProblemError` on a setting out of range.
    """
    n, steps = _settings.count("num_data", num_data), _settings.count("num_steps", num_steps, 2)
    k, d = _settings.count("num_states", num_states, 2), _settings.count("data_dim", data_dim)
    symbols = _settings.count("num_symbols", num_symbols, 2)
    apart = _settings.number("separation", separation, least=0.0)
    kind = _settings.choice("emissions", emissions, ("normal", "categorical"))
    remain = _settings.number("stay", stay, above=0.0)
    if remain >= 1:
        raise ProblemError(f"stay={stay!r}: expected a probability below 1.")
    generator = _settings.generator("seed", seed)

    def rows(*shape: int, spread: float) -> Tensor:
        return torch.softmax(spread * torch.randn(*shape, generator=generator, dtype=torch.float64), -1)

    off = (1 - remain) / (k - 1)
    truth = {
        "initial": torch.full((k,), 1 / k, dtype=torch.float64),
        "transition": torch.full((k, k), off, dtype=torch.float64).fill_diagonal_(remain),
    }
    start = {"initial": truth["initial"], "transition": rows(k, k, spread=0.2)}
    if kind == "normal":
        truth["locs"] = apart * torch.arange(k, dtype=torch.float64)[:, None].expand(k, d)
        truth["scales"] = torch.ones(k, d, dtype=torch.float64)
    else:
        truth["emission"] = rows(k, symbols, spread=1.5)
        start["emission"] = rows(k, symbols, spread=0.3)
    x = _make_data(n, steps, truth, generator)
    if kind == "normal":
        flat = x.reshape(-1, d).sort(0).values
        spots = ((torch.arange(k) + 0.5) / k * len(flat)).long()
        start["locs"], start["scales"] = flat[spots], x.reshape(-1, d).std(0).clamp_min(0.1).expand(k, d)

    def model(x: Tensor) -> None:
        initial, transition = (
            pyro.param(name, start[name].clone, constraint=constraints.simplex) for name in ("initial", "transition")
        )
        if kind == "normal":
            locs = pyro.param("locs", start["locs"].clone)
            scales = pyro.param("scales", start["scales"].clone, constraint=constraints.positive)
        else:
            emission = pyro.param("emission", start["emission"].clone, constraint=constraints.simplex)
        with pyro.plate("data", x.shape[0]):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
                if kind == "normal":
                    pyro.sample(f"x_{t}", dist.Normal(locs[z], scales[z]).to_event(1), obs=x[:, t])
                else:
                    pyro.sample(f"x_{t}", dist.Categorical(emission[z]), obs=x[:, t])

    return Problem(model, args=(x,), reference=reference, name="hidden_markov", m_step=partial(m_step, num_states=k))


def _make_data(n: int, steps: int, theta: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    def chosen(probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    z, columns = chosen(theta["initial"].expand(n, -1)), []
    for t in range(steps):
        z = chosen(theta["transition"][z]) if t else z
        if "emission" in theta:
            columns.append(chosen(theta["emission"][z]))
        else:
            noise = torch.randn(n, theta["locs"].shape[1], generator=generator, dtype=torch.float64)
            columns.append(theta["locs"][z] + theta["scales"][z] * noise)
    return torch.stack(columns, 1)


def log_likelihoods(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """log p(x_t | z_t = j) of each state, (N, T, K)."""
    if "emission" in parameters:
        return parameters["emission"].double().log().T[x]
    locs, scales = parameters["locs"].double(), parameters["scales"].double()
    return dist.Normal(locs, scales).to_event(1).log_prob(x.double()[:, :, None])


def reference(parameters: Mapping[str, Tensor], x: Tensor) -> Reference:
    """State marginals (as moments of the index z) and evidence by the forward-backward algorithm; where the state
    sequences are few, their log p(x, z) too, in lexicographic order, (K^T, N)."""
    log_initial, log_transition = parameters["initial"].double().log(), parameters["transition"].double().log()
    likelihood = log_likelihoods(parameters, x)
    n, steps, k = likelihood.shape
    forward = [log_initial + likelihood[:, 0]]
    backward = [torch.zeros(n, k, dtype=torch.float64)]
    for t in range(1, steps):
        forward.append(torch.logsumexp(forward[-1][:, :, None] + log_transition, 1) + likelihood[:, t])
        after = likelihood[:, steps - t] + backward[-1]
        backward.append(torch.logsumexp(log_transition + after[:, None, :], 2))
    evidence = torch.logsumexp(forward[-1], 1)
    marginal = (torch.stack(forward, 1) + torch.stack(backward[::-1], 1) - evidence[:, None, None]).exp()
    index = torch.arange(k, dtype=torch.float64)
    mean = marginal @ index
    sd = (marginal * (index - mean[..., None]).square()).sum(-1).sqrt()
    listed = None
    if k**steps <= MOST_LISTED:
        listed = log_initial + likelihood[:, 0]  # (N, sequences so far, last state)
        listed = listed[:, None]
        for t in range(1, steps):
            listed = listed.reshape(n, -1, k)[..., None] + log_transition + likelihood[:, t, None, None]
            listed = listed.reshape(n, -1, k)
        listed = listed.reshape(n, -1).T.contiguous()
    return Reference(
        "exact",
        mean={f"z_{t}": mean[:, t] for t in range(steps)},
        sd={f"z_{t}": sd[:, t] for t in range(steps)},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        provenance="forward-backward algorithm",
        log_weights=listed,
    )


def m_step(
    draws: Mapping[str, Tensor], weights: Tensor, x: Tensor, *, num_states: int, marginals: Any = None
) -> dict[str, Tensor]:
    """Expected counts, normalised; from the exact `marginals` of an E-step that has them (states (N, T, K) and pairs
    summed over time (N, K, K)), else from weighted draws of z_t (S, N), weights (S, N).

    Raises `ProblemError` where a state has no data, or all its weight on equal data.
    """
    if marginals is not None:
        single, pairs = marginals.single, marginals.pairs.sum(0)  # (N, T, K), (K, K)
    else:
        one_hot = torch.nn.functional.one_hot(
            torch.stack([draws[f"z_{t}"] for t in range(x.shape[1])], 2).long(), num_states
        ).to(weights.dtype)  # (S, N, T, K)
        single = torch.einsum("sn,sntk->ntk", weights, one_hot)
        pairs = torch.einsum("sn,snti,sntj->ij", weights, one_hot[:, :, :-1], one_hot[:, :, 1:])
    total = single.sum((0, 1))  # (K,)
    initial, leaving = single[:, 0].sum(0), pairs.sum(1)
    if not bool((leaving > 0).all()):
        bare = int((~(leaving > 0)).nonzero()[0])
        raise ProblemError(f"state {bare} holds no data: start elsewhere (seed) or use fewer states (num_states).")
    found = {"initial": initial / initial.sum(), "transition": pairs / leaving[:, None]}
    flat = single.reshape(-1, num_states)
    if not x.is_floating_point():
        symbols = torch.nn.functional.one_hot(x.reshape(-1)).to(flat.dtype)
        return {**found, "emission": flat.T @ symbols / total[:, None]}
    rows = x.reshape(len(flat), -1)
    locs = flat.T @ rows / total[:, None]
    centre = rows.mean(0)  # for precision
    second = flat.T @ (rows - centre).square() / total[:, None]
    variance = second - (locs - centre).square()
    bad = ~(variance > 1e-12 * second).all(1)
    if bool(bad.any()):
        raise ProblemError(f"state {int(bad.nonzero()[0])} holds equal data only: start elsewhere (seed).")
    return {**found, "locs": locs, "scales": variance.sqrt()}

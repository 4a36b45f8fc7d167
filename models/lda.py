"""Latent Dirichlet allocation so small that it is exact: topics of words, shares of topics, and a topic for each word.

    topics_k ~ Dirichlet(seeds_k),   shares_d ~ Dirichlet(alpha),   z_dn ~ Categorical(shares_d),
    word_dn ~ Categorical(topics_{z_dn})

    p(z, words) = prod_d DirMult(counts of topics in d; alpha) prod_k DirMult(counts of words under k; seeds_k)

Topics and shares are integrated out in closed form, which leaves a sum over the K^(D N) ways to give words their
topics; given these, topics and shares are Dirichlet. The seeds favour other words for each topic, so that the labels
are identified. Source: Blei, Ng and Jordan (2003), jmlr.org/papers/v3/blei03a.html; the sum, Griffiths and Steyvers
(2004), doi:10.1073/pnas.0307752101.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrometer.inference.posterior import Evidence
from pyrometer.inference.problem import Problem, ProblemError, Reference

from . import _settings

MOST_WAYS = 2**18  # to give words their topics, that are listed
ALPHA, SEED, FAVOURED = 0.8, 0.5, 1.5  # concentrations of shares, of words, and what a topic's own words have more


def problem(
    *, num_documents: int = 3, num_words: int = 4, num_topics: int = 2, vocabulary: int = 4, seed: int = 0
) -> Problem:
    """D documents of N words each, from K topics over V words, simulated with the seed; there is no theta.

    The sites are `topics` (K, V), `shares` (D, K) and `z` (D, N). The reference is 'exact' where the K^(D N) ways to
    give words their topics are at most 2^18, else 'none'. Raises `ProblemError` on a setting out of range.
    """
    d, n = _settings.count("num_documents", num_documents), _settings.count("num_words", num_words)
    k, v = _settings.count("num_topics", num_topics, 2), _settings.count("vocabulary", vocabulary, 2)
    if v < k:
        raise ProblemError(f"vocabulary={v} is less than num_topics={k}: each topic favours words of its own.")
    generator = _settings.generator("seed", seed)
    seeds = SEED + FAVOURED * (torch.arange(v) % k == torch.arange(k)[:, None]).double()  # (K, V)
    likely = seeds / seeds.sum(1, keepdim=True)
    z = torch.randint(k, (d, n), generator=generator)
    words = torch.multinomial(likely[z].reshape(-1, v), 1, generator=generator).reshape(d, n)

    def model(words: Tensor) -> None:
        with pyro.plate("topic", k, dim=-1):
            topics = pyro.sample("topics", dist.Dirichlet(seeds))
        with pyro.plate("documents", words.shape[0], dim=-2):
            shares = pyro.sample("shares", dist.Dirichlet(torch.full((k,), ALPHA, dtype=torch.float64)))  # (D, 1, K)
            with pyro.plate("words", words.shape[1], dim=-1):
                z = pyro.sample("z", dist.Categorical(shares), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(topics[z]), obs=words)

    truth = reference(words, seeds) if k ** (d * n) <= MOST_WAYS else None
    return Problem(model, args=(words,), reference=truth, name="lda")


def reference(words: Tensor, seeds: Tensor) -> Reference:
    """Moments of all three sites and the log evidence; words (D, N), seeds (K, V)."""
    (d, n), (k, v) = words.shape, seeds.shape
    each = torch.arange(k)
    z = torch.cartesian_prod(*[each] * (d * n)).reshape(-1, d, n)  # (A, D, N)
    chosen = torch.nn.functional.one_hot(z, k).double()  # (A, D, N, K)
    said = torch.nn.functional.one_hot(words, v).double()  # (D, N, V)
    shares = ALPHA + chosen.sum(2)  # (A, D, K): posterior concentrations
    topics = seeds + torch.einsum("adnk,dnv->akv", chosen, said)  # (A, K, V)
    log_joint = _log_beta(shares).sum(1) + _log_beta(topics).sum(1)
    log_joint = log_joint - d * _log_beta(torch.full((k,), ALPHA, dtype=torch.float64)) - _log_beta(seeds).sum()
    evidence = torch.logsumexp(log_joint, 0)
    weight = (log_joint - evidence).exp()
    average = lambda values: torch.tensordot(weight, values, 1)  # noqa: E731
    mean, square = {"z": average(z.double())}, {"z": average(z.double().square())}
    for name, concentration in (("topics", topics), ("shares", shares)):
        total = concentration.sum(-1, keepdim=True)
        mean[name] = average(concentration / total)
        square[name] = average(concentration * (concentration + 1) / (total * (total + 1)))
    return Reference(
        "exact",
        mean=mean,
        sd={name: (square[name] - mean[name].square()).clamp_min(0).sqrt() for name in mean},
        log_evidence=Evidence(evidence, torch.zeros(()), "exact"),
        provenance=f"enumeration of {k}^{d * n} = {len(z)} ways to give words their topics",
    )


def _log_beta(concentration: Tensor) -> Tensor:
    """log of the Dirichlet's normaliser, over the last dimension."""
    return torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1))

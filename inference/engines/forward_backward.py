"""Exact posterior and evidence of a chain of discrete latents, by the forward-backward algorithm.

    a_t(j) = sum_i a_{t-1}(i) p(z_t = j | z_{t-1} = i) p(x_t | z_t = j),      p(x) = sum_j a_T(j)

linear in the chain's length, where listing all paths is exponential in it. Draws are independent and exact, chosen from
the end backwards (Scott 2002, doi:10.1198/016214502753479464). As the E-step of `EM`, with a closed M-step that takes
`marginals`, it makes Baum-Welch (Baum, Petrie, Soules & Weiss 1970, doi:10.1214/aoms/1177697196).
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch

from ..chain_sums import marginals, native, sampled
from ..density import Density
from ..engine import Draws, EngineError, Run, as_chain, seed_all
from ..markov import Chain, NotAChain
from ..posterior import Evidence
from ..settings import settings


@settings
class ForwardBackward:
    """Sum over all states of a chain of discrete latents, found from the program; each sequence of a plate for itself.

    num_samples  independent draws of whole paths
    """

    name: ClassVar[str] = "forward_backward"
    num_samples: int = 1000

    def sized(self, calls: float, density: Density) -> Self:
        return self  # one run of the program, whatever is asked for

    def supports(self, density: Density) -> str:
        try:
            _chain(density)
        except NotAChain as error:
            return str(error)
        return ""

    def expect(self, density: Density, run: Run) -> Draws:
        """The marginals and the evidence alone, without draws: what an exact M-step needs."""
        batch = tuple(density.batch_shape)
        factors = _chain(density).factors(often=True)
        code, why_not = native(factors)
        found, total = marginals(factors, batch, code)
        _check(total)
        evidence = _evidence(total, density)
        return Draws({}, "iid", log_evidence=evidence, marginals=found, notes=(why_not,) if why_not else ())

    def run(self, density: Density, run: Run) -> Draws:
        seed_all(run.child(0).seed)
        chain = _chain(density)
        factors = chain.factors()
        code, why_not = native(factors)
        paths, total = sampled(factors, self.num_samples, code)
        _check(total)
        values = density.complete(chain.values(paths))
        return Draws(
            as_chain(values),
            "iid",
            log_evidence=_evidence(total, density),
            notes=(why_not,) if why_not else (),
        )


def _evidence(total: torch.Tensor, density: Density) -> Evidence:
    """Of the sums over all paths, in which padding counts once for each state."""
    value = total.reshape(density.batch_shape)
    return Evidence((value - density.log_idle().to(value)).cpu(), torch.zeros(()), "exact")


def _chain(density: Density) -> Chain:
    if "chain" not in density.kept:
        density.kept["chain"] = Chain(density)
    return density.kept["chain"]


def _check(total: torch.Tensor) -> None:
    bad = (~total.isfinite()).flatten().nonzero().flatten().tolist()
    if bad:
        raise EngineError(f"no path of states has a positive, defined density for {len(bad)} data, first {bad[:5]}")

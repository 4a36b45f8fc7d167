"""sbi's Monte Carlo ABC: all simulations at once, in torch's own float32; the nearest are kept."""

from __future__ import annotations

from functools import partial
from types import ModuleType

from ..record import Kept, Plan
from . import Prepared, Tool


def abc(regression: bool, case: ModuleType, plan: Plan) -> Prepared:
    import torch
    from sbi.inference import MCABC
    from torch.distributions import MultivariateNormal

    prior = MultivariateNormal(torch.zeros(case.DIM), torch.eye(case.DIM))
    observed = torch.from_numpy(case.data()["x"]).float()

    def simulator(theta: torch.Tensor) -> torch.Tensor:
        return theta + case.NOISE * torch.randn_like(theta)

    method = MCABC(simulator, prior, simulation_batch_size=None, show_progress_bars=False)
    count, share = case.NUM_SIMULATIONS, case.NUM_SAMPLES / case.NUM_SIMULATIONS

    def called(seed: int) -> Kept:
        torch.manual_seed(seed)
        return Kept(count, method(observed, count, quantile=share, lra=regression).numpy())

    return Prepared(called, called)


REQUIRES = {"sbi": "sbi", "torch": "torch"}

TOOLS = [
    Tool("sbi", "abc", REQUIRES, "float32", partial(abc, False), compiles=False),
    Tool("sbi-regression", "abc", REQUIRES, "float32", partial(abc, True), compiles=False),
]

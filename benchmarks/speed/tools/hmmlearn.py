"""hmmlearn's Baum-Welch, in C++ with scaled sums."""

from __future__ import annotations

import time
from types import ModuleType

import numpy as np

from ..record import Plan, Steps
from . import Prepared, Tool


def chain(case: ModuleType, plan: Plan) -> Prepared:
    from hmmlearn.hmm import GaussianHMM

    start, count = case.start(), case.NUM_STEPS
    x = start["x"]

    def fitted(steps: int) -> tuple[float, GaussianHMM]:
        model = GaussianHMM(
            len(start["initial"]), "diag", n_iter=steps, tol=-np.inf, covars_prior=0.0, init_params="",
            implementation="scaling",
        )  # fmt: skip
        model.startprob_, model.transmat_ = start["initial"], start["transition"]
        model.means_, model.covars_ = start["locs"], start["scales"] ** 2
        begin = time.perf_counter()
        model.fit(x)
        return time.perf_counter() - begin, model

    def called(seed: int) -> Steps:
        setup, _ = fitted(1)  # what is not a step: checks, the start
        seconds, model = fitted(count)
        return Steps(count, -float(model.score(x)) / len(x), seconds=(seconds - setup) / (count - 1) * count)

    return Prepared(called, called)


TOOLS = [Tool("hmmlearn", "chain", {"hmmlearn": "hmmlearn.hmm"}, "float64", chain, compiles=False)]

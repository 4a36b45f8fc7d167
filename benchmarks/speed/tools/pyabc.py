"""pyABC's sequential ABC on one core: each simulation a call of Python, so that it is given few of them."""

from __future__ import annotations

import logging
from types import ModuleType

import numpy as np

from ..record import Kept, Plan
from . import Prepared, Tool

SHARE = 100  # of the simulations that others run, one in so many


def abc(case: ModuleType, plan: Plan) -> Prepared:
    import pyabc

    logging.getLogger("ABC").setLevel(logging.ERROR)
    names = [f"theta_{k}" for k in range(case.DIM)]
    observed, count = case.data(), case.NUM_SIMULATIONS // SHARE

    def simulator(theta: dict[str, float]) -> dict[str, np.ndarray]:
        return {"x": np.array([theta[n] for n in names]) + case.NOISE * np.random.normal(size=case.DIM)}

    def distance(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(((x["x"] - y["x"]) ** 2).sum()))

    def called(seed: int) -> Kept:
        np.random.seed(seed % 2**32)
        prior = pyabc.Distribution(**{n: pyabc.RV("norm", 0.0, 1.0) for n in names})
        population = min(case.NUM_SAMPLES, count // 10)
        method = pyabc.ABCSMC(simulator, prior, distance, population, sampler=pyabc.SingleCoreSampler())
        method.new("sqlite://", observed)  # in memory
        history = method.run(max_total_nr_simulations=count)
        frame, weights = history.get_distribution()
        used = history.total_nr_simulations
        return Kept(used, frame[names].to_numpy(), np.asarray(weights), note=f"its error is after {used:,} simulations")

    return Prepared(called, called)


TOOLS = [Tool("pyabc", "abc", {"pyabc": "pyabc"}, "float64", abc, compiles=False)]

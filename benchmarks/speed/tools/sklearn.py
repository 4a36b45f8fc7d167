"""scikit-learn's EM, in numpy and scipy."""

from __future__ import annotations

import time
import warnings
from types import ModuleType

import numpy as np

from ..record import Plan, Steps
from . import Prepared, Tool


def mixture(case: ModuleType, plan: Plan) -> Prepared:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    start = case.start()
    x, count = start["x"], case.NUM_STEPS
    precisions = np.linalg.inv(start["scale_trils"] @ start["scale_trils"].swapaxes(1, 2))

    def fitted(steps: int, seed: int) -> tuple[float, GaussianMixture]:
        model = GaussianMixture(
            len(start["weights"]), tol=0.0, reg_covar=0.0, max_iter=steps, init_params="random_from_data",
            weights_init=start["weights"], means_init=start["locs"], precisions_init=precisions, random_state=seed,
        )  # fmt: skip
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # so many steps were asked for
            model.fit(x)
        return time.perf_counter() - begin, model

    def called(seed: int) -> Steps:
        setup, _ = fitted(1, seed)  # what is not a step: checks, the start, the last assignment
        seconds, model = fitted(count, seed)
        return Steps(count, -float(model.score(x)), seconds=(seconds - setup) / (count - 1) * count)

    return Prepared(called, called)


TOOLS = [Tool("scikit-learn", "mixture", {"scikit-learn": "sklearn"}, "float64", mixture, compiles=False)]

"""What importance weights say of the evidence."""

from __future__ import annotations

import numpy as np


def evidence(log_weights: np.ndarray) -> tuple[float, float]:
    """log of the mean weight in nats, and its standard error by the delta method; log_weights (S,)."""
    log_weights = np.asarray(log_weights, dtype=float)
    largest = log_weights.max()
    weights = np.exp(log_weights - largest)
    mean = weights.mean()
    return float(largest + np.log(mean)), float(weights.std() / mean / np.sqrt(len(weights)))

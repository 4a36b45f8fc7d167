"""Baum-Welch on a hidden Markov model of five states: a sequence of 10,000 normal observations, from equal starts."""

from __future__ import annotations

from typing import Any

import numpy as np

KIND = "chain"
ROWS, STATES = 10_000, 5
NUM_STEPS = 50


def problem() -> Any:
    from pyrometer.models import hidden_markov

    return hidden_markov.problem(num_data=1, num_steps=ROWS, num_states=STATES)


def start() -> dict[str, np.ndarray]:
    """The data (T, 1), and where every tool starts, by the names of the problem's parameters."""
    import pyro
    import torch

    program = problem()
    (x,) = program.args
    with pyro.get_param_store().scope(), torch.no_grad():
        program.model(x[:, :2])
        values = {name: value.numpy().copy() for name, value in pyro.get_param_store().items()}
    return {"x": x[0].numpy(), **values}

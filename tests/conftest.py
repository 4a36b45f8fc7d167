"""What all tests share: a parameter store of their own, and one thread, so that a machine's cores change no number."""

from __future__ import annotations

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_param_store():
    """No test sees another's `pyro.param`s."""
    with pyro.get_param_store().scope():
        yield

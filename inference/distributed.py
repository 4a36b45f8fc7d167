"""Learning on several processes: each sees its rows of every minibatch, and what they find is averaged.

    g = sum_w (B_w / B) g_w,    g_w the gradient from the B_w rows of process w, scaled to stand for all data

which is the gradient from all B rows. Started by `torchrun`, with `torch.distributed.init_process_group` before
`learn`; the processes then hold the same theta after every step. Li et al. 2020, doi:10.14778/3415478.3415530.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, distributed

from .problem import ProblemError


def processes() -> int:
    """How many learn together; 1 where there is no process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share(rows: Tensor) -> Tensor:
    """The rows that this process sees. Raises `ProblemError` where there are fewer than processes."""
    if len(rows) < processes():
        raise ProblemError(
            f"{processes()} processes cannot share {len(rows)} rows: take a larger batch_size, or fewer processes."
        )
    return rows[distributed.get_rank() :: processes()]


def average(tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
    """sum_w weight_w tensor_w over the processes, for each tensor; the same on all of them."""
    flat = torch.cat([tensor.reshape(-1) * weight for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def own_noise() -> Iterator[torch.Generator | None]:
    """Inside, each process draws numbers of its own; yields the generator of what all must draw alike (minibatches).

    With one process nothing changes, and that is torch's own (None). What all draw afterwards is alike again.
    """
    if processes() == 1:
        yield None
        return
    common, ahead = torch.Generator(), torch.Generator()
    for generator in (common, ahead):
        generator.set_state(torch.get_rng_state())
    word = int(torch.randint(2**63 - 1, (), generator=ahead))
    seed = np.random.SeedSequence([word, distributed.get_rank()]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed) >> 1)
    try:
        yield common
    finally:
        torch.set_rng_state(common.get_state())

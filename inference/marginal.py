"""Summing discrete latents out of a trace in which they were enumerated, by Pyro's tensor variable elimination."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode


def enumerated_trace(model: Callable[..., Any], args: Any, kwargs: Any, max_plate_nesting: int) -> Any:
    """The model's trace with every discrete latent that has no value set to all of its support, in parallel."""
    program = poutine.enum(config_enumerate(model, "parallel"), first_available_dim=-1 - max_plate_nesting)
    with _DataIsDetached():
        return poutine.trace(program).get_trace(*args, **kwargs)


class _DataIsDetached(TorchFunctionMode):
    """Pyro's enumeration reads `value.data` for its shape, which vmap forbids; `detach` is the same to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _safe_log(x: Tensor) -> Tensor:
    """log x, with gradient zero where x is zero. Pyro's own is an autograd function, which vmap cannot enter."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x > 0, x.clamp_min(tiny).log(), -math.inf)


@mock.patch("pyro.ops.einsum.torch_log.safe_log", _safe_log)
def sum_out(trace: Any, batch: list[str], scaled: tuple[str, float] | None = None) -> Tensor:
    """The log probability of an enumerated trace, with all plates but the batch's multiplied together, (*batch).

    batch   names of the batch plates, left to right
    scaled  a plate that stands for more data than it holds, and by how much: what is inside counts so often
    Source: Obermeyer et al. 2019, arXiv:1902.03210.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            ordinal = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            factors.setdefault(ordinal, []).append(site["packed"]["log_prob"])
    sum_dims = set(trace.symbol_to_dim) - set(symbols.values())
    if scaled is not None and scaled[1] != 1.0:
        plate = symbols[scaled[0]]
        parts = [
            (weight, OrderedDict((o, t) for o, t in factors.items() if (plate in o) == inside))
            for inside, weight in ((True, scaled[1]), (False, 1.0))
        ]
        return sum(weight * contract_to_tensor(part, sum_dims, frozenset()) for weight, part in parts if part)
    # packing drops dimensions of size one, so that plates of one element must not be asked for
    frames = [f for site in trace.nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"]]
    single = {symbols[f.name] for f in frames if f.vectorized and f.size == 1}
    merged: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for ordinal, terms in factors.items():
        merged.setdefault(ordinal - single, []).extend(terms)
    wanted = [symbols[name] for name in batch]
    total = contract_to_tensor(merged, sum_dims, frozenset(wanted) - single)
    total = total.permute([total._pyro_dims.index(symbol) for symbol in wanted if symbol not in single])
    sizes = iter(total.shape)
    return total.reshape([1 if symbol in single else next(sizes) for symbol in wanted])

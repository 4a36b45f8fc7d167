"""Functions of one draw over many draws: by vmap, in chunks that fit in memory, compiled where there are many.

vmap refuses some of what programs draw from; here is what it draws instead, from the same laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

_CHUNK = 2**23  # numbers that a vmapped run holds at once, roughly: bounds memory, not results
_COMPILE_FROM = 2**26  # from this many numbers on, a run over draws is compiled and takes them
_BLOCK = 2**18  # so many at a time: they stay in the processor's cache

# In-place random operations act on a fresh, unbatched tensor, which vmap refuses: the same draws, out of place. Of a
# binomial's arguments vmap wants both batched.
_OUT_OF_PLACE: dict[Any, Callable[..., Tensor]] = {
    Tensor.normal_: lambda t, mean=0.0, std=1.0, **_: (
        torch.randn_like(t) if (mean, std) == (0.0, 1.0) else torch.randn_like(t) * std + mean
    ),
    Tensor.uniform_: lambda t, low=0.0, to=1.0, **_: torch.rand_like(t) * (to - low) + low,
    Tensor.exponential_: lambda t, lambd=1.0, **_: -torch.log1p(-torch.rand_like(t)) / lambd,
    Tensor.clamp_: lambda t, *args, **kwargs: t.copy_(t.clamp(*args, **kwargs)),  # in effect still in place
    torch.binomial: lambda count, probs, *args: torch.binomial(count + 0 * probs, probs + 0 * count, *args),
    Tensor.cauchy_: lambda t, median=0.0, sigma=1.0, **_: (
        median + sigma * torch.tan(torch.pi * (torch.rand_like(t) - 0.5))
    ),
}


class _OutOfPlaceRandomness(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _OUT_OF_PLACE.get(func, func)(*args, **(kwargs or {}))


def log_gammas(shape: Tensor) -> Tensor:
    """Logs of draws from Gamma(shape, 1): gamma(a) = gamma(a + 1) U^(1/a), so that small shapes do not underflow."""
    uniform = torch.rand_like(shape).clamp_min(torch.finfo(shape.dtype).tiny)
    return torch._standard_gamma(shape + 1).log() + uniform.log() / shape


class _DirichletByGammas:
    """torch's Dirichlet draws through an autograd function that vmap cannot enter; gammas give the same law."""

    @staticmethod
    def apply(concentration: Tensor) -> Tensor:
        return torch.softmax(log_gammas(concentration), -1)


class _DrawOutOfPlace(Messenger):
    """Draws at sample statements out of place: a mode that stands around the whole program makes it twice as slow."""

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and msg["value"] is None and not msg["done"] and not site_is_subsample(msg):
            msg["value"] = out_of_place(msg["fn"], *msg["args"], **msg["kwargs"])


def out_of_place(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """A draw from a distribution, out of place."""
    with _OutOfPlaceRandomness():
        return fn(*args, **kwargs)


@contextmanager
def batched_randomness(anywhere: bool = False) -> Iterator[None]:
    """Let `torch.func.vmap(..., randomness='different')` draw from any distribution it can, at sample statements, or
    `anywhere` in a program, as a simulator may that has no density."""
    everywhere = _OutOfPlaceRandomness() if anywhere else _DrawOutOfPlace()
    with everywhere, mock.patch("torch.distributions.dirichlet._Dirichlet", _DirichletByGammas):
        yield


Flat = Callable[..., tuple[Tensor, ...]]


def chunk_of(count: int, numel: int) -> tuple[int, bool]:
    """How many of the draws to take at a time, of so many numbers each, and whether compiling pays."""
    many = count * numel >= _COMPILE_FROM
    return max(1, (_BLOCK if many else _CHUNK) // numel), many and not torch.is_grad_enabled()


def over_draws(
    function: Callable[[Any], Any],
    inputs: Any,
    count: int,
    *,
    vectorised: bool,
    chunk: int,
    random: bool,
    anywhere: bool = False,
    compile: Callable[[Flat, list[tuple[Tensor, ...]]], Flat] | None = None,
) -> Any:
    """Apply a function of one draw along the first dimension of its inputs (a tensor or a dict of tensors): by vmap,
    `chunk` draws at a time, or in a loop where the program cannot be batched. `random`: the function draws,
    `anywhere`: not at sample statements alone.
    `compile` (function of tensors, example arguments -> the same, faster) is used where there are chunks enough."""

    def row(i: int) -> Any:
        return inputs[i] if isinstance(inputs, Tensor) else {n: v[i] for n, v in inputs.items()}

    if count == 1:  # vmap costs more than it saves
        return tree_map(lambda t: t[None], function(row(0)))
    if vectorised:
        mapped = torch.func.vmap(function, chunk_size=min(chunk, count), randomness="different" if random else "error")
        try:
            with batched_randomness(anywhere) if random else nullcontext():
                if count > chunk and not torch.is_grad_enabled():
                    return _in_chunks(mapped, inputs, count, chunk, compile if count > 2 * chunk else None)
                return mapped(inputs)
        except RuntimeError:  # a distribution that vmap cannot draw from
            if not random:
                raise
    rows = [function(row(i)) for i in range(count)]
    return tree_map(lambda *tensors: torch.stack(tensors), *rows)


def _in_chunks(mapped: Callable[[Any], Any], inputs: Any, count: int, chunk: int, compile: Any) -> Any:
    """mapped(inputs), all full chunks by the compiled function where there is to be one."""
    columns, build = tree_flatten(inputs)
    form: list[TreeSpec] = []

    def flat(*rows: Tensor) -> tuple[Tensor, ...]:
        results, spec = tree_flatten(mapped(tree_unflatten(list(rows), build)))
        form[:] = [spec]
        return tuple(results)

    pieces = [tuple(c[start : start + chunk] for c in columns) for start in range(0, count, chunk)]
    run = compile(flat, pieces[:2]) if compile is not None else flat
    whole: list[Tensor] = []  # filled piece by piece: no result is there twice
    for i, piece in enumerate(pieces):
        results = run(*piece) if len(piece[0]) == chunk else flat(*piece)
        whole = whole or [part.new_empty((count, *part.shape[1:])) for part in results]
        for target, part in zip(whole, results, strict=True):
            target[i * chunk : i * chunk + len(part)] = part
    return tree_unflatten(whole, form[0])

"""Joining, cutting and indexing: where elements come from and go to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..shapes import broadcast_shapes
from .arithmetic import where
from .ir import Access, Call, Expr, Loop, Window
from .lower import Lowering, Uniform, UnsupportedError, Value, lowers
from .reductions import heads

MANY = 4  # values for each place, on average, from which on a sum by places beats adding one after the other


def _section(window: Window, dim: int, start: int, length: int, step: int = 1) -> Window:
    shape = (*window.shape[:dim], length, *window.shape[dim + 1 :])
    strides = (*window.strides[:dim], window.strides[dim] * step, *window.strides[dim + 1 :])
    return Window(window.buffer, shape, strides, window.offset + start * window.strides[dim])


@lowers("cat")
def _cat(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, start = lower.scratch(out.shape, out.dtype), 0
    dim = a["dim"] % out.dim()
    for part in a["tensors"]:
        if len(part.shape) != out.dim():
            continue  # torch lets empty vectors join anything
        lower.store(_section(target, dim, start, part.shape[dim]), part)
        start += part.shape[dim]
    return target


@lowers("stack")
def _stack(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, dim = lower.scratch(out.shape, out.dtype), a["dim"] % out.dim()
    for index, part in enumerate(a["tensors"]):
        lower.store(_select(target, dim, index), part)
    return target


def _select(window: Window, dim: int, index: int) -> Window:
    strides = window.strides[:dim] + window.strides[dim + 1 :]
    shape = window.shape[:dim] + window.shape[dim + 1 :]
    return Window(window.buffer, shape, strides, window.offset + index * window.strides[dim])


def _onto(lower: Lowering, base: Value, out: Tensor, parts: list[tuple[Window, Value]], target: Window, dim: int,
          start: int, length: int, step: int = 1) -> Value:  # fmt: skip
    """base everywhere but in a section along dim, which gets the part."""
    size = target.shape[dim] if target.shape else 0
    if step == 1:
        for low, count in ((0, start), (start + length, size - start - length)):
            if count > 0:
                inside = base if isinstance(base, Uniform) else _section(base, dim, low, count)
                section = _section(target, dim, low, count)
                lower.store(section, replace(inside, shape=section.shape) if isinstance(inside, Uniform) else inside)
    else:
        lower.store(target, base)
    for window, part in parts:
        lower.store(window, part, over_base=step != 1)
    return target


@lowers("slice_scatter")
def _slice_scatter(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dim, step = a["dim"] % out.dim(), a["step"]
    start, _, _ = slice(a["start"], a["end"], step).indices(out.shape[dim])
    target, length = lower.scratch(out.shape, out.dtype), a["src"].shape[dim]
    part = _section(target, dim, start, length, step)
    return _onto(lower, a["self"], out, [(part, a["src"])], target, dim, start, length, step)


@lowers("select_scatter")
def _select_scatter(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dim = a["dim"] % out.dim()
    index, target = a["index"] % out.shape[dim], lower.scratch(out.shape, out.dtype)
    return _onto(lower, a["self"], out, [(_select(target, dim, index), a["src"])], target, dim, index, 1)


@lowers("diagonal_scatter")
def _diagonal_scatter(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target = lower.scratch(out.shape, out.dtype)
    lower.store(target, a["self"])
    like = torch.empty(out.shape, device="meta").diagonal(a["offset"], a["dim1"], a["dim2"])
    part = Window(target.buffer, tuple(like.shape), tuple(like.stride()), int(like.storage_offset()))
    lower.store(part, a["src"], over_base=True)
    return target


def _zeros(out: Tensor) -> Uniform:
    return Uniform(0, tuple(out.shape), out.dtype)


lowers("slice_backward")(
    lambda lower, a, out: _slice_scatter(lower, {**a, "self": _zeros(out), "src": a["grad_output"]}, out)
)
lowers("select_backward")(
    lambda lower, a, out: _select_scatter(lower, {**a, "self": _zeros(out), "src": a["grad_output"]}, out)
)
lowers("diagonal_backward")(
    lambda lower, a, out: _diagonal_scatter(lower, {**a, "self": _zeros(out), "src": a["grad_output"]}, out)
)


@lowers("constant_pad_nd")
def _pad(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, source = lower.scratch(out.shape, out.dtype), lower.window(a["self"])
    pads = a["pad"]
    inside, full = source, target
    for position in range(len(pads) // 2):
        dim, before, after = out.dim() - 1 - position, pads[2 * position], pads[2 * position + 1]
        length = source.shape[dim] + min(before, 0) + min(after, 0)
        inside = _section(inside, dim, max(-before, 0), length)
        for low, count in ((0, max(before, 0)), (max(before, 0) + length, max(after, 0))):
            section = _section(full, dim, low, count)
            lower.store(section, Uniform(a["value"], section.shape, out.dtype))
        full = _section(full, dim, max(before, 0), length)
    lower.store(full, inside)
    return target


@lowers("flip")
def _flip(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    source = lower.window(a["self"])
    strides, offset = list(source.strides), source.offset
    for dim in a["dims"]:
        offset += strides[dim] * (source.shape[dim] - 1)
        strides[dim] = -strides[dim]
    return Window(source.buffer, source.shape, tuple(strides), offset)


# -- indexing ----------------------------------------------------------------------------------------------------


def _indexed(lower: Lowering, base: Window, indices: Sequence[Any], shape: tuple[int, ...]) -> Access:
    """The element base[indices] at a point of the result's index space, as `aten.index` orders it."""
    positions = [d for d, index in enumerate(indices) if index is not None]
    if any(indices[d].dtype == torch.bool for d in positions):
        raise UnsupportedError("indexing by truth values")
    space = broadcast_shapes(*[indices[d].shape for d in positions])
    together = positions == list(range(positions[0], positions[-1] + 1))
    first = positions[0] if together else 0
    others = [d for d in range(len(base.shape)) if d not in positions]
    offset, strides = base.offset, [0] * len(shape)
    for place, d in zip([i for i in range(len(shape)) if not first <= i < first + len(space)], others, strict=True):
        strides[place] = base.strides[d]
    indirect: list[tuple[Expr, int, int]] = []
    for d in positions:
        known = _pattern(lower, indices[d], base.shape[d])
        if known is not None:
            start, steps = known
            offset += start * base.strides[d]
            for place, step in enumerate((0,) * (len(space) - len(steps)) + steps):
                strides[first + place] += step * base.strides[d]
            continue
        index, size = lower.within(indices[d], base.shape[d])
        expr = lower.read(index, space, torch.int64)
        if isinstance(expr, Access):
            tail = (0,) * (len(shape) - first - len(space))
            expr = Access(expr.buffer, expr.offset, (0,) * first + expr.strides + tail)
        indirect.append((expr, size, base.strides[d]))
    return Access(base.buffer, offset, tuple(strides), tuple(indirect))


def _pattern(lower: Lowering, index: Value, size: int) -> tuple[int, tuple[int, ...]] | None:
    """start and steps, where a constant index is start + sum steps * position, as an enumerated site's is."""
    if isinstance(index, Uniform):
        return int(index.value) % size if size else 0, (0,) * len(index.shape)
    tensor = lower.constant_of(index)
    if tensor is None or not tensor.numel():
        return None
    if int(tensor.min()) < -size or int(tensor.max()) >= size:
        raise UnsupportedError("an index out of range")
    tensor = tensor % size
    start = int(tensor.flatten()[0])
    steps = tuple(int(tensor.select(d, 1).flatten()[0]) - start if n > 1 else 0 for d, n in enumerate(tensor.shape))
    grid = torch.full_like(tensor, start)
    for d, step in enumerate(steps):
        grid += step * torch.arange(tensor.shape[d]).reshape([-1 if i == d else 1 for i in range(tensor.dim())])
    return (start, steps) if torch.equal(grid, tensor) else None


def _positions(lower: Lowering, indices: Sequence[Any]) -> list[Any]:
    """Indices without truth values: a constant mask is the positions where it is true."""
    found: list[Any] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif (mask := lower.constant_of(index)) is not None:
            found += [lower.constant(places) for places in mask.nonzero(as_tuple=True)]
        else:
            raise UnsupportedError("indexing by truth values that are not constant")
    return found


@lowers("index")
def _index(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    a = {**a, "indices": _positions(lower, a["indices"])}
    if isinstance(a["self"], Uniform):
        return replace(a["self"], shape=tuple(out.shape))
    access = _indexed(lower, a["self"], a["indices"], tuple(out.shape))
    if not access.indirect:
        return Window(access.buffer, tuple(out.shape), access.strides, access.offset)
    return lower.compute(out.shape, access, out.dtype)


def _added(lower: Lowering, base: Value, access_of: Any, values: Any, shape: tuple[int, ...], out: Tensor,
           accumulate: bool) -> Value:  # fmt: skip
    """A copy of base with values put, or added, where access_of(copy) says."""
    if accumulate and out.dtype == torch.bool:
        raise UnsupportedError("adding truth values at indices")
    target = lower.scratch(out.shape, out.dtype)
    lower.store(target, base)
    expr = lower.read(values, shape, out.dtype)
    lower.add(Loop(shape, expr, access_of(target), adds=accumulate, over_base=True))
    return target


def _sums_by_place(lower: Lowering, base: Value, index: Tensor, values: Value, out: Tensor) -> Window:
    """base plus values (..., n), each added at its index of the last dimension (n,): place after place, so that a sum
    stays in a register, where adding one value after the other waits for memory."""
    size, shape = out.shape[-1], (*out.shape[:-1], len(index))
    index = index % size
    order = index.argsort(stable=True)
    ends = lower.hold(torch.bincount(index, minlength=size).cumsum(0))
    sorted_ = torch.equal(order, torch.arange(len(order)))
    source = lower.window(lower.expand(lower.cast(values, out.dtype), shape))
    target = lower.scratch(out.shape, out.dtype)
    lower.store(target, base)
    x, y = (" + ".join(f"i{d} * {s}" for d, s in enumerate(w.strides[:-1])) or "0" for w in (source, target))
    here, place = "j" if sorted_ else "$3[j]", f"$1[{y} + k * {target.strides[-1]}]"
    text = (
        f"{heads(shape[:-1])} {{ int64_t j = 0; for (int64_t k = 0; k < {size}; k++) {{ $T1 sum = {place}; "
        f"for (; j < $2[k]; j++) sum += $0[{x} + {here} * {source.strides[-1]}]; {place} = sum; }} }}"
    )
    lower.steps.append(Call(text, (source, target, ends, ends if sorted_ else lower.hold(order)), (target.buffer,)))
    return target


def _sums(lower: Lowering, index: Value | None, out: Tensor) -> Tensor | None:
    """A constant index of the last dimension, where many values are added to few places; else None."""
    if index is None or len(index.shape) != 1 or not out.dtype.is_floating_point:
        return None
    known = lower.constant_of(index)
    if known is None or known.dtype == torch.bool or len(known) < MANY * out.shape[-1] or not len(known):
        return None
    if _pattern(lower, index, out.shape[-1]) is not None:
        return None
    return known


def _reshaped_scalar(value: Value) -> Value:
    return replace(value, shape=()) if isinstance(value, Uniform) else Window(value.buffer, (), (), value.offset)


@lowers("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    first, values = a["indices"][0], a["values"]
    one = len(a["indices"]) == 1 and first is not None and first.dtype == torch.bool and not a["accumulate"]
    if one and math.prod(values.shape) == 1:  # the same number wherever the mask is true
        mask = lower.window(first)
        more = out.dim() - len(mask.shape)
        mask = Window(mask.buffer, (*mask.shape, *(1,) * more), (*mask.strides, *(0,) * more), mask.offset)
        return where(lower, {"condition": mask, "self": _reshaped_scalar(values), "other": a["self"]}, out)
    a = {**a, "indices": _positions(lower, a["indices"])}
    indices = list(a["indices"]) + [None] * (out.dim() - len(a["indices"]))
    if a["accumulate"] and out.dim() and indices[:-1] == [None] * (out.dim() - 1):
        known = _sums(lower, indices[-1], out)
        if known is not None:
            return _sums_by_place(lower, a["self"], known, values, out)
    like = torch.empty(out.shape, device="meta")[tuple(_meta_index(i) for i in indices)]
    shape = tuple(like.shape)
    return _added(
        lower, a["self"], lambda t: _indexed(lower, t, indices, shape), a["values"], shape, out, a["accumulate"]
    )


def _meta_index(index: Value | None) -> Any:
    return slice(None) if index is None else torch.empty(index.shape, dtype=torch.int64, device="meta")


def _along(lower: Lowering, window: Window, dim: int, index: Value) -> Access:
    """window[.., index[..], ..]: as `gather`."""
    shape = tuple(index.shape)
    size, step = (window.shape[dim], window.strides[dim]) if window.shape else (1, 0)
    strides = ([0 if d == dim else s for d, s in enumerate(window.strides)] or [0])[: len(shape)]
    known = _pattern(lower, index, size)
    if known is not None:
        start, steps = known
        moved = tuple(s + step * k for s, k in zip(strides, steps, strict=True))
        return Access(window.buffer, window.offset + start * step, moved)
    index, checked = lower.within(index, size)
    expr = lower.read(index, shape, torch.int64)
    return Access(window.buffer, window.offset, tuple(strides), ((expr, checked, step),))


@lowers("gather")
def _gather(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if isinstance(a["self"], Uniform):
        return replace(a["self"], shape=tuple(out.shape))
    dim = a["dim"] % max(1, out.dim())
    return lower.compute(out.shape, _along(lower, a["self"], dim, a["index"]), out.dtype)


def _scattering(accumulate: bool) -> Any:
    def operation(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
        if a.get("reduce"):
            raise UnsupportedError("scatter with a reduction")
        dim, shape = a["dim"] % max(1, out.dim()), tuple(a["index"].shape)
        values = a["src"] if "src" in a else a["value"]
        if isinstance(values, Window):
            values = Window(values.buffer, shape, values.strides, values.offset)
        elif isinstance(values, Uniform):
            values = replace(values, shape=shape)
        known = _sums(lower, a["index"], out) if accumulate and out.dim() == 1 else None
        if known is not None:
            return _sums_by_place(lower, a["self"], known, values, out)
        return _added(lower, a["self"], lambda t: _along(lower, t, dim, a["index"]), values, shape, out, accumulate)

    return operation


lowers("scatter")(_scattering(False))
lowers("scatter_add")(_scattering(True))


@lowers("index_select")
def _index_select(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dim = a["dim"] % max(1, out.dim())
    indices = [a["index"] if d == dim else None for d in range(out.dim())]
    return _index(lower, {"self": a["self"], "indices": indices}, out)


@lowers("index_add")
def _index_add(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["alpha"] != 1:
        raise UnsupportedError("index_add with alpha")
    dim = a["dim"] % max(1, out.dim())
    indices = [a["index"] if d == dim else None for d in range(out.dim())]
    return _index_put(lower, {"self": a["self"], "indices": indices, "values": a["source"], "accumulate": True}, out)


@lowers("embedding")
def _embedding(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return _index(lower, {"self": a["weight"], "indices": [a["indices"], None]}, out)

"""The operations that are more than elementwise: arithmetic worth simplifying, reductions, indexing, joining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .ir import Access, Apply, Call, Counter, Expr, Loop, Window
from .lower import Lowering, Uniform, UnsupportedError, Value, lowers


def scalar(value: Any) -> Any:
    """The number, where it is known now; else None."""
    return value.value if isinstance(value, Uniform) else value if isinstance(value, (int, float, bool)) else None


# -- arithmetic: what a known 0, 1 or 2 makes simpler ------------------------------------------------------------


@lowers("mul")
def _mul(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    x, y = a["self"], a["other"]
    for one, other in ((x, y), (y, x)):
        if scalar(one) == 1 and not isinstance(other, (int, float)):
            return lower.expand(lower.cast(other, out.dtype), out.shape)
        if scalar(one) == -1 and not isinstance(other, (int, float)):
            return lower.expand(lower.apply("-{0}", (other,), out.dtype, out.dtype), out.shape)
    return lower.apply("{0} * {1}", (x, y), out.dtype, out.dtype)


def _sum_of(lower: Lowering, x: Any, y: Any, out: Tensor, sign: str, alpha: Any) -> Value:
    """x + alpha y or x - alpha y."""
    if alpha != 1:
        y = lower.apply("{0} * {1}", (y, alpha), out.dtype, out.dtype) if not _number(y) else y * alpha
    if scalar(y) == 0 and not _number(x):
        return lower.expand(lower.cast(x, out.dtype), out.shape)
    if scalar(x) == 0 and not _number(y):
        if sign == "+":
            return lower.expand(lower.cast(y, out.dtype), out.shape)
        return lower.expand(lower.apply("-{0}", (y,), out.dtype, out.dtype), out.shape)
    if out.dtype == torch.bool:
        return lower.apply("{0} | {1}", (x, y), out.dtype, out.dtype)
    return lower.apply(f"{{0}} {sign} {{1}}", (x, y), out.dtype, out.dtype)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, bool))


lowers("add")(lambda lower, a, out: _sum_of(lower, a["self"], a["other"], out, "+", a["alpha"]))
lowers("sub")(lambda lower, a, out: _sum_of(lower, a["self"], a["other"], out, "-", a["alpha"]))
lowers("rsub")(lambda lower, a, out: _sum_of(lower, a["other"], a["self"], out, "-", a["alpha"]))


@lowers("div")
def _div(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    x, y = a["self"], a["other"]
    if a.get("rounding_mode") is not None:  # a quotient that is off by its rounding would be off by one
        raise UnsupportedError("division with rounding")
    if scalar(y) == 1 and not _number(x):
        return lower.expand(lower.cast(x, out.dtype), out.shape)
    return lower.apply("{0} / {1}", (x, y), out.dtype, out.dtype)


@lowers("pow")
def _pow(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    x, y = a["self"], a["exponent"]
    powers = {0.5: "@sqrt({0})", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", -1.0: "1 / {0}", -0.5: "1 / @sqrt({0})"}
    known = scalar(y)
    if known == 0:
        return Uniform(1, tuple(out.shape), out.dtype)
    if known == 1 and not _number(x):
        return lower.expand(lower.cast(x, out.dtype), out.shape)
    if known in powers and not _number(x) and (out.dtype.is_floating_point or known in (2, 3)):
        return lower.expand(lower.apply(powers[known], (x,), out.dtype, out.dtype), out.shape)
    if not out.dtype.is_floating_point:
        raise UnsupportedError("integer power")
    return lower.apply("@pow({0}, {1})", (x, y), out.dtype, out.dtype)


@lowers("where")
def _where(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    condition, x, y = a["condition"], a["self"], a["other"]
    if scalar(condition) is not None:
        return lower.expand(lower.cast(_valued(x if scalar(condition) else y, out), out.dtype), out.shape)
    shape = tuple(out.shape)
    args = (lower.read(condition, shape, torch.bool), lower.read(x, shape, out.dtype), lower.read(y, shape, out.dtype))
    # the condition is read in its own type
    return lower.compute(shape, Apply("({0} ? {1} : {2})", args, out.dtype, out.dtype), out.dtype)


@lowers("masked_fill")
def _masked_fill(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return _where(lower, {"condition": a["mask"], "self": a["value"], "other": a["self"]}, out)


def _valued(value: Any, out: Tensor) -> Value:
    return Uniform(value, tuple(out.shape), out.dtype) if _number(value) else value


@lowers("clamp", "clamp_min", "clamp_max")
def _clamp(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    value, low, high = a["self"], a.get("min"), a.get("max")
    if low is not None:
        value = lower.apply(_bound("maximum", low, out), (value, low), out.dtype, out.dtype)
    if high is not None:
        value = lower.apply(_bound("minimum", high, out), (value, high), out.dtype, out.dtype)
    return lower.expand(lower.cast(value, out.dtype), out.shape)


def _bound(kind: str, bound: Any, out: Tensor) -> str:
    """A number that is a bound is never NaN; an element may be."""
    if out.dtype.is_floating_point and scalar(bound) is None:
        return f"@{kind}({{0}}, {{1}})"
    return f"({{0}} {'<' if kind == 'maximum' else '>'} {{1}} ? {{1}} : {{0}})"


@lowers("_to_copy")
def _to_copy(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return lower.cast(a["self"], out.dtype)


@lowers("copy")
def _copy(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return lower.expand(lower.cast(a["src"], out.dtype), out.shape)


@lowers("binary_cross_entropy_with_logits")
def _cross_entropy(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a.get("weight") is not None or a.get("pos_weight") is not None or a["reduction"] != 0:
        raise UnsupportedError("a weighted cross entropy")
    template = "(1 - {1}) * {0} - ({0} < 0 ? {0} : 0) + @log1p(@exp(-@fabs({0})))"
    return lower.apply(template, (a["self"], a["target"]), out.dtype, out.dtype)


@lowers("gelu")
def _gelu(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["approximate"] != "none":
        raise UnsupportedError("gelu by tanh")
    return lower.apply("{0} * (1 + @erf({0} * 0.70710678118654752)) / 2", (a["self"],), out.dtype, out.dtype)


@lowers("gelu_backward")
def _gelu_backward(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["approximate"] != "none":
        raise UnsupportedError("gelu by tanh")
    slope = "(1 + @erf({1} * 0.70710678118654752)) / 2 + {1} * @exp(-{1} * {1} / 2) * 0.39894228040143268"
    return lower.apply(f"{{0}} * ({slope})", (a["grad_output"], a["self"]), out.dtype, out.dtype)


@lowers("softplus")
def _softplus(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    template = "({0} * {1} > {2} ? {0} : @log1p(@exp({0} * {1})) / {1})"
    return lower.apply(template, (a["self"], a["beta"], a["threshold"]), out.dtype, out.dtype)


@lowers("softplus_backward")
def _softplus_backward(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    template = "({1} * {2} > {3} ? {0} : {0} / (1 + @exp(-{1} * {2})))"
    args = (a["grad_output"], a["self"], a["beta"], a["threshold"])
    return lower.apply(template, args, out.dtype, out.dtype)


@lowers("bitwise_not")
def _bitwise_not(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return lower.apply("!{0}" if out.dtype == torch.bool else "~{0}", (a["self"],), out.dtype, out.dtype)


@lowers("polygamma")
def _polygamma(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["n"] > 1:
        raise UnsupportedError(f"polygamma of order {a['n']}")
    return lower.apply("trigamma({0})" if a["n"] else "digamma({0})", (a["self"],), out.dtype, out.dtype)


def _triangular(lower: Lowering, a: dict[str, Any], out: Tensor, sign: str) -> Value:
    if isinstance(a["self"], Uniform) and a["self"].value == 0:
        return a["self"]
    shape, n = tuple(out.shape), out.dim()
    # the counters are compared as integers: GCC 12 gets it wrong in double, at 5 to 8 columns with AVX-512
    inside = Apply(
        f"{{0}} {sign} {{1}} + ({a['diagonal']})", (Counter(n - 1, 0, 1), Counter(n - 2, 0, 1)), torch.bool, torch.int64
    )
    chosen = Apply("({0} ? {1} : 0)", (inside, lower.read(a["self"], shape, out.dtype)), out.dtype, out.dtype)
    return lower.compute(shape, chosen, out.dtype)


lowers("tril")(lambda lower, a, out: _triangular(lower, a, out, "<="))
lowers("triu")(lambda lower, a, out: _triangular(lower, a, out, ">="))


# -- reductions --------------------------------------------------------------------------------------------------


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)}) if rank else []


def _reduction(lower: Lowering, kind: str, value: Value, dims: list[int], out: Tensor) -> Value:
    """Over dims, shaped as `out` (with or without the reduced dimensions)."""
    shape = tuple(value.shape)
    count = math.prod(shape[d] for d in dims)
    if isinstance(value, Uniform):
        same = lower.cast(value, out.dtype)
        if kind == "sum" and isinstance(same, Uniform):
            return Uniform(same.value * count if count else 0, tuple(out.shape), out.dtype)
        if kind in ("max", "min", "any", "all") and count:
            return replace(same, shape=tuple(out.shape))
    if count == 1:
        flat = [d for d in range(len(shape)) if d not in dims]
        value = lower.cast(value, out.dtype)
        if isinstance(value, Uniform):
            return replace(value, shape=tuple(out.shape))
        kept = Window(value.buffer, tuple(shape[d] for d in flat), tuple(value.strides[d] for d in flat), value.offset)
    else:
        expr = lower.read(value, shape, out.dtype)
        if value.dtype != out.dtype:
            expr = Apply("{0} != 0" if out.dtype == torch.bool else "{0}", (expr,), out.dtype, value.dtype)
        kept = lower.reduce(kind, shape, expr, dims, out.dtype)
    if len(kept.shape) == out.dim():
        return kept
    strides = list(kept.strides)
    for d in dims:
        strides.insert(d, 0)
    return Window(kept.buffer, tuple(out.shape), tuple(strides), kept.offset)


def _register_reduction(name: str, kind: str) -> None:
    @lowers(name)
    def reduction(lower: Lowering, a: dict[str, Any], out: Any) -> Value:
        value = a["self"]
        return _reduction(lower, kind, value, _dims(a.get("dim"), len(value.shape)), out)


for _name, _kind in {"sum": "sum", "amax": "max", "amin": "min", "any": "any", "all": "all", "prod": "prod"}.items():
    _register_reduction(_name, _kind)


@lowers("mean")
def _mean(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dims = _dims(a.get("dim"), len(a["self"].shape))
    total = _reduction(lower, "sum", lower.cast(a["self"], out.dtype), dims, out)
    count = math.prod(a["self"].shape[d] for d in dims)
    return lower.apply("{0} / {1}", (total, count), out.dtype, out.dtype)


def _variance(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if "unbiased" in a:
        raise UnsupportedError("var by its older signature")
    value, dims = a["self"], _dims(a.get("dim"), len(a["self"].shape))
    count = math.prod(value.shape[d] for d in dims)
    like = torch.empty([1 if d in dims else n for d, n in enumerate(value.shape)], dtype=out.dtype, device="meta")
    mean = lower.apply("{0} / {1}", (_reduction(lower, "sum", value, dims, like), count), out.dtype, out.dtype)
    away = lower.apply("({0} - {1}) * ({0} - {1})", (value, mean), out.dtype, out.dtype)
    total = _reduction(lower, "sum", away, dims, out)
    correction = 1 if a.get("correction") is None else a["correction"]
    return lower.apply("{0} / {1}", (total, max(count - correction, 0)), out.dtype, out.dtype)


lowers("var")(_variance)
lowers("std")(lambda lower, a, out: lower.apply("@sqrt({0})", (_variance(lower, a, out),), out.dtype, out.dtype))


@lowers("linalg_vector_norm")
def _vector_norm(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    if a["ord"] != 2:
        raise UnsupportedError(f"a norm of order {a['ord']}")
    value = lower.cast(a["self"], out.dtype)
    squares = lower.apply("{0} * {0}", (value,), out.dtype, out.dtype)
    total = _reduction(lower, "sum", squares, _dims(a.get("dim"), len(value.shape)), out)
    return lower.apply("@sqrt({0})", (total,), out.dtype, out.dtype)


def _extremes(kind: str) -> Any:
    def operation(lower: Lowering, a: dict[str, Any], out: Any) -> Any:
        if isinstance(out, Tensor):
            if "other" in a:
                return lower.apply(
                    f"@{kind}imum({{0}}, {{1}})",
                    (a["self"], a["other"]), out.dtype, out.dtype,
                )  # fmt: skip
            return _reduction(lower, kind, a["self"], list(range(len(a["self"].shape))), out)
        dims = _dims(a["dim"], len(a["self"].shape))
        return _reduction(lower, kind, a["self"], dims, out[0]), _position(lower, kind, a["self"], dims, out[1])

    return operation


lowers("max")(_extremes("max"))
lowers("min")(_extremes("min"))


def _position(lower: Lowering, kind: str, value: Value, dims: list[int], out: Tensor) -> Value:
    """The index of the first largest (smallest) along one dimension."""
    (dim,) = dims or [0]
    shape = tuple(value.shape)
    if not shape or shape[dim] == 1:
        return Uniform(0, tuple(out.shape), torch.int64)
    window = lower.window(value)
    kept = tuple(n for d, n in enumerate(shape) if d != dim)
    target = lower._scratch(kept, torch.int64)
    sign = ">" if kind == "max" else "<"
    moved = [*[s for d, s in enumerate(window.strides) if d != dim], window.strides[dim]]
    x = " + ".join(f"i{d} * {s}" for d, s in enumerate(moved[:-1])) or "0"
    y = " + ".join(f"i{d} * {s}" for d, s in enumerate(target.strides)) or "0"
    new, old = f"$0[{x} + k * {moved[-1]}]", f"$0[{x} + best * {moved[-1]}]"
    text = (  # the first NaN wins
        f"{heads(kept)} {{ int64_t best = 0; for (int64_t k = 1; k < {shape[dim]}; k++) "
        f"if ({new} {sign} {old} || ({new} != {new} && {old} == {old})) best = k; $1[{y}] = best; }}"
    )
    lower.steps.append(Call(text, (window, target), (target.buffer,)))
    strides = list(target.strides)
    if out.dim() == len(shape):
        strides.insert(dim, 0)
    return Window(target.buffer, tuple(out.shape), tuple(strides), 0)


def heads(sizes: Sequence[int], skip: int | None = None) -> str:
    """C text that runs what follows at every point, counters i0, i1 ..."""
    return "".join(f"for (int64_t i{d} = 0; i{d} < {n}; i{d}++) " for d, n in enumerate(sizes) if d != skip)


def _scan(template: str, start: str) -> Any:
    def operation(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
        value, dim = lower.cast(a["self"], out.dtype), a["dim"]
        shape = tuple(value.shape)
        if not shape or math.prod(shape) <= 1:
            return value
        window, target = lower.window(value), lower._scratch(shape, out.dtype)
        dim %= len(shape)
        x = " + ".join(f"i{d} * {s}" for d, s in enumerate(window.strides) if d != dim) or "0"
        y = " + ".join(f"i{d} * {s}" for d, s in enumerate(target.strides) if d != dim) or "0"
        step = template.format(v=f"$0[{x} + k * {window.strides[dim]}]")
        text = (
            f"{heads(shape, skip=dim)} {{ $T1 acc = {start}; for (int64_t k = 0; k < {shape[dim]}; k++) "
            f"{{ acc = {step}; $1[{y} + k * {target.strides[dim]}] = acc; }} }}"
        )
        lower.steps.append(Call(text, (window, target), (target.buffer,)))
        return target

    return operation


lowers("cumsum")(_scan("acc + {v}", "0"))
lowers("cumprod")(_scan("acc * {v}", "1"))


# -- joining and cutting -----------------------------------------------------------------------------------------


def _section(window: Window, dim: int, start: int, length: int, step: int = 1) -> Window:
    shape = (*window.shape[:dim], length, *window.shape[dim + 1 :])
    strides = (*window.strides[:dim], window.strides[dim] * step, *window.strides[dim + 1 :])
    return Window(window.buffer, shape, strides, window.offset + start * window.strides[dim])


@lowers("cat")
def _cat(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, start = lower._scratch(out.shape, out.dtype), 0
    dim = a["dim"] % out.dim()
    for part in a["tensors"]:
        if len(part.shape) != out.dim():
            continue  # torch lets empty vectors join anything
        lower.store(_section(target, dim, start, part.shape[dim]), part)
        start += part.shape[dim]
    return target


@lowers("stack")
def _stack(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, dim = lower._scratch(out.shape, out.dtype), a["dim"] % out.dim()
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
    target, length = lower._scratch(out.shape, out.dtype), a["src"].shape[dim]
    part = _section(target, dim, start, length, step)
    return _onto(lower, a["self"], out, [(part, a["src"])], target, dim, start, length, step)


@lowers("select_scatter")
def _select_scatter(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    dim = a["dim"] % out.dim()
    index, target = a["index"] % out.shape[dim], lower._scratch(out.shape, out.dtype)
    return _onto(lower, a["self"], out, [(_select(target, dim, index), a["src"])], target, dim, index, 1)


@lowers("diagonal_scatter")
def _diagonal_scatter(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target = lower._scratch(out.shape, out.dtype)
    lower.store(target, a["self"])
    like = torch.empty(out.shape, device="meta").diagonal(a["offset"], a["dim1"], a["dim2"])
    part = Window(target.buffer, tuple(like.shape), tuple(like.stride()), int(like.storage_offset()))
    lower.store(part, a["src"], over_base=True)
    return target


def _zeros(lower: Lowering, out: Tensor) -> Uniform:
    return Uniform(0, tuple(out.shape), out.dtype)


lowers("slice_backward")(
    lambda lower, a, out: _slice_scatter(lower, {**a, "self": _zeros(lower, out), "src": a["grad_output"]}, out)
)
lowers("select_backward")(
    lambda lower, a, out: _select_scatter(lower, {**a, "self": _zeros(lower, out), "src": a["grad_output"]}, out)
)
lowers("diagonal_backward")(
    lambda lower, a, out: _diagonal_scatter(lower, {**a, "self": _zeros(lower, out), "src": a["grad_output"]}, out)
)


@lowers("constant_pad_nd")
def _pad(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    target, source = lower._scratch(out.shape, out.dtype), lower.window(a["self"])
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
    space = torch.broadcast_shapes(*[indices[d].shape for d in positions])
    together = positions == list(range(positions[0], positions[-1] + 1))
    first = positions[0] if together else 0
    others = [d for d in range(len(base.shape)) if d not in positions]
    offset, strides = base.offset, [0] * len(shape)
    for place, d in zip([i for i in range(len(shape)) if not first <= i < first + len(space)], others, strict=True):
        strides[place] = base.strides[d]
    indirect: list[tuple[Expr, int, int]] = []
    for d in positions:
        expr = lower.read(indices[d], space, torch.int64)
        known = _pattern(lower, indices[d], base.shape[d])
        if known is not None:
            start, steps = known
            offset += start * base.strides[d]
            for place, step in enumerate((0,) * (len(space) - len(steps)) + steps):
                strides[first + place] += step * base.strides[d]
            continue
        if isinstance(expr, Access):
            tail = (0,) * (len(shape) - first - len(space))
            expr = Access(expr.buffer, expr.offset, (0,) * first + expr.strides + tail)
        indirect.append((expr, base.shape[d], base.strides[d]))
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
            found += [lower._constant(places) for places in mask.nonzero(as_tuple=True)]
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
    target = lower._scratch(out.shape, out.dtype)
    lower.store(target, base)
    expr = lower.read(values, shape, out.dtype)
    lower.add(Loop(shape, expr, access_of(target), adds=accumulate, over_base=True))
    return target


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
        return _where(lower, {"condition": mask, "self": _reshaped_scalar(values), "other": a["self"]}, out)
    a = {**a, "indices": _positions(lower, a["indices"])}
    indices = list(a["indices"]) + [None] * (out.dim() - len(a["indices"]))
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
    expr = lower.read(index, shape, torch.int64)
    return Access(window.buffer, window.offset, tuple(strides), ((expr, size, step),))


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

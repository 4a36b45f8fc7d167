"""Arithmetic worth simplifying: what a known 0, 1 or 2 makes simpler, and operations of several arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ir import Apply, Counter
from .lower import Lowering, Uniform, UnsupportedError, Value, lowers


def scalar(value: Any) -> Any:
    """The number, where it is known now; else None."""
    return value.value if isinstance(value, Uniform) else value if isinstance(value, (int, float, bool)) else None


@lowers("mul")
def _mul(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    x, y = a["self"], a["other"]
    for one, other in ((x, y), (y, x)):
        if scalar(one) == 1 and not isinstance(other, (int, float)):
            return lower.expand(lower.cast(other, out.dtype), out.shape)
        if scalar(one) == -1 and not isinstance(other, (int, float)):
            return lower.expand(lower.apply("-{0}", (other,), out.dtype, out.dtype), out.shape)
    return lower.apply("{0} * {1}", (x, y), out.dtype, out.dtype)


def sum_of(lower: Lowering, x: Any, y: Any, out: Tensor, sign: str, alpha: Any) -> Value:
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


lowers("add")(lambda lower, a, out: sum_of(lower, a["self"], a["other"], out, "+", a["alpha"]))
lowers("sub")(lambda lower, a, out: sum_of(lower, a["self"], a["other"], out, "-", a["alpha"]))
lowers("rsub")(lambda lower, a, out: sum_of(lower, a["other"], a["self"], out, "-", a["alpha"]))


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
def where(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    condition, x, y = a["condition"], a["self"], a["other"]
    if scalar(condition) is not None:
        return lower.expand(lower.cast(_valued(x if scalar(condition) else y, out), out.dtype), out.shape)
    shape = tuple(out.shape)
    args = (lower.read(condition, shape, torch.bool), lower.read(x, shape, out.dtype), lower.read(y, shape, out.dtype))
    # the condition is read in its own type
    return lower.compute(shape, Apply("({0} ? {1} : {2})", args, out.dtype, out.dtype), out.dtype)


@lowers("masked_fill")
def _masked_fill(lower: Lowering, a: dict[str, Any], out: Tensor) -> Value:
    return where(lower, {"condition": a["mask"], "self": a["value"], "other": a["self"]}, out)


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

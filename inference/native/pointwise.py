"""ATen's elementwise operations as C expressions.

`@name` is a C function of the working precision: `exp` in float64, `expf` in float32.
"""

from __future__ import annotations

FLOAT = {  # computed, and returned, in the result's floating-point type
    "acos": "@acos({0})",
    "acosh": "@acosh({0})",
    "asin": "@asin({0})",
    "asinh": "@asinh({0})",
    "atan": "@atan({0})",
    "atan2": "@atan2({0}, {1})",
    "atanh": "@atanh({0})",
    "cos": "@cos({0})",
    "cosh": "@cosh({0})",
    "digamma": "digamma({0})",
    "erf": "@erf({0})",
    "erfc": "@erfc({0})",
    "exp": "@exp({0})",
    "exp2": "@exp2({0})",
    "expm1": "@expm1({0})",
    "lgamma": "log_gamma({0})",
    "log": "@log({0})",
    "log10": "@log10({0})",
    "log1p": "@log1p({0})",
    "log2": "@log2({0})",
    "log_sigmoid_forward": "({0} < 0 ? {0} : 0) - @log1p(@exp(-@fabs({0})))",
    "log_sigmoid_backward": "{0} / (1 + @exp({1}))",
    "logaddexp": "({0} == {1} ? {0} + LN2 : ({0} > {1} ? {0} : {1}) + @log1p(@exp(-@fabs({0} - {1}))))",
    "reciprocal": "1 / {0}",
    "rsqrt": "1 / @sqrt({0})",
    "sigmoid": "1 / (1 + @exp(-{0}))",
    "sigmoid_backward": "{0} * (1 - {1}) * {1}",
    "sin": "@sin({0})",
    "sinh": "@sinh({0})",
    "sqrt": "@sqrt({0})",
    "tan": "@tan({0})",
    "tanh": "@tanh({0})",
    "tanh_backward": "{0} * (1 - {1} * {1})",
    "xlogy": "({1} != {1} ? {1} : {0} == 0 ? 0 : {0} * @log({1}))",
}

SAME = {  # computed in the result's type
    "abs": "({0} < 0 ? -{0} : {0})",
    "ceil": "@ceil({0})",
    "floor": "@floor({0})",
    "maximum": "@maximum({0}, {1})",
    "minimum": "@minimum({0}, {1})",
    "neg": "-{0}",
    "relu": "({0} < 0 ? 0 : {0})",
    "round": "@rint({0})",
    "sgn": "(({0} > 0) - ({0} < 0))",
    "sign": "(({0} > 0) - ({0} < 0))",
    "threshold_backward": "({1} <= {2} ? 0 : {0})",
    "trunc": "@trunc({0})",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}

COMPARE = {  # arguments brought to one type; answers a truth value
    "eq": "{0} == {1}",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "isinf": "({0} == {0} && {0} - {0} != 0)",
    "isnan": "{0} != {0}",
    "le": "{0} <= {1}",
    "logical_and": "({0} != 0) & ({1} != 0)",
    "logical_not": "{0} == 0",
    "logical_or": "({0} != 0) | ({1} != 0)",
    "logical_xor": "({0} != 0) ^ ({1} != 0)",
    "lt": "{0} < {1}",
    "ne": "{0} != {1}",
}

"""The program as C."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .fuse import COMBINE, kept_buffers, schedule
from .ir import C_TYPES, Access, Apply, Buffer, Call, Counter, Expr, Literal, Loop, Nest, Program
from .lower import UnsupportedError, moves
from .prelude import ENTRY, PRELUDE, SAMPLER, TRAINER

SCRATCH_LIMIT = 2**28  # bytes of working memory a thread may need
SOURCE_LIMIT = 4 * 2**20  # characters; a compiler takes some 3 s for each million
STACK = 1024  # numbers that may lie there
SPLIT = 64  # with more nests than this, each is a function: compilers slow down on long ones


def source(program: Program) -> tuple[str, list[str]]:
    """The C text, and the names of the BLAS and LAPACK routines that it takes after the fixed buffers."""
    return _Writer(program).write()


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.nests = schedule(program)
        self.kept = kept_buffers(self.nests) | {w.buffer for w in program.results}
        self.routines: list[str] = []
        self.bytes = self.length = 0  # of working memory, and of the text so far
        self.names = 0
        self.declared: dict[str, str] = {}  # buffer -> how its pointer is made
        given, results = [w.buffer for w in program.arguments], [w.buffer for w in program.results]
        for letter, const, buffers in (("a", "const ", given), ("c", "const ", program.fixed), ("r", "", results)):
            for b in buffers:
                self._declare(b, f"{const}{C_TYPES[b.dtype]}", f"{letter}[{b.index}]")

    def write(self) -> tuple[str, list[str]]:
        split = len(self.nests) > SPLIT
        parts: list[str] = []
        for i, nest in enumerate(self.nests):
            block = self._call(nest) if isinstance(nest, Call) else self._nest(nest)
            if split:
                head = f"static __attribute__((noinline)) int64_t part{i}(void** a, void** r, void** c, char* scratch)"
                block = f"{head} {{\n{self._pointers(block)}{block}return 0;\n}}\n"
            parts.append(block)
            self.length += len(block)
            if self.length > SOURCE_LIMIT:
                raise UnsupportedError("the program unrolls to more operations than a C compiler takes in seconds")
        if self.bytes > SCRATCH_LIMIT:
            raise UnsupportedError(f"working memory of {self.bytes / 2**20:.0f} MB")
        memory = f"static _Thread_local char memory[{max(self.bytes, 64)}] __attribute__((aligned(64)));\n"
        text = [PRELUDE, memory, *(parts if split else ())]
        if split:
            calls = [f"if ((fault = part{i}(a, r, c, scratch))) return fault;\n" for i in range(len(parts))]
            body = "".join(["int64_t fault;\n", *calls])
        else:
            body = "".join(parts)
            body = self._pointers(body) + body
        # the empty instruction keeps the address in a register: compilers would ask for it again at every use
        body = f'char* scratch = memory;\n__asm__("" : "+r"(scratch));\n{body}'
        text.append(f"static int64_t body(void** a, void** r, void** c) {{\n{body}return 0;\n}}\n{ENTRY}")
        if len(self.program.arguments) == 1 and len(self.program.results) == 2:
            size = self.program.results[0].buffer.size
            text.append(SAMPLER % ("static _Thread_local " if size > STACK else "", size, size))
        kinds = {w.dtype for w in self.program.results}
        if self.program.results[:1] and self.program.results[0].shape == () and len(kinds) == 1:
            (dtype,) = kinds
            count, t = len(self.program.arguments), C_TYPES[dtype]
            if dtype.is_floating_point:
                text.append(_suffixed(TRAINER, dtype) % (max(1, count), count, t, t, t, t))
        return "".join(text), self.routines

    def _declare(self, buffer: Buffer, kind: str, place: str) -> None:
        self.declared[buffer.name] = f"{kind}* restrict {buffer.name} = {place};\n"

    def _pointers(self, text: str) -> str:
        """Declarations of the buffers that a text names."""
        used = dict.fromkeys(re.findall(r"\b[acrt]\d+\b", text))
        return "".join(self.declared[name] for name in used if name in self.declared)

    def _pointer(self, buffer: Buffer) -> str:
        if buffer.kind == "scratch" and buffer.name not in self.declared:
            t = _working(buffer.dtype)
            self._declare(buffer, t, f"({t}*)(scratch + {self.bytes})")
            self.bytes += -(-buffer.size * (8 if buffer.dtype == torch.bool else buffer.dtype.itemsize) // 64) * 64
        return buffer.name

    def _name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    # -- calls ---------------------------------------------------------------------------------------------------

    def _call(self, call: Call) -> str:
        for routine in call.routines:
            if routine not in self.routines:
                self.routines.append(routine)

        def fill(match: re.Match[str]) -> str:
            kind, index = match[1], int(match[2])
            if kind == "R":
                place = len(self.program.fixed) + self.routines.index(call.routines[index])
                return f"((void (*)())c[{place}])"
            window = call.windows[index]
            scratch = window.buffer.kind == "scratch"
            t = _working(window.dtype) if scratch else C_TYPES[window.dtype]
            return t if kind == "T" else f"(({t}*){self._pointer(window.buffer)} + {window.offset})"

        return "{ " + re.sub(r"\$([RT]?)(\d)", fill, call.text) + " }\n"

    # -- nests ---------------------------------------------------------------------------------------------------

    def _nest(self, nest: Nest) -> str:
        order = _order(nest)
        sizes, loops = _merged([nest.sizes[d] for d in order], [_permuted(loop, order) for loop in nest.loops])
        rank, scope = len(sizes), _Scope(len(sizes))
        before, inner, computed = scope.before, scope.before[rank], scope.computed
        after: list[list[str]] = [[] for _ in range(rank + 1)]
        prepare: list[str] = []
        independent = True
        for loop in loops:
            t, name = _working(loop.target.dtype), self._name()
            value = self._expr(loop.expr, scope)
            if loop.reduce:
                start = rank  # the trailing loops that are all reduced over
                while start and start - 1 in loop.over:
                    start -= 1
                combine = _suffixed(COMBINE[loop.reduce], loop.target.dtype)
                partial = len(loop.over) > rank - start
                place = self._place(loop.target, scope)
                if partial:
                    prepare.append(self._initial(loop, sizes))
                if start == rank:
                    inner.append(f"{place} = {combine.format(place, f'({value})')};")
                else:
                    before[start].append(f"{t} {name} = {_start(loop)};")
                    inner.append(f"{name} = {combine.format(name, f'({value})')};")
                    after[start].append(f"{place} = {combine.format(place, name) if partial else name};")
            elif loop.adds or loop.target.indirect:
                place = self._place(loop.target, scope)
                independent = False
                inner.append(f"{place} {'+=' if loop.adds else '='} {value};")
            else:
                inner.append(f"const {t} {name} = {value};")
                computed[loop.target] = name
                if loop.target.buffer in self.kept:
                    inner.append(f"{self._place(loop.target, scope)} = {name};")
        text = "\n".join(inner)
        for d in reversed(range(rank)):
            hint = "#pragma GCC ivdep\n" if d == rank - 1 and independent else ""
            head = f"{hint}for (int64_t i{d} = 0; i{d} < {sizes[d]}; i{d}++) {{"
            text = "\n".join([*before[d], head, text, "}", *after[d]])
        return "{\n" + "".join(prepare) + text + "\n}\n"

    def _initial(self, loop: Loop, sizes: list[int]) -> str:
        kept = [d for d in range(len(sizes)) if d not in loop.over]
        heads = "".join(f"for (int64_t i{d} = 0; i{d} < {sizes[d]}; i{d}++) " for d in kept)
        return f"{heads}{self._place(loop.target, _Scope(len(sizes)))} = {_start(loop)};\n"

    def _place(self, access: Access, scope: _Scope) -> str:
        terms = [str(access.offset)] if access.offset or not any(access.strides) else []
        terms += [f"{s} * i{d}" if s != 1 else f"i{d}" for d, s in enumerate(access.strides) if s]
        for index, size, stride in access.indirect:
            terms.append(f"{self._index(index, size, scope)} * {stride}")
        return f"{self._pointer(access.buffer)}[{' + '.join(terms)}]"

    def _index(self, index: Expr, size: int, scope: _Scope) -> str:
        """The name of an index, read and held against its size (0: known to be within) outside the loops that it does
        not move with: a check in a loop keeps it from being vectorised."""
        if (index, size) in scope.indices:
            return scope.indices[index, size]
        name = self._name()
        with scope.outside(index) as lines:
            lines.append(f"int64_t {name} = {self._expr(index, scope)};")
            if size:
                lines.append(f"if ({name} < 0) {name} += {size};")
                lines.append(f"if ((uint64_t){name} >= {size}) return 6;")
        scope.indices[index, size] = name
        return name

    def _expr(self, expr: Expr, scope: _Scope) -> str:
        if isinstance(expr, Access):
            return scope.computed.get(expr) or self._place(expr, scope)
        if isinstance(expr, Literal):
            return _literal(expr.value, expr.dtype)
        if isinstance(expr, Counter):
            return f"({expr.start} + {expr.step} * i{expr.loop})"
        args = []
        for i, arg in enumerate(expr.args):
            text = self._expr(arg, scope)
            # a template may name an argument twice; and what it reads in one branch only, GCC 12 with AVX-512 reads
            # wrongly where memory runs backwards
            chosen = isinstance(arg, Access) and "?" in expr.template and arg not in scope.computed
            if isinstance(arg, Apply) or chosen:
                name = self._name()
                scope.lines.append(f"const {_working(arg.dtype)} {name} = {text};")
                text = name
            condition = f"{{{i}}} ?" in expr.template
            if isinstance(arg, Literal) and not condition:
                text = _literal(arg.value, expr.within)
            elif arg.dtype != expr.within and not condition:
                text = f"(({C_TYPES[expr.within]}){_bracketed(text)})"
            args.append(_bracketed(text))
        return f"({_suffixed(expr.template, expr.within).format(*args)})"


class _Scope:
    """What is being written inside the loops of a nest: before[d] runs before loop d, before[rank] inside all."""

    def __init__(self, rank: int) -> None:
        self.before: list[list[str]] = [[] for _ in range(rank + 1)]
        self.lines = self.before[rank]  # where the next one goes
        self.computed: dict[Access, str] = {}  # at this very point, by its name
        self.indices: dict[tuple[Expr, int], str] = {}

    @contextmanager
    def outside(self, index: Expr) -> Iterator[list[str]]:
        """Lines that run outside the loops that an index does not move with: what a nest computes itself moves with
        all of its loops."""
        kept = self.lines
        self.lines = self.before[max((d + 1 for d in range(len(self.before) - 1) if moves(index, d)), default=0)]
        yield self.lines
        self.lines = kept


def _suffixed(template: str, dtype: torch.dtype) -> str:
    """Functions of the working precision."""
    return re.sub(r"@(\w+)", r"\1f" if dtype == torch.float32 else r"\1", template)


def _working(dtype: torch.dtype) -> str:
    """The C type in registers and scratch memory: truth values are wide, so that loops of them vectorise."""
    return "int64_t" if dtype == torch.bool else C_TYPES[dtype]


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _literal(value: Any, dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        return str(int(value)) if dtype != torch.int64 else f"((int64_t){int(value)})"
    number = float(value)
    if math.isnan(number):
        return f'(({C_TYPES[dtype]})__builtin_nan(""))'
    if math.isinf(number):
        return f"(({C_TYPES[dtype]}){'-' if number < 0 else ''}__builtin_inf())"
    return number.hex() if dtype == torch.float64 else f"((float){number.hex()})"


def _start(loop: Loop) -> str:
    dtype = loop.target.dtype
    if loop.reduce in ("max", "min"):
        if not dtype.is_floating_point:
            raise UnsupportedError(f"{loop.reduce} of integers")
        return _literal(-math.inf if loop.reduce == "max" else math.inf, dtype)
    return {"sum": "0", "prod": "1", "any": "0", "all": "1"}[loop.reduce]


def _order(nest: Nest) -> list[int]:
    """The loops from the outside in: innermost the one along which most memory is contiguous."""
    rank = len(nest.sizes)
    if rank < 2:
        return list(range(rank))
    accesses = {a for loop in nest.loops for a in [*loop.accesses(), loop.target]}

    def score(d: int) -> float:
        good = sum({0: 0.5, 1: 1.0}.get(abs(a.strides[d]), -1.0) for a in accesses)
        return good - (len(accesses) if nest.sizes[d] < 8 else 0)

    last = max(range(rank), key=lambda d: (score(d), d))
    return [d for d in range(rank) if d != last] + [last]


def _permuted(loop: Loop, order: list[int]) -> Loop:
    def move(x: Any) -> Any:
        if isinstance(x, Access):
            return Access(
                x.buffer, x.offset, tuple(x.strides[d] for d in order),
                tuple((move(e), n, s) for e, n, s in x.indirect),
            )  # fmt: skip
        if isinstance(x, Counter):
            return replace(x, loop=order.index(x.loop))
        return replace(x, args=tuple(move(a) for a in x.args)) if isinstance(x, Apply) else x

    over = frozenset(order.index(o) for o in loop.over)
    return Loop(tuple(loop.sizes[d] for d in order), move(loop.expr), move(loop.target), loop.reduce, over, loop.adds)


def _merged(sizes: list[int], loops: list[Loop]) -> tuple[list[int], list[Loop]]:
    """Neighbouring loops as one where every access allows it: longer inner loops."""
    if any(_counts(loop.expr) or _counts(loop.target) for loop in loops):
        return sizes, loops
    d = len(sizes) - 2
    while d >= 0:
        inner = sizes[d + 1]
        accesses = [a for loop in loops for a in [*loop.accesses(), loop.target]]
        if all(a.strides[d] == a.strides[d + 1] * inner for a in accesses) and all(
            (d in loop.over) == (d + 1 in loop.over) for loop in loops
        ):
            sizes = [*sizes[:d], sizes[d] * inner, *sizes[d + 2 :]]
            loops = [_without(loop, d, tuple(sizes)) for loop in loops]
        d -= 1
    return sizes, loops


def _without(loop: Loop, d: int, sizes: tuple[int, ...]) -> Loop:
    """The loop after dimension d went into the next."""

    def drop(x: Any) -> Any:
        if isinstance(x, Access):
            return Access(
                x.buffer, x.offset, x.strides[:d] + x.strides[d + 1 :],
                tuple((drop(e), n, s) for e, n, s in x.indirect),
            )  # fmt: skip
        return replace(x, args=tuple(drop(a) for a in x.args)) if isinstance(x, Apply) else x

    over = frozenset(o - (o > d) for o in loop.over if o != d)
    return Loop(sizes, drop(loop.expr), drop(loop.target), loop.reduce, over, loop.adds)


def _counts(x: Any) -> bool:
    if isinstance(x, Counter):
        return True
    if isinstance(x, Access):
        return any(_counts(e) for e, _, _ in x.indirect)
    return isinstance(x, Apply) and any(_counts(a) for a in x.args)

"""Which loops run together: small ones unrolled, the rest joined where one reads what another has just computed.

Loops over equal index spaces form a nest. A value read at the very point where the same nest computed it stays in a
register, and memory that nobody else reads is never written.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace

from .ir import Access, Apply, Buffer, Call, Expr, Loop, Nest, Program
from .lower import UNROLL, fix

UNROLL_TOTAL = 16  # small dimensions are written out where that makes at most so many copies
LARGEST_NEST = 256  # compilers slow down on functions that are too long

COMBINE = {
    "sum": "{0} + {1}",
    "prod": "{0} * {1}",
    "max": "@maximum({0}, {1})",
    "min": "@minimum({0}, {1})",
    "any": "{0} | {1}",
    "all": "{0} & {1}",
}


def schedule(program: Program) -> list[Nest | Call]:
    """The program as nests and calls, in an order that respects what reads what."""
    steps: list[Loop | Call] = []
    for step in _live(program):
        steps += _unrolled(step) if isinstance(step, Loop) else [step]
    return _Schedule().run(steps)


def _live(program: Program) -> list[Loop | Call]:
    """The steps whose results somebody reads."""
    wanted = {w.buffer for w in program.results}
    kept: list[Loop | Call] = []
    for step in reversed(program.steps):
        if isinstance(step, Call):
            if not step.writes or any(b in wanted for b in step.writes):
                wanted |= {w.buffer for w in step.windows}
                kept.append(step)
        elif step.target.buffer in wanted:
            wanted |= {a.buffer for a in step.accesses()}
            kept.append(step)
    return kept[::-1]


def _unrolled(loop: Loop) -> list[Loop]:
    """The loop with its small dimensions written out."""
    small = [d for d, n in enumerate(loop.sizes) if n <= UNROLL]
    if not small or math.prod(loop.sizes[d] for d in small) > UNROLL_TOTAL:
        return [loop]
    loops = [loop]
    for d in reversed(small):
        loops = [copy for each in loops for copy in _written_out(each, d)]
    return loops


def _written_out(loop: Loop, d: int) -> list[Loop]:
    sizes = loop.sizes[:d] + loop.sizes[d + 1 :]
    over = frozenset(o - (o > d) for o in loop.over if o != d)
    parts = [fix(loop.expr, d, i) for i in range(loop.sizes[d])]
    if d not in loop.over:
        return [
            replace(loop, sizes=sizes, expr=part, target=fix(loop.target, d, i), over=over)
            for i, part in enumerate(parts)
        ]
    total: Expr = parts[0]
    dtype = loop.target.dtype
    for part in parts[1:]:
        total = Apply(COMBINE[loop.reduce], (total, part), dtype, dtype)
    reduce = loop.reduce if over else ""
    return [replace(loop, sizes=sizes, expr=total, target=fix(loop.target, d, 0), over=over, reduce=reduce)]


class _Schedule:
    """Puts each loop into the earliest nest that may hold it."""

    def __init__(self) -> None:
        self.nests: list[Nest | Call] = []
        self.writers: dict[Buffer, list[int]] = {}  # where a buffer is written
        self.readers: dict[Buffer, int] = {}  # the last place where it is read
        self.stores: set[tuple[int, Access]] = set()  # what a nest computes at each point
        self.places: dict[tuple[int, ...], list[int]] = {}  # nests by their sizes

    def run(self, steps: list[Loop | Call]) -> list[Nest | Call]:
        for step in steps:
            if isinstance(step, Call):
                reads, writes, place = {w.buffer for w in step.windows}, step.writes, len(self.nests)
                self.nests.append(step)
            else:
                reads, writes, place = {a.buffer for a in step.accesses()}, (step.target.buffer,), self._place(step)
            for buffer in reads:
                self.readers[buffer] = max(self.readers.get(buffer, -1), place)
            for buffer in writes:
                self.writers.setdefault(buffer, []).append(place)
        return self.nests

    def _place(self, loop: Loop) -> int:
        earliest = 0
        for access in loop.accesses():
            for place in self.writers.get(access.buffer, ()):
                here = (place, access) in self.stores
                earliest = max(earliest, place if here else place + 1)
        if loop.adds or loop.over_base:  # after all that prepared or read the memory
            target = loop.target.buffer
            earliest = max([earliest, self.readers.get(target, -1) + 1, *[p + 1 for p in self.writers.get(target, ())]])
        alone = bool(loop.target.indirect)
        alike = [] if alone else self.places.get(loop.sizes, [])
        for place in alike[bisect_left(alike, earliest) :]:
            nest = self.nests[place]
            if isinstance(nest, Nest) and len(nest.loops) < LARGEST_NEST:
                nest.loops.append(loop)
                break
        else:
            place = len(self.nests)
            self.nests.append(Nest(loop.sizes, [loop]))
            if not alone:
                self.places.setdefault(loop.sizes, []).append(place)
        if not loop.reduce and not loop.adds:
            self.stores.add((place, loop.target))
        return place


def kept_buffers(nests: list[Nest | Call]) -> set[Buffer]:
    """Buffers that somebody reads from memory."""
    kept: set[Buffer] = set()
    for nest in nests:
        if isinstance(nest, Call):
            kept |= {w.buffer for w in nest.windows}
            continue
        computed: set[Access] = set()
        for loop in nest.loops:
            kept |= {a.buffer for a in loop.accesses() if a not in computed}
            if loop.adds:
                kept.add(loop.target.buffer)
            if not loop.reduce and not loop.adds:
                computed.add(loop.target)
    return kept

"""A zoo of plain Pyro programs, each with a second density in numpy and, where it can be had, its exact posterior.

`ZOO` maps a name to a function that makes the `Entry`; `EXACT` are those with marginals and evidence.
"""

from .entry import Entry, Marginal
from .exact import EXACT
from .programs import PROGRAMS

ZOO = EXACT | PROGRAMS

__all__ = ["EXACT", "PROGRAMS", "ZOO", "Entry", "Marginal"]

"""Who is timed: one file for each library, with its `TOOLS`. A file put into this folder is found by `pyrometer speed`.

A tool is one way to use a library for one kind of case. It prepares a case once and then answers with draws, steps or
weights, so that compilation can be told from the work. Each runs in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from ..names import among
from ..record import Answer, Plan

OURS = "pyrometer"


def is_ours(name: str) -> bool:
    """Ourselves, in whichever precision."""
    return name == OURS or name.startswith(f"{OURS}-")


def is_floor(name: str) -> bool:
    """No tool, but the part of the work that none can do without."""
    return name.startswith("products-")


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: each function takes a seed and answers.

    called  as a user of the library calls it a second time in one process, with what it compiles again
    warm    the same work with compilation taken out
    """

    called: Callable[[int], Answer]
    warm: Callable[[int], Answer]


@dataclass(frozen=True)
class Tool:
    """One way to use a library.

    kind         of the cases it runs: one of those that `cases` lists
    requires     installed name -> name to import, of each library
    precision    of its arithmetic, 'float32' or 'float64'
    prepare      (case, plan) -> Prepared; called where the libraries have been imported
    environment  plan -> variables that must stand before they are
    compiles     False: there is nothing to compile, so a process's first answer is as good as any other
    """

    name: str
    kind: str
    requires: Mapping[str, str]
    precision: str
    prepare: Callable[[ModuleType, Plan], Prepared]
    environment: Callable[[Plan], Mapping[str, str]] = lambda plan: {}
    compiles: bool = True

    @property
    def missing(self) -> list[str]:
        """The libraries that are not installed."""
        return [name for name in self.requires if name not in _installed(self.requires)]

    def versions(self) -> dict[str, str]:
        return _installed(self.requires)


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tools() -> list[Tool]:
    """Every tool, ours first, then in the order of files."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [tool for name in modules for tool in importlib.import_module(f"{__name__}.{name}").TOOLS]
    return sorted(found, key=lambda tool: (tool.name != OURS, not is_ours(tool.name)))


def chosen(given: Iterable[str], kinds: Iterable[str]) -> list[Tool]:
    """The tools for these kinds that the names or beginnings of names mean. Raises `ProblemError`."""
    wanted = among(given, list(dict.fromkeys(tool.name for tool in tools())), "tool")
    return [tool for tool in tools() if tool.name in wanted and tool.kind in set(kinds)]


def find(name: str, kind: str) -> Tool:
    return next(tool for tool in tools() if (tool.name, tool.kind) == (name, kind))

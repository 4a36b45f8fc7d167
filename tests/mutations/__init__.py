"""Seeded bugs, each with the test that sees it: a test that no bug fails proves nothing.

A file of this folder holds the bugs of one room. A bug is a table under its name:

    file         where it is planted
    old, new     the lines that are replaced, which stand in the file exactly once, and what takes their place
    why          what is then wrong
    test         the test that fails with it, of those that run by default: a node of pytest
    equivalent   in the place of `test`: why no test can see it

`python -m tests.mutations [NAME ...]` plants them one by one in a copy of the tree and runs the tests that are named;
`test_mutations.py` sees to it that the list still fits the source.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


@dataclass(frozen=True)
class Mutation:
    """One bug. Raises TypeError where a field is missing or unknown, ValueError where it has not one fate."""

    name: str
    file: str
    old: str
    new: str
    why: str
    test: str = ""
    equivalent: str = ""

    def __post_init__(self) -> None:
        if bool(self.test) == bool(self.equivalent):
            raise ValueError(f"{self.name}: name the test that sees it, or say why it is equivalent.")

    def planted(self, root: Path = ROOT) -> str:
        """The file with the bug. Raises ValueError where the old lines do not stand there exactly once."""
        source = (root / self.file).read_text()
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its old lines stand {count} times in {self.file}, not once.")
        return source.replace(self.old, self.new)


def mutations() -> dict[str, Mutation]:
    """All bugs by name, file by file. Raises ValueError where a name is taken twice."""
    found: dict[str, Mutation] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text()).items():
            if name in found:
                raise ValueError(f"{path.name}: {name} is the name of another bug, too.")
            found[name] = Mutation(name, **entry)
    return found

"""The list of seeded bugs fits the source: each can still be planted, in one place, and its test is there and runs by
default. That the tests see them is seen by `python -m tests.mutations`, in half an hour."""

from __future__ import annotations

import ast
from functools import cache

import pytest
from mutations import FOLDER, ROOT, Mutation, mutations

ALL = mutations()
SEEN = {name: m for name, m in ALL.items() if m.test}


@cache
def nodes_of(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((FOLDER.parent / file).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def is_slow(test: ast.FunctionDef) -> bool:
    return any(ast.unparse(mark) == "pytest.mark.slow" for mark in test.decorator_list)


@pytest.mark.parametrize("name", ALL)
def test_a_bug_can_still_be_planted(name):
    mutation = ALL[name]
    planted = mutation.planted()
    assert planted != (ROOT / mutation.file).read_text()
    if mutation.file.endswith(".py"):
        ast.parse(planted)


@pytest.mark.parametrize("name", SEEN)
def test_the_test_of_a_bug_is_there_and_runs_by_default(name):
    file, test = SEEN[name].test.split("::")
    found = nodes_of(file)[test.partition("[")[0]]
    assert not is_slow(found)


def test_bugs_are_many_and_few_are_equivalent():
    assert len(SEEN) >= 60
    assert len(ALL) - len(SEEN) <= 5


def test_a_bug_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        Mutation("odd", "inference/engine.py", "no such line", "", "", "test_engines.py::test").planted()
    with pytest.raises(ValueError, match="name the test"):
        Mutation("odd", "inference/engine.py", "", "", "")

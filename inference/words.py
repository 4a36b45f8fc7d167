"""The words that verdicts share: levels, and names of what they speak of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Finding = tuple[str, str]  # level, and what was found in words
Judgement = tuple[dict[str, Any], list[Finding]]  # named figures, and the findings


def level_by(good: bool, bad: bool) -> str:
    """'good' must be shown: a comparison with nan shows nothing, and is a caution."""
    return "good" if good else "bad" if bad else "caution"


def element(site: str, index: Sequence[int]) -> str:
    return f"{site}[{', '.join(map(str, index))}]" if index else site


def datum(flat: Tensor | int, shape: Sequence[int]) -> str:
    index = unravel(int(flat), shape)
    return f" at datum {index[0] if len(index) == 1 else tuple(index)}" if index else ""


def unravel(flat: int, shape: Sequence[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return index[::-1]


def both(first: Judgement, second: Judgement) -> Judgement:
    """The figures and findings of two judgements as one."""
    return {**first[0], **second[0]}, [*first[1], *second[1]]

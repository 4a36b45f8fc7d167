"""Names on a command line: whole, or the beginning of several."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def among(given: Iterable[str], known: Sequence[str], word: str) -> list[str]:
    """What of `known` is meant, in its order: 'numpyro' means 'numpyro-step' and 'numpyro-scan'; nothing means all.

    Raises `ProblemError`, with the nearest name, where one means nothing.
    """
    wanted: set[str] = set()
    for name in given:
        key = name.strip().lower().replace("_", "-")
        matches = [n for n in known if n == key] or [n for n in known if key and n.startswith(key + "-")]
        if not matches:
            from pyrometer.inference import ProblemError

            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}."
            raise ProblemError(f"no {word} {name!r}; {hint}")
        wanted.update(matches)
    return [name for name in known if name in wanted or not wanted]

"""Records of runs, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TIMES = ("seconds", "tuning_seconds", "compile_seconds", "peak_memory", "machine")


def same_but_for_times(left: Any, right: Any) -> bool:
    """Whether two records say the same, seconds, memory and machine apart."""
    return _without_times(left) == _without_times(right)


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept: Callable[[str, Any], bool] = lambda key, item: key not in TIMES or isinstance(item, str)  # noqa: E731
        return {key: _without_times(item) for key, item in value.items() if kept(key, item)}
    return [_without_times(item) for item in value] if isinstance(value, list | tuple) else value

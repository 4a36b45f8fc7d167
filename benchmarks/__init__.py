"""Which inference method should I trust on my model? `compare` answers with one table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .metrics import held_out_log_likelihood

__all__ = ["Comparison", "compare", "held_out_log_likelihood"]

_HOME = {"Comparison": "comparison", "compare": "comparison", "held_out_log_likelihood": "metrics"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the command line must start before torch has loaded."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

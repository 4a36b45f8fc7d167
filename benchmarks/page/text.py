"""What was read, made fit to be shown: nothing in it that is no text, and no XML."""

from __future__ import annotations

import re
from typing import Any

# Control characters, halves of pairs, and those that turn the direction of what follows.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def as_text(value: Any) -> Any:
    """Plain data with a replacement character for all such, in every string."""
    if isinstance(value, str):
        return NOT_TEXT.sub("\ufffd", value)
    if isinstance(value, dict):
        return {as_text(key): as_text(item) for key, item in value.items()}
    return [as_text(item) for item in value] if isinstance(value, list) else value

"""Patterns with ``*``, as arguments of the command line may have them."""

import re
from typing import Iterable


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Whether a text matches one of the patterns. ``*`` matches any characters except
    slashes. The pattern ``*`` alone matches every text."""
    return any(
        pattern == "*"
        or re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), text) is not None
        for pattern in patterns
    )

"""Names with ``*`` in them, as arguments have them."""

import re
from typing import Iterable


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Whether a text is one of the patterns. ``*`` stands for any characters but
    slashes, and by itself for everything."""
    return any(
        pattern == "*"
        or re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), text) is not None
        for pattern in patterns
    )

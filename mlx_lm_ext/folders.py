"""Where this package keeps files between starts."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder for this package in the user's cache, as ``XDG_CACHE_HOME`` says."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-lm-ext"

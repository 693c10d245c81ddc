"""The file descriptors of this process: the standard ones, and how many it may have.

Rule: nothing lowers the limit. A process without privileges could not raise it again.
"""

import os
import resource
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

# How many the server asks for, if it may have so many, and those that it cannot do without.
WANTED, NEEDED = 4096, 128
# Those that are left for other things than connections: the files of models, downloads, and
# the compiler that MLX starts.
RESERVED = 256


def open_standard() -> None:
    """Open the null device in the place of standard streams that are closed.

    What is opened next would get their numbers, and what a library prints would be
    written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


@contextmanager
def limit_kept() -> Iterator[None]:
    """Within it, mlx-lm can be imported without changing the limit.

    The import of ``mlx_lm.utils`` sets the limit to 4096, which fails if less is allowed,
    and else takes away what is allowed beyond. There is no way to undo this, so that one
    call is left out, unless mlx-lm asks for the limit first
    (``patches/utils-keep-open-files.patch``).
    """
    if mlx_lm_keeps_limit():
        yield
        return
    setrlimit = resource.setrlimit

    def set_others(kind: int, limits: Any) -> None:
        if sys._getframe(1).f_globals.get("__name__") != "mlx_lm.utils":
            setrlimit(kind, limits)

    resource.setrlimit = set_others
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


def mlx_lm_keeps_limit() -> bool:
    """Whether the import of the installed mlx-lm lowers no limit. It is not imported here."""
    spec = find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        return True  # there is nothing to import
    source = (Path(spec.origin).parent / "utils.py").read_text(encoding="utf-8")
    return "getrlimit(resource.RLIMIT_NOFILE)" in source


def limit() -> int:
    """How many this process may have open at a time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def raise_limit() -> None:
    """Raise the limit to ``WANTED``, or to what is allowed.

    Raises:
        RuntimeError: If fewer than ``NEEDED`` are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if limit() < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if limit() < NEEDED:
        raise RuntimeError(
            f"{NEEDED} open files are needed, and this process may have {limit()} "
            "(ulimit -Hn)"
        )


def for_connections() -> int:
    """How many connections there may be at a time."""
    return max(limit() // 4, limit() - RESERVED)

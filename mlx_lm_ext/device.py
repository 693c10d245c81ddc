"""What MLX runs on, and how much memory the place gives it."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Iterator, Optional

import mlx.core as mx

from .errors import RequestError

# Bytes of the address space that a step may need beside the KV.
MIN_LEFT = 256 << 20
# That of glibc's malloc.h.
M_ARENA_MAX = -8


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def device_memory() -> int:
    """Bytes that MLX may use: those of the GPU, or of the machine and of what limits this
    process there."""
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(info[name])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Half of the address space is for threads, and for what a step makes and drops.
    limits = [total, cgroup_limit(), address_space_limit(share=0.5)]
    return min(limit for limit in limits if limit is not None)


def process_limit() -> Optional[int]:
    """Bytes beyond which the place ends this process, if it does."""
    limits = (cgroup_limit(), address_space_limit())
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_limit(root: Path = Path("/")) -> Optional[int]:
    """Bytes that the control groups of this process (Linux, versions 1 and 2) may have.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    limits = []
    for file in cgroup_files(root):
        try:
            text = file.read_text().strip()
        except OSError:
            continue  # the group is another's, seen from outside a container
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def cgroup_files(root: Path) -> Iterator[Path]:
    """The files that may hold a limit: of the process's groups and of those above."""
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
    """Bytes of the address space that are left, if it is limited (``ulimit -v``)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None  # where there is no proc, the limit is not enforced
    return max(0, limit - n_pages * os.sysconf("SC_PAGE_SIZE"))


def address_space_limit(share: float = 1.0) -> Optional[int]:
    """Bytes of the address space that MLX has, and a share of what is left."""
    left = address_space_left()
    return None if left is None else mx.get_active_memory() + int(left * share)


def check_address_space() -> None:
    """Raise a 503 ``RequestError`` if a step might run out of address space, for MLX ends
    the process then."""
    left = address_space_left()
    if left is not None and left < MIN_LEFT:
        raise RequestError(503, "the server has too little memory left (ulimit -v)")


def share_arenas() -> None:
    """Let threads share glibc's arenas if the address space is limited: each arena
    reserves 64 MB of it."""
    if address_space_left() is not None:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)


def give_back_freed() -> None:
    """Give freed memory back to the device, unless it is little beside what is in use:
    a server that runs short prompts would only have to ask for it again."""
    if mx.get_cache_memory() > mx.get_active_memory() // 4:
        mx.clear_cache()

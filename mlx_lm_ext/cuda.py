"""What MLX's CUDA build needs from the environment to serve for long and to start quickly.

MLX reads its variables when it first uses the GPU, so ``prepare`` must run before.

Rules:
1. What the environment says stays, unless MLX could not work with it: one line then names
   the variable, and what is used instead.
2. Without MLX's CUDA build, a driver or a GPU, nothing is set and nothing is said.
"""

import ctypes
import os
import re
import struct
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Dict, Iterator, List, Optional, Tuple

from .folders import cache_directory

# MLX's CUDA wheels, by the CUDA version that they are built for.
WHEELS = {"cuda13": "mlx-cuda-13", "cuda12": "mlx-cuda-12"}
DRIVER = "libcuda.so.1"
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
COMPUTE_CAPABILITY = (75, 76)

THRASHING_CHECK = "MLX_ENABLE_CACHE_THRASHING_CHECK"
KERNELS_FOLDER = "MLX_PTX_CACHE_DIR"
# The capacities of MLX's caches, and what is set here. A server needs a compiled graph for
# each batch size and a plan of cuDNN for each shape of attention. MLX keeps 400 and 256, so
# that those in use are made again and again.
CAPACITIES = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2000",
    "MLX_CUDA_SDPA_CACHE_SIZE": "2000",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": None,
    "MLX_CUDA_CONV_CACHE_SIZE": None,
    "MLX_CUDA_FFT_CACHE_SIZE": None,
}
MAX_CAPACITY = 2**31 - 1

# The first bytes of a cubin, which is a 64-bit little-endian ELF file, and what its header
# says of its two tables: where they are, and the size and number of their entries.
ELF = b"\x7fELF\x02\x01"
ELF_HEADER = struct.Struct("<32xQQ6xHHHH2x")
# MLX cuts longer names of kernels into the names of folders, of this length, and of a file.
MAX_NAME = 245
# The ending of the names of files that say that all kernels are there.
BUILT = ".built"


# The driver


def compute_capability() -> Optional[str]:
    """The architecture of device 0, such as ``sm_90``; None without a driver or a GPU. The
    driver numbers only the devices that ``CUDA_VISIBLE_DEVICES`` names."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name = "sm_"
    for attribute in COMPUTE_CAPABILITY:
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        name += str(value.value)
    return name


# The variables


def wheel_name() -> Optional[str]:
    """The version of MLX's CUDA wheel and of its CUDA, such as ``0.32.4-cuda13``; None if
    none is installed."""
    for cuda, wheel in WHEELS.items():
        try:
            return f"{version(wheel)}-{cuda}"
        except PackageNotFoundError:
            continue
    return None


def prepare() -> List[str]:
    """Set the variables that the environment lacks, before MLX uses the GPU.

    Returns:
        Lines for the log: what cannot be used, and what was set.
    """
    wheel = wheel_name()
    architecture = compute_capability() if wheel else None
    if architecture is None:
        return []
    lines: List[str] = []
    settings = choose_capacities(lines)
    if THRASHING_CHECK not in os.environ:
        # An exception in the middle of a step, once a cache has missed twice its capacity
        # since the start. A server that runs for long gets there whatever the capacity.
        settings[THRASHING_CHECK] = "0"
    settings |= choose_kernels_folder(f"{wheel}-{architecture}", lines)
    for variable, value in settings.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value
    told = [f"{name}={value}" for name, value in settings.items() if value is not None]
    if told:
        lines.append(f"CUDA: {', '.join(told)}")
    return lines


def choose_capacities(lines: List[str]) -> Dict[str, Optional[str]]:
    """What to set for the capacities of MLX's caches.

    Args:
        lines (List[str]): Takes a line for each value that cannot be used.

    Returns:
        Values by variable; None for one that is to be removed.
    """
    settings: Dict[str, Optional[str]] = {}
    for variable, ours in CAPACITIES.items():
        value = os.environ.get(variable)
        if value is None:
            if ours is not None:
                settings[variable] = ours
        elif not is_capacity(value):
            settings[variable] = ours
            lines.append(
                f"{variable}={value!r} cannot be used: it must be a number from 1 to "
                f"{MAX_CAPACITY}; {ours or 'the default of MLX'} is used instead"
            )
    return settings


def is_capacity(value: str) -> bool:
    """Whether MLX, which reads numbers with C's ``atoi``, finds a capacity in a value."""
    match = re.match(r"[ \t-\r]*\+?0*([1-9][0-9]{0,9})(?![0-9])", value)
    return match is not None and int(match[1]) <= MAX_CAPACITY


def choose_kernels_folder(name: str, lines: List[str]) -> Dict[str, Optional[str]]:
    """What to set for the folder in which MLX keeps the kernels that it compiles.

    Its own default is in the folder for temporary files, which containers and reboots lose.

    Args:
        name (str): The name of the folder for this MLX and this GPU. MLX finds kernels by
          name only, and those of another architecture cannot be loaded, so that machines
          that share a home must not share this folder.
        lines (List[str]): Takes a line for each folder that cannot be used.

    Returns:
        The variable and its value, or None to remove it; empty if it is right as it is.
    """
    named = os.environ.get(KERNELS_FOLDER)
    if named is not None:
        try:
            make_ready(named, lines)
            return {}
        except OSError as e:
            lines.append(
                f"{KERNELS_FOLDER}={named!r} cannot be used ({e.strerror or e}): it must "
                "be a folder that can be written to"
            )
    folder = "the user's cache"
    try:
        folder = str(cache_directory() / "kernels" / name)
        make_ready(folder, lines)
    # RuntimeError: the user has no home.
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or e
        lines.append(
            f"Compiled CUDA kernels cannot be kept in {folder} ({reason}), and MLX uses "
            f"the folder for temporary files; set {KERNELS_FOLDER} or XDG_CACHE_HOME"
        )
        return {KERNELS_FOLDER: None}
    return {KERNELS_FOLDER: folder}


# The kernels


def make_ready(folder: str, lines: List[str]) -> None:
    """Make a folder for kernels, and remove the half-made ones that are in it.

    A process that was killed, a full disk or a power cut leaves some behind. MLX believes
    what it finds, and would fail with them at every start.

    Args:
        folder (str): Its path.
        lines (List[str]): Takes a line if kernels were removed.

    Raises:
        OSError: If it cannot be made, written to, or mended.
    """
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    n_removed = 0
    for path in kernels(folder):
        try:
            if is_half_made(path):
                # The code alone: without it MLX compiles, and writes all files anew. So no
                # age protects what another server is writing right now. That one has the
                # kernel in memory, and the next start makes it once more.
                os.remove(path)
                n_removed += 1
        except FileNotFoundError:
            continue  # another server has removed it
    if n_removed:
        for name in os.listdir(folder):
            if name.endswith(BUILT):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
        lines.append(f"Half-made CUDA kernels removed from {folder}: {n_removed}")


def kernels(folder: str) -> Iterator[str]:
    """The paths of the code of all kernels that MLX would find in a folder."""
    for parent, folders, files in os.walk(folder):
        # No others, because a folder that the user names may contain anything.
        folders[:] = [f for f in folders if len(os.fsencode(f)) == MAX_NAME]
        paths = [os.path.join(parent, f) for f in files if f.endswith(".ptx")]
        # To open a pipe, of all things, would wait for ever.
        yield from filter(os.path.isfile, paths)


def is_half_made(path: str) -> bool:
    """Whether a kernel has not been written to its end.

    MLX writes the code, ``NAME.ptx``, then a line with a tab for each function, ``NAME.txt``,
    and then the source, ``NAME.cu``.

    Args:
        path (str): The path of its code. Code that is not a cubin is the user's, or was
          written by a compiler that has no machine code for this GPU. It is let alone if
          there is any.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as f:
        head = f.read(ELF_HEADER.size)
        size = os.fstat(f.fileno()).st_size
    # After a power cut, a file may have its length but only zeros in it.
    if not any(head):
        return True
    if head[: len(ELF)] != ELF[: len(head)]:
        return False
    if len(head) < ELF_HEADER.size or size < elf_size(head):
        return True
    base = path.removesuffix(".ptx")
    try:
        with open(f"{base}.txt", "rb") as f:
            functions = f.read()
        # Without the source, the lines may not be all.
        source = os.stat(f"{base}.cu").st_size
    except FileNotFoundError:
        return True
    return not (b"\t" in functions and functions.endswith(b"\n") and source)


def elf_size(header: bytes) -> int:
    """The least size of an ELF file. In a cubin the two tables are at its end."""
    numbers: Tuple[int, ...] = ELF_HEADER.unpack(header)
    segments, sections, segment_size, n_segments, section_size, n_sections = numbers
    return max(
        segments + n_segments * segment_size, sections + n_sections * section_size
    )

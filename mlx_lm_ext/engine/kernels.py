"""Compiles kernels for CUDA in processes of their own, beside the server.

MLX compiles a kernel when it is first needed. With CUDA that takes 3 to 4 seconds, and a
process compiles one at a time: the first requests would wait a minute. What is compiled is
kept in a folder (``MLX_PTX_CACHE_DIR``), where all processes find it.

Rules:
1. The kernels of a folder are compiled once: a file in it says that they are there.
2. The server does not depend on it. MLX compiles what is not there when it is needed.
"""

import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, Callable, List, Optional, Tuple

import mlx.core as mx
import numpy as np
from mlx.nn import Embedding

from .. import __version__
from ..batch.logprobs import Logprobs
from ..cuda import BUILT, KERNELS_FOLDER
from ..device import device_kind, device_memory
from ..log import stage
from ..sampling import gpu
from ..sampling.constraints import apply_masks
from ..sampling.penalties import Penalties, PenaltyParameters

logger = logging.getLogger(__name__)

# About as many as there are calls, some of which need several kernels.
MAX_PROCESSES = 14
# Bytes of the GPU's memory for each of them. It needs about a tenth of that.
MEMORY_OF_PROCESS = 4 << 30
# What a process runs. Modules come from where those of the server come from, be it a zip file
# or a path that was set. With ``-m`` they could come from the current folder.
CODE = "import sys; sys.path[:] = {!r}; from {} import main; main()"


class KernelBuild:
    """The processes that compile kernels."""

    def __init__(self) -> None:
        self.processes: List["subprocess.Popen[str]"] = []
        self.is_stopped = False
        self.watcher: Optional[Thread] = None

    @property
    def is_running(self) -> bool:
        return self.watcher is not None and self.watcher.is_alive()

    def start(self, dtype: str) -> None:
        """Start the processes, unless the kernels are there or MLX uses no CUDA.

        Args:
            dtype (str): The type of the model's logits.
        """
        folder = os.environ.get(KERNELS_FOLDER)
        if self.is_stopped or not folder or device_kind() != "cuda":
            return
        built = Path(folder) / f"mlx-lm-ext-{__version__}-{dtype}{BUILT}"
        if built.exists():
            return
        n = device_memory() // MEMORY_OF_PROCESS
        n = max(1, min(MAX_PROCESSES, os.cpu_count() or 1, n))
        try:
            for i in range(n):
                self.processes.append(start_process(dtype, i, n))
        except OSError as e:
            self.stop()
            logger.warning(f"No process can be started to compile kernels: {e}")
            return
        if self.is_stopped:
            self.stop()  # the server has stopped meanwhile, and knows not all of them
        self.watcher = Thread(target=self.watch, args=(built,), daemon=True)
        self.watcher.start()

    def watch(self, built: Path) -> None:
        """Wait for the processes, and write the file that says that the kernels are there."""
        n = len(self.processes)
        with stage(f"Compiling kernels in {n} processes, once on this machine"):
            errors = [process.communicate()[1].strip() for process in self.processes]
        failed = [
            # One that the system has ended has written nothing.
            e.splitlines()[-1] if e else f"exit code {p.returncode}"
            for e, p in zip(errors, self.processes)
            if p.returncode
        ]
        if self.is_stopped:
            return
        if failed:
            logger.warning(
                f"{len(failed)} of {n} processes that compile kernels have failed: the "
                f"first requests will wait for theirs ({failed[0]})"
            )
            return
        with suppress(OSError):  # they would be looked for again at the next start
            built.touch()

    def stop(self) -> None:
        """End the processes that still run (any thread)."""
        self.is_stopped = True
        for process in self.processes:
            process.kill()


def start_process(dtype: str, i: int, n: int) -> "subprocess.Popen[str]":
    """Start the i-th of n processes.

    Raises:
        OSError: If it cannot be started.
    """
    if not sys.executable:
        raise OSError("it is not known where Python is")
    code = CODE.format([*map(str, sys.path)], __name__)
    flags = ["-E"] if sys.flags.ignore_environment else []
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code, dtype, str(i), str(n)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def calls(dtype: str, n: int) -> List[Callable[[], Any]]:
    """Calls that together need the kernels of all kinds of requests. None needs many, so that
    the processes share them evenly. What needs mlx-lm, whose import takes seconds, imports
    it in its call.

    Args:
        dtype (str): The type of the model's logits.
        n (int): Rows of the batch.

    Returns:
        List[Callable]: Functions that give arrays to evaluate, the likely ones first.
    """
    logits = mx.zeros((n, 64), getattr(mx, dtype))
    shifted = logits.astype(mx.float32)
    # Not one array for both: MLX compiles a call with equal arguments by itself.
    half, third = mx.full((n, 1), 0.5), mx.full((n, 1), 0.3)
    keys = mx.zeros((n, 2), mx.uint32)
    rows, tokens = mx.array([*range(n)]), mx.zeros(n, mx.uint32)

    def run_embedding() -> mx.array:
        embedding = Embedding(64, 64)
        embedding.weight = mx.zeros((64, 64), logits.dtype)
        return embedding(tokens)

    def run_activation() -> mx.array:
        from mlx_lm.models.activations import swiglu

        return swiglu(logits, mx.zeros_like(logits))

    def remove_padding() -> mx.array:
        from mlx_lm.models.cache import dynamic_roll

        return dynamic_roll(logits[:, None, :, None], rows[:, None], axis=2)

    def replace_tokens() -> mx.array:
        replaced = mx.zeros(n, mx.uint32)
        replaced[rows] = tokens[rows]
        return replaced

    def penalize(*penalties: Tuple[float, int]) -> mx.array:
        bias = np.array([0], np.int32), np.ones(1, np.float32)
        row = PenaltyParameters(bias, [*penalties])
        return Penalties([row] * n)([[0, 1, 2] for _ in range(n)], logits)

    def process() -> List[mx.array]:
        from mlx_lm.sample_utils import make_logits_processors

        processors = make_logits_processors({0: 1.0}, 1.1, 4, 0.1, 4, 0.1, 4)
        context = mx.zeros(3, mx.uint32)
        return [process(context, logits[:1]) for process in processors]

    def restrict() -> mx.array:
        return apply_masks(logits, mx.zeros((n, 2), mx.uint32))

    return [
        run_embedding,
        run_activation,
        lambda: gpu.draw(shifted, half, keys),
        lambda: gpu.below_highest(logits),
        lambda: gpu.keep_top_p(shifted, half),
        lambda: logits[rows],
        replace_tokens,
        lambda: gpu.keep_top_k(shifted, half),
        lambda: gpu.keep_min_p(shifted, half),
        remove_padding,
        lambda: Logprobs(logits, tokens, 2).arrays,
        restrict,
        lambda: penalize((1.1, 4), (0.1, 4), (0.1, 4)),
        lambda: gpu.apply_xtc(shifted, half, third, [0, 1], keys),
        process,
    ]


def main() -> None:
    """Evaluate every n-th of the calls, beginning with the i-th: the arguments are the type
    of the logits, i and n."""
    # The server is more urgent.
    os.nice(10)
    dtype, i, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # Several rows come first, because broadcasting needs more kernels.
    for several, one in [*zip(calls(dtype, 2), calls(dtype, 1))][i::n]:
        mx.eval(several(), one())
    # Nothing is left to free in order.
    os._exit(0)


if __name__ == "__main__":
    main()

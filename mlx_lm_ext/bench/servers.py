"""Servers that are started for one measurement and stopped after it."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Optional

from mlx_lm_ext import blas

START_TIMEOUT = 600  # a large model takes minutes to load

OURS = f"{shlex.quote(sys.executable)} -m mlx_lm_ext.batch_server --use-prompt-cache"
THEIRS = f"{shlex.quote(sys.executable)} -m mlx_lm server"

# The size of the prompt cache in the log of both servers, and its units.
CACHE_LINE = re.compile(r"Prompt Cache: .*?([\d.]+) (GB|MB)")
UNITS = {"GB": 1e9, "MB": 1e6}

NVIDIA_SMI = (
    "nvidia-smi",
    "--query-compute-apps=pid,used_memory",
    "--format=csv,noheader,nounits",
)


@dataclass
class Server:
    """A server that answers.

    Args:
        url (str): Its base URL, with ``/v1``.
        log (Optional[Path]): The file with its output, if it was started here.
        pid (Optional[int]): Its process, if it was started here.
        gpu_bytes (Optional[int]): The most GPU memory that it was seen to have.
    """

    url: str
    log: Optional[Path] = None
    pid: Optional[int] = None
    gpu_bytes: Optional[int] = None

    def cache_bytes(self) -> Optional[int]:
        """Bytes in its prompt cache by its log, or ``None`` if the log does not say."""
        found = CACHE_LINE.findall(self.log.read_text()) if self.log else []
        return round(float(found[-1][0]) * UNITS[found[-1][1]]) if found else None

    def peak_memory(self) -> Optional[int]:
        """The most bytes that it had, of a GPU if it uses one and else of the machine; ``None``
        if that is not known."""
        if self.gpu_bytes is None and self.pid is not None:
            return resident_memory(self.pid)
        return self.gpu_bytes


def output_of(*command: str) -> str:
    """What a program prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def resident_memory(pid: int) -> Optional[int]:
    """The most bytes of memory that a process has had, or where only ``ps`` tells it, what it
    has now."""
    try:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        kilobytes = found[1] if found else ""
    except OSError:
        kilobytes = output_of("ps", "-o", "rss=", "-p", str(pid)).strip()
    return int(kilobytes) << 10 if kilobytes else None


def gpu_memory(pid: int, table: str) -> Optional[int]:
    """Bytes that a process has of all GPUs.

    Args:
        table (str): Processes and their MiB, as ``nvidia-smi`` prints them.
    """
    used: Dict[int, int] = {}
    for process, mebibytes in re.findall(r"(\d+), *(\d+)", table):
        used[int(process)] = used.get(int(process), 0) + (int(mebibytes) << 20)
    # In a container, nvidia-smi knows its only process by another number.
    return next(iter(used.values())) if len(used) == 1 else used.get(pid)


@contextmanager
def watch_gpu(server: Server, pid: int) -> Iterator[None]:
    """Note the most GPU memory that a server has, until the block ends."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        yield
        return
    ended = threading.Event()

    def watch():
        while True:
            used = gpu_memory(pid, output_of(*NVIDIA_SMI))
            if used is not None:
                server.gpu_bytes = max(used, server.gpu_bytes or 0)
            if ended.wait(0.5):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    """Whether a server at ``url`` accepts requests."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError as e:
        return e.code != 503  # not every server has this route
    except OSError:
        return False
    return True


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Until the block ends, SIGTERM raises ``KeyboardInterrupt``: at once, it would end the process
    without what it has started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def start(command: str, model: str) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        command (str): Its command line. ``--model`` and ``--port`` are added, unless
          ``{model}`` and ``{port}`` in it are their places.
        model (str): Path or repository of the model.

    Raises:
        KeyboardInterrupt: On SIGTERM, as on SIGINT.
        RuntimeError: If it ends before it answers, or does not answer in time, or if the
          path of the BLAS library cannot be preloaded.
    """
    port = free_port()
    if "{model}" not in command:
        command += " --model {model} --port {port}"
    words = [
        word.replace("{model}", model).replace("{port}", str(port))
        for word in shlex.split(command)
    ]
    library = blas.load_openblas()[0]
    environment = dict(os.environ)
    if library:
        # Let every server use the BLAS library that this one would find.
        environment["LD_PRELOAD"] = library
        if " " in library or ":" in library:
            raise RuntimeError(
                f"{library} cannot be preloaded; XDG_CACHE_HOME must name a folder "
                "without blanks and colons"
            )
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "w") as output:
            try:
                process = subprocess.Popen(
                    words, stdout=output, stderr=output, env=environment
                )
            except OSError as e:
                raise RuntimeError(f"{words[0]} cannot be started: {e.strerror}")
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = log.read_text().strip().splitlines() or ["no output"]
                    raise RuntimeError(
                        f"{shlex.join(words)} did not start: {lines[-1]}"
                    )
                time.sleep(0.2)
            server = Server(f"http://127.0.0.1:{port}/v1", log, process.pid)
            with watch_gpu(server, process.pid):
                yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

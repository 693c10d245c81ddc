"""Servers that are started for one measurement and stopped after it."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

from mlx_lm_ext import blas

START_TIMEOUT = 600  # a large model takes minutes to load

OURS = f"{shlex.quote(sys.executable)} -m mlx_lm_ext.batch_server --use-prompt-cache"
THEIRS = f"{shlex.quote(sys.executable)} -m mlx_lm server"

# The size of the prompt cache in the log of both servers, and its units.
CACHE_LINE = re.compile(r"Prompt Cache: .*?([\d.]+) (GB|MB)")
UNITS = {"GB": 1e9, "MB": 1e6}


@dataclass
class Server:
    """A server that answers.

    Args:
        url (str): Its base URL, with ``/v1``.
        log (Optional[Path]): The file with its output, if it was started here.
    """

    url: str
    log: Optional[Path] = None

    def cache_bytes(self) -> Optional[int]:
        """Bytes in its prompt cache by its log, or ``None`` if the log does not say."""
        found = CACHE_LINE.findall(self.log.read_text()) if self.log else []
        return round(float(found[-1][0]) * UNITS[found[-1][1]]) if found else None


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
def start(command: str, model: str) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        command (str): Its command line. ``--model`` and ``--port`` are added, unless
          ``{model}`` and ``{port}`` in it are their places.
        model (str): Path or repository of the model.

    Raises:
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
    with tempfile.TemporaryDirectory() as folder:
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
            yield Server(f"http://127.0.0.1:{port}/v1", log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

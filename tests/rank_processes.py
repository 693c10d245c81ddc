"""Starts the ranks of a group on this machine, which talk over MLX's ring."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

# Seconds for a rank to import all and load a tiny model while other tests run.
START_TIMEOUT = 240


class Rank:
    """One process of a group, and what it has logged."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self.has_line = threading.Condition()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            with self.has_line:
                self.lines.append(line)
                self.has_line.notify_all()

    @property
    def log(self):
        return "".join(self.lines)

    def wait_for(self, pattern):
        """Wait until a line matches, and give the match."""
        deadline = time.monotonic() + START_TIMEOUT
        seen = 0
        while True:
            with self.has_line:
                for line in self.lines[seen:]:
                    seen += 1
                    if match := re.search(pattern, line):
                        return match
                ended = self.process.poll() is not None and not self.reader.is_alive()
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"no line with {pattern!r}:\n{self.log}")
                self.has_line.wait(1.0)

    def status(self, timeout=30):
        """The exit status, once it has ended."""
        status = self.process.wait(timeout)
        self.reader.join(timeout)
        return status


def free_ports(n):
    """Ports that were free just now."""
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(n)
        ]
        return [s.getsockname()[1] for s in sockets]


@contextmanager
def ranks(n, folder, *argv, others=(), program=("-m", "mlx_lm_ext.batch_server")):
    """Start ``n`` ranks.

    Args:
        n (int): How many.
        folder (Path): Where the file of the hosts is written.
        *argv (str): Arguments of all ranks.
        others (Sequence): Arguments that all but rank 0 have in addition.
        program (Sequence[str]): What Python runs.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    started = []
    try:
        for rank in range(n):
            env = os.environ | {
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hosts),
                # The ranks share the cores of this machine.
                "OPENBLAS_NUM_THREADS": "1",
            }
            command = [sys.executable, *program, "--port", "0", *argv]
            command += others if rank else ()
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=env
            )
            started.append(Rank(process))
        yield started
    finally:
        for rank in started:
            rank.process.kill()
        for rank in started:
            rank.status()
            rank.process.stderr.close()


@contextmanager
def served(n, folder, *argv, **kwargs):
    """``ranks`` that serve: gives the port and the ranks."""
    with ranks(n, folder, *argv, **kwargs) as started:
        port = int(started[0].wait_for(r"Serving .* at http://.*:(\d+)/v1")[1])
        for rank in started[1:]:
            rank.wait_for(r"Rank \d+ of \d+ is ready")
        yield port, started

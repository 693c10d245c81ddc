"""The connections between rank 0 and the others, beside those of MLX.

Rules:
1. Each rank opens two connections to rank 0: one for decisions, and one for heartbeats, which
   goes on while the generation thread waits.
2. Nobody else gets in: a connection begins with a key that rank 0 has made, and that the ranks
   know from a collective.
3. Frames are JSON with its length before it. Nothing is unpickled.
"""

import hmac
import json
import os
import secrets
import socket
import struct
import time
from contextlib import suppress
from typing import Any, Callable, Dict, Iterator, List, Tuple

LENGTH = struct.Struct("<I")
KEY_BYTES = 16
# Seconds for all ranks to connect, after they have shared the key.
JOIN_TIMEOUT = 60.0
# Seconds for a connection to show its key.
HELLO_TIMEOUT = 1.0


class RankError(RuntimeError):
    """The ranks do not run the same steps, or one is lost."""


def address_of_first() -> str:
    """The host of rank 0 for the other ranks, as the launcher names it. "" if it does not."""
    path = os.environ.get("MLX_HOSTFILE")
    if path:
        with open(path) as f:
            first = json.load(f)[0]
        first = first[0] if isinstance(first, list) else first["ips"][0]
        return str(first).rpartition(":")[0]
    for name in ("NCCL_HOST_IP", "MLX_JACCL_COORDINATOR"):
        if name in os.environ:
            return os.environ[name].partition(":")[0]
    return ""


class Connections:
    """The connections of one rank.

    Args:
        rank (int): This one.
        size (int): How many ranks there are.
        share (Callable): Gives the sums over all ranks of integers from 0 to 65,535.

    Raises:
        RankError: If the other ranks do not connect, or rank 0 cannot be reached.

    Attributes:
        lives (Dict[int, socket.socket]): The connections for heartbeats, by rank.
    """

    def __init__(self, rank: int, size: int, share: Callable[[List[int]], List[int]]):
        self.lives: Dict[int, socket.socket] = {}
        self.decisions: Dict[int, socket.socket] = {}
        if rank:
            port, *shared = share([0] * (1 + KEY_BYTES))
            self.connect(rank, port, bytes(shared))
        else:
            # Without a launcher that names a host, the ranks are on this one.
            listener = socket.create_server((address_of_first() or "127.0.0.1", 0))
            with listener:
                key = secrets.token_bytes(KEY_BYTES)
                share([listener.getsockname()[1], *key])
                self.accept(listener, size, key)
        self.files = {r: sock.makefile("rb") for r, sock in self.decisions.items()}

    def connect(self, rank: int, port: int, key: bytes) -> None:
        host = address_of_first() or "127.0.0.1"
        for kind, sockets in enumerate((self.decisions, self.lives)):
            try:
                sock = socket.create_connection((host, port), JOIN_TIMEOUT)
            except OSError as e:
                reason = e.strerror or e
                raise RankError(
                    f"rank {rank} cannot reach rank 0 at {host} port {port}: {reason}"
                )
            prepare(sock)
            sock.sendall(key + bytes([rank, kind]))
            sockets[0] = sock

    def accept(self, listener: socket.socket, size: int, key: bytes) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT
        missing = {(r, kind) for r in range(1, size) for kind in (0, 1)}
        while missing:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                ranks = ", ".join(str(r) for r in sorted({r for r, _ in missing}))
                raise RankError(
                    f"rank 0 waited {JOIN_TIMEOUT:g} seconds for rank {ranks}"
                )
            hello = b""
            with suppress(OSError):
                sock.settimeout(HELLO_TIMEOUT)
                hello = receive(sock, KEY_BYTES + 2)
            who = tuple(hello[KEY_BYTES:])
            if not hmac.compare_digest(hello[:KEY_BYTES], key) or who not in missing:
                sock.close()
                continue
            missing.remove(who)
            prepare(sock)
            (self.lives if who[1] else self.decisions)[who[0]] = sock

    # Decisions, of which only the generation thread knows

    def tell(self, value: Any) -> None:
        """Send a value to all other ranks, or from one of them to rank 0."""
        frame = pack(value)
        for rank, sock in self.decisions.items():
            try:
                sock.sendall(frame)
            except OSError:
                raise RankError(f"rank {rank} has ended")

    def shut(self) -> None:
        """Nothing more is said (any thread): who waits for a decision gets an error."""
        for sock in self.decisions.values():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def take(self) -> Any:
        """The next value that rank 0 has sent."""
        return self.read(0)

    def answers(self) -> Iterator[Tuple[int, Any]]:
        """The next value of each of the other ranks."""
        for rank in sorted(self.files):
            yield rank, self.read(rank)

    def read(self, rank: int) -> Any:
        file = self.files[rank]
        try:
            head = file.read(LENGTH.size)
            raw = file.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
        except OSError:
            raw = b""
        if not raw:
            raise RankError(f"rank {rank} has ended")
        return json.loads(raw)


def prepare(sock: socket.socket) -> None:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def pack(value: Any) -> bytes:
    raw = json.dumps(value, separators=(",", ":")).encode()
    return LENGTH.pack(len(raw)) + raw


def receive(sock: socket.socket, n: int) -> bytes:
    """Up to ``n`` bytes; fewer if the other side ends."""
    raw = b""
    while len(raw) < n and (more := sock.recv(n - len(raw))):
        raw += more
    return raw

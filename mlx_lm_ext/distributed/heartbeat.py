"""Says to the other ranks that this one lives, and notices when one of them does not: MLX's
collectives do not notice it with every backend, and wait for ever.

Rules:
1. Threads of their own send and receive, whatever the generation thread is doing.
2. The first reason for the end of the group is the one that is told everywhere.
"""

import json
import socket
import time
from dataclasses import asdict, dataclass
from threading import Event, Lock, Thread
from typing import Callable, Dict, Iterator, List, Optional

# Seconds between two beats, and without one after which a rank counts as lost. To load a
# model or a library may keep its threads from running for longer.
INTERVAL = 0.5
SILENCE = 3.0
SILENCE_AT_START = 60.0
# Seconds for the reason why another rank has ended to come, after its connection has.
GRACE = 1.0


@dataclass
class Beat:
    """What a rank says of itself.

    Args:
        n_places (int): How often its generation thread has called ``advance``. All ranks call
          it at the same places of their loop.
        is_busy (bool): Whether it should call it again soon.
        is_leaving (bool): Whether it ends as it should, so that its silence is no loss.
        must_stop (bool): Whether it was asked to end by a signal.
        error (Optional[str]): Why it cannot go on.
    """

    n_places: int = 0
    is_busy: bool = False
    is_leaving: bool = False
    must_stop: bool = False
    error: Optional[str] = None


class Heartbeat:
    """The beats of one rank, and what it knows of the others.

    Args:
        rank (int): This one.
        connections (Dict[int, socket.socket]): To rank 0, or to all others, by rank.
        timeout (float): Seconds without progress after which a busy rank counts as stuck.
    """

    def __init__(
        self, rank: int, connections: Dict[int, socket.socket], timeout: float
    ):
        self.rank = rank
        self.connections = connections
        self.timeout = timeout
        self.mine = Beat()
        self.others = {r: Beat() for r in connections}
        # When each rank was last seen at a new place.
        self.moved = {r: time.monotonic() for r in (rank, *connections)}
        self.lost: Optional[str] = None
        self.is_lost = Event()
        self.tell: List[Callable[[str], None]] = []
        self.lock = Lock()
        self.sending = Lock()
        for r in connections:
            Thread(target=self.watch, args=(r,), daemon=True).start()
        Thread(target=self.beat, daemon=True).start()

    # This rank

    def advance(self, is_busy: bool) -> None:
        """The generation thread is at the next place that is the same on all ranks."""
        self.mine.n_places += 1
        self.mine.is_busy = is_busy
        self.moved[self.rank] = time.monotonic()

    def leave(self) -> None:
        """This rank ends as it should, and the others will, too."""
        self.mine.is_leaving = True
        self.send()

    def ask_to_stop(self) -> None:
        """This rank was asked to end, which rank 0 decides for all."""
        self.mine.must_stop = True
        self.send()

    def fail(self, reason: str) -> str:
        """This rank cannot go on.

        Returns:
            str: Why the group has ended. If the connection to another rank has just broken, it
            takes a moment until its reason is known.
        """
        self.is_lost.wait(GRACE)
        self.lose(reason)
        return str(self.lost)

    def lose(self, reason: str) -> None:
        """The group cannot go on. The reason of the first call counts."""
        with self.lock:
            if self.lost is not None:
                return
            self.lost = self.mine.error = reason
        self.send()
        self.is_lost.set()
        for tell in self.tell:
            tell(reason)

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """Let a function be called with the reason when the group is lost, or now if it is."""
        with self.lock:
            self.tell.append(tell)
            lost = self.lost
        if lost is not None:
            tell(lost)

    @property
    def must_stop(self) -> bool:
        """Whether another rank was asked to end."""
        return any(beat.must_stop for beat in self.others.values())

    # The threads

    def beat(self) -> None:
        while not (self.mine.is_leaving or self.is_lost.wait(INTERVAL)):
            self.send()
            if self.rank == 0:
                self.find_stuck()

    def send(self) -> None:
        line = json.dumps(asdict(self.mine)).encode() + b"\n"
        with self.sending:
            for sock in self.connections.values():
                try:
                    sock.sendall(line)
                except OSError:
                    pass  # the thread that reads from it says so

    def watch(self, peer: int) -> None:
        """Read the beats of another rank."""
        reason = f"rank {peer} has ended"
        try:
            for line in self.lines(peer):
                self.note(peer, Beat(**json.loads(line)))
        except TimeoutError as e:
            reason = str(e)
        except ConnectionError:
            pass  # it has ended before it has read all beats
        except (OSError, ValueError, TypeError) as e:
            reason = f"the connection to rank {peer} has failed: {e}"
        if not (self.mine.is_leaving or self.others[peer].is_leaving):
            self.lose(reason)

    def lines(self, peer: int) -> Iterator[bytes]:
        """What another rank sends, until it ends.

        Raises:
            TimeoutError: If it has been silent for too long.
        """
        sock, left, heard = self.connections[peer], b"", time.monotonic()
        sock.settimeout(INTERVAL)
        while True:
            try:
                more = sock.recv(4096)
            except TimeoutError:
                limit = SILENCE if self.mine.n_places else SILENCE_AT_START
                if time.monotonic() - heard > limit:
                    message = f"rank {peer} has been silent for {limit:g} seconds"
                    raise TimeoutError(message) from None
                continue
            if not more:
                return
            heard = time.monotonic()
            *lines, left = (left + more).split(b"\n")
            yield from lines

    def note(self, peer: int, beat: Beat) -> None:
        if beat.n_places != self.others[peer].n_places:
            self.moved[peer] = time.monotonic()
        self.others[peer] = beat
        if beat.error is not None:
            self.lose(beat.error)

    def find_stuck(self) -> None:
        """Notice a rank that lives, and whose generation thread does not go on. The others wait
        for it: it is the one that is behind."""
        beats = {self.rank: self.mine, **self.others}
        limit = time.monotonic() - self.timeout
        stuck = [
            r for r, beat in beats.items() if beat.is_busy and self.moved[r] < limit
        ]
        if stuck:
            last = min(beats, key=lambda r: beats[r].n_places)
            self.lose(f"rank {last} has made no progress for {self.timeout:g} seconds")

"""Wakes the handler threads for their tokens, one after the other.

Python runs one thread at a time. If each token woke its handler at once, the generation
thread would stand behind all handlers for the interpreter lock, several times a step.

Rules:
1. Of the handlers that wait, one at a time is woken. It wakes the next.
2. A handler that is busy, with a slow client for example, keeps nobody waiting.
3. What has come in the meantime is taken with one wake-up: handlers that cannot keep up
   with the steps take several tokens at a time.
"""

from collections import deque
from threading import Lock
from typing import Any, Deque, Iterable, List, Tuple


class Turnstile:
    """The mailboxes of the handlers of an engine that have something to be taken."""

    def __init__(self):
        self.lock = Lock()
        self.line: Deque["Mailbox"] = deque()
        # Whether a mailbox has been told to go, and has not gone yet.
        self.taken = False

    def put(self, events: Iterable[Tuple["Mailbox", Any, bool]]) -> None:
        """Put events into their mailboxes.

        Args:
            events (Iterable[Tuple[Mailbox, Any, bool]]): Each with whether it is worth
              waking the handler.
        """
        with self.lock:
            for box, event, wakes in events:
                box.events.append(event)
                box.due |= wakes
                if box.due and box.waits:
                    box.waits = False
                    self.line.append(box)
            if not self.taken:
                self.next()

    def next(self) -> None:
        """Wake the first in the line. The caller holds the lock."""
        self.taken = bool(self.line)
        if self.line:
            self.line.popleft().turn.release()


class Mailbox:
    """Events for one handler thread.

    Args:
        turnstile (Turnstile): That of the engine.
    """

    def __init__(self, turnstile: Turnstile):
        self.turnstile = turnstile
        self.events: List[Any] = []
        # Whether there is something that is worth waking the handler.
        self.due = False
        # Whether the handler waits, and is not yet in the line.
        self.waits = False
        self.turn = Lock()
        self.turn.acquire()

    def take(self, timeout: float) -> List[Any]:
        """All events that have piled up; none if the time runs out."""
        turnstile = self.turnstile
        with turnstile.lock:
            self.waits = not self.due
            if self.due:
                turnstile.line.append(self)
                if not turnstile.taken:
                    turnstile.next()
        if not self.turn.acquire(timeout=timeout):
            with turnstile.lock:
                if self.waits:
                    self.waits = False
                    return []
            # It is in the line: its turn comes soon.
            self.turn.acquire()
        with turnstile.lock:
            turnstile.next()
            events, self.events, self.due = self.events, [], False
        return events

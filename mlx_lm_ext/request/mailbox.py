"""Brings tokens from the generation thread to the handlers, which it wakes one at a time.

Python runs one thread at a time. If each token woke its handler at once, the generation
thread would wait for all handlers to give back the interpreter lock, several times a step.

Rules:
1. Of the handlers that wait for an event, one at a time is woken. It wakes the next one.
2. A handler that does not wait, because it writes to a slow client for example, delays no
   other.
3. A handler takes all events that have come since it last took some. One that is slower
   than the steps takes several tokens at a time.
"""

from collections import deque
from threading import Lock
from typing import Any, Deque, Iterable, List, Tuple


class Turnstile:
    """The line of those mailboxes of an engine whose handlers are to be woken."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.line: Deque["Mailbox"] = deque()
        # Whether a handler was woken and has not taken its events yet.
        self.is_busy = False

    def put(self, events: Iterable[Tuple["Mailbox", Any, bool]]) -> None:
        """Put events into their mailboxes.

        Args:
            events (Iterable[Tuple[Mailbox, Any, bool]]): Each event with its mailbox, and
              whether it is worth waking the handler.
        """
        with self.lock:
            for box, event, wakes in events:
                box.events.append(event)
                box.is_due |= wakes
                if box.is_due and box.is_waiting:
                    box.is_waiting = False
                    self.line.append(box)
            if not self.is_busy:
                self.wake_next()

    def wake_next(self) -> None:
        """Wake the handler of the first mailbox in the line. The caller holds the lock."""
        self.is_busy = bool(self.line)
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
        # Whether one of the events is worth waking the handler.
        self.is_due = False
        # Whether the handler waits for an event, and the mailbox is not in the line yet.
        self.is_waiting = False
        # Released when it is the handler's turn.
        self.turn = Lock()
        self.turn.acquire()

    def take(self, timeout: float) -> List[Any]:
        """Take all events. Blocks until there is one that is due, or until the timeout.

        Args:
            timeout (float): Seconds.
        """
        turnstile = self.turnstile
        with turnstile.lock:
            self.is_waiting = not self.is_due
            if self.is_due:
                turnstile.line.append(self)
                if not turnstile.is_busy:
                    turnstile.wake_next()
        if not self.turn.acquire(timeout=timeout):
            with turnstile.lock:
                if self.is_waiting:
                    self.is_waiting = False
                    events, self.events = self.events, []
                    return events
            # It came into the line just now, so that its turn comes soon.
            self.turn.acquire()
        with turnstile.lock:
            turnstile.wake_next()
            events, self.events, self.is_due = self.events, [], False
        return events

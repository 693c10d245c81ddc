"""Which requests the engine takes, and which it refuses because there are too many.

Rules:
1. A request counts from the moment that it is admitted until its answer was sent, or was given
   to the route of a plugin, whatever becomes of it.
2. A request that is refused is neither tokenized nor submitted.
3. Once closed, no request is admitted any more. Routes that need no engine are still tracked.
"""

import math
from collections import deque
from contextlib import contextmanager
from threading import Condition
from typing import Deque, Iterator, List, Optional, Set

from ..errors import RequestError
from ..interfaces import Clock
from ..request.request import Request

# The ends of so many answers give the rate at which they end.
N_RECENT = 64
# Seconds that a client is asked to wait at most. OpenAI's clients wait no longer than this.
MOST_WAIT = 60


class Ticket:
    """A request of HTTP that was admitted.

    Args:
        n (int): How many answers it asks for.
        key_name (Optional[str]): The name of its API key.
    """

    def __init__(self, n: int, key_name: Optional[str]):
        self.n = n
        self.key_name = key_name
        # The requests for its answers, once they are submitted.
        self.requests: List[Request] = []

    @property
    def n_waiting(self) -> int:
        """How many of its answers have not started."""
        if not self.requests:
            return self.n
        return sum(r.started is None and not r.finished for r in self.requests)


class Admission:
    """Counts the requests that are there, and refuses those that are too many.

    All methods may be called on any thread.

    Args:
        max_queue (Optional[int]): How many answers may wait to be started.
        max_per_key (Optional[int]): How many answers may wait or run for one API key.
        clock (Clock): Seconds that never go back.
    """

    def __init__(
        self, max_queue: Optional[int], max_per_key: Optional[int], clock: Clock
    ):
        self.max_queue = max_queue
        self.max_per_key = max_per_key
        self.clock = clock
        self.tickets: Set[Ticket] = set()
        self.is_closed = False
        # When the last answers have ended.
        self.ends: Deque[float] = deque(maxlen=N_RECENT)
        # Guards all of the above, and tells ``wait_until_empty`` when a ticket is given back.
        self.changed = Condition()

    @contextmanager
    def admit(self, n: int, key_name: Optional[str]) -> Iterator[Ticket]:
        """Count a request while its answers are made.

        Args:
            n (int): How many answers it asks for.
            key_name (Optional[str]): The name of its API key.

        Raises:
            RequestError: A 429 if it is one too many, or a 503 if no more are taken.
        """
        ticket = Ticket(n, key_name)
        with self.changed:
            self.check(ticket)
            self.tickets.add(ticket)
        with self.held(ticket):
            yield ticket

    @contextmanager
    def track(self) -> Iterator[None]:
        """Let ``wait_until_empty`` wait for something that is no request to the engine."""
        ticket = Ticket(0, None)
        with self.changed:
            self.tickets.add(ticket)
        with self.held(ticket):
            yield

    @contextmanager
    def held(self, ticket: Ticket) -> Iterator[None]:
        """Take a ticket back when the block ends."""
        try:
            yield
        finally:
            with self.changed:
                self.tickets.remove(ticket)
                if ticket.requests:
                    self.ends.extend([self.clock()] * ticket.n)
                self.changed.notify_all()

    def check(self, ticket: Ticket) -> None:
        if self.is_closed:
            raise RequestError(503, "the server is stopping")
        most = self.max_per_key
        n_of_key = sum(t.n for t in self.tickets if t.key_name == ticket.key_name)
        # A request that is alone is taken, however many answers it asks for.
        if most is not None and n_of_key and n_of_key + ticket.n > most:
            message = f"an API key may have {most} answers at a time"
            raise self.too_many(f"{message} (--max-requests-per-key)", n_of_key)
        n_waiting, most = self.n_waiting, self.max_queue
        if most is not None and n_waiting and n_waiting + ticket.n > most:
            message = f"{n_waiting} answers wait for their turn, and {most} may"
            raise self.too_many(f"{message} (--max-queue)", n_waiting)

    @property
    def n_waiting(self) -> int:
        """How many answers have not started."""
        with self.changed:
            return sum(ticket.n_waiting for ticket in self.tickets)

    def too_many(self, message: str, n: int) -> RequestError:
        """The 429 for a request that comes after ``n`` others."""
        seconds = 1
        if len(self.ends) > 1:
            passed = self.ends[-1] - self.ends[0]
            # The answers before it end in so many seconds, if they end as the last ones did.
            seconds = math.ceil(n * passed / (len(self.ends) - 1))
        headers = {"Retry-After": str(min(max(1, seconds), MOST_WAIT))}
        return RequestError(429, message, code="rate_limit_exceeded", headers=headers)

    def close(self) -> None:
        """Admit nothing more."""
        with self.changed:
            self.is_closed = True

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until the answers to all requests were sent.

        Args:
            timeout (float): Seconds to wait at most.

        Returns:
            bool: Whether they were.
        """
        with self.changed:
            return self.changed.wait_for(lambda: not self.tickets, timeout)

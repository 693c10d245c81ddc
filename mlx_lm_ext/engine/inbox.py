"""Takes new and cancelled requests from the handlers to the generation thread."""

import time
from queue import Empty, SimpleQueue
from threading import Event
from typing import List, Optional

from ..errors import RequestError
from ..request.mailbox import Turnstile
from ..request.request import Request


class Inbox:
    """New and cancelled requests, on their way to the generation thread."""

    def __init__(self) -> None:
        self.requests: "SimpleQueue[Optional[Request]]" = SimpleQueue()
        self.cancelled: "SimpleQueue[Request]" = SimpleQueue()
        # Takes the tokens back to the handlers.
        self.turnstile = Turnstile()
        # Set when requests are served: the model is loaded, and with --warmup full warm, too.
        # Also set when that has failed.
        self.loaded = Event()
        # Why no request is served any more, if none is, and since when.
        self.reason: Optional[str] = None
        self.closed = 0.0

    def put(self, request: Request) -> None:
        self.requests.put(request)

    def cancel(self, request: Request) -> None:
        """Take a request out before the next step. It may have ended already."""
        request.cancelled = True
        if not request.finished:
            self.cancelled.put(request)

    @property
    def is_closed(self) -> bool:
        return self.reason is not None

    @property
    def is_done(self) -> bool:
        """Whether the generation thread is to end."""
        return self.is_closed

    def close(self, reason: str) -> None:
        """Let no request be served any more, and wake the generation thread.

        Args:
            reason (str): What clients are told. That of the first call counts.
        """
        if self.reason is None:
            self.closed = time.monotonic()
            self.reason = reason
        self.requests.put(None)

    def abandon(self, reason: str) -> None:
        """End all requests that come or are here, on any thread: the generation thread cannot.

        Args:
            reason (str): What clients are told.
        """
        self.close(reason)
        for request in Inbox.take(self, block=False):
            request.put(RequestError(503, reason))

    @property
    def has_new(self) -> bool:
        """Whether ``take`` would not have to wait."""
        return not self.requests.empty()

    def take(self, block: bool, timeout: Optional[float] = None) -> List[Request]:
        """All new requests that were not cancelled.

        Args:
            block (bool): Wait until something is there.
            timeout (Optional[float]): Seconds to wait at most.
        """
        requests = []
        try:
            while True:
                request = self.requests.get(block, timeout)
                if request is not None and not request.cancelled:
                    requests.append(request)
                block = False
        except Empty:
            return requests

    def take_cancelled(self) -> List[Request]:
        requests = []
        while not self.cancelled.empty():
            requests.append(self.cancelled.get())
        return requests

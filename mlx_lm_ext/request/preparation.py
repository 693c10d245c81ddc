"""Bounds for what a connection's thread does before the engine has its request.

JSON, chat templates and tokenizers take time that a client chooses.

Rules:
1. Only so many requests are prepared at once; the others wait for their turn.
2. Preparing ends when the client has left, when it takes too long, and when the server
   stops: between two steps, and within a step that ``run`` was given.
3. ``run`` raises an exception in the middle of whatever its step does. So it is given
   only what shares no locks and no state with other threads.
"""

import ctypes
import os
import socket
import time
from contextlib import contextmanager
from math import inf
from threading import Lock, Semaphore, get_ident
from typing import Callable, Iterator, Optional, Set, TypeVar

from ..errors import RequestError

T = TypeVar("T")

# How many requests are prepared at once, of how many at once an image is fetched, and for
# how many seconds at most. Python runs one thread at a time: more prepare nothing sooner.
MAX_PREPARING = max(2, min(4, os.cpu_count() or 1))
MAX_FETCHES = 8
MAX_SECONDS = 30.0
# Seconds between two looks at those that are prepared, at least.
INTERVAL = 0.1


class Interrupted(BaseException):
    """Raised in a thread by another. Not an ``Exception``, which a template may catch."""


class Preparation:
    """What ends the preparation of one request.

    Args:
        server (Optional[Preparations]): Where it takes turns with others. Without it,
          nothing ends the preparation, and ``turn`` cannot be used.
        is_gone (Callable[[], bool]): Whether its client has left (any thread).
        seconds (float): How long each of its turns may take, waiting included.
    """

    def __init__(
        self,
        server: Optional["Preparations"] = None,
        is_gone: Callable[[], bool] = lambda: False,
        seconds: float = inf,
    ):
        self.server = server
        self.is_gone = is_gone
        self.deadline = inf
        self.seconds = seconds
        self.lock = Lock()
        # Whether it waits for its turn.
        self.waits = False
        # Why it ends.
        self.error: Optional[Exception] = None
        # The thread that ``run`` may be interrupted on.
        self.thread: Optional[int] = None
        self.connection: Optional[socket.socket] = None

    @contextmanager
    def turn(self, slots: Optional[Semaphore] = None) -> Iterator[None]:
        """Wait for a turn, and let the server watch what is done in it.

        Args:
            slots (Optional[Semaphore]): Of what; of preparing, without any.
        """
        slots = slots or self.server.slots
        self.deadline = time.monotonic() + self.seconds
        self.server.running.add(self)
        try:
            self.waits = True
            self.check()
            while not slots.acquire(timeout=0.5):
                self.check()
            self.waits = False
            try:
                yield
            finally:
                slots.release()
        finally:
            self.server.running.discard(self)

    def check(self) -> None:
        """Between two steps: raise what ends it.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it takes too long, or the server stops.
        """
        if self.server is not None and self.error is None:
            self.look()
        if self.error is not None:
            raise self.error

    def look(self) -> None:
        """Find out whether it is to end, and interrupt it then (any thread)."""
        if self.error is None:
            if self.server.stopping:
                self.error = RequestError(503, "the server is stopping")
            elif self.waits and time.monotonic() >= self.deadline:
                self.error = RequestError(503, "too many requests are being prepared")
            elif time.monotonic() >= self.deadline:
                self.error = RequestError(
                    400,
                    f"the prompt was not ready within {self.seconds:g} seconds; "
                    "it is too long, or the chat template too slow",
                )
            elif self.is_gone():
                self.error = ConnectionResetError("the client is gone")
            else:
                return
        # With a timeout, because an interrupted thread might have kept the lock, and the
        # thread that accepts connections must not wait for it.
        if not self.lock.acquire(timeout=1.0):
            return
        try:
            if self.thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread), ctypes.py_object(Interrupted)
                )
            if self.connection is not None:
                try:
                    # Not that of a TLS connection, which takes it from its reader.
                    socket.socket.shutdown(self.connection, socket.SHUT_RDWR)
                except OSError:
                    pass  # it has just ended
        finally:
            self.lock.release()

    def run(self, step: Callable[[], T]) -> T:
        """The result of ``step()``, which is interrupted when it is to end.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it takes too long, or the server stops.
        """
        self.check()
        try:
            try:
                with self.lock:
                    self.thread = get_ident()
                return step()
            finally:
                # To leave the lock is a call, and after a call CPython raises what is
                # pending: what was sent just before comes here, and not to the caller.
                with self.lock:
                    self.thread = None
        except Interrupted:
            raise self.error from None

    @contextmanager
    def reading(self, connection: socket.socket) -> Iterator[None]:
        """Shut a connection of the server's own when it is to end."""
        with self.lock:
            self.connection = connection
        try:
            self.check()
            yield
        finally:
            with self.lock:
                self.connection = None


class Preparations:
    """The requests that a server prepares.

    Args:
        n (int): How many at once.
        seconds (float): How long each turn may take.
    """

    def __init__(self, n: int = MAX_PREPARING, seconds: float = MAX_SECONDS):
        self.slots = Semaphore(n)
        self.fetches = Semaphore(MAX_FETCHES)
        self.seconds = seconds
        self.running: Set[Preparation] = set()
        self.stopping = False
        self.next_look = 0.0

    def begin(self, is_gone: Callable[[], bool]) -> Preparation:
        return Preparation(self, is_gone, self.seconds)

    def look(self) -> None:
        """End those that are to end. To be called every second or oftener."""
        now = time.monotonic()
        if self.running and now >= self.next_look:
            self.next_look = now + INTERVAL
            for preparation in list(self.running):
                preparation.look()

    def stop(self) -> None:
        """End all, and let none begin."""
        self.stopping = True
        for preparation in list(self.running):
            preparation.look()

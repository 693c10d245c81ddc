"""Limits how many requests handlers prepare at a time, and for how long.

JSON, chat templates and tokenizers take as long as a client's input makes them.

Rules:
1. A limited number of requests is prepared at a time; the others wait for their turn.
2. Preparing ends when the client has left, when it takes too long, and when the server
   stops: between two steps, and also in the middle of a step that ``run`` executes.
3. ``run`` raises an exception at any point of its step. So a step must not take locks or
   change state that other threads use.
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

# Requests that are prepared at a time. Python runs one thread at a time, so more of them
# would not be ready sooner.
MAX_PREPARING = max(2, min(4, os.cpu_count() or 1))
# Requests whose images are checked or fetched at a time.
MAX_FETCHES = 8
# Seconds that a turn may take.
MAX_SECONDS = 30.0
# Least seconds between two checks of the requests that are being prepared.
INTERVAL = 0.1


class Interrupted(BaseException):
    """Raised in a thread by another thread. It is not an ``Exception``, because code that
    is called by a template may catch those."""


class Preparation:
    """The preparation of one request, made by ``Preparations.begin``.

    Args:
        preparations (Preparations): Those with which it takes turns.
        is_gone (Callable[[], bool]): Whether its client has left (any thread).
    """

    def __init__(self, preparations: "Preparations", is_gone: Callable[[], bool]):
        self.preparations = preparations
        self.is_gone = is_gone
        # When its current or last turn must be over.
        self.deadline = inf
        # Guards ``thread`` and ``connection``.
        self.lock = Lock()
        # Whether it waits for its turn.
        self.waits = False
        # Why it has to end.
        self.error: Optional[Exception] = None
        # The thread on which ``run`` executes a step.
        self.thread: Optional[int] = None
        # The connection from which an image is read.
        self.connection: Optional[socket.socket] = None

    @contextmanager
    def turn(self, slots: Optional[Semaphore] = None) -> Iterator[None]:
        """Wait for a turn, which the server may end.

        Args:
            slots (Optional[Semaphore]): The turns to take one of; if not given, those of
              preparing.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it waits too long, or the server stops.
        """
        slots = slots or self.preparations.slots
        self.deadline = time.monotonic() + self.preparations.seconds
        self.preparations.running.add(self)
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
            self.preparations.running.discard(self)

    def check(self) -> None:
        """Raise the error if it has to end. To be called between two steps.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it takes too long, or the server stops.
        """
        if self.error is None:
            self.end_if_due()
        if self.error is not None:
            raise self.error

    def end_if_due(self) -> None:
        """Check whether it has to end, and interrupt it if so (any thread)."""
        if self.error is None:
            if self.preparations.stopping:
                self.error = RequestError(503, "the server is stopping")
            elif self.waits and time.monotonic() >= self.deadline:
                self.error = RequestError(503, "too many requests are being prepared")
            elif time.monotonic() >= self.deadline:
                self.error = RequestError(
                    400,
                    f"the prompt was not ready within {self.preparations.seconds:g} seconds; "
                    "it is too long, or the chat template too slow",
                )
            elif self.is_gone():
                self.error = ConnectionResetError("the client is gone")
            else:
                return
        # With a timeout: an interrupted thread may never release the lock, and the thread
        # that accepts connections must not wait for it.
        if not self.lock.acquire(timeout=1.0):
            return
        try:
            if self.thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread), ctypes.py_object(Interrupted)
                )
            if self.connection is not None:
                try:
                    # Not the method of a TLS socket, which breaks its reader.
                    socket.socket.shutdown(self.connection, socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended by itself
        finally:
            self.lock.release()

    def run(self, step: Callable[[], T]) -> T:
        """Give the result of ``step()``, which is interrupted if the preparation has to end.

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
                # CPython raises a pending exception after a call, and to release the lock
                # is a call. So one that was set just before is raised here, and never in
                # the code of the caller.
                with self.lock:
                    self.thread = None
        except Interrupted:
            assert self.error is not None  # it is set before the interruption
            raise self.error from None

    @contextmanager
    def reading(self, connection: socket.socket) -> Iterator[None]:
        """Let a connection be shut down if the preparation has to end.

        Args:
            connection (socket.socket): One that this server has made, to fetch an image.
        """
        with self.lock:
            self.connection = connection
        try:
            self.check()
            yield
        finally:
            with self.lock:
                self.connection = None


class Preparations:
    """All requests that a server is preparing.

    Args:
        n (int): How many are prepared at a time.
        seconds (float): How long each turn may take.
    """

    def __init__(self, n: int = MAX_PREPARING, seconds: float = MAX_SECONDS):
        self.slots = Semaphore(n)
        self.fetches = Semaphore(MAX_FETCHES)
        self.seconds = seconds
        self.running: Set[Preparation] = set()
        self.stopping = False
        self.next_look = 0.0

    def begin(self, is_gone: Callable[[], bool] = lambda: False) -> Preparation:
        """Begin to prepare a request.

        Args:
            is_gone (Callable[[], bool]): Whether its client has left (any thread).
        """
        return Preparation(self, is_gone)

    def end_due(self) -> None:
        """End those that have to end. To be called at least once a second."""
        now = time.monotonic()
        if self.running and now >= self.next_look:
            self.next_look = now + INTERVAL
            for preparation in list(self.running):
                preparation.end_if_due()

    def stop(self) -> None:
        """End all of them, and those that begin later."""
        self.stopping = True
        for preparation in list(self.running):
            preparation.end_if_due()

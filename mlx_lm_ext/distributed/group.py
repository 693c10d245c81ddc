"""The processes that run one model: rank 0 decides, and tells the others.

Rules:
1. All ranks run the same steps in the same order. Whatever could differ between them (clocks,
   arrivals, policies, bytes, random numbers) goes through ``agree``.
2. What is told has its kind. A rank that asks for another kind has taken another way, and
   raises ``RankError``.
3. It is sent at once, over TCP beside MLX's collectives: rank 0 may wait for the others in the
   next line, and a rank that waits for it sleeps.
"""

import logging
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, TypeVar

import mlx.core as mx

from ..errors import RequestError, internal_error
from .connections import Connections, RankError
from .heartbeat import Heartbeat

logger = logging.getLogger(__name__)

T = TypeVar("T")

# ``OneProcess.agree``, for those who need nothing else of the group.
Agree = Callable[[str, Callable[[], Any]], Any]


class OneProcess:
    """A group of one, which has decided for all what it has decided."""

    rank, size = 0, 1

    def agree(self, kind: str, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0.

        Args:
            kind (str): What is decided.
            make (Callable): Decides it, on rank 0 only. Gives what JSON has: the other ranks get
              tuples as lists.

        Raises:
            RequestError: If ``make`` has raised one: on all ranks, so that the same request fails
              on all. What else it raises becomes one of them, and is logged.
            RankError: If rank 0 has decided something else, or is lost.
        """
        return make()

    def on_first(self, kind: str, make: Callable[[], T]) -> Optional[T]:
        """What ``make`` gives on rank 0; None on the others. For what JSON does not have."""
        return make()

    def check(self, kind: str, mine: Any) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            RankError: If it is not.
        """

    def compare(self, facts: Dict[str, str]) -> None:
        """Check that the facts that all ranks have are the same.

        Raises:
            RankError: If one is not. It names the fact and the ranks.
        """

    def least(self, value: int) -> int:
        """The least of the values that the ranks give. All ranks wait for each other."""
        return value

    def first(self, array: mx.array) -> mx.array:
        """The array of rank 0, in the graph. Those of the others are zeros of its shape."""
        return array

    def advance(self, is_busy: bool) -> None:
        """The generation thread has come so far that all ranks are at the same place.

        Args:
            is_busy (bool): Whether it will soon be at the next one. Otherwise it waits for
              requests.
        """

    def leave(self) -> None:
        """Nothing is decided together any more: this rank ends, and the others will, too."""

    def fail(self, reason: str) -> str:
        """This rank cannot go on, so that none can.

        Args:
            reason (str): Why, in a sentence that names what has failed.

        Returns:
            str: Why the group has ended: another rank may have failed first.
        """
        return reason

    @property
    def lost(self) -> Optional[str]:
        """Why the group cannot go on, if it cannot (any thread)."""
        return None

    @property
    def must_stop(self) -> bool:
        """Whether another rank was asked to end by a signal (any thread)."""
        return False

    def ask_to_stop(self) -> None:
        """Let rank 0 know that this rank was asked to end (any thread)."""

    def on_lost(self, tell: Callable[[str], None]) -> None:
        """Let a function be called with the reason when the group is lost, or now if it is."""


ONE_PROCESS = OneProcess()


class Ranks(OneProcess):
    """The group of several processes.

    Args:
        group (mx.distributed.Group): That of MLX.
        timeout (float): Seconds without progress after which a rank counts as stuck.

    Raises:
        RankError: If the other ranks cannot be reached.
    """

    def __init__(self, group: Any, timeout: float):
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.connections = Connections(self.rank, self.size, self.share)
        self.heartbeat = Heartbeat(self.rank, self.connections.lives, timeout)
        # Some thread may wait for a rank that does nothing.
        self.heartbeat.on_lost(lambda reason: self.connections.shut())
        # Whether ``make`` is running: what it asks for itself is not told.
        self.is_deciding = False
        self.is_over = False

    # Decisions

    def agree(self, kind: str, make: Callable[[], T]) -> T:
        if self.is_deciding or self.is_over:
            return make()
        if self.rank:
            told: T = self.take(kind)
            return told
        self.is_deciding = True
        try:
            value = make()
        except Exception as e:
            if not isinstance(e, RequestError):
                logger.error(f"Rank 0 could not decide: {kind}", exc_info=e)
                e = internal_error()
            self.tell([kind, None, [e.status, str(e), e.param, e.code]])
            raise e
        finally:
            self.is_deciding = False
        self.tell([kind, value])
        return value

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Where the others are talked to: an error says why the group has ended.

        Raises:
            RankError: If a connection has ended.
        """
        try:
            yield
        except RankError as e:
            raise RankError(self.fail(str(e))) from None

    def tell(self, value: Any) -> None:
        """Send a value to all other ranks, or from one of them to rank 0."""
        with self.connected():
            self.connections.tell(value)

    def take(self, kind: str) -> Any:
        """What rank 0 has decided."""
        with self.connected():
            told, value, *error = self.connections.take()
        if told != kind:
            raise RankError(
                f"rank {self.rank} has to know {kind!r}, and rank 0 tells {told!r}: the ranks "
                "do not run the same steps"
            )
        if error:
            raise RequestError(*error[0])
        return value

    def on_first(self, kind: str, make: Callable[[], T]) -> Optional[T]:
        made: List[T] = []
        self.agree(kind, lambda: made.append(make()))
        return made[0] if made else None

    def check(self, kind: str, mine: Any) -> None:
        told = self.agree(kind, lambda: mine)
        if told != mine:
            raise RankError(
                f"the {kind} of rank {self.rank} is {mine}, and that of rank 0 is {told}"
            )

    def compare(self, facts: Dict[str, str]) -> None:
        if self.rank:
            self.tell(facts)
            error = self.take("comparison")
        else:
            error = None
            with self.connected():
                answers = [*self.connections.answers()]
            for rank, theirs in answers:
                wrong = next(
                    (k for k in facts if theirs.get(k, facts[k]) != facts[k]), None
                )
                if wrong is not None and error is None:
                    error = (
                        f"the ranks differ in {wrong}: rank 0 has {facts[wrong]}, and rank "
                        f"{rank} has {theirs[wrong]}"
                    )
            self.tell(["comparison", error])
        if error is not None:
            raise RankError(error)

    # Collectives

    def share(self, values: List[int]) -> List[int]:
        """The sums over all ranks of small integers."""
        sums: List[int] = mx.distributed.all_sum(mx.array(values, mx.int32)).tolist()
        return sums

    def least(self, value: int) -> int:
        # In two parts, because there are 32 bits; each rank has a place of its own.
        parts = [0] * (2 * self.size)
        parts[2 * self.rank : 2 * self.rank + 2] = divmod(min(value, 1 << 50), 1 << 26)
        parts = self.share(parts)
        return min((high << 26) + low for high, low in zip(parts[::2], parts[1::2]))

    def first(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array)

    # Life and end

    def advance(self, is_busy: bool) -> None:
        self.heartbeat.advance(is_busy)

    def leave(self) -> None:
        self.is_over = True
        self.heartbeat.leave()

    def fail(self, reason: str) -> str:
        self.is_over = True
        return self.heartbeat.fail(reason)

    @property
    def lost(self) -> Optional[str]:
        return self.heartbeat.lost

    @property
    def must_stop(self) -> bool:
        return self.heartbeat.must_stop

    def ask_to_stop(self) -> None:
        self.heartbeat.ask_to_stop()

    def on_lost(self, tell: Callable[[str], None]) -> None:
        self.heartbeat.on_lost(tell)

"""Waiting requests whose prompts share a prefix with a row that runs it: who waits for whom.

Rules:
1. Only requests and rows are known here. The batch moves the KV.
2. What is known of a request is forgotten when it starts, and when it leaves.
"""

from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Optional, Set
from weakref import WeakSet

from ..cache.tree import n_common
from ..request.request import Request
from .row import Row

# Tokens of a shared prefix that are worth a wait.
MIN_SHARED = 16


@dataclass(frozen=True)
class SharedPrefix:
    """A prefix that a row runs for a request that waits for it.

    Args:
        leader (Row): The row.
        n_tokens (int): Tokens of the prefix.
    """

    leader: Row
    n_tokens: int

    @property
    def is_ready(self) -> bool:
        return self.leader.n_run >= self.n_tokens

    @property
    def is_pending(self) -> bool:
        return self.leader.is_prefilling and not self.is_ready


class PrefixSharing:
    """Which requests wait for which rows, and for how many tokens."""

    def __init__(self) -> None:
        # What each waiting request waits for at present.
        self.awaited: Dict[Request, SharedPrefix] = {}
        # The row that each waiting request last waited for, or that it was itself. Its KV
        # is needed until the request starts.
        self.leaders: Dict[Request, Row] = {}
        # Rows that some request has waited for.
        self.followed: "WeakSet[Row]" = WeakSet()
        # Requests that have waited for a prefix which was not there afterwards.
        self.gave_up: Set[Request] = set()
        # Tokens that a waiting request shares with rows: prompts are compared once.
        self.n_shared: Dict[Request, Dict[Row, int]] = {}

    def follow(
        self, request: Request, rows: Iterable[Row], n_known: Callable[[], int]
    ) -> Optional[SharedPrefix]:
        """Let a request wait for the row that runs the longest prefix of its prompt.

        Args:
            request (Request): A waiting request.
            rows (Iterable[Row]): The rows that are prefilling.
            n_known (Callable): Gives the tokens of its prompt that the prompt cache has.

        Returns:
            Optional[SharedPrefix]: ``None`` if no wait is worth it: no row runs a prefix
            of at least ``MIN_SHARED`` tokens more than the prompt cache has.
        """
        if request in self.gave_up:
            return None
        leader, n_tokens = None, 0
        for row in rows:
            n = self.compare(request, row)
            if n > n_tokens:
                leader, n_tokens = row, n
        if leader is None or n_tokens < MIN_SHARED or leader.n_run >= n_tokens:
            return None
        if n_tokens < n_known() + MIN_SHARED:
            # The prompt cache will hardly lose it before the request starts.
            self.n_shared[request][leader] = 0
            return None
        shared = self.awaited[request] = SharedPrefix(leader, n_tokens)
        self.leaders[request] = leader
        self.followed.add(leader)
        return shared

    def compare(self, request: Request, row: Row) -> int:
        """How many tokens the prompts of a request and of a row share. The last token of
        each has to run in any case."""
        lengths = self.n_shared.setdefault(request, {})
        if row not in lengths:
            other = row.request
            is_alike = other.cache_key == request.cache_key and not other.generated
            lengths[row] = (
                n_common(other.prompt[:-1], request.prompt[:-1]) if is_alike else 0
            )
        return lengths[row]

    def end_wait(self, request: Request, is_there: bool) -> None:
        """A request need not wait any longer.

        Args:
            request (Request): The request.
            is_there (bool): Whether the prompt cache has the prefix now.
        """
        del self.awaited[request]
        if not is_there:
            self.gave_up.add(request)

    def keep(self, row: Row) -> None:
        """A row is about to leave for a while. Its KV is needed until its request starts
        again."""
        self.leaders[row.request] = row
        self.followed.add(row)

    def forget(self, request: Request) -> None:
        """A request has started or left."""
        self.awaited.pop(request, None)
        self.leaders.pop(request, None)
        self.n_shared.pop(request, None)
        self.gave_up.discard(request)

    @property
    def needed(self) -> List[Request]:
        """The requests whose KV some waiting request needs."""
        return [row.request for row in set(self.leaders.values())]

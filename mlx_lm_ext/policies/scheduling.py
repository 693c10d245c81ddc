"""Built-in scheduler policies: which request starts next.

Rule: no request waits for ever. ``Ageing`` starts one that has waited for ``--max-wait`` seconds
before all that came later; ``FCFS`` and ``Fair`` need no such limit.
"""

import argparse
import heapq
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type

from ..interfaces import Clock, RequestInfo, SchedulerPolicy, SchedulerView


class FCFS(SchedulerPolicy):
    """First come, first served."""

    name = "fcfs"

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.budget = args.prefill_budget

    def prefill_tokens(self, view: SchedulerView) -> Optional[int]:
        """What keeps ``--max-gap`` and ``--prefill-budget`` while a running request has tokens
        already. Before that, nobody waits for a next token, and there is no limit."""
        if not any(r.n_generated for r in view.running):
            return None
        limits = (self.budget, view.gap_tokens)
        return min((n for n in limits if n is not None), default=None)


class Ageing(FCFS):
    """Orders by a key. Requests that have waited for ``--max-wait`` seconds go first."""

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.max_wait = args.max_wait

    def key(self, request: RequestInfo) -> Any:
        """The request with the lowest key goes first; of equal ones, the one that came
        first."""
        raise NotImplementedError

    def order(
        self, waiting: Sequence[RequestInfo], view: SchedulerView
    ) -> Optional[Sequence[RequestInfo]]:
        late = [r for r in waiting if view.now - r.arrival >= self.max_wait]
        return late + sorted(waiting[len(late) :], key=self.key)


class LPM(Ageing):
    """Longest prefix match: the request of which the prompt cache has most tokens goes first.

    So requests that share a prefix follow each other while it is in the cache. Zheng et
    al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024.
    """

    name = "lpm"
    most_known = 128

    def key(self, request: RequestInfo) -> Any:
        return -request.n_known

    def order(
        self, waiting: Sequence[RequestInfo], view: SchedulerView
    ) -> Optional[Sequence[RequestInfo]]:
        # To look up more prompts than that would take longer than it saves.
        return None if len(waiting) > self.most_known else super().order(waiting, view)


class SJF(Ageing):
    """Shortest job first: by the tokens of the prompt plus the most tokens of the answer."""

    name = "sjf"

    def key(self, request: RequestInfo) -> Any:
        return request.n_prompt + request.max_tokens


class Priority(Ageing):
    """The request with the lowest ``priority`` goes first."""

    name = "priority"

    def key(self, request: RequestInfo) -> Any:
        return request.priority


class Fair(FCFS):
    """Each ``user`` gets the same share of tokens, however many requests they send.

    The user who was served least goes first. The count of a user who comes back is raised
    to the lowest of the others, so that nobody saves up a share. Ageing is not needed:
    every user gets a turn, and their own requests are in order of arrival. This is the
    virtual token counter of Sheng et al., "Fairness in Serving Large Language Models",
    OSDI 2024, with its weights: a generated token counts as much as two of a prompt.
    """

    name = "fair"

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.served: Dict[Optional[str], float] = {}
        self.users: Set[Optional[str]] = set()

    def on_tokens(self, counts: Sequence[Tuple[RequestInfo, int]]) -> None:
        for request, n in counts:
            first = request.n_generated == 0
            prompt = request.n_prompt - request.n_matched if first else 0
            served = self.served.get(request.user, 0)
            self.served[request.user] = served + prompt + 2 * n

    def order(
        self, waiting: Sequence[RequestInfo], view: SchedulerView
    ) -> Optional[Sequence[RequestInfo]]:
        users = {r.user for r in (*waiting, *view.running)}
        served = self.served
        stayed = [served[user] for user in users & self.users]
        floor = min(stayed, default=max(served.values(), default=0))
        gone = {user: n for user, n in served.items() if user not in users}
        self.served = {user: n for user, n in gone.items() if n > floor}
        self.served |= {user: max(served.get(user, 0), floor) for user in users}
        self.users = users

        queues: Dict[Optional[str], List[RequestInfo]] = {}
        for request in waiting:
            queues.setdefault(request.user, []).append(request)
        turns = [
            (self.served[user], queue[0].arrival, i, iter(queue))
            for i, (user, queue) in enumerate(queues.items())
        ]
        heapq.heapify(turns)
        ordered = []
        while turns:
            n, _, i, queue = turns[0]
            following = next(queue, None)
            if following is None:
                heapq.heappop(turns)
                continue
            ordered.append(following)
            # The next request of this user is placed as if this one had been served.
            n += following.n_prompt + 2 * following.max_tokens
            heapq.heapreplace(turns, (n, following.arrival, i, queue))
        return ordered


POLICIES: List[Type[SchedulerPolicy]] = [FCFS, LPM, SJF, Priority, Fair]

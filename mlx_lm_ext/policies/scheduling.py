"""Built-in scheduler policies: which request starts next.

Rule: under any load, who has waited for ``--max-wait`` seconds starts before all who
came later. So nobody waits longer than that and the time to serve those before them.
"""

import heapq
from typing import Any, Dict, List, Optional, Set

from ..batch.prefill import default_budget
from ..interfaces import RequestInfo, SchedulerPolicy


class FCFS(SchedulerPolicy):
    """First come, first served."""

    name = "fcfs"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.budget = args.prefill_budget or default_budget()

    def prefill_tokens(self, view):
        """A few beside streams that run; as many as there are when nobody reads yet."""
        return self.budget if any(r.n_generated for r in view.running) else None


class Ageing(FCFS):
    """Orders by a key; who has waited too long goes first."""

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.max_wait = args.max_wait

    def key(self, request: RequestInfo) -> Any:
        """The lowest goes first, and of those that are equal, who came first."""
        raise NotImplementedError

    def order(self, waiting, view):
        late = [r for r in waiting if view.now - r.arrival >= self.max_wait]
        return late + sorted(waiting[len(late) :], key=self.key)


class LPM(Ageing):
    """Longest prefix match: what the prompt cache has most tokens of goes first.

    Its order keeps what was just used in the cache. Zheng et al., "SGLang: Efficient
    Execution of Structured Language Model Programs", 2024.
    """

    name = "lpm"
    most_known = 128

    def key(self, request):
        return -request.n_known

    def order(self, waiting, view):
        # Looking up so many prompts would take longer than it saves.
        return None if len(waiting) > self.most_known else super().order(waiting, view)


class SJF(Ageing):
    """Shortest job first, by the tokens of the prompt and of the longest answer."""

    name = "sjf"

    def key(self, request):
        return request.n_prompt + request.max_tokens


class Priority(Ageing):
    """The lowest ``priority`` of the request goes first."""

    name = "priority"

    def key(self, request):
        return request.priority


class Fair(FCFS):
    """Each ``user`` gets the same share of tokens, whoever asks more often.

    The user who was served least goes first. One who comes back starts where the least
    served of the others are, and cannot save up a share. It needs no ageing: each
    user's turn comes, and their requests are in order of arrival. The virtual token
    counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024,
    with its weights: a generated token counts as two of a prompt.
    """

    name = "fair"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.served: Dict[Optional[str], float] = {}
        self.users: Set[Optional[str]] = set()

    def on_tokens(self, counts):
        for request, n in counts:
            first = request.n_generated == 0
            prompt = request.n_prompt - request.n_matched if first else 0
            served = self.served.get(request.user, 0)
            self.served[request.user] = served + prompt + 2 * n

    def order(self, waiting, view):
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
            served, arrival, i, queue = turns[0]
            request = next(queue, None)
            if request is None:
                heapq.heappop(turns)
                continue
            ordered.append(request)
            # As if it were served now.
            served += request.n_prompt + 2 * request.max_tokens
            heapq.heapreplace(turns, (served, request.arrival, i, queue))
        return ordered


POLICIES = [FCFS, LPM, SJF, Priority, Fair]

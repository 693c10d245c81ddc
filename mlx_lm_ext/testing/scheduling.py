"""Checks scheduler policies: random requests wait, run, are put back, and leave, as on a server."""

import argparse
import gc
import operator
import random
import weakref
from itertools import islice
from typing import Any, Dict, Iterable, List, Optional, Sequence, Type

from ..interfaces import RequestInfo, SchedulerPolicy, SchedulerView
from ..policies.loading import SCHEDULER
from .requests import make_request, random_sampling
from .watching import ManualClock, Watched, command_line

N_STEPS = 300


def check_scheduler_policy(
    cls: Type[SchedulerPolicy],
    argv: Sequence[str] = (),
    seeds: Iterable[int] = range(3),
) -> None:
    """Check a class for ``--scheduler`` against its contract.

    Args:
        cls (Type[SchedulerPolicy]): The class.
        argv (Sequence[str]): The command line of the server. ``-p`` names the plugin if its
          flags are needed and it is not installed.
        seeds (Iterable[int]): The seeds of the traces.

    Raises:
        AssertionError: If it breaks the contract.
        SystemExit: If the command line is wrong.
    """
    args = command_line(argv)
    for seed in seeds:
        trace = Trace(cls, args, random.Random(seed))
        for _ in range(N_STEPS):
            trace.step()
        trace.end()


class Trace:
    """A server without a model: who waits, who runs, and what the policy is told of it.

    Args:
        cls (Type[SchedulerPolicy]): The class that is checked.
        args (argparse.Namespace): The command line.
        rng (random.Random): Decides what happens.
    """

    def __init__(
        self, cls: Type[SchedulerPolicy], args: argparse.Namespace, rng: random.Random
    ):
        self.args = args
        self.rng = rng
        self.clock = ManualClock()
        self.watched = Watched(SCHEDULER, cls, args, self.clock)
        self.batch_size = rng.choice([1, 4, 8])
        self.n_requests = 0
        self.waiting: List[RequestInfo] = []
        self.running: List[RequestInfo] = []
        self.started: "weakref.WeakSet[RequestInfo]" = weakref.WeakSet()
        self.gone: List[weakref.ref[RequestInfo]] = []

    @property
    def view(self) -> SchedulerView:
        gap_tokens = self.rng.choice([None, 1, 64, 2048])
        running = tuple(self.running)
        return SchedulerView(self.clock.now, running, self.batch_size, gap_tokens)

    def step(self) -> None:
        """One step of the batch, and what happens around it."""
        rng = self.rng
        self.clock.now += rng.choice([0, 0.01, 0.1, 40])
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            if len(self.waiting) < 40:
                self.arrive()
        if rng.random() < 0.1 and self.waiting + self.running:
            self.leave(rng.choice(self.waiting + self.running))
        if self.waiting and len(self.running) < self.batch_size:
            self.start(self.order())
        if any(not request.n_generated for request in self.running):
            self.check_prefill_tokens()
        self.generate()
        if rng.random() < 0.1 and self.running:
            # There was no memory for it: it goes on later.
            self.waiting.append(self.running.pop())
            self.waiting.sort(key=lambda request: request.arrival)

    def arrive(self) -> None:
        rng = self.rng
        fields: Dict[str, List[Any]] = {
            "priority": [-1, 0, 7],
            "user": ["a", "b", "c"],
            "stream": [True, False],
        }
        body = random_sampling(rng) | {"max_tokens": rng.choice([1, 8, 4000])}
        body |= {k: rng.choice(v) for k, v in fields.items() if rng.random() < 0.5}
        request = make_request(self.args, body, self.n_requests, self.clock.now)
        request.n_prompt = rng.choice([1, 20, 3000])
        request.key_name = rng.choice([None, "key"])
        self.n_requests += 1
        self.waiting.append(request)

    def leave(self, request: RequestInfo) -> None:
        """A request ends, or its client leaves."""
        for requests in (self.waiting, self.running):
            if request in requests:
                requests.remove(request)
        self.gone.append(weakref.ref(request))
        self.watched.call("on_finish", request)

    def order(self) -> List[RequestInfo]:
        """The waiting requests, in the order of the policy."""
        if len(self.waiting) <= self.most_known:
            for request in self.waiting:
                request.n_known = self.rng.randrange(request.n_prompt)
        waiting, view = list(self.waiting), self.view
        given = [waiting, view]
        right = (
            "some or all of the waiting requests in another order, each once, or None"
        )
        answer = self.watched.call("order", waiting, view)
        if answer is None:
            return list(self.waiting)
        try:
            # One too many is named below. A generator may never end.
            first = list(islice(answer, len(self.waiting) + 1))
        except TypeError:
            self.watched.fail("order", given, f"returned {answer!r}", right)
        for i, request in enumerate(first):
            if not any(request is other for other in self.waiting):
                label = repr(getattr(request, "id", request))
                found = f"returned {label}, which does not wait"
                self.watched.fail("order", given, found, right)
            if any(request is other for other in first[:i]):
                found = f"returned request {request.id!r} twice"
                self.watched.fail("order", given, found, right)
        return first + [r for r in self.waiting if r not in first]

    @property
    def most_known(self) -> int:
        most = self.watched.object.most_known
        assert isinstance(most, int) and most >= 0, (
            f"{self.watched.cls.__name__}.most_known is {most!r}; right is how many waiting "
            "requests may be looked up in the prompt cache: 0, or a larger integer"
        )
        return most

    def start(self, ordered: List[RequestInfo]) -> None:
        """Start as many as fit. One whose prefix another one is computing is passed over."""
        for request in ordered:
            if len(self.running) < self.batch_size and self.rng.random() < 0.8:
                self.waiting.remove(request)
                self.running.append(request)
                if request not in self.started:
                    self.started.add(request)
                    request.n_matched = self.rng.randrange(request.n_prompt)
                    self.watched.call("on_start", request)

    def check_prefill_tokens(self) -> None:
        view = self.view
        found: Optional[Any] = self.watched.call("prefill_tokens", view)
        if found is None:
            return
        try:
            is_right = not isinstance(found, bool) and operator.index(found) >= 1
        except TypeError:
            is_right = False
        if not is_right:
            right = "an integer of at least 1, or None for --prefill-step-size"
            self.watched.fail("prefill_tokens", [view], f"returned {found!r}", right)

    def generate(self) -> None:
        """A token of each row whose prompt has been run."""
        rows = [r for r in self.running if r.n_generated or self.rng.random() < 0.5]
        if not rows:
            return
        self.watched.call("on_tokens", [(request, 1) for request in rows])
        for request in rows:
            request.n_generated += 1
            is_last = request.n_generated >= request.max_tokens
            if is_last or self.rng.random() < 0.05:
                self.leave(request)

    def end(self) -> None:
        """All leave. The policy may keep what it has counted, but not the requests."""
        while self.waiting or self.running:
            self.leave((self.waiting + self.running)[0])
        gc.collect()
        n_kept = sum(ref() is not None for ref in self.gone)
        if n_kept > len(self.gone) / 2:
            self.watched.warn(
                f"{self.watched.cls.__name__} keeps {n_kept} of {len(self.gone)} requests that "
                "have ended; let go of them in on_finish, or memory runs out"
            )
        self.watched.warn_if_slow()

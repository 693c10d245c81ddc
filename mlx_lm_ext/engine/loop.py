"""The generation thread, the only one that touches MLX: it takes requests from the inbox, holds
those that wait, starts them, and runs the batch.

Rules:
1. Only this thread touches MLX. What comes from and goes to other threads is plain Python.
2. Requests start in the order of the scheduler policy. One that needs another model, or
   that cannot be batched, starts when the batch is empty.
3. A step that raises fails only the requests that cause it. The others go on from the
   tokens that they have. An error before a request is in the batch fails that request only.
4. With several ranks, each runs this loop. What could differ is agreed on, see
   ``distributed.group``, and what raises on one of them ends all.
"""

import gc
import logging
import time
import traceback
from collections import deque
from functools import partial
from math import inf
from threading import Event, Thread
from typing import Deque, List, Optional, Sequence, cast

from mlx_lm.models.cache import make_prompt_cache

from ..batch.batch import Batch
from ..batch.pairs import PAIRED_SHAPES
from ..batch.prefill import SHAPES, max_prefill_tokens
from ..cache.kinds import flatten
from ..cache.prompt_cache import RadixPromptCache
from ..distributed.connections import RankError
from ..distributed.group import ONE_PROCESS, OneProcess
from ..errors import RequestError, internal_error, one_line
from ..interfaces import SchedulerView
from ..policies.guard import Policies
from ..request.request import NO_TIME, NO_TOKEN, Request
from ..request.served_model import ModelKey
from .alone import Alone
from .counters import Counters
from .dequantize import logits_type, type_name
from .inbox import Inbox
from .kernels import KernelBuild
from .models import BatchModelProvider
from .prompt_scores import PromptScores
from .self_check import find_fault
from .warm_up import WarmUp

logger = logging.getLogger(__name__)

# Seconds between two lines of statistics, and between two looks for expired KV.
STATISTICS_INTERVAL = 10.0
# Seconds between two counts of the bytes.
COUNT_INTERVAL = 1.0
# Seconds between two looks whether all kernels are compiled.
COMPILING_INTERVAL = 0.2
# Places at which the ranks are the same between two comparisons of their prompt caches.
DIGEST_INTERVAL = 64


class Engine:
    """Serves all requests from one thread, as many at a time as fit into one batch.

    Args:
        model_provider (BatchModelProvider): Loads models, and carries the command line.
        policies (Policies): The policies and hooks of plugins.
        prompt_cache (Optional[RadixPromptCache]): Where KV is kept between requests.
          Without one, none is kept.
        group (OneProcess): The ranks that run the model.
        inbox (Optional[Inbox]): Where requests come from; a new one if not given.
    """

    batch_class = Batch

    def __init__(
        self,
        model_provider: BatchModelProvider,
        policies: Policies,
        prompt_cache: Optional[RadixPromptCache] = None,
        group: OneProcess = ONE_PROCESS,
        inbox: Optional[Inbox] = None,
    ):
        self.model_provider = model_provider
        self.cli_args = model_provider.cli_args
        self.policies = policies
        self.prompt_cache = prompt_cache
        self.group = group
        self.inbox = inbox or Inbox()
        # Requests that have not started, in the order in which they are to start.
        self.waiting: Deque[Request] = deque()
        # Whether a request came or left since they were put in that order.
        self.changed = False
        # When the first of all requests has to be looked at, because it takes too long.
        self.deadline = inf
        # How many rows may run: for a while, fewer than --batch-size after a failed step.
        self.max_rows = self.cli_args.batch_size
        # The batch of the loaded model, made for its first request.
        self.batch: Optional[Batch] = None
        # The prompt whose log probabilities are computed between the steps of the batch.
        self.scores: Optional[PromptScores] = None
        self.alone = Alone(
            model_provider, prompt_cache, lambda: self.inbox.is_closed, self.fail
        )
        self.load_error: Optional[Exception] = None
        # What is left of the warm-up of the model that was loaded first, and the kernels for
        # which it waits.
        self.warm_up: Optional[WarmUp] = None
        self.kernels = KernelBuild()
        # Whether the batches of the loaded model have still to be checked.
        self.must_check = True
        # Set when no request is served any more. Whether that is because of an error.
        self.ended = Event()
        self.has_failed = False
        self.n_places = 0
        self.counters = Counters()
        # Of the tokens that were generated, those that a line of the log has reported.
        self.n_reported = 0
        # Whether KV expires by the eviction policy, and whether it is time to look for it.
        self.has_expiry = self.prompt_cache is not None and bool(
            group.agree("expiry of KV", lambda: policies.eviction.overrides("expired"))
        )
        self.must_expire = False
        self.last_report = self.last_count = policies.clock()
        self.thread = Thread(target=self.run)
        group.on_lost(self.lose)

    # Any thread

    @property
    def loaded(self) -> Event:
        return self.inbox.loaded

    def start(self) -> None:
        self.thread.start()

    def stop_and_join(self, timeout: Optional[float] = None) -> bool:
        """End all requests that are unfinished, the generation thread, and its processes.

        Args:
            timeout (Optional[float]): Seconds to wait for the end of the thread, which
              cannot be interrupted while it loads a model. Without one, there is no limit.

        Returns:
            bool: Whether the thread has ended.
        """
        # First, because the warm-up begins when no kernels are compiled any more.
        self.inbox.close("the server is stopping")
        self.kernels.stop()
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def lose(self, reason: str) -> None:
        """Another rank is lost. The generation thread may wait for it for ever."""
        self.has_failed = True
        if not self.loaded.is_set():
            self.load_error = RankError(reason)
        self.inbox.abandon(reason)
        self.loaded.set()
        self.ended.set()

    # The generation thread from here on

    def run(self) -> None:
        try:
            self.load()
            self.serve()
        except BaseException as e:
            # What requests and plugins raise does not come here.
            self.has_failed = True
            mine = "the engine has failed"
            if self.group.size > 1:
                mine = self.describe_failure(e)
            reason = self.group.fail(mine)
            if reason == mine and not isinstance(e, RankError):
                logger.critical("The generation thread has failed", exc_info=e)
            self.inbox.close(reason)
        self.loaded.set()
        try:
            self.end(self.has_failed)
        except BaseException:
            logger.exception("The generation thread could not free what it has")
        self.ended.set()

    def describe_failure(self, error: BaseException) -> str:
        """What the other ranks say of an error on this one."""
        if isinstance(error, RankError):
            return str(error)
        return f"rank {self.group.rank}: {one_line(error)}"

    def load(self) -> None:
        """Load the model. With ``--warmup full``, warm it up too."""
        try:
            self.model_provider.switch_to(self.model_provider.default_key)
            if self.group.size > 1:
                self.must_check = False
                self.check_ranks()
            elif self.cli_args.warmup != "off" and self.has_batches:
                self.warm_up = WarmUp.of_server(self.model_provider)
                dtype = logits_type(self.model_provider.model)
                self.kernels.start(type_name(dtype))
            self.check_batches()
        except Exception as e:
            self.load_error = e
            if self.group.size > 1:
                reason = self.group.fail(self.describe_failure(e))
                self.load_error = RankError(reason)
            self.inbox.close("the model cannot be loaded")
        if self.warm_up and self.cli_args.warmup == "full":
            while self.kernels.is_running and not self.inbox.is_closed:
                time.sleep(COMPILING_INTERVAL)
            self.check_batches()
        if self.warm_up and self.cli_args.warmup == "full":
            self.warm_up.run_all(lambda: self.inbox.is_closed)
        self.loaded.set()

    def check_batches(self) -> None:
        """Check once whether the batches of the loaded model are right, and have its requests
        served alone if they are not. While kernels are compiled, it has to wait for them: then
        the check is made later."""
        if self.kernels.is_running or not self.must_check:
            return
        self.must_check = False
        fault = self.find_fault()
        if not fault:
            return
        # Requests may have run before.
        self.close_batch()
        self.warm_up = None
        if self.prompt_cache is not None:
            self.prompt_cache.trim_to(n_bytes=0)
        self.model_provider.is_batchable = False
        logger.warning(
            f"Requests to {self.model_provider.model_key[0]} are served one at a time: {fault}. "
            "With --no-self-check they are batched all the same"
        )

    def find_fault(self) -> str:
        """What is wrong with the batches of the loaded model. Empty if it need not be known."""
        if not (self.cli_args.self_check and self.has_batches):
            return ""
        return find_fault(self.model_provider.model, self.group)

    def check_ranks(self) -> None:
        """Check what has to be so with several ranks, of a model that is loaded.

        Raises:
            RuntimeError: If it is not so.
        """
        if not self.has_batches:
            raise RuntimeError(
                "the model cannot be served by several ranks, because its requests cannot be "
                "batched"
            )
        # With --pipeline, ranks with other layers might keep the KV of a prompt in other ways.
        caches = flatten(make_prompt_cache(self.model_provider.model))
        types = ", ".join(sorted({type(c).__name__ for c in caches}))
        self.group.compare(
            self.model_provider.digests | {"the types of the model's caches": types}
        )
        fault = self.find_fault()
        if fault:
            raise RuntimeError(
                f"the model cannot be served by several ranks: {fault}. With --no-self-check it "
                "is served all the same"
            )

    def warm_up_while_idle(self) -> None:
        """Check the batches if that had to wait, and run pieces of the warm-up until something is
        in the inbox."""
        self.check_batches()
        while self.warm_up and not (self.inbox.has_new or self.kernels.is_running):
            self.warm_up.run_next(lambda: self.inbox.has_new)
            self.counters.warm_up_left = len(self.warm_up)

    def serve(self) -> None:
        """Serve requests until the inbox is closed."""
        while not self.inbox.is_done:
            is_idle = not (self.waiting or self.n_running)
            self.count(is_idle)
            self.report(is_idle)
            if is_idle:
                self.warm_up_while_idle()
                self.group.advance(is_busy=False)
            self.take_new(block=is_idle)
            self.group.advance(is_busy=True)
            self.check_trees()
            self.expire()
            if is_idle:
                self.last_report = self.policies.clock()
            try:
                self.drop_unwanted()
            except BaseException as e:
                self.restart(e)
            self.admit()
            try:
                self.preempt()
            except BaseException as e:
                self.restart(e)
            try:
                self.step()
            except BaseException as e:
                self.recover(e)
            self.score()

    def check_trees(self) -> None:
        """Compare the prompt caches of several ranks now and then.

        Raises:
            RankError: If they differ.
        """
        cache = self.batch.prompt_cache if self.batch is not None else self.prompt_cache
        if self.group.size == 1 or cache is None:
            return
        self.n_places += 1
        if self.n_places % DIGEST_INTERVAL == 0:
            self.group.check("digest of the prompt cache", cache.digest)

    def end(self, has_failed: bool) -> None:
        """End all requests, and free all arrays on the thread that has made them.

        Args:
            has_failed (bool): Whether that is because of an error.
        """
        self.group.leave()
        self.take_new(block=False)
        reason = str(self.inbox.reason)
        for request in self.unfinished:
            if has_failed:
                request.put(RequestError(503, reason))
            else:
                request.stop(reason)
            self.forget(request)
        self.scores = None
        self.close_batch()
        self.model_provider.reset()
        del self.alone, self.prompt_cache
        gc.collect()

    @property
    def running(self) -> List[Request]:
        return self.batch.requests if self.batch else []

    @property
    def scored(self) -> List[Request]:
        """The request whose prompt is scored, if one is."""
        return [self.scores.request] if self.scores else []

    @property
    def n_running(self) -> int:
        n_rows = len(self.batch) if self.batch else 0
        return n_rows + len(self.scored)

    @property
    def unfinished(self) -> List[Request]:
        """All requests that are here."""
        return [*self.waiting, *self.scored, *self.running]

    def count(self, is_idle: bool) -> None:
        """Bring the counters up to date: the bytes once a second, and when nothing is left to
        do."""
        counters, now = self.counters, self.policies.clock()
        counters.n_running = self.n_running
        counters.warm_up_left = len(self.warm_up) if self.warm_up else 0
        if not is_idle and now - self.last_count < COUNT_INTERVAL:
            return
        self.last_count = now
        counters.batch_bytes = self.batch.nbytes if self.batch else 0
        if self.batch is not None:
            counters.batch_limit = self.batch.kv_memory.limit
        cache = self.prompt_cache
        if cache is not None:
            counters.cache_bytes, counters.cache_limit = cache.nbytes, cache.max_bytes
            counters.evictions = cache.evictions

    def report(self, is_idle: bool) -> None:
        """Log what was done: every few seconds, and when nothing is left to do."""
        seconds = self.policies.clock() - self.last_report
        if not is_idle and seconds < STATISTICS_INTERVAL:
            return
        n = self.counters.generated_tokens - self.n_reported
        self.n_reported += n
        self.last_report += seconds
        self.must_expire = True
        try:
            # The others would say the same.
            if (n or not is_idle) and self.group.rank == 0:
                logger.info("; ".join(self.describe(n, seconds)))
        except Exception:
            logger.exception("What was done cannot be logged")

    def expire(self) -> None:
        """Let expired KV leave, if the policy has a time for it: every few seconds."""
        if self.has_expiry and self.group.agree("expire", lambda: self.must_expire):
            self.must_expire = False
            self.prompt_cache.expire()

    def describe(self, n_tokens: int, seconds: float) -> List[str]:
        """What was done in the last seconds, and what is there."""
        lines = [f"{n_tokens} tokens, {n_tokens / max(seconds, 1e-3):.1f} a second"]
        if self.prompt_cache is not None:
            lines.append(f"Prompt Cache: {self.prompt_cache.stats()}")
        lines.append(f"{self.n_running} running, {len(self.waiting)} waiting")
        times = [f"{name} {s:.3f} s" for name, s in self.policies.seconds.items()]
        lines.append(f"time in policies: {', '.join(times)}")
        return lines

    # Requests come and leave

    def take_new(self, block: bool) -> None:
        """Put new requests into the waiting list.

        Args:
            block (bool): Wait until there is one, or something else to do.
        """
        timeout = None
        if block and self.has_expiry:
            # Expired KV leaves while the engine is idle, too.
            timeout = STATISTICS_INTERVAL
        if self.warm_up:
            timeout = COMPILING_INTERVAL
        for request in self.inbox.take(block, timeout):
            self.waiting.append(request)
            self.changed = True
            self.deadline = min(self.deadline, request.deadline)

    def drop_unwanted(self) -> None:
        """Take out the requests that were cancelled, or have taken too long."""
        if self.policies.clock() >= self.deadline:
            self.end_late()
        # Handlers also cancel requests that have ended.
        gone = {r for r in self.inbox.take_cancelled() if not r.forgotten}
        if not gone:
            return
        self.waiting = deque(r for r in self.waiting if r not in gone)
        # First, because the batch may fail in ``remove``.
        for request in gone:
            self.forget(request)
        if self.scores is not None and self.scores.request in gone:
            self.scores = None
        if self.batch is not None:
            self.batch.remove(gone)

    def end_late(self) -> None:
        """End the requests that have taken longer than ``--request-timeout``."""
        requests = self.unfinished
        for request in requests:
            if request.is_late:
                self.inbox.cancel(request)
                request.put(NO_TIME)
        self.deadline = min((r.deadline for r in requests), default=inf)

    def forget(self, request: Request) -> None:
        """A request has ended, or left before it started."""
        self.changed = True
        if self.batch is not None:
            self.batch.forget(request)
        if not request.forgotten:
            request.forgotten = True
            self.policies.scheduler.on_finish(request)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error, which nobody waits for if it is cancelled: other answers to
        its client may go on."""
        if not isinstance(error, RequestError):
            logger.error("A request failed", exc_info=error)
            error = internal_error()
        if not request.cancelled:
            request.put(error)
        self.forget(request)

    # Requests start

    def admit(self) -> None:
        """Start waiting requests in their order, as long as there is room.

        What raises here is no failed step: no row is in the middle of one.
        """
        try:
            if self.changed and self.waiting and self.n_running < self.max_rows:
                self.order_waiting()
            self.start_waiting()
            if self.batch is not None:
                self.batch.expect(self.waiting)
                self.batch.drop_unneeded()
        except BaseException as e:
            self.survive(e)
            logger.exception("Starting the waiting requests failed")

    def start_waiting(self) -> None:
        for request in list(self.waiting):
            if self.n_running >= self.max_rows or self.inbox.is_done:
                return
            try:
                if not self.is_turn(request):
                    return
                if request.awaits_logprobs:
                    if self.scores is not None:
                        continue  # one prompt at a time
                    if self.batch and not self.group.agree(
                        "start of scores", partial(self.batch.fits, request)
                    ):
                        return
                elif self.batch is not None and request.max_tokens:
                    if self.batch.must_wait(request):
                        continue
                    if not self.group.agree(
                        "start", partial(self.batch.can_start, request, self.scored)
                    ):
                        return
                self.waiting.remove(request)
                self.begin(request)
            except BaseException as e:
                if not isinstance(e, RequestError):
                    self.survive(e)
                if request in self.waiting:
                    self.waiting.remove(request)
                self.fail(request, e)

    def is_turn(self, request: Request) -> bool:
        """Whether a request can run beside the rows of the batch, if there are any."""
        is_served = request.model.key == self.model_provider.model_key
        return not self.n_running or (is_served and self.is_batchable(request))

    def begin(self, request: Request) -> None:
        """Let a request run.

        Raises:
            RequestError: If it cannot run.
        """
        if request.model.key != self.model_provider.model_key:
            self.switch_model(request.model.key)
        if request.awaits_logprobs:
            if self.is_batchable(request):
                self.make_batch()
                self.batch.kv_memory.fit(request)
            self.note_start(request)
            size = max_prefill_tokens(self.cli_args.prefill_step_size)
            self.scores = PromptScores(self.model_provider.model, request, size)
            return
        if not request.max_tokens:
            self.note_start(request)
            request.put(NO_TOKEN)
            self.forget(request)
            return
        if not self.is_batchable(request):
            self.serve_alone(request)
            return
        self.make_batch()
        self.batch.add(request)
        self.note_start(request)

    def note_start(self, request: Request) -> None:
        """A request runs, which it may do after its prompt did."""
        if request.started is None:
            request.started = request.clock()
            self.policies.scheduler.on_start(request)

    def make_batch(self) -> None:
        """Make the batch of the loaded model, if there is none."""
        if self.batch is None:
            self.batch = self.batch_class(
                self.model_provider.model,
                self.model_provider.tokenizer,
                self.cli_args,
                self.policies,
                self.prompt_cache,
                self.inbox.turnstile,
                self.group,
            )

    def order_waiting(self) -> None:
        """Put the waiting requests in the order of the scheduler policy."""
        self.changed = False
        if self.group.size == 1:
            self.waiting = self.ordered()
            return
        numbers = self.group.agree("order", lambda: [r.number for r in self.ordered()])
        found = {r.number: r for r in self.waiting}
        self.waiting = deque(found[number] for number in numbers)

    def ordered(self) -> Deque[Request]:
        """The waiting requests in the order of the scheduler policy."""
        scheduler = self.policies.scheduler
        if not scheduler.overrides("order"):
            return self.waiting
        arrived = sorted(self.waiting, key=lambda r: r.arrival)
        cache = self.prompt_cache if self.batch is None else self.batch.prompt_cache
        if len(arrived) <= scheduler.most_known and cache is not None:
            for request in arrived:
                match = cache.search(request.cache_key, request.prompt)
                request.n_known = match.n_tokens
        if self.batch is None:
            view = SchedulerView(self.policies.clock(), (), self.cli_args.batch_size)
        else:
            view = self.batch.view
        return deque(cast(Sequence[Request], scheduler.order(arrived, view)))

    @property
    def has_batches(self) -> bool:
        """Whether requests to the loaded model can be batched."""
        return self.model_provider.is_batchable and self.cli_args.kv_bits is None

    def is_batchable(self, request: Request) -> bool:
        """Whether a request to the loaded model can be batched. One with images cannot:
        its prompt is not tokenized yet."""
        return self.has_batches and bool(request.segments)

    def switch_model(self, key: ModelKey) -> None:
        """Load another model, when the batch is empty."""
        self.close_batch()
        # What the device has planned for the other model says nothing about this one.
        SHAPES.clear()
        PAIRED_SHAPES.clear()
        self.warm_up = None
        self.model_provider.switch_to(key)
        self.must_check = True
        self.check_batches()

    def close_batch(self) -> None:
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.close()

    def serve_alone(self, request: Request) -> None:
        """Serve a request to its end, as upstream does.

        Raises:
            RequestError: If it asks for what upstream does not have.
        """
        tokenizer = self.model_provider.tokenizer
        sampler = self.policies.samplers[request.sampler]
        if sampler.cls is not sampler.default or self.policies.make_logits_processors(
            request, tokenizer
        ):
            raise RequestError(
                400,
                "a request with images, or to a model that cannot be batched, cannot use "
                "the samplers and logits processors of plugins",
            )
        if request.min_tokens:
            raise RequestError(
                400,
                "a request with images, or to a model that cannot be batched, cannot use "
                "min_tokens",
                "min_tokens",
            )
        self.note_start(request)
        self.counters.n_running = 1
        self.alone.serve(request)
        self.counters.generated_tokens += request.n_generated
        self.forget(request)

    # Requests run

    def preempt(self) -> None:
        """Put the newest requests back to those that wait, until the KV of the others fits
        into the memory in the next step."""
        while self.batch is not None and self.group.agree(
            "outgrown memory", lambda: self.batch.outgrows_memory(self.scored)
        ):
            request = self.batch.newest
            try:
                self.batch.preempt(request)
            finally:
                # If the batch fails while it still has the request, ``restart`` puts it back.
                if not request.finished and request not in self.running:
                    self.waiting.appendleft(request)
                    self.changed = True

    def step(self) -> None:
        """Run a step of the batch."""
        if self.batch is None:
            return
        start = time.perf_counter()
        is_step = bool(self.batch)
        try:
            self.batch.step()
        finally:
            if is_step:
                self.counters.n_steps += 1
                self.counters.step_seconds += time.perf_counter() - start
            # Requests may have ended before the step has failed.
            ended, n_tokens = self.batch.take_ended()
            self.counters.generated_tokens += n_tokens
            for request in ended:
                self.forget(request)
            for request, error in self.batch.take_failed():
                self.fail(request, error)
        self.max_rows = min(self.max_rows + len(ended), self.cli_args.batch_size)

    def score(self) -> None:
        """Run a part of the prompt whose log probabilities are computed. Its request then
        waits for its turn in the batch, where it starts with the KV of the prompt."""
        scores = self.scores
        if scores is None:
            return
        request, n = scores.request, None
        try:
            if self.batch:
                view = self.batch.view
                n = self.group.agree(
                    "tokens to score",
                    partial(self.policies.scheduler.prefill_tokens, view),
                )
                self.batch.interrupt()
            if not scores.step(scores.step_size if n is None else n):
                return
            if request.max_tokens and self.is_batchable(request):
                self.make_batch()
                self.batch.prompt_cache.insert_cache(
                    request.cache_key, request.prompt[:-1], scores.caches
                )
            self.waiting.appendleft(request)
            self.changed = True
        except BaseException as e:
            self.survive(e)
            # The frames hold the arrays of the chunk.
            traceback.clear_frames(e.__traceback__)
            self.fail(request, e)
        self.scores = None

    def recover(self, error: BaseException) -> None:
        """After a failed step: fail the requests that make it fail, and let the others start
        again."""
        self.survive(error)
        suspects = [r for r in self.running if not r.finished]
        for request in suspects:
            request.is_suspect = True
        logger.error(f"A step of {len(suspects)} requests failed", exc_info=error)
        self.isolate(suspects, error)
        n_innocent = self.put_back(suspects)
        if n_innocent and n_innocent == len(suspects):
            # None fails by itself: they were too many at a time.
            self.max_rows = max(1, len(suspects) // 2)

    def restart(self, error: BaseException) -> None:
        """After requests could not leave the batch: no step of those that stay has failed, and
        all of them start again."""
        self.survive(error)
        logger.error("Requests could not be taken out of the batch", exc_info=error)
        traceback.clear_frames(error.__traceback__)
        self.put_back(self.running)

    def survive(self, error: BaseException) -> None:
        """Let an error end the engine if there are other ranks: they are in the middle of a step
        in which this one does not take part any more."""
        if self.group.size > 1:
            raise error

    def put_back(self, requests: List[Request]) -> int:
        """Empty the batch, and let the requests that have not ended start again before all
        that wait.

        Returns:
            int: How many have not ended.
        """
        unfinished = [r for r in requests if not (r.finished or r.cancelled)]
        for request in unfinished:
            request.is_suspect = True
        if self.batch is not None:
            self.batch.close()
        self.waiting.extendleft(reversed(unfinished))
        # They may have taken too long.
        self.deadline = -inf
        return len(unfinished)

    def isolate(self, suspects: List[Request], error: BaseException) -> None:
        """Run ever smaller halves of the suspects, until each that fails is alone."""
        # The frames of the failed step hold the arrays of its batch.
        traceback.clear_frames(error.__traceback__)
        if self.batch is not None:
            self.batch.close()
        if len(suspects) <= 1:
            for request in suspects:
                self.fail(request, error)
            return
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            try:
                self.advance(half)
            except BaseException as e:
                self.isolate([r for r in half if not r.finished], e)

    def advance(self, requests: List[Request]) -> None:
        """Run only these requests, until each has one more token."""
        goals = [len(r.generated) + 1 for r in requests]
        for request in requests:
            self.begin(request)
        while any(
            len(r.generated) < goal and not (r.finished or r.cancelled)
            for r, goal in zip(requests, goals)
        ):
            self.drop_unwanted()
            self.step()
        self.batch.close()

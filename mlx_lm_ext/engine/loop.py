"""The generation thread: inbox -> waiting list -> batch -> delivery.

Rules:
1. Only the generation thread touches MLX. What crosses threads is plain Python.
2. Requests start in the order of the scheduler policy. One that needs another model,
   or that upstream serves alone, waits until the batch is empty.
3. A step that raises costs only the request at fault. The others go on from the
   tokens they have, and the thread lives.
"""

import gc
import logging
from collections import deque
from dataclasses import replace
from math import inf
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, Deque, Dict, List, Optional

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import CompletionRequest, GenerationArguments

from ..batch.batch import Batch
from ..cache.prompt_cache import RadixPromptCache
from ..errors import RequestError, internal_error
from ..policies.guard import Policies
from ..request.fields import check_choice
from ..request.images import image_parts
from ..request.mailbox import Mailbox, Turnstile
from ..request.preparation import Preparation, Preparations
from ..request.request import Request, SingleCache, SingleQueue
from .models import BatchModelProvider
from .upstream import ResponseGeneratorBase
from .warm_up import warm_up

# Seconds between two lines of statistics, and between two looks for what has expired.
STATISTICS_INTERVAL = 10.0


class Engine(ResponseGeneratorBase):
    """Serves all requests from one thread, as many as fit in one batch.

    Args:
        model_provider (BatchModelProvider): Loads models; carries the command line.
        policies (Policies): The policies and hooks of plugins.
        prompt_cache (Optional[RadixPromptCache]): Where KV is kept between requests.
          Without one, nothing is kept.
    """

    batch_class = Batch

    def __init__(
        self,
        model_provider: BatchModelProvider,
        policies: Policies,
        prompt_cache: Optional[RadixPromptCache] = None,
    ):
        self.policies = policies
        self.inbox = SimpleQueue()
        self.waiting: Deque[Request] = deque()
        # Whether the waiting list or the batch has changed since it was put in order.
        self.changed = False
        # When the first of all requests runs out of time.
        self.deadline = inf
        # Those that were cancelled since the last step.
        self.cancelled = SimpleQueue()
        # How many rows may run: fewer for a while after a step failed.
        self.limit = model_provider.cli_args.batch_size
        self.loaded = Event()
        self.load_error: Optional[Exception] = None
        # Whether the generation thread has ended, and whether it should not have.
        self.ended = Event()
        self.has_failed = False
        self.stopping = False
        self.n_reported, self.reported = 0, policies.clock()
        self.turnstile = Turnstile()
        self.batch = self.batch_class(
            model_provider, policies, prompt_cache, self.turnstile
        )
        # An empty cache is false.
        if prompt_cache is None:
            prompt_cache = LRUPromptCache(max_size=0)
        super().__init__(model_provider, prompt_cache)

    # Any thread

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        body: Dict[str, Any],
        id: str = "",
        preparation: Optional[Preparation] = None,
    ) -> Request:
        """Tokenise a request on the caller's thread and put it into the inbox.

        Args:
            request (CompletionRequest): The prompt or the messages.
            generation_args (GenerationArguments): Sampling parameters and limits.
            body (Dict[str, Any]): What the client sent.
            id (str): The id of its answer.
            preparation (Optional[Preparation]): Says when to give up; if not given,
              never.

        Raises:
            ConnectionError: If its client has left.
            RequestError: If it cannot be served.
        """
        self.check_available()
        model = self.model_provider.describe(generation_args.model)
        model.name_roles(request)
        job = Request(
            id=id,
            args=generation_args,
            body=body,
            arrival=self.policies.clock(),
            model=model,
            completion=request,
            sampler=body.get("sampler", self.cli_args.sampler),
            clock=self.policies.clock,
            timeout=self.cli_args.request_timeout,
            cancellations=self.cancelled,
            mailbox=Mailbox(self.turnstile),
        )
        check_choice("sampler", job.sampler, self.policies.samplers)
        if not image_parts(request.messages):
            try:
                tokenizer = model.bounded_tokenizer(
                    job.prompt_field, preparation or Preparations().begin()
                )
                job.prompt, job.segments, job.segment_types, job.initial_state = (
                    self.tokenize(tokenizer, request, generation_args)
                )
            except (ConnectionError, RequestError):
                raise
            except Exception as e:
                # Templates are code, and can raise anything.
                name = job.prompt_field
                raise RequestError(400, f"{name} cannot be tokenised: {e}", name)
        job.n_prompt = len(job.prompt)
        job.check_tokens()
        if job.segments:
            job.fit_to_context()
        self.inbox.put(job)
        return job

    def check_available(self) -> None:
        """Raise a 503 ``RequestError`` unless requests are served."""
        if self.stopping or not self.generation_available():
            raise RequestError(503, "the server is stopping or its engine has failed")
        if not self.loaded.is_set():
            raise RequestError(503, "the model is being loaded and warmed up")

    @property
    def is_healthy(self) -> bool:
        return (
            self.loaded.is_set() and self.generation_available() and not self.stopping
        )

    def stop_and_join(self, timeout: Optional[float] = None) -> bool:
        """Fail what is unfinished and end the generation thread.

        Args:
            timeout (Optional[float]): Seconds to wait for its end, if not for ever: it
              cannot be interrupted while it loads a model.

        Returns:
            Whether it has ended.
        """
        self.stopping = True
        self.inbox.put(None)
        has_ended = self.ended.wait(timeout)
        if has_ended:
            self.join()
        return has_ended

    # The generation thread from here on

    def run(self) -> None:
        try:
            self.load()
            self.serve()
        except BaseException as e:
            # What requests and plugins raise ends in ``recover`` and ``fail``.
            logging.critical("The generation thread has failed", exc_info=e)
            self.has_failed = True
        self.stopping = True
        self.loaded.set()
        try:
            self.end()
        except BaseException:
            logging.exception("The generation thread could not free what it has")
        self.ended.set()

    def load(self) -> None:
        """Load the model and warm it up."""
        try:
            self.model_provider.switch_to(self.model_provider.default_key)
        except Exception as e:
            self.load_error = e
            self.stopping = True
        if self.cli_args.warmup and not self.stopping and self.has_batches:
            try:
                warm_up(self.model_provider, lambda: self.stopping)
            except RequestError as e:
                logging.warning(f"There is no warm-up: {e}")
            except Exception:
                logging.warning("The warm-up failed", exc_info=True)
        self.loaded.set()

    def serve(self) -> None:
        """Serve requests until the server stops."""
        while not self.stopping:
            idle = not (self.waiting or self.batch)
            self.report(idle)
            self.drain_inbox(block=idle)
            if idle:
                self.reported = self.policies.clock()
            try:
                self.drop_unwanted()
                self.admit()
                self.step()
                self.batch.forget_shared(self.waiting)
            except BaseException as e:
                self.recover(e)

    def end(self) -> None:
        """Fail what is unfinished, and free all arrays on the thread that made them."""
        self.drain_inbox(block=False)
        reason = (
            "the engine has failed" if self.has_failed else "the server is stopping"
        )
        for request in [*self.waiting, *self.batch.requests]:
            request.put(RequestError(503, reason))
        self.batch.close()
        self.model_provider.reset()
        del self.batch, self.prompt_cache
        gc.collect()

    def report(self, idle: bool) -> None:
        """Log what was done, every few seconds and when nothing is left to do."""
        seconds = self.policies.clock() - self.reported
        if not idle and seconds < STATISTICS_INTERVAL:
            return
        cache, caching = self.prompt_cache, self.batch.caching
        if caching:
            cache.expire()
        n = self.batch.n_generated - self.n_reported
        if n:
            lines = [f"{n} tokens, {n / max(seconds, 1e-3):.1f} a second"]
            if caching:
                lines.append(f"Prompt Cache: {cache.stats()}")
            lines.append(f"{len(self.batch)} running, {len(self.waiting)} waiting")
            lines.append(f"time in policies: {self.policies.describe_times()}")
            logging.info("; ".join(lines))
        self.n_reported += n
        self.reported += seconds

    def drain_inbox(self, block: bool) -> None:
        timeout = None
        if self.batch.caching and self.policies.eviction.has("expired"):
            timeout = STATISTICS_INTERVAL
        try:
            while True:
                request = self.inbox.get(block, timeout)
                if request is not None and not request.cancelled:
                    self.waiting.append(request)
                    self.changed = True
                    self.deadline = min(self.deadline, request.deadline)
                block = False
        except Empty:
            pass

    def drop_unwanted(self) -> None:
        """Take out the requests that were cancelled or have taken too long."""
        if self.policies.clock() >= self.deadline:
            requests = [*self.waiting, *self.batch.requests]
            for request in requests:
                try:
                    request.check_time()
                except RequestError as e:
                    request.put(e)
                    request.cancel()
            self.deadline = min((r.deadline for r in requests), default=inf)
        gone = set()
        while not self.cancelled.empty():
            request = self.cancelled.get()
            # Handlers cancel what has ended as well.
            if not request.forgotten:
                gone.add(request)
        if not gone:
            return
        self.waiting = deque(r for r in self.waiting if r not in gone)
        self.batch.remove(gone)
        for request in gone:
            self.forget(request)

    def forget(self, request: Request) -> None:
        """Tell the scheduler policy, once, that a request is no more."""
        self.changed = True
        if not request.forgotten:
            request.forgotten = True
            self.policies.scheduler.run(lambda policy: policy.on_finish(request))

    def step(self) -> None:
        finished = self.batch.step()
        for request in finished:
            self.forget(request)
        self.limit = min(self.limit + len(finished), self.cli_args.batch_size)

    def admit(self) -> None:
        """Start waiting requests in their order, as long as there is room."""
        if self.changed and self.waiting and len(self.batch) < self.limit:
            self.order_waiting()
        for request in list(self.waiting):
            if len(self.batch) >= self.limit or self.stopping:
                return
            other_model = request.model.key != self.model_provider.model_key
            if self.batch and (other_model or not self.is_batchable(request)):
                return
            if self.batch and self.batch.must_wait(request):
                continue
            if not self.batch.can_start(request):
                return
            self.waiting.remove(request)
            try:
                if other_model:
                    self.batch.close()
                    self.model_provider.switch_to(request.model.key)
                if self.is_batchable(request):
                    self.batch.add(request)
                else:
                    self.serve_alone(request)
            except BaseException as e:
                self.fail(request, e)

    def order_waiting(self) -> None:
        """Put the waiting requests in the order of the scheduler policy."""

        def ask(policy):
            first = policy.order(list(arrived), view)
            if first is None:
                return arrived
            ids = {id(r) for r in first}
            if len(ids) < len(first) or not ids <= {id(r) for r in arrived}:
                raise ValueError(
                    "it ordered a request twice, or one that does not wait"
                )
            return [*first, *(r for r in arrived if id(r) not in ids)]

        self.changed = False
        scheduler = self.policies.scheduler
        if scheduler.has("order"):
            arrived = sorted(self.waiting, key=lambda r: r.arrival)
            if len(arrived) <= scheduler.run(lambda policy: int(policy.most_known)):
                for request in arrived:
                    request.n_known = self.batch.n_known(request)
            view = self.batch.view
            self.waiting = deque(scheduler.run(ask))

    @property
    def has_batches(self) -> bool:
        """Whether upstream can run the model in batches."""
        return self.model_provider.is_batchable and self.cli_args.kv_bits is None

    def is_batchable(self, request: Request) -> bool:
        """Whether upstream can serve a request in a batch. Images it cannot."""
        return self.has_batches and bool(request.segments)

    def serve_alone(self, request: Request) -> None:
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
        request.start()
        # Stop words are found in the text, on the handler's thread.
        args = replace(request.args, stop_words=[])
        stream = mx.default_stream(mx.default_device())
        queue = SingleQueue(request, args, lambda: self.stopping, self.fail)
        prompt_cache = self.prompt_cache
        self.prompt_cache = SingleCache(request, prompt_cache)
        try:
            self.serve_single((queue, request.completion, args), stream)
        finally:
            self.prompt_cache = prompt_cache
        if not request.finished:
            request.put(RequestError(503, "the server is stopping"))
        self.batch.n_generated += request.n_generated
        self.forget(request)

    # When a step fails

    def recover(self, error: BaseException) -> None:
        """Fail the requests whose part of a step raises; requeue the others."""
        suspects = [r for r in self.batch.requests if not r.finished]
        logging.error(f"A step of {len(suspects)} requests failed", exc_info=error)
        self.isolate(suspects, error)
        innocent = [r for r in suspects if not (r.finished or r.cancelled)]
        if innocent and len(innocent) == len(suspects):
            # None fails by itself: together they were too many.
            self.limit = max(1, len(suspects) // 2)
        self.waiting.extendleft(reversed(innocent))
        # Those that were put back are to be looked at as well.
        self.deadline = -inf

    def isolate(self, suspects: List[Request], error: BaseException) -> None:
        """Run ever smaller halves apart until the ones that raise are alone."""
        self.batch.close()
        if len(suspects) == 1:
            self.fail(suspects[0], error)
            return
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            try:
                self.advance(half)
            except BaseException as e:
                self.isolate([r for r in half if not r.finished], e)

    def advance(self, requests: List[Request]) -> None:
        """Serve ``requests`` alone until each has one more token."""
        goals = [len(r.generated) + 1 for r in requests]
        for request in requests:
            self.batch.add(request)
        while any(
            len(r.generated) < goal and not (r.finished or r.cancelled)
            for r, goal in zip(requests, goals)
        ):
            self.drop_unwanted()
            self.step()
        self.batch.close()

    def fail(self, request: Request, error: BaseException) -> None:
        if not isinstance(error, RequestError):
            logging.error("A request failed", exc_info=error)
            error = internal_error()
        request.put(error)
        self.forget(request)

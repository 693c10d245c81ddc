"""The generation thread: inbox -> waiting list -> batch -> delivery.

Rules:
1. Only the generation thread touches MLX. What crosses threads is plain Python.
2. Requests start in order of arrival. One that needs another model, or that
   upstream serves alone, waits until the batch is empty.
3. A step that raises costs only the request at fault. The others go on from the
   tokens they have, and the thread lives.
"""

import gc
import logging
from collections import deque
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Event
from typing import List, Optional

import mlx.core as mx
from mlx_lm.server import CompletionRequest, GenerationArguments

from ._upstream import ResponseGeneratorBase, image_parts
from .batching import Batch
from .errors import RequestError, internal_error
from .model_provider import BatchModelProvider
from .prompt_cache import PromptCache
from .request import Request, SingleQueue


class Engine(ResponseGeneratorBase):
    """Serves all requests from one thread, as many as fit in one batch.

    Args:
        model_provider (BatchModelProvider): Loads models; carries the command line.
        prompt_cache (Optional[PromptCache]): Where KV is kept between requests.
          Without one, nothing is kept.
    """

    batch_class = Batch

    def __init__(
        self,
        model_provider: BatchModelProvider,
        prompt_cache: Optional[PromptCache] = None,
    ):
        self.inbox = SimpleQueue()
        self.waiting = deque()
        # How many rows may run: fewer for a while after a step failed.
        self.limit = model_provider.cli_args.batch_size
        self.loaded = Event()
        self.load_error: Optional[Exception] = None
        self.stopping = False
        # An empty cache is false.
        if prompt_cache is None:
            prompt_cache = PromptCache(max_size=0)
        self.batch = self.batch_class(model_provider, prompt_cache)
        super().__init__(model_provider, prompt_cache)

    # Any thread

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        max_tokens_is_default: bool = False,
    ) -> Request:
        """Tokenise a request on the caller's thread and put it into the inbox.

        Args:
            request (CompletionRequest): The prompt or the messages.
            generation_args (GenerationArguments): Sampling parameters and limits.
            max_tokens_is_default (bool): Nobody asked for ``max_tokens``, so it may
              shrink to what the model has room for.

        Raises:
            RequestError: If it cannot be served.
        """
        self.check_available()
        model = self.model_provider.describe(generation_args.model)
        job = Request(model=model, completion=request, args=generation_args)
        if not any(image_parts(request.messages)):
            try:
                job.prompt, job.segments, job.segment_types, job.initial_state = (
                    self.tokenize(model.tokenizer, request, generation_args)
                )
                # Arguments of a request's template can ask for other things.
                if not isinstance(job.prompt, list):
                    raise ValueError("it gives no list of tokens")
            except Exception as e:
                # Templates and their arguments are code, and can raise anything.
                name = "messages" if request.messages else "prompt"
                raise RequestError(400, f"{name} cannot be tokenised: {e}", name)
        job.check_tokens()
        if job.segments:
            job.fit_to_context(max_tokens_is_default)
        self.inbox.put(job)
        return job

    def check_available(self) -> None:
        """Raise a 503 ``RequestError`` unless requests are served."""
        if self.stopping or not self.generation_available():
            raise RequestError(503, "the server is stopping or its engine has failed")
        if not self.loaded.is_set():
            raise RequestError(503, "the model is being loaded")

    @property
    def is_healthy(self) -> bool:
        return (
            self.loaded.is_set() and self.generation_available() and not self.stopping
        )

    def stop_and_join(self) -> None:
        """Fail what is unfinished and end the generation thread."""
        self.stopping = True
        self.inbox.put(None)
        self.join()

    # The generation thread from here on

    def run(self) -> None:
        try:
            self.model_provider.switch_to(self.model_provider.default_key)
        except Exception as e:
            self.load_error = e
            self.stopping = True
        self.loaded.set()
        while not self.stopping:
            self.drain_inbox(block=not (self.waiting or self.batch))
            try:
                self.drop_cancelled()
                self.admit()
                self.step()
            except Exception as e:
                self.recover(e)
        self.drain_inbox(block=False)
        for request in [*self.waiting, *self.batch.requests]:
            request.put(RequestError(503, "the server is stopping"))
        # Arrays must be freed on the thread that made them.
        self.batch.close()
        self.model_provider.reset()
        del self.batch, self.prompt_cache
        gc.collect()

    def drain_inbox(self, block: bool) -> None:
        try:
            while True:
                request = self.inbox.get(block)
                if request is not None:
                    self.waiting.append(request)
                block = False
        except Empty:
            pass

    def drop_cancelled(self) -> None:
        if any(r.cancelled for r in self.waiting):
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        self.batch.remove([r for r in self.batch.requests if r.cancelled])

    def step(self) -> None:
        finished = self.batch.step()
        self.limit = min(self.limit + finished, self.cli_args.batch_size)
        if finished and self.batch.caching and not (self.batch or self.waiting):
            cache = self.prompt_cache
            logging.info(
                f"Prompt Cache: {len(cache)} sequences, {cache.nbytes / 1e6:.1f} MB"
            )

    def admit(self) -> None:
        """Start waiting requests in order of arrival, as long as there is room."""
        while self.waiting and len(self.batch) < self.limit and not self.stopping:
            request = self.waiting[0]
            other_model = request.model.key != self.model_provider.model_key
            if self.batch and (other_model or not self.is_batchable(request)):
                return
            self.waiting.popleft()
            try:
                if other_model:
                    self.batch.close()
                    self.model_provider.switch_to(request.model.key)
                if self.is_batchable(request):
                    self.batch.add(request)
                else:
                    self.serve_alone(request)
            except Exception as e:
                self.fail(request, e)

    def is_batchable(self, request: Request) -> bool:
        """Whether upstream can serve a request in a batch."""
        return (
            self.model_provider.is_batchable
            and self.cli_args.kv_bits is None
            and request.args.seed is None
            and bool(request.segments)
        )

    def serve_alone(self, request: Request) -> None:
        # Stop words are found in the text, on the handler's thread.
        args = replace(request.args, stop_words=[])
        stream = mx.default_stream(mx.default_device())
        queue = SingleQueue(request, lambda: self.stopping, self.fail)
        self.serve_single((queue, request.completion, args), stream)
        if not request.finished:
            request.put(RequestError(503, "the server is stopping"))

    # When a step fails

    def recover(self, error: Exception) -> None:
        """Fail the requests whose part of a step raises; requeue the others."""
        suspects = [r for r in self.batch.requests if not r.finished]
        logging.error(f"A step of {len(suspects)} requests failed", exc_info=error)
        self.isolate(suspects, error)
        innocent = [r for r in suspects if not r.finished]
        if innocent and len(innocent) == len(suspects):
            # None fails by itself: together they were too many.
            self.limit = max(1, len(suspects) // 2)
        self.waiting.extendleft(reversed(innocent))

    def isolate(self, suspects: List[Request], error: Exception) -> None:
        """Run ever smaller halves apart until the ones that raise are alone."""
        self.batch.close()
        if len(suspects) == 1:
            self.fail(suspects[0], error)
            return
        middle = len(suspects) // 2
        for half in (suspects[:middle], suspects[middle:]):
            try:
                self.advance(half)
            except Exception as e:
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
            self.drop_cancelled()
            self.step()
        self.batch.close()

    def fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logging.error("A request failed", exc_info=error)
            error = internal_error()
        request.put(error)

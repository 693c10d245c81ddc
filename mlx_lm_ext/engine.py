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
from dataclasses import astuple, replace
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, Dict, List, Optional, Tuple

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.generate import BatchGenerator
from mlx_lm.server import CompletionRequest, GenerationArguments

from ._upstream import (
    ResponseGeneratorBase,
    format_top_logprobs,
    image_parts,
    make_logits_processors,
    make_sampler,
)
from .errors import RequestError
from .model_provider import BatchModelProvider
from .prompt_cache import PromptCache
from .request import Request, ResumedStopSequences, SingleQueue, Token


class Engine(ResponseGeneratorBase):
    """Serves all requests from one thread, as many as fit in one batch.

    Args:
        model_provider (BatchModelProvider): Loads models; carries the command line.
        prompt_cache (Optional[PromptCache]): Where KV is kept between requests.
          Without one, nothing is kept.
    """

    def __init__(
        self,
        model_provider: BatchModelProvider,
        prompt_cache: Optional[PromptCache] = None,
    ):
        self.inbox = SimpleQueue()
        self.waiting = deque()
        self.active: Dict[int, Request] = {}
        self.batch: Optional[BatchGenerator] = None
        self.samplers: Dict[Tuple, Any] = {}
        # How many rows may run: fewer for a while after a step failed.
        self.limit = model_provider.cli_args.batch_size
        self.steps = 0
        self.loaded = Event()
        self.load_error: Optional[Exception] = None
        self.stopping = False
        super().__init__(model_provider, prompt_cache or PromptCache(max_size=0))

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
        if isinstance(request.prompt, list):
            job.prompt, job.segments = request.prompt, [request.prompt]
            job.segment_types = ["assistant"]
        elif not any(image_parts(request.messages)):
            try:
                job.prompt, job.segments, job.segment_types, job.initial_state = (
                    self.tokenize(model.tokenizer, request, generation_args)
                )
            except (KeyError, TypeError, ValueError, TemplateError) as e:
                message = f"the chat template cannot render the messages: {e}"
                raise RequestError(400, message, "messages")
        self.check_tokens(job)
        if job.segments:
            self.check_length(job, max_tokens_is_default)
        self.inbox.put(job)
        return job

    def check_tokens(self, job: Request) -> None:
        """Refuse token ids that the model lacks: MLX would read beyond its arrays."""
        n = job.model.vocabulary_size
        fields = {"prompt": job.prompt, "logit_bias": job.args.logits.logit_bias or ()}
        for name, ids in fields.items():
            if any(not 0 <= i < n for i in ids):
                raise RequestError(
                    400, f"token ids of {name} must be from 0 to {n - 1}", name
                )
        # Upstream's top-k takes no more than there are.
        if job.args.sampling.top_k >= n:
            job.args.sampling.top_k = 0

    def check_length(self, job: Request, max_tokens_is_default: bool) -> None:
        """Refuse a prompt or a ``max_tokens`` for which the model has no room."""
        prompt_field = "messages" if job.completion.messages else "prompt"
        n_prompt, limit = len(job.prompt), job.model.context_length
        if not n_prompt:
            raise RequestError(400, f"{prompt_field} gives no tokens", prompt_field)
        if limit is None:
            return
        room = limit - n_prompt
        if room < 1:
            message = f"the prompt has {n_prompt} tokens; the model takes {limit}"
            raise RequestError(400, message, prompt_field, "context_length_exceeded")
        if job.args.max_tokens > room and max_tokens_is_default:
            job.args.max_tokens = room
        if job.args.max_tokens > room:
            raise RequestError(
                400,
                f"max_tokens is {job.args.max_tokens}, and after {n_prompt} tokens of "
                f"prompt the model has room for {room}",
                "max_tokens",
                "context_length_exceeded",
            )

    def check_available(self) -> None:
        """Raise a 503 ``RequestError`` unless requests are served."""
        if self.stopping or not self.generation_available():
            raise RequestError(503, "the server is stopping or its engine has failed")
        if not self.loaded.is_set():
            raise RequestError(503, "the model is being loaded")

    @property
    def is_healthy(self) -> bool:
        return self.loaded.is_set() and self.generation_available()

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
            self.drain_inbox(block=not (self.waiting or self.active))
            try:
                self.drop_cancelled()
                self.admit()
                self.step()
            except Exception as e:
                self.recover(e)
        self.drain_inbox(block=False)
        for request in [*self.waiting, *self.active.values()]:
            request.put(RequestError(503, "the server is stopping"))
        # Arrays must be freed on the thread that made them.
        self.close_batch()
        self.model_provider.reset()
        del self.prompt_cache
        gc.collect()

    def drain_inbox(self, block: bool) -> None:
        try:
            while True:
                request = self.inbox.get(block)
                if request is not None:
                    self.waiting.append(request)
                block = False
                if self.stopping:
                    return
        except Empty:
            pass

    def drop_cancelled(self) -> None:
        if any(r.cancelled for r in self.waiting):
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        uids = [uid for uid, r in self.active.items() if r.cancelled]
        if uids:
            caching = self.prompt_cache.max_size > 0
            caches = self.batch.remove(uids, return_prompt_caches=caching)
            for uid in uids:
                request = self.active.pop(uid)
                if caching:
                    cache, tokens = caches[uid]
                    self.store(request, tokens, cache)

    def admit(self) -> None:
        """Start waiting requests in order of arrival, as long as there is room."""
        while self.waiting and len(self.active) < self.limit:
            request = self.waiting[0]
            other_model = request.model.key != self.model_provider.model_key
            if self.active and (other_model or not self.is_batchable(request)):
                return
            self.waiting.popleft()
            try:
                if other_model:
                    self.close_batch()
                    self.samplers.clear()
                    self.model_provider.switch_to(request.model.key)
                if self.is_batchable(request):
                    self.insert(request)
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
        queue = SingleQueue(request, is_stopping=lambda: self.stopping)
        self.serve_single((queue, request.completion, args), stream)

    def insert(self, request: Request) -> None:
        """Add a request to the batch, after the tokens it has already."""
        if self.batch is None:
            args = self.cli_args
            self.batch = BatchGenerator(
                self.model_provider.model,
                completion_batch_size=args.batch_size,
                prefill_batch_size=min(args.batch_size, args.prompt_concurrency),
                prefill_step_size=args.prefill_step_size,
                stream=mx.default_stream(mx.default_device()),
            )
        segments, cache, n_cached = self.fetch(request)
        tokens = request.prompt + request.generated
        (uid,) = self.batch.insert_segments(
            segments=[segments],
            max_tokens=[request.args.max_tokens - len(request.generated)],
            caches=[cache],
            all_tokens=[tokens[:n_cached]],
            samplers=[self.sampler(request.args)],
            logits_processors=[make_logits_processors(request.args)],
            stop_sequences=[
                ResumedStopSequences(request.model.end_of_text, request.generated)
            ],
        )
        self.active[uid] = request

    def fetch(self, request: Request) -> Tuple[List[List[int]], Any, int]:
        """The segments left to run, and the cache of the tokens before them.

        A request that goes on after a failed step takes nothing from the cache.
        """
        if request.generated:
            return [request.prompt + request.generated], None, 0
        cache, rest = self.prompt_cache.fetch_nearest_cache(
            request.model.key, request.prompt
        )
        request.n_cached = len(request.prompt) - len(rest)
        segments, skip = [], request.n_cached
        for segment in request.segments:
            if skip < len(segment):
                segments.append(segment[skip:])
            skip = max(0, skip - len(segment))
        request.segment_types = request.segment_types[-len(segments) :]
        return segments, cache, request.n_cached

    def sampler(self, args: GenerationArguments) -> Any:
        """Rows with equal parameters share a sampler, so they sample in one call."""
        key = astuple(args.sampling)
        if key not in self.samplers:
            if len(self.samplers) >= 256:
                self.samplers.clear()
            self.samplers[key] = make_sampler(args, self.model_provider.tokenizer)
        return self.samplers[key]

    def step(self) -> None:
        """Run the batch for one step and hand out what it made."""
        if not self.active:
            return
        self.steps += 1
        prompt_responses, responses = self.batch.next()
        self.store_segments(prompt_responses)
        for r in responses:
            request = self.active[r.uid]
            logprob, top = None, ()
            if request.args.logprobs:
                logprob = r.logprobs[r.token].item()
                n = request.args.top_logprobs
                found = format_top_logprobs(r.logprobs, n, request.model.tokenizer)
                top = tuple((t["id"], t["logprob"]) for t in found)
            request.put(Token(r.token, logprob, top, r.finish_reason))
            if r.finish_reason is not None:
                del self.active[r.uid]
                self.limit = min(self.limit + 1, self.cli_args.batch_size)
                self.store(request, r.all_tokens, r.prompt_cache)

    def store_segments(self, prompt_responses: List[Any]) -> None:
        """Keep the KV of prompts that have reached the end of a segment."""
        ended = [
            r.uid for r in prompt_responses if r.end_of_segment and not r.end_of_prompt
        ]
        if not self.prompt_cache.max_size or not ended:
            return
        for uid, (cache, tokens) in self.batch.extract_cache(ended).items():
            request = self.active[uid]
            if request.segment_types:
                self.store(request, tokens, cache, request.segment_types.pop(0))

    def store(
        self,
        request: Request,
        tokens: List[int],
        cache: List[Any],
        cache_type: str = "assistant",
    ) -> None:
        """Keep the KV of ``tokens``, unless the cache is off or has just given it."""
        if self.prompt_cache.max_size and len(tokens) > request.n_cached:
            # Evaluated at once: a lazy copy would keep the batch's buffers alive.
            mx.eval([c.state for c in cache])
            self.prompt_cache.insert_cache(
                request.model.key, tokens[:], cache, cache_type=cache_type
            )

    # When a step fails

    def recover(self, error: Exception) -> None:
        """Fail the requests whose part of a step raises; requeue the others."""
        suspects = [r for r in self.active.values() if not r.finished]
        logging.exception(f"A step of {len(suspects)} requests failed", exc_info=error)
        self.isolate(suspects, error)
        innocent = [r for r in suspects if not r.finished]
        if innocent and len(innocent) == len(suspects):
            # None fails by itself: together they were too many.
            self.limit = max(1, len(suspects) // 2)
        self.waiting.extendleft(reversed(innocent))

    def isolate(self, suspects: List[Request], error: Exception) -> None:
        """Run ever smaller halves apart until the ones that raise are alone."""
        self.close_batch()
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
            self.insert(request)
        while any(
            len(r.generated) < goal and not (r.finished or r.cancelled)
            for r, goal in zip(requests, goals)
        ):
            self.drop_cancelled()
            self.step()
        self.close_batch()

    def fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, RequestError):
            logging.error("A request failed", exc_info=error)
        request.put(error)

    def close_batch(self) -> None:
        """Drop the batch and its KV."""
        self.active.clear()
        if self.batch is not None:
            self.batch.close()
            self.batch = None

"""The running batch: rows join it, it runs a step at a time, and rows leave it.

Rules:
1. Lives on the generation thread; every array here is made and freed there.
2. After an exception from ``add``, ``remove`` or ``step`` only ``close`` is safe: the
   rows may be half way through a step.
"""

import logging
from dataclasses import astuple
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.server import GenerationArguments

from ._upstream import (
    LeanBatchGenerator,
    format_top_logprobs,
    make_logits_processors,
    make_sampler,
)
from .model_provider import BatchModelProvider
from .prompt_cache import PromptCache
from .request import Request, ResumedStopSequences, Token


class Batch:
    """The requests that run together on upstream's ``BatchGenerator``.

    Args:
        model_provider (BatchModelProvider): Holds the model that the batch runs.
        prompt_cache (PromptCache): Gives KV to requests and takes it back.
    """

    def __init__(self, model_provider: BatchModelProvider, prompt_cache: PromptCache):
        self.model_provider = model_provider
        self.prompt_cache = prompt_cache
        self.caching = prompt_cache.max_size > 0
        self.generator: Optional[LeanBatchGenerator] = None
        self.active: Dict[int, Request] = {}
        self.samplers: Dict[Tuple, Any] = {}
        self.steps = 0

    def __len__(self):
        return len(self.active)

    @property
    def requests(self) -> List[Request]:
        return list(self.active.values())

    def add(self, request: Request) -> None:
        """Add a request. It goes on after the tokens that it has already."""
        if self.generator is None:
            args = self.model_provider.cli_args
            self.generator = LeanBatchGenerator(
                self.model_provider.model,
                completion_batch_size=args.batch_size,
                prefill_batch_size=min(args.batch_size, args.prompt_concurrency),
                prefill_step_size=args.prefill_step_size,
                stream=mx.default_stream(mx.default_device()),
            )
        segments, cache, n_cached = self.fetch(request)
        (uid,) = self.generator.insert_segments(
            segments=[segments],
            max_tokens=[request.args.max_tokens - len(request.generated)],
            caches=[cache],
            all_tokens=[request.prompt[:n_cached]],
            samplers=[self.sampler(request.args)],
            logits_processors=[make_logits_processors(request.args)],
            stop_sequences=[
                ResumedStopSequences(request.model.end_of_text, request.generated)
            ],
        )
        self.active[uid] = request

    def remove(self, requests: List[Request]) -> None:
        """Take requests out before they end; what they have run stays in the cache."""
        uids = [uid for uid, r in self.active.items() if r in requests]
        if not uids:
            return
        caches = self.generator.remove(uids, return_prompt_caches=self.caching)
        for uid in uids:
            request = self.active.pop(uid)
            if self.caching:
                cache, tokens = caches[uid]
                self.store(request, tokens, cache)

    def close(self) -> None:
        """Drop all rows and their KV, and what belongs to the model."""
        self.active.clear()
        self.samplers.clear()
        generator, self.generator = self.generator, None
        if generator is not None:
            try:
                generator.close()
            except Exception:
                # It waits for the device, which can have failed.
                logging.exception("A batch could not be closed")

    def step(self) -> int:
        """Run one step and hand out its tokens; gives how many requests it ended."""
        if not self.active:
            return 0
        self.steps += 1
        before = len(self.active)
        prompt_responses, responses = self.generator.next()
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
                self.store(request, r.all_tokens, r.prompt_cache)
        return before - len(self.active)

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
        key = (astuple(args.sampling), args.logprobs)
        if key not in self.samplers:
            if len(self.samplers) >= 256:
                self.samplers.clear()
            sampler = make_sampler(args, self.model_provider.tokenizer)
            # Rows with upstream's own greedy sampler get no log probabilities.
            self.samplers[key] = partial(sampler) if args.logprobs else sampler
        return self.samplers[key]

    def store_segments(self, prompt_responses: List[Any]) -> None:
        """Keep the KV of prompts that have reached the end of a segment."""
        ended = [
            r.uid for r in prompt_responses if r.end_of_segment and not r.end_of_prompt
        ]
        if not self.caching or not ended:
            return
        for uid, (cache, tokens) in self.generator.extract_cache(ended).items():
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
        if self.caching and len(tokens) > request.n_cached:
            # Evaluated at once: a lazy copy would keep the batch's buffers alive.
            mx.eval([c.state for c in cache])
            self.prompt_cache.insert_cache(
                request.model.key, tokens[:], cache, cache_type=cache_type
            )

"""The running batch: rows join it, it runs a step at a time, and rows leave it.

Rules:
1. Lives on the generation thread; every array here is made and freed there.
2. After an exception from ``add``, ``remove`` or ``step`` only ``close`` is safe: the
   rows may be half way through a step.
"""

import logging
from itertools import accumulate
from typing import Any, Collection, Dict, Iterable, List, Optional, Set, Tuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..cache.kinds import make_segmented_cache
from ..cache.prompt_cache import RadixPromptCache
from ..cache.tree import Node, n_common
from ..device import check_address_space
from ..engine.models import BatchModelProvider
from ..interfaces import SchedulerView
from ..policies.guard import Policies
from ..policies.guarded_sampler import GuardedSampler
from ..request.mailbox import Turnstile
from ..request.request import Request, ResumedStopSequences, Token
from ..sampling.penalties import PenaltyParameters
from .generator import LeanBatchGenerator, RowSampling, make_logits_processors
from .kv_memory import KVMemory
from .prefill import chunk_width, max_prefill_tokens

# Tokens of a common prefix that are worth waiting for.
MIN_SHARED = 16


class Batch:
    """The requests that run together on upstream's ``BatchGenerator``.

    Args:
        model_provider (BatchModelProvider): Holds the model that the batch runs.
        policies (Policies): Samples, and sets how much prefill a step does.
        prompt_cache (Optional[RadixPromptCache]): Gives KV to requests and takes it back.
        turnstile (Turnstile): Takes the tokens to the handlers.
    """

    def __init__(
        self,
        model_provider: BatchModelProvider,
        policies: Policies,
        prompt_cache: Optional[RadixPromptCache],
        turnstile: Turnstile,
    ):
        self.turnstile = turnstile
        self.model_provider = model_provider
        self.policies = policies
        # Without a cache, KV is kept only while others wait for it.
        self.caching = prompt_cache is not None
        if prompt_cache is None:
            n_bytes = model_provider.cli_args.radix_cache_size
            prompt_cache = RadixPromptCache(max_bytes=n_bytes, clock=policies.clock)
        self.prompt_cache = prompt_cache
        self.generator: Optional[LeanBatchGenerator] = None
        self.kv_memory: Optional[KVMemory] = None
        # Whether the KV of the model can be cut after any token, when it is there.
        self.can_cut = False
        self.active: Dict[int, Request] = {}
        # Those of whose prompts a part is left to run.
        self.prefilling: Set[int] = set()
        # Tokens of prompts that the last step was allowed.
        self.step_size = max_prefill_tokens(model_provider.cli_args.prefill_step_size)
        self.budget = self.step_size
        self.steps = 0
        self.n_generated = 0

    def __len__(self):
        return len(self.active)

    @property
    def requests(self) -> List[Request]:
        return list(self.active.values())

    @property
    def view(self) -> SchedulerView:
        """What scheduler policies see."""
        batch_size = self.model_provider.cli_args.batch_size
        return SchedulerView(self.policies.clock(), tuple(self.requests), batch_size)

    def can_start(self, request: Request) -> bool:
        """Whether a request that is added is prefilled in the next step, and does not
        take much from those that are. If it had to wait, what it took from the prompt
        cache would be held beside the bound."""
        if not self.active:
            return True
        if len(self.prefilling) >= self.generator.prefill_batch_size:
            return False
        if not self.fits(request):
            return False
        prompts = [self.active[uid] for uid in self.prefilling]
        left = [r.n_prompt - r.n_run for r in prompts]
        if request.n_prompt <= self.budget // 4:
            # It need not wait until a long one is done.
            left = [n for n in left if n <= self.budget // 4]
        return sum(left) < self.budget

    def fits(self, request: Request) -> bool:
        """Whether the KV of a request fits beside that of the others, if there are any."""
        requests = self.requests
        return not requests or self.kv_memory.fits(
            [*requests, request], *self.generator.kv_shape
        )

    def add(self, request: Request) -> None:
        """Add a request. It goes on after the tokens that it has already.

        Raises:
            RequestError: If its KV can never fit, or a plugin refuses it.
        """
        if self.generator is None:
            args = self.model_provider.cli_args
            model = self.model_provider.model
            self.kv_memory = KVMemory(model, args.max_kv_bytes)
            if args.max_kv_bytes is None:
                self.prompt_cache.max_bytes = min(
                    args.radix_cache_size, self.kv_memory.limit
                )
            self.can_cut = all(type(c) is KVCache for c in make_prompt_cache(model))
            self.generator = LeanBatchGenerator(
                model,
                completion_batch_size=args.batch_size,
                prefill_batch_size=min(args.batch_size, args.prompt_concurrency),
                prefill_step_size=self.step_size,
                stream=mx.default_stream(mx.default_device()),
            )
        self.kv_memory.check(request)
        tokenizer = self.model_provider.tokenizer
        sampler = GuardedSampler(
            self.policies.samplers[request.sampler],
            self.policies.args,
            request,
            tokenizer,
        )
        n_top = request.args.top_logprobs if request.args.logprobs else None
        penalties = PenaltyParameters.from_arguments(request.args.logits)
        processors = []
        if not penalties.is_short:
            penalties, processors = None, make_logits_processors(request.args)
        processors += self.policies.make_logits_processors(request, tokenizer)
        segments, cache, n_cached = self.fetch(request)
        (uid,) = self.generator.insert_segments(
            segments=[segments],
            max_tokens=[request.args.max_tokens - len(request.generated)],
            caches=[cache],
            all_tokens=[request.prompt[:n_cached]],
            samplers=[RowSampling(sampler, penalties, n_top)],
            logits_processors=[processors],
            stop_sequences=[
                ResumedStopSequences(request.model.end_of_text, request.generated)
            ],
        )
        self.active[uid] = request
        self.prefilling.add(uid)
        request.n_run, request.leader, request.shared_by = n_cached, None, None
        request.start()

    # Prefixes that are being run

    def must_wait(self, request: Request) -> bool:
        """Whether a request should start later: another one runs a prefix of its prompt,
        which will be in the prompt cache before it could have run it itself."""
        leader = request.leader
        if leader is not None:
            is_running = any(self.active[uid] is leader for uid in self.prefilling)
            if is_running and leader.n_run < request.n_shared:
                return True
            if leader.n_run >= request.n_shared:
                self.store_running(request)
                # If it is not there, there was no room for it.
                request.shares = self.n_known(request) >= request.n_shared
            request.leader = None
        return request.shares and self.follow(request)

    def follow(self, request: Request) -> bool:
        """Let a request wait for one that runs a longer prefix than the cache has."""
        found = [
            (n_common(leader.prompt[:-1], request.prompt[:-1]), uid)
            for uid in self.prefilling
            for leader in [self.active[uid]]
            if leader.cache_key == request.cache_key and not leader.generated
        ]
        n_shared, uid = max(found, default=(0, 0))
        if n_shared < MIN_SHARED or self.active[uid].n_run >= n_shared:
            return False
        if n_shared < self.n_known(request) + MIN_SHARED:
            return False
        leader = request.leader = request.shared_by = self.active[uid]
        request.n_shared = n_shared
        leader.has_followers = True
        if not self.can_cut:
            self.generator.cut(uid, n_shared - leader.n_matched)
        return True

    def n_known(self, request: Request) -> int:
        return self.prompt_cache.search(request.cache_key, request.prompt).n_tokens

    def forget_shared(self, waiting: Iterable[Request]) -> None:
        """Drop the KV that none of those who wait needs, if none is to be kept."""
        if self.caching or not self.prompt_cache:
            return
        keep: Set[Node] = set()
        for leader in {r.shared_by for r in waiting} - {None}:
            match = self.prompt_cache.search(leader.cache_key, leader.prompt)
            keep.update(match.node.path if match.node else ())
        self.prompt_cache.evict(0, 0, keep)

    def remove(self, requests: Collection[Request]) -> None:
        """Take requests out before they end; what they have run stays in the cache."""
        uids = [uid for uid, r in self.active.items() if r in requests]
        if not uids:
            return
        rows = {uid: self.active.pop(uid) for uid in uids}
        self.prefilling.difference_update(uids)
        # A prompt of one token may not have begun.
        wanted = [
            uid
            for uid, r in rows.items()
            if (r.n_run or r.generated) and self.is_kept(r)
        ]
        caches = self.generator.extract_cache(wanted)
        self.generator.remove(uids)
        self.reserve()
        self.store({rows[uid]: cache for uid, cache in caches.items()})

    def close(self) -> None:
        """Drop all rows and their KV, and what belongs to the model."""
        self.active.clear()
        self.prefilling.clear()
        generator, self.generator = self.generator, None
        if generator is not None:
            try:
                generator.close()
            except Exception:
                # It waits for the device, which can have failed.
                logging.exception("A batch could not be closed")
        self.reserve()

    def step(self) -> List[Request]:
        """Run one step and hand out its tokens; gives the requests that it ended."""
        if not self.active:
            return []
        check_address_space()
        self.steps += 1
        ended = self.decode()
        if self.prefilling:
            self.prefill()
        return ended

    def prefill(self) -> None:
        """Run a part of the prompts."""
        self.generator.prefill_step_size = self.plan_prefill()
        responses = self.generator.prefill()
        self.reserve()
        for r in responses:
            if not r.end_of_prompt:
                request = self.active[r.uid]
                done, total = r.progress
                request.n_run = max(0, request.n_prompt - total + done)
        self.store_segments(responses)
        self.prefilling -= {r.uid for r in responses if r.end_of_prompt}

    def decode(self) -> List[Request]:
        """Run the rows that have their prompts behind them, and hand out the tokens."""
        scheduler = self.policies.scheduler
        joined, responses = self.generator.decode()
        self.prefilling -= {r.uid for r in joined}
        self.reserve()
        if responses and scheduler.has("on_tokens"):
            counts = [(self.active[r.uid], 1) for r in responses]
            scheduler.run(lambda policy: policy.on_tokens(counts))
        self.n_generated += len(responses)
        events, ended = [], {}
        for r in responses:
            request = self.active[r.uid]
            logprob, top = r.logprobs() if r.logprobs else (None, ())
            token = Token(r.token, logprob, top, r.finish_reason)
            events.append(request.note(token))
            if r.finish_reason is not None:
                ended[request] = r.prompt_cache, r.all_tokens
                del self.active[r.uid]
        self.turnstile.put(events)
        self.store(ended)
        return list(ended)

    def reserve(self) -> None:
        """Tell the prompt cache what the rows hold: one bound is for both."""
        if self.caching:
            generator = self.generator
            n_bytes = generator.prompt_cache_nbytes if generator else 0
            self.prompt_cache.reserve(n_bytes)

    def plan_prefill(self) -> int:
        """How many tokens of each prompt the next step processes at most."""

        def ask(policy):
            tokens = policy.prefill_tokens(view)
            return None if tokens is None else max(1, int(tokens))

        view = self.view
        limit = self.step_size
        tokens = self.policies.scheduler.run(ask)
        self.budget = limit if tokens is None else min(tokens, limit)
        lengths = self.generator.segment_lengths
        return chunk_width(lengths, self.budget) if lengths else limit

    def fetch(self, request: Request) -> Tuple[List[List[int]], Any, int]:
        """The segments left to run, and the cache of the tokens before them.

        A request that goes on after a failed step takes nothing from the cache.
        """
        prompt, n = request.prompt, request.n_prompt
        if request.generated:
            request.to_store = {}
            cache = make_segmented_cache(self.model_provider.model)
            return [prompt + request.generated], cache, 0
        key = request.cache_key
        if self.caching:
            self.store_running(request)
        # Where others branch off, the prompt leaves what they can resume from.
        branch = self.prompt_cache.branch_point(key, prompt)
        cache, rest = self.prompt_cache.fetch_nearest_cache(key, prompt)
        start = request.n_matched = n - len(rest)
        request.to_store = {}
        for end, cache_type in zip(
            accumulate(len(segment) for segment in request.segments),
            request.segment_types,
        ):
            for stop in (branch, end):
                # The last token is run with the batch.
                if stop is not None and start < min(stop, n - 1) and stop <= end:
                    start = min(stop, n - 1)
                    request.to_store[start] = cache_type
        if cache is None:
            cache = make_segmented_cache(self.model_provider.model)
        stops = [n] if self.can_cut else [*request.to_store, n]
        starts = [request.n_matched, *stops]
        segments = [prompt[i:j] for i, j in zip(starts, stops)]
        return segments, cache, request.n_matched

    def store_segments(self, prompt_responses: List[Any]) -> None:
        """Keep the KV of prompts that have reached the end of a segment, unless it can be
        cut when it is asked for."""
        wanted = [
            r.uid
            for r in prompt_responses
            if r.end_of_segment and not (r.end_of_prompt or self.can_cut)
            if self.is_kept(self.active[r.uid])
        ]
        caches = self.generator.extract_cache(wanted)
        self.store({self.active[uid]: caches[uid] for uid in wanted})

    def store_running(self, request: Request) -> None:
        """Keep what a running row has of a prompt, if the prompt cache has less."""

        def n_run(uid: int) -> int:
            row = self.active[uid]
            n_run = row.n_run if uid in self.prefilling else row.n_prompt
            return min(n_run, n_common(row.prompt, request.prompt[:-1]))

        if not self.can_cut:
            return
        key = request.cache_key
        found = [
            (n_run(uid), uid) for uid, r in self.active.items() if r.cache_key == key
        ]
        n, uid = max(found, default=(0, 0))
        if n >= self.n_known(request) + MIN_SHARED:
            cache, tokens = self.generator.extract_cache([uid])[uid]
            self.store({self.active[uid]: (cache, tokens[:n])})

    def is_kept(self, request: Request) -> bool:
        """Whether what it runs is kept for others."""
        return self.caching or request.has_followers

    def store(self, rows: Dict[Request, Tuple[List[Any], List[int]]]) -> None:
        """Keep what rows have run.

        Args:
            rows (Dict[Request, Tuple]): The caches of each, and the tokens in them.
        """
        for request, (cache, tokens) in rows.items():
            n = len(tokens)
            # The prompt cache may just have given all of it.
            if n <= request.n_matched or not self.is_kept(request):
                continue
            ends, request.to_store = request.to_store, {}
            for end in sorted({n, *ends}):
                cache_type = ends.get(
                    min((e for e in ends if e >= end), default=None), "assistant"
                )
                if end > n:
                    request.to_store[end] = cache_type
                elif end == n or (self.can_cut and cache_type == "system"):
                    self.prompt_cache.insert(
                        request.cache_key, tokens[:end], cache, cache_type
                    )
        self.prompt_cache.evaluate()

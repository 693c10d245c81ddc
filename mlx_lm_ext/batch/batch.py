"""The running batch: the requests in it, and the steps that it runs.

The steps' arithmetic is in ``generator.py``; what is stored of the KV, in ``storage.py``.

Rules:
1. Lives on the generation thread; every array here is made and freed there.
2. After an exception from ``remove`` or ``step`` only ``close`` is safe, because the rows
   may be in the middle of a step.
"""

import argparse
import logging
from itertools import islice
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
)

import mlx.core as mx
from mlx_lm.generate import GenerationBatch

from ..cache import growth
from ..cache.prompt_cache import RadixPromptCache
from ..cache.tree import Node, n_common
from ..device import check_address_space
from ..distributed.group import ONE_PROCESS, OneProcess
from ..errors import internal_error
from ..interfaces import Clock, RequestInfo, SchedulerPolicy, SchedulerView
from ..request.mailbox import Turnstile
from ..request.request import Request, Token
from ..sampling.groups import RowSampler
from ..sampling.penalties import PenaltyParameters
from .batch_sampling import NoSampler, RowSampling
from .end_ban import EndBan
from .generator import KVShape, LeanBatchGenerator, make_logits_processors
from .grouping import Grouping
from .kv_memory import KVMemory
from .pace import Pace
from .prefill import least_chunk, max_prefill_tokens, whole_budget
from .resumed import ResumedStopSequences
from .row import Row
from .sharing import MIN_SHARED, PrefixSharing
from .step_costs import StepCosts, measure_place
from .storage import KVStorage

logger = logging.getLogger(__name__)

# Chunks of prompts in a step, at most: each waits for the one before.
MAX_CHUNKS = 8


class BatchPolicies(Protocol):
    """What a batch asks for: see ``policies.guard.Policies``."""

    clock: Clock

    @property
    def scheduler(self) -> SchedulerPolicy: ...

    def make_sampler(
        self, name: str, request: RequestInfo, tokenizer: Any
    ) -> RowSampler: ...

    def make_logits_processors(
        self, request: RequestInfo, tokenizer: Any
    ) -> List[Callable[[mx.array, mx.array], mx.array]]: ...


class Batch:
    """The requests that run together on upstream's ``BatchGenerator``.

    Args:
        model (nn.Module): The model that runs them.
        tokenizer (TokenizerWrapper): Its tokenizer.
        args (argparse.Namespace): The command line.
        policies (BatchPolicies): Choose tokens, and how much prefill a step does.
        prompt_cache (Optional[RadixPromptCache]): Gives KV to rows and stores what they
          have run. Without one, KV is stored only while other requests wait for it.
        turnstile (Turnstile): Takes the tokens to the handlers.
        group (OneProcess): The ranks that run the model.
    """

    grouping_class = Grouping

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: argparse.Namespace,
        policies: BatchPolicies,
        prompt_cache: Optional[RadixPromptCache],
        turnstile: Turnstile,
        group: OneProcess = ONE_PROCESS,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.policies = policies
        self.turnstile = turnstile
        self.group = group
        self.kv_memory = KVMemory(model, args.max_kv_bytes)
        self.kv_memory.bound(group.least(self.kv_memory.most_tokens))
        n_bytes = args.radix_cache_size
        if args.max_kv_bytes is None:
            n_bytes = min(n_bytes, self.kv_memory.limit)
        self.is_caching = prompt_cache is not None
        if prompt_cache is None:
            prompt_cache = RadixPromptCache(clock=policies.clock, agree=group.agree)
        prompt_cache.max_bytes = n_bytes
        self.prompt_cache = prompt_cache
        self.storage = KVStorage(model, prompt_cache)
        self.sharing = PrefixSharing()
        self.generator: Optional[LeanBatchGenerator] = None
        self.rows: Dict[int, Row] = {}
        # Requests of which most will be added as soon as there is room.
        self.waiting: Iterable[Request] = ()
        self.step_size = max_prefill_tokens(args.prefill_step_size)
        self.pace = Pace(args.max_gap, MAX_CHUNKS * self.step_size, least_chunk())
        # When the last step had nothing more to wait for, if another one was to follow, and
        # the tokens of each chunk of prompts that it has handed to the device then.
        self.last_wait: Optional[float] = None
        self.handed_over: List[int] = []
        # Tokens of prompts that the last step was allowed.
        self.budget = self.step_size
        self.n_steps = 0
        # Since ``take_ended``.
        self.ended: List[Request] = []
        self.n_tokens = 0
        # Since ``take_failed``.
        self.failed: List[Tuple[Request, BaseException]] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def requests(self) -> List[Request]:
        return [row.request for row in self.rows.values()]

    @property
    def prefilling(self) -> List[Row]:
        return [row for row in self.rows.values() if row.is_prefilling]

    @property
    def view(self) -> SchedulerView:
        """What scheduler policies see."""
        clock = self.policies.clock
        requests = tuple(self.requests)
        prefilling = self.prefilling
        n_decoding = len(requests) - len(prefilling)
        n_left = sum(row.n_tokens - row.n_run for row in prefilling)
        gap_tokens = whole_budget(self.pace.gap_tokens(n_decoding, n_left))
        return SchedulerView(clock(), requests, self.args.batch_size, gap_tokens)

    # Joining

    def can_start(self, request: Request, beside: Sequence[Request] = ()) -> bool:
        """Whether there is room for a request, and its prompt can run in the next step.

        Until it runs, the KV that it takes from the prompt cache is not counted in the bound
        of the cache. A short prompt may start beside a long one, because it delays it
        little.

        Args:
            request (Request): The request.
            beside (Sequence[Request]): Requests whose KV is there, but in no row yet.
        """
        if not self.rows:
            return self.fits(request, beside)
        prefilling = self.prefilling
        if len(prefilling) >= self.generator.prefill_batch_size:
            return False
        if not self.fits(request, beside):
            return False
        left = [row.n_tokens - row.n_run for row in prefilling]
        if request.n_prompt <= self.budget // 4:
            left = [n for n in left if n <= self.budget // 4]
        return sum(left) < self.budget

    def fits(self, request: Request, beside: Sequence[Request] = ()) -> bool:
        """Whether the KV of a request fits beside that of the rows and of ``beside``, if there
        are any."""
        requests = [request, *beside]
        if not self.rows:
            return not beside or self.kv_memory.fits([(requests, 0, 0)])
        return self.groups_fit(self.kv_groups(requests))

    def groups_fit(self, groups: Sequence[Tuple[List[Request], KVShape]]) -> bool:
        """Whether there is memory for all groups of ``kv_groups``."""
        return self.kv_memory.fits((g, shape.n_rows, shape.end) for g, shape in groups)

    def kv_groups(
        self, waiting: Sequence[Request] = ()
    ) -> List[Tuple[List[Request], KVShape]]:
        """The requests whose KV is in the same arrays, or will be as soon as their prompts
        are run, and the shape that it has now.

        Args:
            waiting (Sequence[Request]): Requests that would start now.
        """
        decoding = self.generator.generation_batch
        groups = [
            ([self.rows[uid].request for uid in g.batch.uids], g.batch.kv_shape)
            for g in decoding.groups
        ]
        to_come = [*(row.request for row in self.prefilling), *waiting]
        places = decoding.places_for([len(request.tokens) for request in to_come])
        for place, request in zip(places, to_come):
            while place >= len(groups):
                groups.append(([], KVShape(0, 0, 0)))
            groups[place][0].append(request)
        return groups

    def expect(self, waiting: Iterable[Request]) -> None:
        """Most of these requests will be added as soon as there is room."""
        self.waiting = waiting

    def n_to_come(self) -> List[int]:
        """How many rows are about to join each group that decodes: those whose prompts run,
        and, if there is memory for all of them, those that wait."""
        n_free = self.args.batch_size - len(self.rows)
        groups = self.kv_groups([*islice(self.waiting, n_free)])
        if not self.groups_fit(groups):
            groups = self.kv_groups()
        decoding = self.generator.generation_batch.groups
        return [
            len(requests) - len(group) for (requests, _), group in zip(groups, decoding)
        ]

    def add(self, request: Request) -> None:
        """Let a request run. It goes on after the tokens that it has already.

        Raises:
            RequestError: If its prompt can never fit, or a plugin refuses it.
        """
        if self.generator is None:
            self.generator = LeanBatchGenerator(
                self.model,
                self.make_grouping(),
                self.n_to_come,
                self.group,
                completion_batch_size=self.args.batch_size,
                prefill_batch_size=min(
                    self.args.batch_size, self.args.prompt_concurrency
                ),
                prefill_step_size=self.step_size,
                stream=mx.default_stream(mx.default_device()),
            )
        self.kv_memory.fit(request)
        sampling, processors = self.group.on_first(
            "sampling", lambda: self.make_sampling(request)
        ) or (RowSampling(NoSampler()), [])
        if self.is_caching:
            self.store_running(request)
        row, segments, caches = self.storage.fetch(request)
        (row.uid,) = self.generator.insert_segments(
            segments=[segments],
            max_tokens=[request.args.max_tokens - len(request.generated)],
            caches=[caches],
            all_tokens=[request.tokens[: row.n_run]],
            samplers=[sampling],
            logits_processors=[processors],
            stop_sequences=[
                ResumedStopSequences(request.stop_sequences, request.generated)
            ],
        )
        self.rows[row.uid] = row
        self.sharing.forget(request)

    def make_sampling(
        self, request: Request
    ) -> Tuple[RowSampling, List[Callable[[mx.array, mx.array], mx.array]]]:
        """How the tokens of a request are chosen, and its logits processors.

        Raises:
            RequestError: If a plugin refuses it.
        """
        sampler = self.policies.make_sampler(request.sampler, request, self.tokenizer)
        n_top = request.args.top_logprobs if request.args.logprobs else None
        penalties = PenaltyParameters.from_arguments(request.args.logits)
        processors = []
        if not penalties.is_short:
            penalties, processors = None, make_logits_processors(request.args)
        processors += self.policies.make_logits_processors(request, self.tokenizer)
        if request.min_tokens and request.end_tokens:
            processors.append(EndBan(request))
        constraint = request.constraint and request.constraint.copy()
        sampling = RowSampling(
            sampler, penalties, n_top, constraint, request.generated[:]
        )
        return sampling, processors

    def make_grouping(self) -> Grouping:
        """What decides which rows decode together."""
        costs = StepCosts(lambda: measure_place(self.model))
        return self.grouping_class(costs, self.kv_memory.most_tokens)

    def must_wait(self, request: Request) -> bool:
        """Whether a request should start later: a row runs a prefix of its prompt, which
        will be in the prompt cache before the request could have run it itself."""
        shared = self.sharing.awaited.get(request)
        if shared is not None:
            if shared.is_pending:
                return True
            is_there = True
            if shared.is_ready:
                self.store_running(request)
                # It is not there if there was no room for it.
                is_there = self.storage.n_known(request) >= shared.n_tokens
            self.sharing.end_wait(request, is_there)
        shared = self.sharing.follow(
            request, self.prefilling, lambda: self.storage.n_known(request)
        )
        if shared is not None and not self.storage.can_cut:
            leader = shared.leader
            n_left = shared.n_tokens - leader.n_start
            self.generator.cut(leader.uid, n_left)
        return shared is not None

    # Leaving

    def remove(self, requests: Collection[Request]) -> None:
        """Take requests out before they end. What they have run is stored."""
        rows = {uid: row for uid, row in self.rows.items() if row.request in requests}
        if not rows:
            return
        # A row that has tokens from before a pause has no KV until a part of them has run again.
        # A prompt of one token has no such part: it has run when the row has given a token.
        stored = [
            row
            for row in rows.values()
            if (row.n_run or (row.request.generated and not row.is_prefilling))
            and self.must_store(row)
        ]
        for row in rows.values():
            row.is_prefilling = False
            del self.rows[row.uid]
        caches = self.generator.extract_cache([row.uid for row in stored])
        self.generator.remove(list(rows))
        if not self.rows:
            self.interrupt()
        self.reserve()
        self.storage.store({row: caches[row.uid] for row in stored})

    def outgrows_memory(self, beside: Sequence[Request] = ()) -> bool:
        """Whether the KV may take more memory in the next step than it may have.

        Args:
            beside (Sequence[Request]): Requests whose prompts run, and have no rows.
        """
        if not self.rows:
            return False
        is_joined = bool(self.prefilling)
        n_bytes = sum(self.kv_memory.nbytes(1, r.n_prompt) for r in beside)
        shapes = [g.batch.kv_shape for g in self.generator.generation_batch.groups]
        if not (is_joined or any(shape.grows for shape in shapes)):
            return False
        for requests, shape in self.kv_groups():
            n_rows, end = shape.n_rows, shape.n_places
            if is_joined:
                # Some may join the others in this step.
                n_rows = max(n_rows, growth.max_rows(len(requests)))
            elif shape.grows and shape.n_next == 1:
                # The copy has no spare rows, which take part where pairs are run.
                n_rows = len(requests)
            if is_joined or shape.grows:
                n_tokens = max(r.n_prompt + r.n_generated for r in requests)
                end = max(shape.end, n_tokens) + shape.n_next
                if is_joined:
                    end = growth.roomy_columns(shape.n_places, end)
            n_bytes += self.kv_memory.nbytes(n_rows, end)
        return n_bytes > self.kv_memory.limit

    @property
    def nbytes(self) -> int:
        """Bytes of the KV of its rows."""
        return self.generator.prompt_cache_nbytes if self.generator else 0

    @property
    def newest(self) -> Request:
        """The request that has started last."""
        return self.rows[max(self.rows)].request

    def preempt(self, request: Request) -> None:
        """Take a request out until there is room for it again, unless it ends just then. What
        it has run is kept as far as the prompt cache has room for it."""
        (row,) = (row for row in self.rows.values() if row.request is request)
        if not row.is_prefilling:
            # KV that cannot be cut is of use only for what follows all tokens that are in it.
            pending = self.generator.generation_batch.pending(row.uid)
            if pending is not None:
                self.deliver([pending])
        if row.uid in self.rows:
            self.sharing.keep(row)
            self.remove([request])
        else:
            self.generator.remove([row.uid])

    def forget(self, request: Request) -> None:
        """A request that waited, or ran, is not served any more."""
        self.sharing.forget(request)

    def close(self) -> None:
        """Drop all rows and their KV. Requests can be added again."""
        for row in self.rows.values():
            row.is_prefilling = False
        self.rows.clear()
        self.interrupt()
        generator, self.generator = self.generator, None
        if generator is not None:
            try:
                generator.close()
            except Exception:
                # It waits for the device, which may have failed.
                logger.exception("A batch could not be closed")
        self.reserve()

    # Running

    def step(self) -> None:
        """Run one step, and hand out its tokens."""
        if not self.rows:
            return
        check_address_space()
        self.n_steps += 1
        n_rows = self.decode()
        # A GPU may give the tokens before it has run the prompts of the step before.
        self.generator.prompts.wait()
        now = self.policies.clock()
        before, decoding = self.last_wait, self.generator.generation_batch
        if before is not None and not decoding.has_planned:
            self.pace.note(n_rows, self.handed_over, now - before)
        self.last_wait, self.handed_over = now, []
        # A step that is not timed would leave the prompts out for nothing.
        must_measure = before is not None and self.pace.must_measure(n_rows)
        budget = None
        if self.prefilling:
            # A step that has to be planned is long enough without them.
            must_wait = must_measure or decoding.must_plan
            budget = self.group.agree(
                "tokens of prompts",
                lambda: None if must_wait else self.plan_prefill(),
            )
        if budget is not None:
            self.prefill(budget)
            self.handed_over = self.generator.chunk_sizes
            if self.generator.prompts.has_new_shape:
                # Until now it was planned. What is left of the step is the run.
                self.last_wait = self.policies.clock()
        if not self.rows:
            self.interrupt()

    def interrupt(self) -> None:
        """The next step follows on something else than a step, or one that took a time of its
        own: its time says nothing."""
        self.last_wait, self.handed_over = None, []

    def take_ended(self) -> Tuple[List[Request], int]:
        """The requests that have ended, and the number of tokens that were generated, since
        this was last called."""
        ended, n_tokens = self.ended, self.n_tokens
        self.ended, self.n_tokens = [], 0
        return ended, n_tokens

    def take_failed(self) -> List[Tuple[Request, BaseException]]:
        """The requests that were taken out because their constraints have failed, and why,
        since this was last called."""
        failed, self.failed = self.failed, []
        return failed

    def decode(self) -> int:
        """Run one token of each row whose prompt is run.

        Returns:
            int: How many rows these are.
        """
        joined, responses = self.generator.decode()
        n_rows = self.generator.n_decoded
        for r in joined:
            self.rows[r.uid].is_prefilling = False
        self.reserve()
        failed = self.take_failed_rows()
        self.deliver([r for r in responses if r.uid not in failed])
        self.drop(failed)
        return n_rows

    def take_failed_rows(self) -> Dict[int, BaseException]:
        """The rows whose constraints or logits processors have failed in this step, and why."""
        failed = self.generator.generation_batch.take_failed()
        uids = self.group.agree("failed rows", lambda: list(failed))
        return {uid: failed.get(uid) or internal_error() for uid in uids}

    def drop(self, failed: Dict[int, BaseException]) -> None:
        """Take out the rows whose constraints or logits processors have failed."""
        if not failed:
            return
        # Some may have left before this step.
        uids = [uid for uid in failed if uid in self.rows]
        self.failed += [(self.rows.pop(uid).request, failed[uid]) for uid in uids]
        # Some may have ended in it.
        running = self.generator.generation_batch.uids
        self.generator.remove([uid for uid in uids if uid in running])

    def deliver(self, responses: List[GenerationBatch.Response]) -> None:
        """Hand out tokens, and store what the rows that have ended have run."""
        if responses:
            counts = [(self.rows[r.uid].request, 1) for r in responses]
            self.policies.scheduler.on_tokens(counts)
        # All of them before the first is noted: reading log probabilities may raise.
        tokens = []
        for r in responses:
            logprob, top = r.logprobs() if r.logprobs else (None, ())
            tokens.append(Token(r.token, logprob, top, r.finish_reason))
        events, ended = [], {}
        for r, token in zip(responses, tokens):
            row = self.rows[r.uid]
            events.append(row.request.note(token))
            if r.finish_reason is not None:
                self.kv_memory.lengths.add(row.request.n_generated)
                ended[row] = r.prompt_cache, r.all_tokens
                del self.rows[r.uid]
        self.turnstile.put(events)
        self.ended += [row.request for row in ended]
        self.n_tokens += len(responses)
        self.storage.store(
            {row: kv for row, kv in ended.items() if self.must_store(row)}
        )

    def plan_prefill(self) -> int:
        """How many tokens of prompts the next step runs."""
        tokens = self.policies.scheduler.prefill_tokens(self.view)
        return self.step_size if tokens is None else min(tokens, self.pace.limit)

    def prefill(self, budget: int) -> None:
        """Run a part of the prompts, of so many tokens."""
        self.budget = budget

        def cost(n: int) -> int:
            return self.group.agree("cost", lambda: self.pace.cost(budget, n))

        responses = self.generator.prefill(budget, cost)
        self.reserve()
        for r in responses:
            row = self.rows[r.uid]
            if r.end_of_prompt:
                row.is_prefilling = False
            else:
                n_run, n_left = r.progress
                row.n_run = row.n_tokens - n_left + n_run
        self.store_segments([r.uid for r in responses if r.end_of_segment])

    # Storing

    def must_store(self, row: Row) -> bool:
        """Whether the KV of a row is to be stored."""
        return self.is_caching or row in self.sharing.followed

    def store_segments(self, uids: List[int]) -> None:
        """Store the KV of rows that are at the end of a segment of their prompts, unless it
        can be cut whenever it is asked for."""
        if self.storage.can_cut:
            return
        rows = [self.rows[uid] for uid in uids]
        rows = [row for row in rows if row.is_prefilling and self.must_store(row)]
        caches = self.generator.extract_cache([row.uid for row in rows])
        self.storage.store({row: caches[row.uid] for row in rows})

    def store_running(self, request: Request) -> None:
        """Store what a row has of the prompt of a request, if the prompt cache has less."""
        if not self.storage.can_cut:
            return
        longest, n = None, 0
        prompt = request.prompt[:-1]
        for row in self.rows.values():
            other = row.request
            if other.cache_key == request.cache_key:
                n_run = row.n_run if row.is_prefilling else other.n_prompt
                n_run = min(n_run, n_common(other.prompt, prompt))
                if n_run > n:
                    longest, n = row, n_run
        if longest is None or not self.must_store(longest):
            return
        if n >= self.storage.n_known(request) + MIN_SHARED:
            caches, tokens = self.generator.extract_cache([longest.uid])[longest.uid]
            self.storage.store({longest: (caches, tokens[:n])})

    def drop_unneeded(self) -> None:
        """Drop the stored KV that no waiting request needs, if none is to be kept."""
        if self.is_caching or not self.prompt_cache:
            return
        keep: set[Node] = set()
        for leader in self.sharing.needed:
            match = self.prompt_cache.search(leader.cache_key, leader.tokens)
            keep.update(match.node.path if match.node else ())
        self.prompt_cache.evict(0, 0, keep)

    def reserve(self) -> None:
        """Tell the prompt cache how much the rows hold: one bound is for both."""
        if self.is_caching:
            self.prompt_cache.reserve(self.nbytes)

"""Runs the steps of the batch: mlx-lm's ``BatchGenerator`` with its batches of prompts and of
rows that decode, changed so that a step computes nothing that no request asked for, and does
not wait for the device where it need not.

Rules:
1. Of the files that are not named ``upstream.py``, only this one uses private names of
   mlx-lm. What upstream makes public (see ``patches/``) is deleted here.
2. Upstream's tuples are read by name, through the named tuples below.
3. The caches that ``extract_cache`` gives are views of the batch's arrays. Use them before
   the next step, which writes into these arrays.
"""

from copy import copy
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    StopSequences,
)
from mlx_lm.server import _make_logits_processors

from ..cache.kinds import prepare_step
from ..cache.segmented import BatchSegmentedKVCache
from ..device import on_cpu
from ..distributed.group import ONE_PROCESS, OneProcess
from .batch_sampling import BatchSampling, RowSampling
from .grouping import Grouping
from .groups import GenerationGroups
from .pairs import PAIRED_SHAPES, can_pair
from .prefill import chunk_width, runs_alone
from .prompts import (
    LeanPromptBatch,
    PromptBatches,
    PromptInProgress,
    evaluate_staged,
    part,
    segmented,
)

make_logits_processors = _make_logits_processors


class UnprocessedPrompt(NamedTuple):
    """An entry of ``BatchGenerator._unprocessed_sequences``: a prompt that has not begun.

    Args:
        uid (int): The row that it will be.
        segments (List[List[int]]): The tokens left to run; the last token is a segment of
          its own.
        max_tokens (int): The most tokens to generate.
        cache (List[Any]): The KV of the tokens before the segments, one cache a layer.
        tokens (List[int]): These tokens.
        sampler (RowSampling): How its tokens are chosen.
        logits_processors (Tuple[Callable, ...]): Called before its sampler.
        stop_sequences (StopSequences): What ends it.
    """

    uid: int
    segments: List[List[int]]
    max_tokens: int
    cache: List[Any]
    tokens: List[int]
    sampler: RowSampling
    logits_processors: Tuple[Callable, ...]
    stop_sequences: StopSequences

    @property
    def n_left(self) -> int:
        """Tokens left to run."""
        return sum(map(len, self.segments))

    @property
    def is_long(self) -> bool:
        """Whether it takes less time to run it alone than beside others."""
        return runs_alone(self.n_left, len(self.tokens))


class KVShape(NamedTuple):
    """The shape of the KV of a group of rows, in the layers that keep all of it.

    Args:
        n_rows (int): Rows of the arrays, spare ones included, in the layers with the most.
        end (int): Places that the tokens take, with the padding.
        n_places (int): Places that there are.
        n_next (int): Places that the next step needs: two where it runs pairs of tokens.
    """

    n_rows: int
    end: int
    n_places: int
    n_next: int = 1

    @property
    def grows(self) -> bool:
        """Whether the arrays grow in the next step."""
        return self.end + self.n_next > self.n_places


class LeanGenerationBatch(GenerationBatch):
    """``GenerationBatch`` that samples all rows in one call, computes log probabilities only
    of the rows that asked for them, and runs logits processors only on the rows that have
    some.

    - ``logprobs`` of its responses is a function that gives what ``Logprobs.row`` does, or
      None for a row that did not ask.
    - New rows have no step of their own: their first step is one of the whole batch.
    - On a CPU, a step runs the model and then samples the tokens that it gives. A GPU must
      not wait for the tokens to be read: its step samples from the logits of the step before
      and runs the model on these tokens. It is handed over as a whole, and the tokens are read
      then. With constraints, they are read before the model is handed over, and the masks for
      the next ones are filled meanwhile.

    - The tokens are those of rank 0. The other ranks, whose rows have no sampler, run the
      model.

    Args:
        samplers (List[RowSampling]): How the tokens of each row are chosen.
        *args, **kwargs: See ``GenerationBatch``.
        group (OneProcess): The ranks that run the model.
    """

    _next_logprobs: List[Optional[Callable]]
    # Whether the device had to plan the last step.
    has_planned = False

    def __init__(
        self,
        model: Any,
        uids: List[int],
        inputs: mx.array,
        prompt_cache: List[Any],
        tokens: List[List[int]],
        samplers: List[RowSampling],
        *args: Any,
        group: OneProcess = ONE_PROCESS,
        **kwargs: Any,
    ):
        self.group = group
        # Of the rows that have taken part in a step, and of the others, which follow them.
        self.sampling = BatchSampling([])
        self.joining = BatchSampling(samplers)
        self.is_eager = on_cpu()
        # What the next tokens are sampled from, if the step of a GPU has left it, and these
        # tokens with their log probabilities, if they were needed before the next step.
        self.logits: Optional[mx.array] = None
        self.sampled: Optional[Tuple[mx.array, List[Optional[Callable]]]] = None
        # Rows whose constraint or logits processor has failed, and why.
        self.failed: Dict[int, BaseException] = {}
        # Upstream's constructor runs a step, which is skipped.
        self.is_new = True
        # Upstream wants one for each row, and calls none of them.
        samplers = [None] * len(uids)
        super().__init__(
            model, uids, inputs, prompt_cache, tokens, samplers, *args, **kwargs
        )
        self.is_new = False
        self._next_logprobs = [None] * len(uids)
        if not self.is_eager:
            # Upstream counts each step, and the first one gives no token.
            self._num_tokens = [-1] * len(uids)

    @classmethod
    def of_prompts(
        cls, batch: LeanPromptBatch, group: OneProcess
    ) -> "LeanGenerationBatch":
        """The batch that decodes these rows, of which only the last token is left."""
        return cls(
            batch.model,
            batch.uids,
            # The type that samplers give: with CUDA, each type has kernels of its own.
            mx.array([p.segments[0][0] for p in batch.progress], mx.uint32),
            batch.prompt_cache,
            batch.tokens,
            batch.samplers,
            batch.fallback_sampler,
            batch.logits_processors,
            batch.stop_sequences,
            batch.max_tokens,
            group=group,
        )

    @property
    def is_settled(self) -> bool:
        """Whether its rows can move: all have taken part in a step, and are at its end."""
        return not self.joining and self.sampled is None

    @property
    def kv_shape(self) -> KVShape:
        layers = [c for c in segmented(self.prompt_cache) if c.keys is not None]
        if not layers:
            return KVShape(0, 0, 0)
        # Of the layers with a window, only the last places are there.
        longest = max(layers, key=lambda c: c.end)
        # Spare rows are given up when arrays are copied, which is not in all layers at once.
        n_rows = max(len(c.keys) for c in layers)
        n_next = 2 if can_pair(self.prompt_cache) else 1
        return KVShape(n_rows, longest.end, longest.keys.shape[2], n_next)

    def extend(self, batch: "LeanGenerationBatch") -> None:
        """Add the rows of another batch: new ones, or, if both are settled, any."""
        if batch.logits is not None:
            mine = [] if self.logits is None else [self.logits]
            self.logits = mx.concatenate([*mine, batch.logits])
        self.sampling.extend(batch.sampling)
        self.joining.extend(batch.joining)
        self.failed |= batch.failed
        super().extend(batch)
        mx.async_eval([c.state for c in self.prompt_cache])

    def split(self, indices: List[int]) -> "LeanGenerationBatch":
        """Take rows out of a batch that is settled, for another batch."""
        go = self.with_few_moves(indices)
        stay = self.with_few_moves([i for i in range(len(self)) if i not in set(go)])
        batch = copy(self)
        batch.sampling, batch.joining = self.sampling.copy(), self.joining.copy()
        batch.failed = {}
        taken, left = [], []
        # One layer at a time: the arrays of it are freed before the next is copied.
        for layer in self.prompt_cache:
            of_go, of_stay = part([layer], go, stay)
            taken += of_go
            left += of_stay
        # The caches are parted already: these filter all else that belongs to the rows.
        self.prompt_cache, batch.prompt_cache = [], []
        batch.filter(go)
        self.filter(stay)
        self.prompt_cache, batch.prompt_cache = left, taken
        return batch

    def with_few_moves(self, keep: List[int]) -> List[int]:
        """These indices in the order in which the last rows take the places of those that
        leave, so that few rows move."""
        stay, movers = set(keep), iter([i for i in keep if i >= len(keep)])
        return [i if i in stay else next(movers) for i in range(len(keep))]

    def filter(self, keep: List[int]) -> None:
        n = len(self.sampling)
        if not self.joining:
            keep = self.with_few_moves(keep)
        evaluate_staged(self.prompt_cache, keep)
        super().filter(keep)
        old = [i for i in keep if i < n]
        self.sampling.filter(old)
        self.joining.filter([i - n for i in keep if i >= n])
        if not old:
            self.logits = self.sampled = None
        elif self.logits is not None and len(old) < n:
            self.logits = self.logits[mx.array(old)]
            if self.sampled is not None:
                tokens, logprobs = self.sampled
                self.sampled = tokens[mx.array(old)], [logprobs[i] for i in old]

    def _step(self) -> Tuple[List[Optional[int]], List[Optional[Callable]]]:
        if self.is_new:
            return [], []
        if self.is_eager:
            return self.run_and_sample()
        return self.sample_and_run()

    def run_and_sample(self) -> Tuple[List[int], List[Optional[Callable]]]:
        """Run the model on the last tokens, and sample the next ones."""
        inputs = self._next_tokens
        self.join()
        for row, token in zip(self.tokens, inputs.tolist()):
            row.append(token)
        logits = self.run(inputs)
        logprobs: List[Optional[Callable]] = [None] * len(self.uids)

        def choose() -> List[int]:
            nonlocal logprobs
            self._next_tokens, logprobs, to_evaluate = self.sample(logits)
            mx.async_eval(self._next_tokens, to_evaluate)
            return self._next_tokens.tolist()

        if self.group.size > 1:
            # Rank 0 needs the part of the others before it decides. If one of them is lost, that
            # fails here, and is no failed decision.
            mx.eval(logits)
        given = self.group.agree("tokens", choose)
        if self.group.rank:
            self._next_tokens = mx.array(given, mx.uint32)
        self.sampling.constraints.advance([[t] for t in given])
        return given, logprobs

    def sample_and_run(self) -> Tuple[List[Optional[int]], List[Optional[Callable]]]:
        """Sample the next tokens of the rows that have logits, and run the model on them and
        on the last tokens of the prompts of the new rows."""
        n, inputs = len(self.sampling), self._next_tokens
        logprobs: List[Optional[Callable]] = [None] * len(self.uids)
        if n:
            tokens, logprobs[:n] = self.sampled or self.sample_ahead()
            inputs = mx.concatenate([tokens, inputs[n:]]) if self.joining else tokens
        self.sampled = None
        self.join()
        self._next_tokens = inputs
        self.logits = self.run(inputs)
        constraints = self.sampling.constraints
        if constraints.constrained:
            # The last token of a prompt is none of the answer.
            news = enumerate(inputs.tolist())
            constraints.advance([[t] if i < n else [] for i, t in news])
        # To hand the step over takes a while, in which the masks are filled.
        mx.async_eval(inputs, self.logits)
        given: List[Optional[int]] = inputs.tolist()
        for row, token in zip(self.tokens, given):
            row.append(token)
        return [*given[:n], *[None] * (len(given) - n)], logprobs

    def sample_ahead(self) -> Tuple[mx.array, List[Optional[Callable]]]:
        """Sample the next tokens of the rows that have logits, without running the model."""
        if self.group.rank:
            tokens, to_evaluate = mx.zeros(len(self.sampling), mx.uint32), []
            logprobs: List[Optional[Callable]] = [None] * len(tokens)
        else:
            tokens, logprobs, to_evaluate = self.sample(self.logits)
        tokens = self.group.first(tokens)
        mx.async_eval(tokens, to_evaluate)
        return tokens, logprobs

    def pending(self, uid: int) -> Optional[GenerationBatch.Response]:
        """The response that a row would have to the next step, if its logits are there
        already; else None. For a row that leaves before that step."""
        i = self.uids.index(uid)
        if self.is_eager or i >= len(self.sampling):
            return None
        if self.sampled is None:
            self.sampled = self.sample_ahead()
        if self.group.agree("failed row", lambda: uid in self.failed):
            # It has got a token that it may not have, and fails when it goes on.
            return None
        tokens, logprobs = self.sampled
        token = tokens[i].item()
        reason = None
        if self._num_tokens[i] + 1 >= self.max_tokens[i]:
            reason = "length"
        if self._matchers[i].advance(token):
            reason = "stop"
        return self.Response(
            uid=uid,
            token=token,
            logprobs=logprobs[i],
            finish_reason=reason,
            prompt_cache=self.extract_cache(i) if reason else None,
            all_tokens=self.tokens[i] if reason else None,
        )

    def join(self) -> None:
        """Let the new rows take part in the sampling."""
        if self.joining:
            self.sampling.extend(self.joining)
            self.joining = BatchSampling([])

    def run(self, inputs: mx.array) -> mx.array:
        """The logits of shape (rows, vocabulary) that the model gives for one token of each
        row."""
        prepare_step(self.prompt_cache)
        self.has_planned = self.must_plan
        if PAIRED_SHAPES.note_step(self.prompt_cache):
            return self.run_pairs(inputs)
        return self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]

    @property
    def must_plan(self) -> bool:
        """Whether the device has to plan the next step, which takes longer than others."""
        return PAIRED_SHAPES.must_plan(self.prompt_cache)

    def run_pairs(self, inputs: mx.array) -> mx.array:
        """What ``run`` gives. The model gets each token twice, and the second is taken back: with
        CUDA, attention with a mask has a kernel for two tokens of a row, and not for one.
        """
        layers, n = segmented(self.prompt_cache), len(inputs)
        with BatchSegmentedKVCache.whole(layers) as n_rows:
            tokens = mx.pad(inputs, (0, n_rows - n))
            pairs = mx.stack([tokens, tokens], axis=1)
            logits = self.model(pairs, cache=self.prompt_cache)[:n, 0, :]
            for c in layers:
                c.trim(1)
        return logits

    def sample(
        self, logits: mx.array
    ) -> Tuple[mx.array, List[Optional[Callable]], List[mx.array]]:
        """Choose the next tokens of the rows of ``sampling``, see ``BatchSampling``."""
        process = partial(self.apply_logits_processors, self._next_tokens)
        sampled = self.sampling(logits, self.tokens, process)
        for uid, error in zip(self.uids, self.sampling.constraints.errors):
            if error is not None:
                self.failed[uid] = error
        return sampled

    def take_failed(self) -> Dict[int, BaseException]:
        """The rows whose constraints or logits processors have failed since this was last called,
        and why. They
        have got tokens that they may not have."""
        failed, self.failed = self.failed, {}
        return failed

    def next(self) -> List[GenerationBatch.Response]:
        responses = super().next()
        given = [r for r in responses if r.token is not None]
        if len(given) < len(responses):
            # Upstream has fed the ``None`` of the new rows to their matchers.
            rows = zip(self._num_tokens, self._matchers, self.stop_sequences)
            self._matchers = [s.matcher() if n == 0 else m for n, m, s in rows]
        return given

    def apply_logits_processors(
        self, inputs: mx.array, logits: mx.array
    ) -> Tuple[mx.array, List[mx.array]]:
        """Run the logits processors of the rows that have some.

        Returns:
            Tuple[mx.array, List[mx.array]]: The logits, and arrays that are to be evaluated
            in this step.
        """
        processors = self.logits_processors[: len(logits)]
        rows = [i for i, p in enumerate(processors) if p]
        processed, contexts = [], []
        for i in rows:
            context = self._token_context[i].update_and_fetch(inputs[i : i + 1])
            contexts.append(context)
            row_logits = logits[i : i + 1]
            try:
                for processor in processors[i]:
                    row_logits = processor(context, row_logits)
            except Exception as e:
                self.failed[self.uids[i]] = e
                row_logits = logits[i : i + 1]
            processed.append(row_logits)
        if rows:
            logits[mx.array(rows)] = mx.concatenate(processed)
        return logits, contexts


class LeanBatchGenerator(BatchGenerator):
    """``BatchGenerator`` on lean batches, whose step has two parts: ``decode`` and
    ``prefill``. Each sampler that it is given is a ``RowSampling``.

    Args:
        model (nn.Module): The model.
        grouping (Grouping): Which rows decode together.
        n_to_come (Callable): How many rows are about to join each group.
        group (OneProcess): The ranks that run the model.
        **kwargs: See ``BatchGenerator``.
    """

    def __init__(
        self,
        model: Any,
        grouping: Grouping,
        n_to_come: Callable[[], List[int]],
        group: OneProcess = ONE_PROCESS,
        **kwargs: Any,
    ):
        super().__init__(model, **kwargs)
        self.n_to_come = n_to_come
        self.group = group
        self.max_places = grouping.max_places
        self.prompts = self._prompt_batch = PromptBatches()
        self._generation_batch = GenerationGroups(grouping, group.agree)
        # Rows of the last ``decode``, and tokens of each chunk of the last ``prefill``,
        # padding included.
        self.n_decoded = 0
        self.chunk_sizes: List[int] = []

    @property
    def unprocessed_prompts(self) -> List[UnprocessedPrompt]:
        """The prompts that have not begun."""
        return [UnprocessedPrompt(*entry) for entry in self._unprocessed_sequences]

    def decode(
        self,
    ) -> Tuple[List[PromptProcessingBatch.Response], List[GenerationBatch.Response]]:
        """Run a step of all rows whose prompts are run.

        Returns:
            Tuple: Responses of the prompts that have ended and joined these rows, and of
            the tokens.
        """
        with mx.stream(self._stream):
            has_moved = self._generation_batch.arrange()
            joined = self.start_generation()
            self.n_decoded = len(self._generation_batch)
            responses = self._generation_batch.next(
                is_timed=not (has_moved or joined or self.chunk_sizes)
            )
        self.chunk_sizes = []
        if responses:
            self._counters.generation_steps += 1
            if self._counters.generation_steps % 512 == 0:
                mx.clear_cache()
        return joined, responses

    def prefill(
        self, budget: int, cost: Callable[[int], int]
    ) -> List[PromptProcessingBatch.Response]:
        """Run a part of the prompts. See ``PromptBatches.run``.

        Returns:
            List[PromptProcessingBatch.Response]: How far the prompts are then.
        """
        with mx.stream(self._stream):
            self.begin_prompts(budget)
            joined = self.start_generation()
            responses, self.chunk_sizes = self.prompts.run(budget, self.width, cost)
        return joined + responses

    def width(self, lengths: List[int], budget: int) -> int:
        """How many tokens of each prompt a chunk runs, see ``chunk_width``."""
        return chunk_width(lengths, min(budget, self.prefill_step_size))

    def begin_prompts(self, budget: int) -> None:
        """Make batches of the prompts that have not begun: of those that run side by side, as
        many in each as fit into the budget of a step."""
        n = self.prefill_batch_size - len(self.prompts)
        prompts = self.unprocessed_prompts[: max(0, n)]
        short: List[List[UnprocessedPrompt]] = []
        for p in prompts:
            if p.is_long:
                continue
            if not short or sum(q.n_left for q in (*short[-1], p)) > budget:
                short.append([])
            short[-1].append(p)
        for rows in [*short, *([p] for p in prompts if p.is_long)]:
            batch = LeanPromptBatch(
                [PromptInProgress(p.segments, 0, p.n_left) for p in rows],
                self.model,
                [p.uid for p in rows],
                [p.cache for p in rows],
                [p.tokens for p in rows],
                samplers=[p.sampler for p in rows],
                fallback_sampler=self.sampler,
                logits_processors=[p.logits_processors for p in rows],
                stop_sequences=[p.stop_sequences for p in rows],
                max_tokens=[p.max_tokens for p in rows],
                max_places=self.max_places,
            )
            self.prompts.batches.append(batch)
        for _ in prompts:
            self._unprocessed_sequences.popleft()

    def start_generation(self) -> List[PromptProcessingBatch.Response]:
        """Move the prompts of which only the last token is left to the rows that decode, and
        give their responses."""
        if not any(p.is_at_last_token for p in self.prompts.progress):
            return []
        n_to_come = self.group.agree("rows to come", self.n_to_come)
        responses, ended = [], self.prompts.take_ended()
        for batch in ended:
            responses += [
                batch.Response(
                    uid=uid,
                    progress=(p.n_total, p.n_total),
                    end_of_segment=True,
                    end_of_prompt=True,
                )
                for uid, p in zip(batch.uids, batch.progress)
            ]
        self._generation_batch.join(
            [LeanGenerationBatch.of_prompts(batch, self.group) for batch in ended],
            n_to_come,
        )
        return responses

    def cut(self, uid: int, n: int) -> None:
        """Let a segment of a prompt end after ``n`` of the tokens that were left to run when
        it was inserted."""
        uids = self.prompts.uids
        if uid in uids:
            segments, n_done, _ = self.prompts.progress[uids.index(uid)]
            n -= n_done
        else:
            (segments,) = (p.segments for p in self.unprocessed_prompts if p.uid == uid)
        for i, segment in enumerate(segments):
            if n < len(segment):
                if n > 0:
                    # In place: the list is upstream's own.
                    segments[i : i + 1] = [segment[:n], segment[n:]]
                return
            n -= len(segment)

    @property
    def generation_batch(self) -> GenerationGroups:
        """The rows that decode."""
        return self._generation_batch

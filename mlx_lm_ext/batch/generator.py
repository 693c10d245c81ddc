"""Upstream's ``BatchGenerator`` with steps that wait for nothing they need not wait for.

Rules:
1. A door: with the files named ``upstream.py``, the only one that uses private names of
   mlx-lm. What upstream makes public (see ``patches/``) is deleted here.
"""

from copy import copy, deepcopy
from functools import partial
from typing import Any, Callable, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.server import _make_logits_processors

from ..cache.kinds import flatten, prepare_step
from ..cache.segmented import BatchSegmentedKVCache
from ..device import give_back_freed, on_cpu
from ..sampling.groups import RowSampler, RowSamplers
from ..sampling.penalties import Penalties
from .logprobs import Logprobs

make_logits_processors = _make_logits_processors


def segmented(caches: List[Any]) -> List[BatchSegmentedKVCache]:
    """Those of a batch's caches that rows join and leave in place."""
    return [c for c in flatten(caches) if isinstance(c, BatchSegmentedKVCache)]


def evaluate_staged(caches: List[Any], keep: List[int]) -> None:
    """Evaluate what the ``filter`` of each layer needs, in one call."""
    if keep:
        mx.eval([c.stage(keep) for c in segmented(caches)])


class LeanPromptBatch(PromptProcessingBatch):
    """``PromptProcessingBatch`` that does not wait for what it runs.

    The tokens that were decoded before it go out, and the next decoding is prepared,
    while the device is at it.
    """

    def filter(self, keep: List[int]) -> None:
        evaluate_staged(self.prompt_cache, keep)
        super().filter(keep)

    def split(self, indices: List[int]) -> "LeanPromptBatch":
        batch = copy(self)
        stay = [i for i in range(len(self.uids)) if i not in indices]
        if stay:
            batch.prompt_cache = deepcopy(self.prompt_cache)
            batch.filter(indices)
            # What shares its arrays would be copied as a whole.
            mx.eval([c.state for c in batch.prompt_cache])
        else:
            batch.prompt_cache = list(self.prompt_cache)
        self.filter(stay)
        return batch

    def prompt(self, tokens: List[List[int]]) -> None:
        if not tokens:
            return
        # One chunk at a time: what runs holds memory.
        mx.eval([c.state for c in self.prompt_cache])
        give_back_freed()
        for row, more in zip(self.tokens, tokens):
            row += more
        lengths = [len(row) for row in tokens]
        width = max(lengths)
        padding = [width - n for n in lengths]
        prepare_step(self.prompt_cache)
        if any(padding):
            tokens = [row + [0] * n for row, n in zip(tokens, padding)]
            for c in self.prompt_cache:
                c.prepare(lengths=lengths, right_padding=padding)
        self.model(mx.array(tokens, mx.uint32), cache=self.prompt_cache)
        if any(padding):
            for c in self.prompt_cache:
                c.finalize()
        mx.async_eval([c.state for c in self.prompt_cache])

    def generate(self, tokens: List[List[int]]) -> "LeanGenerationBatch":
        """The batch that goes on after these last tokens, one of each prompt."""
        return LeanGenerationBatch(
            self.model,
            self.uids,
            # As samplers give them: with CUDA, each type has kernels of its own.
            mx.array([token for (token,) in tokens], mx.uint32),
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )


class LeanGenerationBatch(GenerationBatch):
    """``GenerationBatch`` that samples all rows in one call. It makes log probabilities
    only of the rows that asked, and runs logits processors only on rows that have some.

    In its responses ``logprobs`` is a function: what ``Logprobs.row`` gives. For rows
    that did not ask, it is ``None``.

    New rows have no step of their own: their first is one of the whole batch.

    A GPU is given the next step before this one's tokens are read. On the CPU, that would
    only keep them back: there each step gives the tokens that it makes.
    """

    def __init__(
        self,
        model: Any,
        uids: List[int],
        inputs: mx.array,
        prompt_cache: List[Any],
        tokens: List[List[int]],
        samplers: List[RowSampler],
        *args: Any,
        **kwargs: Any,
    ):
        self.row_samplers = RowSamplers(samplers)
        self.penalties = Penalties([s.penalties for s in samplers])
        self.n_top = [s.n_top for s in samplers]
        self.is_eager = on_cpu()
        self.is_new = True
        # Upstream counts them, and calls none.
        samplers = [None] * len(uids)
        super().__init__(
            model, uids, inputs, prompt_cache, tokens, samplers, *args, **kwargs
        )
        self.is_new = False
        self._next_logprobs = [None] * len(uids)
        if not self.is_eager:
            # Their first step gives no token yet.
            self._num_tokens = [-1] * len(uids)

    def extend(self, batch: "LeanGenerationBatch") -> None:
        self.row_samplers.extend(batch.row_samplers)
        self.penalties.extend(batch.penalties)
        self.n_top += batch.n_top
        super().extend(batch)
        mx.async_eval([c.state for c in self.prompt_cache])

    def filter(self, keep: List[int]) -> None:
        # The last rows take the places of those that leave: few have to move.
        stay, movers = set(keep), iter([i for i in keep if i >= len(keep)])
        keep = [i if i in stay else next(movers) for i in range(len(keep))]
        evaluate_staged(self.prompt_cache, keep)
        super().filter(keep)
        self.row_samplers.filter(keep)
        self.penalties.filter(keep)
        self.n_top = [self.n_top[i] for i in keep]

    def _step(self) -> Tuple[List[int], List[Optional[Callable]]]:
        if self.is_new:
            return [], []
        inputs, logprobs = self._next_tokens, self._next_logprobs
        self._current_tokens, self._current_logprobs = inputs, logprobs
        prepare_step(self.prompt_cache)
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        logits = self.penalties(self.tokens, inputs, logits)
        logits, contexts = self.process(inputs, logits)
        tokens = self._next_tokens = self.row_samplers(logits)
        self._next_logprobs = [None] * len(self.uids)
        rows = [i for i, n in enumerate(self.n_top) if n is not None]
        if rows:
            n_top = [self.n_top[i] for i in rows]
            asked = mx.array(rows)
            found = Logprobs(logits[asked], tokens[asked], max(n_top))
            for i, row in enumerate(rows):
                self._next_logprobs[row] = partial(found.row, i, n_top[i])
            contexts += found.arrays
        mx.async_eval(tokens, contexts)
        done = inputs.tolist()
        for row, token in zip(self.tokens, done):
            row.append(token)
        if self.is_eager:
            return tokens.tolist(), self._next_logprobs
        return [None if n < 0 else t for t, n in zip(done, self._num_tokens)], logprobs

    def next(self) -> List[GenerationBatch.Response]:
        responses = super().next()
        given = [r for r in responses if r.token is not None]
        if len(given) < len(responses):
            # The matchers of the new rows took ``None`` for a token.
            rows = zip(self._num_tokens, self._matchers, self.stop_sequences)
            self._matchers = [s.matcher() if n == 0 else m for n, m, s in rows]
        return given

    def process(
        self, inputs: mx.array, logits: mx.array
    ) -> Tuple[mx.array, List[mx.array]]:
        """Run the logits processors; gives the logits, and what is to be evaluated."""
        rows = [i for i, p in enumerate(self.logits_processors) if p]
        processed, contexts = [], []
        for i in rows:
            context = self._token_context[i].update_and_fetch(inputs[i : i + 1])
            contexts.append(context)
            x = logits[i : i + 1]
            for processor in self.logits_processors[i]:
                x = processor(context, x)
            processed.append(x)
        if rows:
            logits[mx.array(rows)] = mx.concatenate(processed)
        return logits, contexts


class LeanBatchGenerator(BatchGenerator):
    """``BatchGenerator`` on lean batches. Each sampler is a ``RowSampler``."""

    def __init__(self, model: Any, **kwargs: Any):
        super().__init__(model, **kwargs)
        self._prompt_batch = LeanPromptBatch.empty(self.model, self.sampler)
        self._generation_batch = LeanGenerationBatch.empty(self.model, self.sampler)

    def decode(self) -> Tuple[List[Any], List[Any]]:
        """Run a step of all rows whose prompts are run.

        Returns:
            Tuple: Responses of the prompts that have joined them, and of the tokens.
        """
        with mx.stream(self._stream):
            joined = self.begin()
            responses = self._generation_batch.next()
        if responses:
            self._counters.generation_steps += 1
            if self._counters.generation_steps % 512 == 0:
                mx.clear_cache()
        return joined, responses

    def prefill(self) -> List[PromptProcessingBatch.Response]:
        """Run some tokens of the prompts; gives the responses of these."""
        with mx.stream(self._stream):
            n = self.prefill_batch_size - len(self._prompt_batch)
            n = min(n, len(self._unprocessed_sequences))
            joined = []
            if n > 0:
                self._prompt_batch.extend(self._make_batch(n))
                joined = self.begin()
            responses, tokens = [], []
            for uid, row in zip(self._prompt_batch.uids, self._currently_processing):
                segments = row[0]
                tokens.append(segments[0][: self.prefill_step_size])
                segments[0] = segments[0][self.prefill_step_size :]
                ended = not segments[0]
                if ended:
                    del segments[0]
                row[1] += len(tokens[-1])
                responses.append(
                    PromptProcessingBatch.Response(uid, tuple(row[1:]), ended, False)
                )
            self._prompt_batch.prompt(tokens)
        return joined + responses

    def begin(self) -> List[PromptProcessingBatch.Response]:
        """Let the prompts of which only the last token is left join the decoding."""
        rows = self._currently_processing
        ready = [i for i, row in enumerate(rows) if [*map(len, row[0])] == [1]]
        if not ready:
            return []
        tokens = [rows[i][0][0] for i in ready]
        self._currently_processing = [
            row for i, row in enumerate(rows) if i not in set(ready)
        ]
        batch = self._prompt_batch.split(ready).generate(tokens)
        responses = [
            PromptProcessingBatch.Response(uid, (rows[i][2],) * 2, True, True)
            for i, uid in zip(ready, batch.uids)
        ]
        self._generation_batch.extend(batch)
        return responses

    def cut(self, uid: int, n: int) -> None:
        """Let a segment of a prompt end after ``n`` of the tokens that were left to run
        when it was inserted."""
        uids = self._prompt_batch.uids
        if uid in uids:
            segments, n_run, _ = self._currently_processing[uids.index(uid)]
        else:
            rows = [s[1] for s in self._unprocessed_sequences if s[0] == uid]
            segments, n_run = rows[0], 0
        n -= n_run
        for i, segment in enumerate(segments):
            if n < len(segment):
                if n > 0:
                    segments[i : i + 1] = [segment[:n], segment[n:]]
                return
            n -= len(segment)

    @property
    def segment_lengths(self) -> List[int]:
        """Tokens left of the current segment of each prompt that is not at its last."""
        rows = [row[0] for row in self._currently_processing]
        rows += [row[1] for row in self._unprocessed_sequences]
        return [len(row[0]) for row in rows if len(row) > 1 or len(row[0]) > 1]

    @property
    def kv_shape(self) -> Tuple[int, int]:
        """Rows, spare ones included, and places of tokens in the KV of what decodes."""
        layers = segmented(self._generation_batch.prompt_cache)
        layers = [c for c in layers if c.keys is not None]
        n_rows = max((c.keys.shape[0] for c in layers), default=0)
        return n_rows, max((c.end for c in layers), default=0)

    @property
    def generation_batch(self) -> LeanGenerationBatch:
        return self._generation_batch

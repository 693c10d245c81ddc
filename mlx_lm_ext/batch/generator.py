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

from ..cache.kinds import flatten, prepare_step, take_rows
from ..cache.segmented import BatchSegmentedKVCache
from ..device import give_back_freed, on_cpu
from .batch_sampling import BatchSampling, RowSampling
from .grouping import Grouping
from .groups import GenerationGroups, KVShape
from .prefill import padded_end

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


class PromptInProgress(NamedTuple):
    """An entry of ``BatchGenerator._currently_processing``: a row of the prompt batch.

    Args:
        segments (List[List[int]]): The tokens left to run.
        n_done (int): Tokens run since it was inserted.
        n_total (int): Tokens that were left to run when it was inserted.
    """

    segments: List[List[int]]
    n_done: int
    n_total: int


def is_at_last_token(segments: List[List[int]]) -> bool:
    """Whether only the last token of a prompt is left, which the decoding runs."""
    return len(segments) == 1 and len(segments[0]) == 1


def segmented(caches: List[Any]) -> List[BatchSegmentedKVCache]:
    """Those of the caches of a batch that rows join and leave in place."""
    return [c for c in flatten(caches) if isinstance(c, BatchSegmentedKVCache)]


def evaluate_staged(caches: List[Any], keep: List[int]) -> None:
    """Evaluate what ``filter(keep)`` needs, for all layers in one call."""
    if keep:
        mx.eval([c.stage(keep) for c in segmented(caches)])


def part(
    caches: List[Any], go: List[int], stay: List[int]
) -> Tuple[List[Any], List[Any]]:
    """Part the rows of some layers.

    Returns:
        Tuple: The caches of the rows that go and of those that stay. If all go, they take the
        arrays as they are.
    """
    if not stay:
        return list(caches), []
    taken = [take_rows(c, go) for c in caches]
    # Until they are evaluated they hold the arrays of the others, and a write into those
    # would copy them as a whole.
    mx.eval([c.state for c in taken], [c.stage(stay) for c in segmented(caches)])
    for c in caches:
        c.filter(stay)
    mx.async_eval([c.state for c in caches])
    return taken, list(caches)


class LeanPromptBatch(PromptProcessingBatch):
    """``PromptProcessingBatch`` that does not wait for the chunk that it runs.

    While the device runs it, the tokens decoded before are delivered, and the next decoding
    is prepared.
    """

    def filter(self, keep: List[int]) -> None:
        evaluate_staged(self.prompt_cache, keep)
        super().filter(keep)

    def split(self, indices: List[int]) -> "LeanPromptBatch":
        batch = copy(self)
        stay = [i for i in range(len(self.uids)) if i not in indices]
        taken, left = part(self.prompt_cache, indices, stay)
        # The rest of the rows.
        self.prompt_cache, batch.prompt_cache = [], []
        batch.filter(indices)
        self.filter(stay)
        self.prompt_cache, batch.prompt_cache = left, taken
        return batch

    def prompt(self, tokens: List[List[int]]) -> None:
        if not tokens:
            return
        # Wait for the last chunk: each one that is queued holds memory.
        mx.eval([c.state for c in self.prompt_cache])
        give_back_freed()
        for row, more in zip(self.tokens, tokens):
            row += more
        lengths = [len(row) for row in tokens]
        width = max(lengths)
        padding = [width - n for n in lengths]
        prepare_step(self.prompt_cache)
        if any(padding):
            for c in self.prompt_cache:
                c.prepare(lengths=lengths, right_padding=padding)
        n_more = self.n_padding(width)
        tokens = [row + [0] * (n + n_more) for row, n in zip(tokens, padding)]
        self.model(mx.array(tokens, mx.uint32), cache=self.prompt_cache)
        if n_more:
            for c in segmented(self.prompt_cache):
                c.trim(n_more)
        if any(padding):
            for c in self.prompt_cache:
                c.finalize()
        mx.async_eval([c.state for c in self.prompt_cache])

    def n_padding(self, width: int) -> int:
        """How many tokens of padding a chunk of ``width`` tokens gets in all rows. They are
        taken back, which only caches can that keep all tokens. Where a model looks positions
        up in a table, its length is a multiple of the places where chunks end."""
        kept = segmented(self.prompt_cache)
        if len(kept) < len([*flatten(self.prompt_cache)]):
            return 0
        end = kept[0].end + width
        return padded_end(end) - end

    def generate(self, tokens: List[List[int]]) -> "LeanGenerationBatch":
        """Make the batch that decodes these rows.

        Args:
            tokens (List[List[int]]): The last token of each prompt, in a list.
        """
        return LeanGenerationBatch(
            self.model,
            self.uids,
            # The type that samplers give: with CUDA, each type has kernels of its own.
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

    Args:
        samplers (List[RowSampling]): How the tokens of each row are chosen.
        *args, **kwargs: See ``GenerationBatch``.
    """

    _next_logprobs: List[Optional[Callable]]

    def __init__(
        self,
        model: Any,
        uids: List[int],
        inputs: mx.array,
        prompt_cache: List[Any],
        tokens: List[List[int]],
        samplers: List[RowSampling],
        *args: Any,
        **kwargs: Any,
    ):
        # Of the rows that have taken part in a step, and of the others, which follow them.
        self.sampling = BatchSampling([])
        self.joining = BatchSampling(samplers)
        self.is_eager = on_cpu()
        # What the next tokens are sampled from, if the step of a GPU has left it, and these
        # tokens with their log probabilities, if they were needed before the next step.
        self.logits: Optional[mx.array] = None
        self.sampled: Optional[Tuple[mx.array, List[Optional[Callable]]]] = None
        # Rows whose constraint has failed, and why.
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
        return KVShape(n_rows, longest.end, longest.keys.shape[2])

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
        # The rest of the rows.
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
        tokens, logprobs, to_evaluate = self.sample(self.run(inputs))
        mx.async_eval(tokens, to_evaluate)
        self._next_tokens = tokens
        given = tokens.tolist()
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
        tokens, logprobs, to_evaluate = self.sample(self.logits)
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
        if uid in self.failed:
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
        return self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]

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
        """The rows whose constraints have failed since this was last called, and why. They
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
            for processor in processors[i]:
                row_logits = processor(context, row_logits)
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
        **kwargs: See ``BatchGenerator``.
    """

    _currently_processing: List[List[Any]]

    def __init__(self, model: Any, grouping: Grouping, **kwargs: Any):
        super().__init__(model, **kwargs)
        self._prompt_batch = LeanPromptBatch.empty(self.model, self.sampler)
        self._generation_batch = GenerationGroups(grouping)
        # Whether the device may still be at a chunk of prompts.
        self.has_run_prompts = False

    @property
    def unprocessed_prompts(self) -> List[UnprocessedPrompt]:
        """The prompts that have not begun."""
        return [UnprocessedPrompt(*entry) for entry in self._unprocessed_sequences]

    @property
    def prompts_in_progress(self) -> List[PromptInProgress]:
        """The rows of the prompt batch."""
        return [PromptInProgress(*entry) for entry in self._currently_processing]

    @prompts_in_progress.setter
    def prompts_in_progress(self, prompts: List[PromptInProgress]) -> None:
        self._currently_processing = [list(prompt) for prompt in prompts]

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
            responses = self._generation_batch.next(
                is_timed=not (has_moved or joined or self.has_run_prompts)
            )
        self.has_run_prompts = False
        if responses:
            self._counters.generation_steps += 1
            if self._counters.generation_steps % 512 == 0:
                mx.clear_cache()
        return joined, responses

    def prefill(self) -> List[PromptProcessingBatch.Response]:
        """Run up to ``prefill_step_size`` tokens of each prompt, and give a response for
        each prompt."""
        with mx.stream(self._stream):
            n = self.prefill_batch_size - len(self._prompt_batch)
            n = min(n, len(self._unprocessed_sequences))
            joined = []
            if n > 0:
                self._prompt_batch.extend(self._make_batch(n))
                joined = self.start_generation()
            prompts, responses, chunks = [], [], []
            for uid, prompt in zip(self._prompt_batch.uids, self.prompts_in_progress):
                segment, *others = prompt.segments
                chunk = segment[: self.prefill_step_size]
                rest = segment[self.prefill_step_size :]
                n_done = prompt.n_done + len(chunk)
                segments = [rest, *others] if rest else others
                prompts.append(PromptInProgress(segments, n_done, prompt.n_total))
                responses.append(
                    PromptProcessingBatch.Response(
                        uid=uid,
                        progress=(n_done, prompt.n_total),
                        end_of_segment=not rest,
                        end_of_prompt=False,
                    )
                )
                chunks.append(chunk)
            self.prompts_in_progress = prompts
            self._prompt_batch.prompt(chunks)
            self.has_run_prompts = bool(chunks)
        return joined + responses

    def start_generation(self) -> List[PromptProcessingBatch.Response]:
        """Move the prompts of which only the last token is left to the rows that decode, and
        give their responses."""
        prompts = self.prompts_in_progress
        ready = [i for i, p in enumerate(prompts) if is_at_last_token(p.segments)]
        if not ready:
            return []
        self.prompts_in_progress = [
            prompt for i, prompt in enumerate(prompts) if i not in set(ready)
        ]
        last_tokens = [prompts[i].segments[0] for i in ready]
        batch = self._prompt_batch.split(ready).generate(last_tokens)
        responses = [
            PromptProcessingBatch.Response(
                uid=uid,
                progress=(prompts[i].n_total, prompts[i].n_total),
                end_of_segment=True,
                end_of_prompt=True,
            )
            for i, uid in zip(ready, batch.uids)
        ]
        self._generation_batch.extend(batch)
        return responses

    def cut(self, uid: int, n: int) -> None:
        """Let a segment of a prompt end after ``n`` of the tokens that were left to run when
        it was inserted."""
        uids = self._prompt_batch.uids
        if uid in uids:
            segments, n_done, _ = self.prompts_in_progress[uids.index(uid)]
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
    def segment_lengths(self) -> List[int]:
        """Tokens left of the current segment of each prompt, without the prompts of which
        only the last token is left."""
        segments = [p.segments for p in self.prompts_in_progress]
        segments += [p.segments for p in self.unprocessed_prompts]
        return [len(left[0]) for left in segments if not is_at_last_token(left)]

    @property
    def generation_batch(self) -> GenerationGroups:
        """The rows that decode."""
        return self._generation_batch

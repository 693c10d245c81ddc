"""The prompts that are run, a part in each step.

Rules:
1. Rows of a batch are padded to each other. So a long prompt runs in a batch of its own, and
   short ones that begin in the same step run side by side.
2. The batch with the fewest tokens left goes first, unless the oldest one was left out of the
   step before. What it leaves of the budget of a step is for the next one.
3. A chunk is handed to the device, and is not waited for: meanwhile the tokens decoded
   before are delivered, and the next decoding is prepared.
"""

from copy import copy
from math import inf
from typing import Any, Callable, List, NamedTuple, Tuple

import mlx.core as mx
from mlx_lm.generate import PromptProcessingBatch

from ..cache.kinds import flatten, prepare_step, take_rows
from ..cache.segmented import BatchSegmentedKVCache
from ..device import give_back_freed
from .prefill import chunk_budget, note_shape, padded_width


class PromptInProgress(NamedTuple):
    """How far a prompt is.

    Args:
        segments (List[List[int]]): The tokens left to run; the last token is a segment of
          its own.
        n_done (int): Tokens run since it was inserted.
        n_total (int): Tokens that were left to run when it was inserted.
    """

    segments: List[List[int]]
    n_done: int
    n_total: int

    @property
    def is_at_last_token(self) -> bool:
        """Whether only its last token is left, which the decoding runs."""
        return len(self.segments) == 1 and len(self.segments[0]) == 1

    def advance(self, n: int) -> "PromptInProgress":
        """How far it is after ``n`` more tokens of its first segment."""
        segment, *others = self.segments
        segments = [segment[n:], *others] if n < len(segment) else others
        return PromptInProgress(segments, self.n_done + n, self.n_total)


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
    """``PromptProcessingBatch`` that knows how far its prompts are.

    Args:
        progress (List[PromptInProgress]): How far each prompt is.
        max_places (float): For how many tokens of one row there is memory.
        *args, **kwargs: See ``PromptProcessingBatch``.
    """

    def __init__(
        self,
        progress: List[PromptInProgress],
        *args: Any,
        max_places: float = inf,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.progress = progress
        self.max_places = max_places

    @property
    def n_left(self) -> int:
        """Tokens left to run, of all prompts."""
        return sum(p.n_total - p.n_done for p in self.progress)

    @property
    def segment_lengths(self) -> List[int]:
        """Tokens left of the current segment of each prompt."""
        return [len(p.segments[0]) for p in self.progress]

    def filter(self, keep: List[int]) -> None:
        evaluate_staged(self.prompt_cache, keep)
        super().filter(keep)
        self.progress = [self.progress[i] for i in keep]

    def split(self, indices: List[int]) -> "LeanPromptBatch":
        batch = copy(self)
        stay = [i for i in range(len(self.uids)) if i not in indices]
        taken, left = part(self.prompt_cache, indices, stay)
        # The caches are parted already: these filter all else that belongs to the rows.
        self.prompt_cache, batch.prompt_cache = [], []
        batch.filter(indices)
        self.filter(stay)
        self.prompt_cache, batch.prompt_cache = left, taken
        return batch

    def run(self, width: int) -> Tuple[List[PromptProcessingBatch.Response], int, bool]:
        """Run up to ``width`` tokens of the current segment of each prompt.

        Returns:
            Tuple: How far each prompt is then, how many tokens the model runs, padding
            included, and whether the device has to plan a new shape for them.
        """
        # Wait for the last chunk: each one that is queued holds memory.
        self.wait()
        give_back_freed()
        tokens = [p.segments[0][:width] for p in self.progress]
        lengths = [len(row) for row in tokens]
        responses = [
            self.Response(
                uid=uid,
                progress=(p.n_done + n, p.n_total),
                end_of_segment=n == len(p.segments[0]),
                end_of_prompt=False,
            )
            for uid, p, n in zip(self.uids, self.progress, lengths)
        ]
        self.progress = [p.advance(n) for p, n in zip(self.progress, lengths)]
        for row, more in zip(self.tokens, tokens):
            row += more
        width = max(lengths)
        padding = [width - n for n in lengths]
        prepare_step(self.prompt_cache)
        if any(padding):
            for c in self.prompt_cache:
                c.prepare(lengths=lengths, right_padding=padding)
        n_more = self.n_padding(width)
        inputs = mx.array(
            [row + [0] * (n + n_more) for row, n in zip(tokens, padding)], mx.uint32
        )
        self.model(inputs, cache=self.prompt_cache)
        if n_more:
            for c in segmented(self.prompt_cache):
                c.trim(n_more)
        if any(padding):
            for c in self.prompt_cache:
                c.finalize()
        mx.async_eval([c.state for c in self.prompt_cache])
        end = self.n_places + n_more
        return responses, inputs.size, note_shape(len(tokens), width + n_more, end)

    def n_padding(self, width: int) -> int:
        """How many tokens of padding a chunk of ``width`` tokens, the last of ``self.tokens``,
        gets in all rows. They are taken back, which only caches can that keep all tokens. Where a
        model looks positions up in a table, its length is a multiple of the places where chunks
        end. A chunk for whose padding there is no memory gets none."""
        if len(segmented(self.prompt_cache)) < len([*flatten(self.prompt_cache)]):
            return 0
        padding = padded_width(width) - width
        return padding if self.n_places + padding <= self.max_places else 0

    @property
    def n_places(self) -> int:
        """Tokens that the longest prompt has run, those before it was inserted included."""
        return max(map(len, self.tokens))

    def wait(self) -> None:
        """Wait until the device has run its last chunk."""
        mx.eval([c.state for c in self.prompt_cache])


class PromptBatches:
    """The prompts in progress, in one or several batches. Takes the place of the one
    ``PromptProcessingBatch`` of ``BatchGenerator``, which sees the rows of all of them, one
    batch after the other."""

    def __init__(self) -> None:
        # The oldest first.
        self.batches: List[LeanPromptBatch] = []
        # The batches of the last ``run``, and whether the device had to plan one of its chunks.
        self.last: List[LeanPromptBatch] = []
        self.has_new_shape = False

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def uids(self) -> List[int]:
        return [uid for batch in self.batches for uid in batch.uids]

    @property
    def tokens(self) -> List[List[int]]:
        return [tokens for batch in self.batches for tokens in batch.tokens]

    @property
    def progress(self) -> List[PromptInProgress]:
        return [progress for batch in self.batches for progress in batch.progress]

    @property
    def prompt_cache(self) -> List[Any]:
        """The caches of all layers, of all batches."""
        return [c for batch in self.batches for c in batch.prompt_cache]

    def extract_cache(self, idx: int) -> List[Any]:
        for batch in self.batches:
            if idx < len(batch):
                return batch.extract_cache(idx)
            idx -= len(batch)
        raise IndexError(idx)

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices."""
        start = 0
        for batch in self.batches:
            n = len(batch)
            rows = [i - start for i in keep if start <= i < start + n]
            if len(rows) < n:
                batch.filter(rows)
            start += n
        self.drop_empty()

    def drop_empty(self) -> None:
        self.batches = [batch for batch in self.batches if len(batch)]

    def take_ended(self) -> List[LeanPromptBatch]:
        """Take out the prompts of which only the last token is left, as batches."""
        ended = []
        for batch in self.batches:
            rows = [i for i, p in enumerate(batch.progress) if p.is_at_last_token]
            if rows:
                ended.append(batch.split(rows))
        self.drop_empty()
        return ended

    def wait(self) -> None:
        """Wait until the device has run the last chunks."""
        for batch in self.batches:
            batch.wait()

    def run(
        self,
        budget: int,
        width: Callable[[List[int], int], int],
        cost: Callable[[int], int],
    ) -> Tuple[List[PromptProcessingBatch.Response], List[int]]:
        """Run chunks of one or several batches.

        Args:
            budget (int): Tokens that may be run in all. At least one chunk is run.
            width (Callable): How many tokens of each prompt a chunk runs. It is given the
              tokens that are left of each, and the most tokens that the chunk may have.
            cost (Callable): How many tokens of the budget a chunk of so many tokens takes.

        Returns:
            Tuple: How far the prompts that were run are after each chunk, and how many tokens
            the model runs in each, padding included.
        """
        responses: List[PromptProcessingBatch.Response] = []
        sizes: List[int] = []
        left = budget
        order = sorted(self.batches, key=lambda batch: batch.n_left)
        oldest = self.batches[:1]
        if self.last and oldest and oldest[0] not in self.last:
            order.remove(oldest[0])
            order = oldest + order
        self.last, self.has_new_shape = [], False
        for batch in order:
            has_ended = False
            while not has_ended:
                most = max(1, chunk_budget(left, budget))
                n = width(batch.segment_lengths, most)
                if sizes and cost(n * len(batch)) > left:
                    return responses, sizes
                more, size, is_new = batch.run(n)
                self.last.append(batch)
                self.has_new_shape |= is_new
                responses += more
                sizes.append(size)
                left -= cost(size)
                # What the rows have then may be stored before they go on.
                has_ended = any(r.end_of_segment for r in more)
        return responses, sizes

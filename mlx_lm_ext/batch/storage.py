"""What a row takes from the prompt cache when it starts, and which KV of a row is stored in the
prompt cache.

KV that can be cut after any token is stored when a row ends or another request asks for
it. Other KV, of sliding windows and recurrent layers, is stored at the ends of the segments
of a prompt, because nothing of it can be cut off later.
"""

from itertools import accumulate
from typing import Any, Dict, List, Optional, Tuple

from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..cache.kinds import make_segmented_cache
from ..cache.prompt_cache import RadixPromptCache
from ..request.request import Request
from .prefill import aligned
from .row import Row


class KVStorage:
    """The prompt cache, as the rows of a model's batch use it.

    Args:
        model (nn.Module): The model.
        prompt_cache (RadixPromptCache): The prompt cache.
    """

    def __init__(self, model: Any, prompt_cache: RadixPromptCache):
        self.model = model
        self.prompt_cache = prompt_cache
        # Whether the KV of the model can be cut after any token.
        self.can_cut = all(type(c) is KVCache for c in make_prompt_cache(model))

    def n_known(self, request: Request) -> int:
        """Tokens of a prompt that the prompt cache has."""
        return self.prompt_cache.search(request.cache_key, request.prompt).n_tokens

    def fetch(self, request: Request) -> Tuple[Row, List[List[int]], List[Any]]:
        """The row of a request that is about to start, or to go on after its last token.

        Returns:
            Tuple: The row, the segments that are left to run, and the caches of the tokens
            before them.
        """
        prompt, n, key = request.prompt, request.n_prompt, request.cache_key
        if request.is_suspect:
            # The prompt cache may have made the step fail.
            return Row(request), [request.tokens], make_segmented_cache(self.model)
        if request.generated:
            caches, rest = self.fetch_aligned(key, request.tokens)
            row = Row(request, n_run=len(request.tokens) - len(rest))
            return row, [rest], caches or make_segmented_cache(self.model)
        # Where other prompts branch off, this one stores what the next of them can resume.
        branch = self.prompt_cache.branch_point(key, prompt)
        caches, rest = self.fetch_aligned(key, prompt)
        start = n - len(rest)
        if request.started is None:
            # Later, and with log probabilities, what it takes was run for it.
            request.n_matched = start
        row = Row(request, n_run=start)
        for end, cache_type in zip(
            accumulate(len(segment) for segment in request.segments),
            request.segment_types,
        ):
            for stop in (branch, end):
                # The last token of a prompt runs with the rows that decode.
                if stop is not None and start < min(stop, n - 1) and stop <= end:
                    start = min(stop, n - 1)
                    row.to_store[start] = cache_type
        stops = [n] if self.can_cut else [*row.to_store, n]
        starts = [row.n_run, *stops]
        segments = [prompt[i:j] for i, j in zip(starts, stops)]
        return row, segments, caches or make_segmented_cache(self.model)

    def fetch_aligned(
        self, key: Any, tokens: List[int]
    ) -> Tuple[Optional[List[Any]], List[int]]:
        """What ``RadixPromptCache.fetch_segmented_cache`` gives, cut where a chunk of the rest
        may begin."""
        caches, rest = self.prompt_cache.fetch_segmented_cache(key, tokens)
        known = len(tokens) - len(rest)
        n = aligned(known, len(tokens))
        if n == known or not self.can_cut:
            return caches, rest
        if n == 0:
            return None, tokens
        for c in caches:
            c.trim(known - n)
            # The size of the arrays is a part of the shape that cuDNN plans for.
            c.n_to_come = 0
        return caches, tokens[n:]

    def store(self, rows: Dict[Row, Tuple[List[Any], List[int]]]) -> None:
        """Store what rows have run, as far as the prompt cache has room for it.

        Args:
            rows (Dict[Row, Tuple]): The caches of each row, and the tokens in them.
        """
        for row, (caches, tokens) in rows.items():
            n = len(tokens)
            if n <= row.n_start:
                # All of it came from the prompt cache.
                continue
            ends, row.to_store = row.to_store, {}
            for end in sorted({n, *ends}):
                cache_type = ends.get(
                    min((e for e in ends if e >= end), default=None), "assistant"
                )
                if end > n:
                    row.to_store[end] = cache_type
                elif end == n or (self.can_cut and cache_type == "system"):
                    self.prompt_cache.insert(
                        row.request.cache_key, tokens[:end], caches, cache_type
                    )
        self.prompt_cache.evaluate()

"""How much memory the KV of a batch may take, how much it would take with one more request,
and what of a request can never fit.

Rules:
1. What a model's KV takes is read off the shapes of its caches after one token, which MLX
   knows without running it.
2. An answer has room for as many tokens as answers usually take. If the rows outgrow the
   limit, the newest of them have to leave: no answer ends because of that.
"""

import logging
from bisect import bisect_right
from functools import cached_property
from typing import Any, Collection, Iterable, Optional, Tuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..cache import growth
from ..cache.kinds import Layout, flatten, nbytes
from ..device import device_memory
from ..errors import RequestError
from ..interfaces import RequestInfo
from ..request.request import Request
from .answer_lengths import AnswerLengths

logger = logging.getLogger(__name__)

# No row has more tokens than that.
MAX_TOKENS = 1 << 40


class KVMemory:
    """What the KV of a model's batch may take.

    Args:
        model (nn.Module): The model; it is not run.
        limit (Optional[int]): Bytes. Without one, nine tenths of what the device has
          beside the weights.
    """

    def __init__(self, model: Any, limit: Optional[int] = None):
        if limit is None:
            weights = sum(w.nbytes for _, w in tree_flatten(model.parameters()))
            limit = max(0, device_memory() - weights) * 9 // 10
        self.limit = limit
        self.lengths = AnswerLengths()
        self.layers = []
        caches = make_prompt_cache(model)
        try:
            layout = Layout(caches)
        except TypeError as e:
            logger.warning(f"The size of the KV of {e} is not known: it is not bounded")
            return
        model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
        self.layers = [
            (kind, nbytes(kind.arrays(cache)))
            for kind, cache in zip(layout.kinds, flatten(caches))
        ]

    def nbytes(self, n_rows: int, n_tokens: int) -> int:
        """Bytes of ``n_rows``, each padded to ``n_tokens``."""
        n_tokens = growth.capacity(n_tokens)
        total = 0
        for kind, of_one in self.layers:
            kept = kind.batch_capacity(n_tokens)
            total += of_one * (1 if kept is None else kept)
        return n_rows * total

    def bound(self, most_tokens: int) -> None:
        """Lower the limit until a row that runs alone has room for no more tokens than that,
        as many as with another process that runs the model too."""
        if most_tokens < self.most_tokens:
            self.limit = self.nbytes(1, most_tokens)
            self.most_tokens = most_tokens

    @cached_property
    def most_tokens(self) -> int:
        """The most tokens that a row has room for if it runs alone."""

        def of_steps(n: int) -> int:
            return self.nbytes(1, n * growth.STEP)

        steps = range(1, MAX_TOKENS // growth.STEP)
        return bisect_right(steps, self.limit, key=of_steps) * growth.STEP

    def needed(
        self, requests: Collection[RequestInfo], n_rows: int = 0, end: int = 0
    ) -> int:
        """Bytes of a batch of requests, each with the answer that is expected.

        Args:
            requests (Collection[RequestInfo]): Those that run and those that are to.
            n_rows (int): Rows that the arrays of the running batch have.
            end (int): Places that the tokens of its rows take, with the padding.
        """
        expected = [self.lengths.expected(r) for r in requests]
        longest = max(r.n_prompt + n for r, n in zip(requests, expected))
        # A batch goes on where it is. When a row leaves, it gives up padding of a quarter.
        begun = max(end, *(r.n_prompt + r.n_generated for r in requests))
        begun += max(n - r.n_generated for r, n in zip(requests, expected))
        width = max(longest, min(begun, growth.max_width(longest)))
        if n_rows or (len(requests) > 1 and width >= growth.LONG):
            # A copy without that padding ends anywhere in a step of the arrays. One with more
            # rows has places left.
            width += growth.STEP
        return self.nbytes(max(n_rows, growth.max_rows(len(requests))), width)

    def fits(self, groups: Iterable[Tuple[Collection[RequestInfo], int, int]]) -> bool:
        """Whether groups of requests fit into the limit; for each of them see ``needed``."""
        return sum(self.needed(*group) for group in groups) <= self.limit

    def fit(self, request: Request) -> None:
        """Lower the ``max_tokens`` of a request until it fits if it runs alone.

        Raises:
            RequestError: A 400 with the figures if its prompt does not fit.
        """
        room = self.most_tokens - request.n_prompt
        if room < 1:
            n_bytes = self.nbytes(1, request.n_prompt + 1)
            raise RequestError(
                400,
                f"the KV of {request.n_prompt} tokens of prompt and one of the answer takes "
                f"{n_bytes / 1e6:,.1f} MB, and the server has {self.limit / 1e6:,.1f} MB "
                "(--max-kv-bytes)",
                request.prompt_field,
                "context_length_exceeded",
            )
        request.args.max_tokens = min(request.max_tokens, room)

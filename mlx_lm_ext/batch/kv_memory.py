"""How much memory the KV of a batch may take, how much it would take with one more request,
and the refusal of a request that can never fit.

Rule: what a model's KV takes is read off the shapes of its caches after one token,
which MLX knows without running it.
"""

import logging
from typing import Any, Collection, Optional

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..cache import growth
from ..cache.kinds import Layout, flatten, nbytes
from ..device import device_memory
from ..errors import RequestError
from ..interfaces import RequestInfo

logger = logging.getLogger(__name__)


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

    def needed(
        self, requests: Collection[RequestInfo], n_rows: int = 0, end: int = 0
    ) -> int:
        """Bytes of a batch of requests, each with the longest answer that it may have.

        Args:
            requests (Collection[RequestInfo]): Those that run and those that are to.
            n_rows (int): Rows that the arrays of the running batch have.
            end (int): Places that the tokens of its rows take, with the padding.
        """
        longest = max(r.n_prompt + r.max_tokens for r in requests)
        # A batch goes on where it is. When a row leaves, it gives up padding of a quarter.
        begun = max(end, *(r.n_prompt + r.n_generated for r in requests))
        begun += max(r.max_tokens - r.n_generated for r in requests)
        width = max(longest, min(begun, growth.max_width(longest)))
        if n_rows:
            # A copy without that padding ends anywhere in a step of the arrays.
            width += growth.STEP
        return self.nbytes(max(n_rows, growth.max_rows(len(requests))), width)

    def fits(self, requests: Collection[RequestInfo], *shape: int) -> bool:
        """Whether they fit into the limit; see ``needed``."""
        return self.needed(requests, *shape) <= self.limit

    def check(self, request: RequestInfo) -> None:
        """Refuse a request that can never fit.

        Raises:
            RequestError: A 400 with the figures.
        """
        if not self.fits([request]):
            raise RequestError(
                400,
                f"the KV of {request.n_prompt} tokens of prompt and {request.max_tokens} "
                f"of max_tokens takes {self.needed([request]) / 1e6:,.1f} MB, and the "
                f"server has {self.limit / 1e6:,.1f} MB (--max-kv-bytes)",
                "max_tokens",
                "context_length_exceeded",
            )

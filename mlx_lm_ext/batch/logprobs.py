"""Log probabilities of the rows of a step that asked for them, in one call."""

from functools import cached_property
from typing import List, Tuple

import mlx.core as mx


class Logprobs:
    """Log probabilities of some rows of a step.

    Args:
        logits (mx.array): Of shape (rows, vocabulary).
        tokens (mx.array): The token that each row got, of shape (rows,).
        n_top (int): How many of the most likely tokens are wanted.
    """

    def __init__(self, logits: mx.array, tokens: mx.array, n_top: int):
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # Whoever makes this object has these evaluated with the rest of the step.
        self.arrays = [mx.take_along_axis(logprobs, tokens[:, None], axis=-1)]
        if n_top:
            ids = mx.argpartition(-logprobs, kth=n_top - 1, axis=-1)[:, :n_top]
            top = mx.take_along_axis(logprobs, ids, axis=-1)
            order = mx.argsort(-top, axis=-1)
            self.arrays += [mx.take_along_axis(x, order, axis=-1) for x in (ids, top)]

    @cached_property
    def lists(self) -> List[List]:
        """The arrays as lists, read once for all rows."""
        return [x.tolist() for x in self.arrays]

    def row(self, i: int, n_top: int) -> Tuple[float, Tuple[Tuple[int, float], ...]]:
        """The log probability of the token of row ``i``, and ``(id, logprob)`` of the
        row's ``n_top`` most likely tokens."""
        chosen, *tops = self.lists
        return chosen[i][0], tuple(zip(*(top[i][:n_top] for top in tops)))

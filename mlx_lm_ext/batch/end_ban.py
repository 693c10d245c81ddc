"""Keeps an answer from ending before it has the tokens that its request wants at least."""

import mlx.core as mx

from ..request.request import Request


class EndBan:
    """A logits processor for one row, as upstream calls it. Rows without one cost nothing.

    Args:
        request (Request): Has ``end_tokens``.
    """

    def __init__(self, request: Request):
        self.ids = mx.array(sorted(request.end_tokens))
        # Tokens of prompt and answer after which the answer may end.
        self.n_tokens = request.n_prompt + request.min_tokens

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Ban the end tokens in logits of shape (1, vocabulary), if ``tokens``, all of the row
        so far, are too few."""
        if len(tokens) < self.n_tokens:
            logits[:, self.ids] = -mx.inf
        return logits

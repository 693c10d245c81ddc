"""Computes the log probabilities of the tokens of a prompt, for a request that asks for its
prompt back with them.

Rules:
1. A chunk of the prompt is run at a time, so that the rows of the batch go on in between.
2. Of the logits of a chunk, only what the answer shows is kept.
3. The prompt runs without KV of the prompt cache, which has no logits, and up to its last
   token. The KV is what a row of the batch starts with.
"""

from typing import Any, List

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..batch.logprobs import Logprobs
from ..request.request import Request, Token

# Logits of a chunk at most: 128 MB in float32.
MAX_LOGITS = 1 << 25


class PromptScores:
    """The log probabilities of one prompt, on their way.

    Args:
        model (nn.Module): The model.
        request (Request): Its ``prompt_logprobs`` are filled at the end.
        step_size (int): Tokens of a chunk at most.
    """

    def __init__(self, model: Any, request: Request, step_size: int):
        self.model = model
        self.request = request
        self.step_size = min(step_size, max(1, MAX_LOGITS // request.vocabulary_size))
        self.caches: List[Any] = make_prompt_cache(model)
        # Before the first token there is nothing that could make it likely.
        self.tokens = [Token(request.prompt[0])]

    @property
    def n_run(self) -> int:
        """Tokens of the prompt that were run."""
        return len(self.tokens) - 1

    def step(self, n: int) -> bool:
        """Run a chunk.

        Args:
            n (int): Tokens of it at most.

        Returns:
            bool: Whether it was the last one.
        """
        prompt, n_top = self.request.prompt, self.request.args.top_logprobs
        start = self.n_run
        end = min(start + max(1, min(n, self.step_size)), len(prompt) - 1)
        if start < end:
            inputs = mx.array([prompt[start:end]], mx.uint32)
            logits = self.model(inputs, cache=self.caches)[0].astype(mx.float32)
            following = prompt[start + 1 : end + 1]
            found = Logprobs(logits, mx.array(following, mx.uint32), n_top)
            mx.eval(found.arrays, [c.state for c in self.caches])
            self.tokens += [
                Token(token, *found.row(i, n_top)) for i, token in enumerate(following)
            ]
        is_last = end == len(prompt) - 1
        if is_last:
            self.request.prompt_logprobs += self.tokens
        return is_last

"""KV kept between requests."""

from typing import Any, List

from mlx_lm.models.cache import (
    LRUPromptCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)


class PromptCache(LRUPromptCache):
    """Upstream's cache, except that a hit is right and leaves a token to run.

    Upstream answers an exact hit with no tokens, from which nothing can be generated.
    """

    def insert_cache(self, model: Any, tokens: List[int], prompt_cache, **kwargs):
        # Speculative decoding ends with KV for fewer tokens than it says.
        n = len(tokens)
        if all(getattr(c, "offset", n) == n for c in prompt_cache):
            super().insert_cache(model, tokens, prompt_cache, **kwargs)

    def fetch_nearest_cache(self, model: Any, tokens: List[int]):
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        if can_trim_prompt_cache(cache) and trim_prompt_cache(cache, 1) == 1:
            return cache, tokens[-1:]
        return None, tokens

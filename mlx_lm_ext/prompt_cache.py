"""KV kept between requests: upstream's cache, with an order that a policy decides."""

from copy import deepcopy
from typing import Any, Dict, List, Optional, Tuple

from mlx_lm.models.cache import (
    LRUPromptCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from ._upstream import LRUPromptCacheBase
from .interfaces import Entry
from .policies import Guard, Policies


class Sequence(list):
    """The caches of a sequence's layers. A copy says which entry it is a copy of."""

    def __init__(self, caches: List[Any], entry: Entry):
        super().__init__(caches)
        self.entry = entry

    def __deepcopy__(self, memo):
        return Sequence([deepcopy(cache, memo) for cache in self], self.entry)


class PolicyOrder(LRUPromptCache.CacheOrder):
    """Asks an eviction policy which sequence leaves.

    Args:
        eviction (Guard): The policy.
    """

    def __init__(self, eviction: Guard):
        super().__init__()
        self.eviction = eviction
        self.entries: Dict[Tuple, Entry] = {}
        self.incoming: Optional[Entry] = None

    def push(self, model: Any, tokens: List[int], cache_type: str = "assistant"):
        super().push(model, tokens, cache_type)
        entry = self.entries[model, tuple(tokens)] = self.incoming
        self.eviction.run(lambda policy: policy.on_insert(entry))

    def remove(self, model: Any, tokens: List[int], reason: str = "replaced"):
        super().remove(model, tokens)
        entry = self.entries.pop((model, tuple(tokens)))
        self.eviction.run(lambda policy: policy.on_remove(entry, reason))

    def pop(self):
        def choose(policy):
            keys = [k for k, e in self.entries.items() if policy.evictable(e)]
            # The bound holds, whatever is pinned.
            keys = keys or list(self.entries)
            return min(keys, key=lambda k: policy.priority(self.entries[k]))

        model, tokens = self.eviction.run(choose)
        self.remove(model, list(tokens), "evicted")
        return model, list(tokens)


class PromptCache(LRUPromptCacheBase):
    """Upstream's cache, except that a hit is right and leaves a token to run.

    Upstream answers an exact hit with no tokens, from which nothing can be generated.

    Args:
        max_bytes (int): The most that it may hold.
        policies (Policies): The one for eviction says what leaves.
    """

    def __init__(self, max_bytes: int, policies: Policies):
        self.eviction = policies.eviction
        self.clock = policies.clock
        self.order = PolicyOrder(policies.eviction)
        super().__init__(self.order, max_bytes)

    def insert_cache(
        self,
        model: Any,
        tokens: List[int],
        prompt_cache: List[Any],
        *,
        cache_type: str = "assistant",
    ):
        # Speculative decoding ends with KV for fewer tokens than it says.
        n = len(tokens)
        if any(getattr(c, "offset", n) != n for c in prompt_cache):
            return
        now = self.clock()
        self.order.incoming = Entry(
            n_tokens=n,
            nbytes=sum(c.nbytes for c in prompt_cache),
            depth=n,
            cache_type=cache_type,
            model_key=model,
            created=now,
            last_hit=now,
            recompute_cost=n,
        )
        sequence = Sequence(prompt_cache, self.order.incoming)
        super().insert_cache(model, tokens, sequence, cache_type=cache_type)

    def fetch_nearest_cache(self, model: Any, tokens: List[int]):
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None:
            return cache, rest
        entry = cache.entry
        if not rest:
            if not can_trim_prompt_cache(cache) or trim_prompt_cache(cache, 1) != 1:
                return None, tokens
            rest = tokens[-1:]
        entry.hits += 1
        entry.last_hit = self.clock()
        self.eviction.run(lambda p: p.on_hit(entry, len(tokens) - len(rest)))
        return list(cache), rest

    def expire(self) -> None:
        """Drop what the policy says is too old."""
        if not self.eviction.has("expired"):
            return
        now = self.clock()
        expired = self.eviction.run(lambda policy: set(policy.expired(now)))
        for (model, tokens), entry in list(self.order.entries.items()):
            if entry in expired:
                self.remove(model, list(tokens), "expired")

"""Built-in eviction policies: which entry leaves the full prompt cache."""

from .interfaces import EvictionPolicy


class LRU(EvictionPolicy):
    """What was not used for the longest time leaves."""

    name = "lru"

    def priority(self, entry):
        return entry.last_hit

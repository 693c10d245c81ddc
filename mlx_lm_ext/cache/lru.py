"""The eviction policy that the prompt cache uses unless it is given another one."""

from ..interfaces import EvictionPolicy


class LRU(EvictionPolicy):
    """Evicts what has not been used for the longest time."""

    name = "lru"

    def priority(self, entry):
        return entry.last_hit

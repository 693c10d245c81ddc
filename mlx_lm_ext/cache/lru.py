"""LRU, the default eviction policy: here and not with the others in ``policies/``, because the
prompt cache uses it when it is given none."""

from ..interfaces import EvictionPolicy


class LRU(EvictionPolicy):
    """Evicts what has not been used for the longest time."""

    name = "lru"

    def priority(self, entry):
        return entry.last_hit

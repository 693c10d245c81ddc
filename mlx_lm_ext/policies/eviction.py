"""Built-in eviction policies: which entry is evicted from a full prompt cache."""

import argparse
from typing import Any, Dict, List

from ..cache.lru import LRU
from ..interfaces import Clock, Entry, EvictionPolicy


class FIFO(EvictionPolicy):
    """Evicts what was stored first, used or not (first in, first out)."""

    name = "fifo"

    def priority(self, entry: Entry) -> Any:
        return entry.created


class LFU(EvictionPolicy):
    """Evicts what was used least often (least frequently used); of equal entries, the one
    that was not used for the longest time."""

    name = "lfu"

    def priority(self, entry: Entry) -> Any:
        return entry.hits, entry.last_hit


class SLRU(EvictionPolicy):
    """Segmented LRU: evicts entries that were never used before those that were.

    An entry that is used becomes protected. Protected entries may take four fifths of the
    cache. If they take more, the one that was not used for the longest time loses its
    protection until it is used again. Karedla, Love and Wherry, "Caching strategies to
    improve disk system performance", IEEE Computer, 1994.
    """

    name = "slru"

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.max_protected_bytes = 0.8 * args.radix_cache_size
        self.protected_bytes = 0
        # Entries in the order of their last use, with the bytes that each was counted as:
        # an entry's own ``nbytes`` can change later.
        self.protected: Dict[Entry, int] = {}

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        self.release(entry)
        self.protected[entry] = entry.nbytes
        self.protected_bytes += entry.nbytes
        while self.protected_bytes > self.max_protected_bytes:
            oldest = next(iter(self.protected))
            self.release(oldest)
            # It competes as if it had been used now.
            oldest.data = self.clock()

    def on_split(self, parent: Entry, child: Entry) -> None:
        parent.data = child.data
        if child in self.protected:
            self.on_hit(child, 0)
            self.on_hit(parent, 0)

    def on_remove(self, entry: Entry, reason: str) -> None:
        self.release(entry)

    def release(self, entry: Entry) -> None:
        """Take away the protection of an entry, if it has it."""
        self.protected_bytes -= self.protected.pop(entry, 0)

    def priority(self, entry: Entry) -> Any:
        return entry in self.protected, max(entry.last_hit, entry.data or 0)


class GDSF(EvictionPolicy):
    """Greedy-Dual-Size-Frequency: evicts what is used seldom and quickly computed again.

    The value of an entry is the number of its uses times its cost per byte, plus a floor:
    the value of the last entry that was evicted. As the floor rises, entries that are no
    longer used lose against those that are. Cherkasova, "Improving WWW Proxies Performance
    with Greedy-Dual-Size-Frequency Caching Policy", HP Labs, 1998.
    """

    name = "gdsf"

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.floor = 0.0

    def on_insert(self, entry: Entry) -> None:
        self.on_hit(entry, 0)

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        cost = entry.recompute_cost / entry.nbytes if entry.nbytes else 0
        entry.data = self.floor + (1 + entry.hits) * cost

    def on_split(self, parent: Entry, child: Entry) -> None:
        parent.data = child.data

    def on_remove(self, entry: Entry, reason: str) -> None:
        if reason == "evicted":
            self.floor = max(self.floor, entry.data)

    def priority(self, entry: Entry) -> Any:
        return entry.data, entry.last_hit


class TTL(LRU):
    """LRU that also drops what was not used for ``--cache-ttl`` seconds (time to live),
    although there is room."""

    name = "ttl"

    def __init__(self, args: argparse.Namespace, clock: Clock):
        super().__init__(args, clock)
        self.seconds = args.cache_ttl
        self.entries: Dict[Entry, None] = {}

    def on_insert(self, entry: Entry) -> None:
        self.entries[entry] = None

    def on_split(self, parent: Entry, child: Entry) -> None:
        self.entries[parent] = None

    def on_remove(self, entry: Entry, reason: str) -> None:
        del self.entries[entry]

    def expired(self, now: float) -> List[Entry]:
        return [e for e in self.entries if e.last_hit + self.seconds <= now]


POLICIES = [LRU, FIFO, LFU, SLRU, GDSF, TTL]

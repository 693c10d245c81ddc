"""Built-in eviction policies: which entry leaves the full prompt cache."""

from typing import Dict

from ..cache.lru import LRU
from ..interfaces import Entry, EvictionPolicy


class FIFO(EvictionPolicy):
    """What was stored first leaves, used or not."""

    name = "fifo"

    def priority(self, entry):
        return entry.created


class LFU(EvictionPolicy):
    """What was used least often leaves, and of those what was not used for longest."""

    name = "lfu"

    def priority(self, entry):
        return entry.hits, entry.last_hit


class SLRU(EvictionPolicy):
    """Segmented LRU: what was used once is protected from what never was.

    Four fifths of the cache are for protected entries. If they need more, the one that
    was not used for longest has to prove itself again. Karedla, Love and Wherry,
    "Caching strategies to improve disk system performance", IEEE Computer, 1994.
    """

    name = "slru"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.most = 0.8 * args.radix_cache_size
        self.n_bytes = 0
        # With the bytes that each was counted with, in the order of their use.
        self.protected: Dict[Entry, int] = {}

    def on_hit(self, entry, n_tokens):
        self.release(entry)
        self.protected[entry] = entry.nbytes
        self.n_bytes += entry.nbytes
        while self.n_bytes > self.most:
            oldest = next(iter(self.protected))
            self.release(oldest)
            oldest.data = self.clock()

    def on_split(self, parent, child):
        if child in self.protected:
            self.on_hit(child, 0)
            self.on_hit(parent, 0)

    def on_remove(self, entry, reason):
        self.release(entry)

    def release(self, entry: Entry) -> None:
        self.n_bytes -= self.protected.pop(entry, 0)

    def priority(self, entry):
        return entry in self.protected, max(entry.last_hit, entry.data or 0)


class GDSF(EvictionPolicy):
    """Greedy-Dual-Size-Frequency: what is used seldom and is quickly made again leaves.

    An entry is worth its uses times its cost for each byte. What has left sets a floor
    on which later uses stand, so that old fame fades. Cherkasova, "Improving WWW
    Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs, 1998.
    """

    name = "gdsf"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.floor = 0.0

    def on_insert(self, entry):
        self.on_hit(entry, 0)

    def on_hit(self, entry, n_tokens):
        cost = entry.recompute_cost / entry.nbytes if entry.nbytes else 0
        entry.data = self.floor + (1 + entry.hits) * cost

    def on_remove(self, entry, reason):
        if reason == "evicted":
            self.floor = max(self.floor, entry.data)

    def priority(self, entry):
        return entry.data, entry.last_hit


class TTL(LRU):
    """LRU, and what was not used for ``--cache-ttl`` seconds leaves although there is
    room."""

    name = "ttl"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.seconds = args.cache_ttl
        self.entries: Dict[Entry, None] = {}

    def on_insert(self, entry):
        self.entries[entry] = None

    def on_split(self, parent, child):
        self.entries[parent] = None

    def on_remove(self, entry, reason):
        del self.entries[entry]

    def expired(self, now):
        return [e for e in self.entries if e.last_hit + self.seconds <= now]


POLICIES = [LRU, FIFO, LFU, SLRU, GDSF, TTL]

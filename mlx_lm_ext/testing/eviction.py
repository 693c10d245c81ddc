"""Checks eviction policies: random conversations go through the server's own prompt cache, with
the KV of small layers, and the policy hears of all that happens there."""

import argparse
import gc
import random
import weakref
from itertools import pairwise
from typing import Any, Dict, Iterable, List, NoReturn, Sequence, Tuple, Type

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache

from ..cache.prompt_cache import RadixPromptCache
from ..interfaces import Clock, Entry, EvictionPolicy
from ..policies.guard import kind_of_priority
from ..policies.loading import EVICTION
from .watching import ManualClock, Watched, command_line

# Bytes that the prompt cache of a trace may take, and what a token and a state take of them.
MAX_BYTES = 24_000
TOKEN_BYTES = 64
N_REQUESTS = 120

# The layers of models: those whose KV can be cut after any token, those with a state, and both.
MODELS = {"attention": "k", "recurrent": "r", "hybrid": "rk"}


def check_eviction_policy(
    cls: Type[EvictionPolicy], argv: Sequence[str] = (), seeds: Iterable[int] = range(2)
) -> None:
    """Check a class for ``--eviction-policy`` against its contract.

    Args:
        cls (Type[EvictionPolicy]): The class.
        argv (Sequence[str]): The command line of the server. ``-p`` names the plugin if its
          flags are needed and it is not installed.
        seeds (Iterable[int]): The seeds of the traces: of each, one with few and one with many
          entries in the cache.

    Raises:
        AssertionError: If it breaks the contract.
        SystemExit: If the command line is wrong.
    """
    args = argparse.Namespace(**vars(command_line(argv)))
    args.radix_cache_size = MAX_BYTES
    for seed in seeds:
        for max_size in (12, 1 << 20):
            clock = ManualClock()
            policy = WatchedEviction(cls, args, clock)
            cache = RadixPromptCache(max_size, MAX_BYTES, policy, clock)
            run_trace(cache, policy, clock, random.Random(seed))
            policy.check_leaks()
            policy.watched.warn_if_slow()


class WatchedEviction(EvictionPolicy):
    """Takes the place of the guard of a server: a policy whose calls and results are checked.

    Args:
        cls (Type[EvictionPolicy]): The class of the policy.
        args (argparse.Namespace): The command line.
        clock (Clock): The clock of the cache.
    """

    def __init__(
        self, cls: Type[EvictionPolicy], args: argparse.Namespace, clock: Clock
    ):
        super().__init__(args, clock)
        self.watched = Watched(EVICTION, cls, args, clock)
        self.entries: Dict[Entry, None] = {}
        self.gone: List[weakref.ref[Entry]] = []
        # A priority of each kind that the policy has given.
        self.priorities: Dict[str, Any] = {}

    def on_insert(self, entry: Entry) -> None:
        self.entries[entry] = None
        self.watched.call("on_insert", entry)

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        self.watched.call("on_hit", entry, n_tokens)

    def on_split(self, parent: Entry, child: Entry) -> None:
        self.entries[parent] = None
        self.watched.call("on_split", parent, child)

    def on_remove(self, entry: Entry, reason: str) -> None:
        del self.entries[entry]
        self.gone.append(weakref.ref(entry))
        self.watched.call("on_remove", entry, reason)

    def evictable(self, entry: Entry) -> bool:
        found = self.watched.call("evictable", entry)
        if not isinstance(found, (bool, np.bool_)):
            self.watched.fail(
                "evictable", [entry], f"returned {found!r}", "True or False"
            )
        return bool(found)

    def priority(self, entry: Entry) -> Any:
        found = self.watched.call("priority", entry)
        self.check_priority("priority", [entry], found)
        return found

    def rank(self, entries: List[Entry]) -> List[Tuple[Any, ...]]:
        before = self.data
        if self.watched.is_own("rank"):
            keys = self.own_rank(entries)
        else:
            keys = [(not self.evictable(e), self.priority(e)) for e in entries]
        for entry, key in zip(entries, keys):
            alone = (not self.evictable(entry), self.priority(entry))
            if same(key, alone):
                continue
            if not self.watched.is_own("rank"):
                self.fail_unsteady("priority", entry, key[1], alone[1])
            self.watched.fail(
                "rank",
                [entries],
                f"gave {key!r} for an entry of which evictable() and priority() make "
                f"{alone!r}",
                "the same key from both, whichever other entries are ranked with it",
            )
        self.check_data("priority", entries, before)
        for (_, a), (_, b) in pairwise(keys):
            self.check_comparable(a, b)
        return keys

    def own_rank(self, entries: List[Entry]) -> List[Tuple[Any, ...]]:
        """What a ``rank`` of the policy's own gives."""
        right = "one tuple for each entry: whether it is pinned, and its priority"
        # The server gives it a list of its own.
        ranks = self.watched.call("rank", list(entries))
        try:
            keys = [(bool(pinned), priority) for pinned, priority in ranks]
        except Exception:
            self.watched.fail("rank", [entries], f"returned {ranks!r}", right)
        if len(keys) != len(entries):
            found = f"returned {len(keys)} of them"
            self.watched.fail("rank", [entries], found, right)
        for _, priority in keys:
            self.check_priority("rank", [entries], priority)
        return list(keys)

    def expired(self, now: float) -> List[Entry]:
        before = self.data
        found, again = (
            self.watched.call("expired", now, convert=list) for _ in range(2)
        )
        if found != again:
            self.fail_unsteady("expired", now, found, again)
        self.check_data("expired", now, before)
        for entry in found:
            if not isinstance(entry, Entry):
                self.watched.fail(
                    "expired", [now], f"gave {entry!r}", "entries and nothing else"
                )
            if entry not in self.entries:
                self.watched.fail(
                    "expired",
                    [now],
                    "gave an entry that has left the cache",
                    "to forget entries in on_remove, and to take those that on_insert and "
                    "on_split (the parent) bring",
                )
        return list(found)

    @property
    def data(self) -> List[Tuple[int, str]]:
        """What the policy keeps with the entries, in a form that can be compared later."""
        return [(id(e.data), repr(e.data)) for e in self.entries]

    def check_data(self, method: str, arg: Any, before: List[Tuple[int, str]]) -> None:
        """Check that a method that may change nothing has left ``data`` alone, too."""
        if self.data != before:
            right = "to change nothing: entry.data is for the methods on_..."
            self.watched.fail(method, [arg], "changed entry.data", right)

    def fail_unsteady(self, method: str, arg: Any, a: Any, b: Any) -> NoReturn:
        self.watched.fail(
            method,
            [arg],
            f"returned {a!r} and then {b!r}, and nothing happened in between",
            "to change nothing, and so to return the same. The time is that of the clock that "
            "it was made with. What is drawn at random can be drawn in on_insert and "
            "on_split, and kept in entry.data",
        )

    def check_priority(self, method: str, args: Sequence[Any], value: Any) -> None:
        """Check that a priority can be compared with those that were given before."""
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, float) and part != part for part in parts):
            right = "a number that can be compared, which NaN cannot"
            self.watched.fail(method, args, f"gave {value!r}", right)
        kind = kind_of_priority(value)
        self.priorities.setdefault(kind, value)
        if len(self.priorities) > 1:
            a, b = [*self.priorities.values()][:2]
            self.watched.fail(
                method,
                args,
                f"gave {value!r}, and the policy has given {a!r} and {b!r}",
                "priorities that can all be compared: only plain numbers, or only tuples of "
                "numbers, or only objects of one class",
            )
        self.check_comparable(self.priorities[kind], value)

    def check_comparable(self, a: Any, b: Any) -> None:
        try:
            both = bool(a < b), bool(b < a)
        except Exception as e:
            raise AssertionError(
                f"{self.watched.cls.__name__}.priority gave {a!r} and {b!r}, and comparing "
                f"them raised {e}; right are priorities that can be compared with <"
            ) from e
        assert both != (True, True), (
            f"{self.watched.cls.__name__}.priority gave {a!r} and {b!r}, and each is less than "
            "the other; right are priorities that have an order"
        )

    def check_leaks(self) -> None:
        """Check that the policy lets go of entries that have left."""
        gc.collect()
        n_kept = sum(ref() is not None for ref in self.gone)
        assert n_kept <= len(self.gone) / 2, (
            f"{self.watched.cls.__name__} keeps {n_kept} of {len(self.gone)} entries that have "
            "left the cache; right is to forget an entry in on_remove, or memory runs out"
        )


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal. Objects that can only be ordered are if neither is less."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        # NaN equals nothing, and has a message of its own.
        return bool(a == b) or a != a or not (a < b or b < a)
    except Exception:
        # What cannot be compared has a message of its own, too.
        return True


def make_caches(layers: str, n: int) -> List[Any]:
    """The caches of a model after ``n`` tokens."""
    keys, state = mx.zeros((1, 1, n, 8)), mx.zeros((1, TOKEN_BYTES))
    return [
        (
            KVCache.from_state((keys, keys, n))
            if kind == "k"
            else ArraysCache.from_state(([state], None, None))
        )
        for kind in layers
    ]


def run_trace(
    cache: RadixPromptCache,
    policy: WatchedEviction,
    clock: ManualClock,
    rng: random.Random,
) -> None:
    """Serve random requests: new conversations with common system prompts, and later turns of old
    ones, some from an earlier place. Batches of different sizes take their part of the memory.
    """
    systems = [[rng.randrange(9) for _ in range(rng.randint(1, 12))] for _ in range(4)]
    talks: List[Tuple[str, List[int]]] = []
    for _ in range(N_REQUESTS):
        clock.now += rng.choice([0, 0, 0.01, 1, 30])
        if talks and rng.random() < 0.6:
            model, tokens = talks.pop(rng.randrange(max(0, len(talks) - 6), len(talks)))
            n_system = 0
            if rng.random() < 0.5:
                # The user goes back to an earlier place, and says something else.
                talks.append((model, tokens))
                tokens = tokens[: rng.randint(1, len(tokens))]
        else:
            model, tokens = rng.choice([*MODELS]), rng.choice(systems)
            n_system = len(tokens)
        prompt = tokens + [rng.randrange(4) for _ in range(rng.randint(1, 10))]
        answer = prompt + [rng.randrange(4) for _ in range(rng.randint(1, 20))]
        cache.fetch_nearest_cache(model, prompt)
        segments = [(n_system, "system"), (len(prompt), "user")]
        for n, cache_type in [*segments, (len(answer), "assistant")]:
            if n:
                caches = make_caches(MODELS[model], n)
                cache.insert_cache(model, answer[:n], caches, cache_type=cache_type)
        if len(answer) < 150:
            talks.append((model, answer))
        if rng.random() < 0.2:
            cache.reserve(rng.choice([0, MAX_BYTES // 4, MAX_BYTES // 2]))
        if rng.random() < 0.1:
            cache.expire()
    # Nothing is used for a long time, and the batch takes all.
    clock.now += 1e6
    cache.expire()
    cache.reserve(MAX_BYTES)
    assert not policy.entries
    cache.expire()
    # It goes on with an empty cache.
    cache.reserve(0)
    cache.insert_cache("attention", [1, 2, 3], make_caches("k", 3))
    cache.trim_to(n_bytes=0)

"""The guard of a policy: what is the policy's fault, and what is not."""

from argparse import Namespace

import integrity
import pytest
from fake_caches import make, make_cache

from mlx_lm_ext.cache.lru import LRU
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.interfaces import Entry, EvictionPolicy, SchedulerPolicy, SchedulerView
from mlx_lm_ext.policies.guard import GuardedEviction, GuardedScheduler
from mlx_lm_ext.policies.loading import EVICTION, SCHEDULER
from mlx_lm_ext.policies.policy_class import PolicyClass
from mlx_lm_ext.policies.scheduling import FCFS

ARGS = Namespace(prefill_budget=8)
VIEW = SchedulerView(0.0, (), 1)


def guard_eviction(cls):
    policy_class = PolicyClass(EVICTION, cls.name, cls, "tests", LRU)
    return GuardedEviction(policy_class, ARGS, lambda: 0.0)


def guard_scheduler(cls):
    policy_class = PolicyClass(SCHEDULER, cls.name, cls, "tests", FCFS)
    return GuardedScheduler(policy_class, ARGS, lambda: 0.0)


def entry(n_tokens):
    return Entry(n_tokens, 8, n_tokens, "user", "model", 0.0, float(n_tokens), n_tokens)


class ByLength(EvictionPolicy):
    name = "by length"

    def priority(self, entry):
        return -entry.n_tokens


# Eviction


def test_keys_sort_by_pin_and_priority():
    class Pinning(ByLength):
        def evictable(self, entry):
            return entry.n_tokens != 3

    guard = guard_eviction(Pinning)
    entries = [entry(n) for n in (1, 2, 3)]
    keys = guard.rank(entries)
    assert sorted(entries, key=lambda e: keys[entries.index(e)]) == [
        entries[1],
        entries[0],
        entries[2],
    ]


@pytest.mark.parametrize(
    "values",
    [(1, "a"), (None, None), (object(), object()), ((1, None), (1, 3.0)), (1, (1, 2))],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_priorities_that_cannot_be_compared_replace_the_policy(values, at_once, caplog):
    class Mixed(EvictionPolicy):
        name = "mixed"

        def priority(self, entry):
            return values[entry.n_tokens]

    guard = guard_eviction(Mixed)
    entries = [entry(0), entry(1)]
    if at_once:
        keys = guard.rank(entries)
    else:
        keys = [guard.rank([e])[0] for e in entries]
    # Those that the replaced policy gave can still be compared with the others.
    assert len(sorted(keys + guard.rank([entry(0)]))) == 3
    assert "'mixed' of tests failed; 'lru'" in caplog.text
    assert type(guard.policy) is LRU


def test_priorities_of_any_kind_that_can_be_compared_are_kept_in_order(caplog):
    class Named(EvictionPolicy):
        name = "named"

        def priority(self, entry):
            return "cab"[entry.n_tokens], entry

    guard = guard_eviction(Named)
    entries = [entry(n) for n in range(3)]
    keys = [guard.rank([e])[0] for e in entries]
    assert sorted(range(3), key=keys.__getitem__) == [1, 2, 0]
    assert not caplog.records


def test_policy_that_changes_the_list_it_is_given_changes_nothing_else(caplog):
    class Emptying(ByLength):
        def rank(self, entries):
            entries.clear()
            raise ArithmeticError("no rank")

    guard = guard_eviction(Emptying)
    entries = [entry(1), entry(2)]
    assert len(guard.rank(entries)) == len(entries) == 2


@pytest.mark.parametrize("item", [{}, "an entry", None])
def test_policy_that_calls_other_things_expired_is_replaced(item, caplog):
    class Confused(ByLength):
        def expired(self, now):
            return [entry(1), item]

    guard = guard_eviction(Confused)
    assert list(guard.expired(0.0)) == []
    assert "what it calls expired is not all entries" in caplog.text


def test_policy_that_ranks_other_entries_than_asked_is_replaced(caplog):
    class Forgetful(ByLength):
        def rank(self, entries):
            return super().rank(entries)[1:]

    guard = guard_eviction(Forgetful)
    assert len(guard.rank([entry(1), entry(2)])) == 2
    assert "it ranked 1 of 2 entries" in caplog.text


def test_policy_that_fails_in_an_eviction_is_replaced_and_the_eviction_ends(caplog):
    class Late(ByLength):
        n_left = 2

        def on_remove(self, entry, reason):
            type(self).n_left -= 1
            if not self.n_left:
                raise ArithmeticError("no more")

    cache = make_cache()
    cache.eviction = guard_eviction(Late)
    for letter in b"abcdef":
        tokens = [letter] * 8
        cache.insert_cache("model", tokens, make("KVCache", tokens))
    cache.trim_to(n_sequences=2)
    assert len(cache) == 2 and len(caplog.records) == 1
    integrity.check(cache)


def test_policy_is_not_blamed_for_what_the_cache_raises(monkeypatch, caplog):
    removals = []

    def remove(self, *args, **kwargs):
        removals.append(args)
        raise ArithmeticError("a fault of the cache")

    cache = make_cache()
    cache.eviction = guard_eviction(ByLength)
    cache.insert_cache("model", [1, 2, 3], make("KVCache", [1, 2, 3]))
    monkeypatch.setattr(RadixPromptCache, "remove", remove)
    with pytest.raises(ArithmeticError, match="of the cache"):
        cache.trim_to(n_sequences=0)
    assert type(cache.eviction.policy) is ByLength and not caplog.records
    assert len(removals) == 1


def test_data_of_a_policy_is_its_own(caplog):
    class Uncopied:
        def __copy__(self):
            raise ArithmeticError("no copy")

    class Keeping(ByLength):
        def on_insert(self, entry):
            entry.data = Uncopied()

    cache = make_cache()
    cache.eviction = guard_eviction(Keeping)
    for tokens in ([1, 2, 3], [1, 2, 4]):
        cache.insert_cache("model", tokens, make("KVCache", tokens))
    assert [type(e.data) for e in cache.nodes if e.data] == [Uncopied, Uncopied]
    assert len(cache) == 3 and not caplog.records
    integrity.check(cache)


def test_what_a_policy_gives_later_is_checked_at_once(caplog):
    class Lazy(ByLength):
        def expired(self, now):
            yield entry(1)
            raise ArithmeticError("after the first")

    guard = guard_eviction(Lazy)
    assert list(guard.expired(0.0)) == []
    assert "'by length' of tests failed" in caplog.text


# Scheduling


def test_built_in_policy_gets_the_list_as_it_was(caplog):
    class Emptying(SchedulerPolicy):
        name = "emptying"

        def order(self, waiting, view):
            waiting.clear()
            raise ArithmeticError("no order")

    requests = [object(), object()]
    assert guard_scheduler(Emptying).order(requests, VIEW) == requests
    assert len(requests) == 2 and "'emptying' of tests failed" in caplog.text


@pytest.mark.parametrize("n, given", [(None, None), (0, 1), (-3, 1), (7.9, 7)])
def test_prefill_tokens_are_at_least_one(n, given):
    class Stingy(SchedulerPolicy):
        name = "stingy"

        def prefill_tokens(self, view):
            return n

    assert guard_scheduler(Stingy).prefill_tokens(VIEW) == given


def test_guards_have_all_methods_of_the_interfaces():
    for guard, interface in (
        (GuardedEviction, EvictionPolicy),
        (GuardedScheduler, SchedulerPolicy),
    ):
        for name, member in vars(interface).items():
            if not name.startswith("_") and callable(member):
                assert getattr(guard, name) is not member, name

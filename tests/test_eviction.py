"""What the prompt cache evicts: what it tells policies, and what the built-in ones do."""

import integrity
import pytest
from fake_caches import Ticks, make, make_cache
from mlx_lm.models.cache import QuantizedKVCache

from mlx_lm_ext.interfaces import EvictionPolicy
from mlx_lm_ext.policies.eviction import FIFO, GDSF, LFU, LRU, POLICIES, SLRU, TTL

# Bytes of a token in "KVCache": two layers with keys and values of 32 floats.
TOKEN = 2 * 2 * 32 * 4


def insert(cache, tokens, model="m", cache_type="assistant", kind="KVCache"):
    tokens = list(tokens)
    cache.insert_cache(model, tokens, make(kind, tokens), cache_type=cache_type)
    integrity.check(cache)


def n_found(cache, tokens, model="m"):
    """How many tokens are found for a prompt of ``tokens`` and one more token."""
    tokens = [*tokens, 255]
    return len(tokens) - len(cache.fetch_nearest_cache(model, tokens)[1])


class Recorder(EvictionPolicy):
    """Evicts what is oldest, and records the calls of its methods."""

    name = "recorder"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.events = []

    def note(self, event, entry, *more):
        start = entry.depth - entry.n_tokens
        self.events.append((event, start, entry.depth, *more))

    def on_insert(self, entry):
        self.note("insert", entry)
        entry.data = ["new"]

    def on_hit(self, entry, n_tokens):
        self.note("hit", entry, n_tokens)

    def on_split(self, parent, child):
        assert parent.data is None
        parent.data = child.data
        self.note("parent", parent)
        self.note("child", child)

    def on_remove(self, entry, reason):
        self.note(reason, entry)

    def priority(self, entry):
        return entry.created


def recorded(cache):
    events = cache.eviction.events[:]
    cache.eviction.events.clear()
    return events


def test_policy_is_told_what_happens():
    cache = make_cache(Recorder, 16 * TOKEN)
    insert(cache, b"system")
    insert(cache, b"system one")
    assert recorded(cache) == [("insert", 0, 6), ("insert", 6, 10)]
    assert n_found(cache, b"system on") == 9
    assert recorded(cache) == [("hit", 0, 6, 6), ("hit", 6, 10, 3)]
    insert(cache, b"system one")
    insert(cache, b"sys")
    assert recorded(cache) == []
    insert(cache, b"system two")
    assert recorded(cache) == [
        ("parent", 6, 7),
        ("child", 7, 10),
        ("insert", 7, 10),
    ]
    insert(cache, b"other")
    assert recorded(cache) == [("evicted", 7, 10), ("insert", 0, 5)]


def test_entry_says_what_the_cache_holds():
    cache = make_cache(Recorder)
    insert(cache, b"system", "owner", "system")
    insert(cache, b"system one", "owner", "user")
    system, user = cache.nodes
    assert (system.n_tokens, system.depth, system.cache_type) == (6, 6, "system")
    assert (user.n_tokens, user.depth, user.cache_type) == (4, 10, "user")
    assert (user.nbytes, user.recompute_cost) == (4 * TOKEN, 4)
    assert user.model_key == "owner"
    assert (user.hits, user.last_hit) == (0, user.created)
    n_found(cache, b"system one", "owner")
    assert user.hits == system.hits == 1
    assert user.last_hit == system.last_hit > user.created > system.created


def test_system_prompt_in_a_run_becomes_an_entry_of_its_own():
    cache = make_cache(Recorder)
    insert(cache, b"system one")
    insert(cache, b"system", cache_type="system")
    types = {e.depth: e.cache_type for e in cache.nodes}
    assert types == {6: "system", 10: "assistant"}
    assert {e.depth: e.recompute_cost for e in cache.nodes} == {6: 6, 10: 4}
    assert cache.stats_by_type()["system"] == {"n_sequences": 1, "n_bytes": 6 * TOKEN}
    assert cache.nbytes == 10 * TOKEN


def test_pinned_entries_stay_while_others_can_leave():
    class Pinned(LRU):
        def evictable(self, entry):
            return entry.cache_type != "system"

    cache = make_cache(Pinned, 20 * TOKEN)
    insert(cache, b"system", cache_type="system")
    for text in (b"aaaaaaaaaa", b"bbbbbbbbbb", b"cccccccccc"):
        insert(cache, text)
        assert n_found(cache, text) == 10
    assert n_found(cache, b"system") == 6
    # The bound holds, whatever is pinned.
    cache.reserve(15 * TOKEN)
    assert len(cache) == 0


def test_what_cannot_fit_leaves_the_rest_alone():
    cache = make_cache(LRU, 10 * TOKEN)
    insert(cache, b"short")
    insert(cache, b"much too long")
    insert(cache, b"short, and on")
    assert n_found(cache, b"short, and on") == 5
    cache.reserve(5 * TOKEN)
    insert(cache, b"other")
    assert n_found(cache, b"short") == 0
    assert n_found(cache, b"other") == 5


def test_most_entries_that_it_may_hold():
    cache = make_cache(LRU, max_size=2)
    for text in (b"a", b"b", b"c"):
        insert(cache, text)
    assert [n_found(cache, text) for text in (b"a", b"b", b"c")] == [0, 1, 1]
    assert len(make_cache(max_size=0).nodes) == 0


def test_what_cannot_be_resumed_leaves_with_what_needed_it():
    cache = make_cache(LRU)
    insert(cache, b"chat one", kind="hybrid")
    insert(cache, b"chat two", kind="hybrid")
    # The common prefix has a segment, but no snapshot to resume from.
    assert len(cache) == 3
    cache.trim_to(n_sequences=2)
    assert sorted(e.depth for e in cache.nodes) == [5, 8]
    integrity.check(cache)
    cache.trim_to(n_sequences=1)
    assert len(cache) == cache.nbytes == 0
    integrity.check(cache)


def test_known_sequence_that_is_stored_again_is_used_and_takes_the_new_type():
    cache = make_cache(LRU)
    insert(cache, b"system")
    insert(cache, b"another")
    insert(cache, b"system", cache_type="system")
    assert [e.cache_type for e in cache.nodes] == ["system", "assistant"]
    cache.trim_to(n_sequences=1)
    assert n_found(cache, b"system") == 6


def test_room_made_for_a_branch_takes_what_it_would_branch_from():
    one = make_cache()
    insert(one, b"aaaa", kind="ArraysCache")
    # Room for one snapshot: the common prefix is of no use once both prompts have left.
    cache = make_cache(FIFO, one.nbytes)
    insert(cache, b"aaaa", kind="ArraysCache")
    insert(cache, b"aaab", kind="ArraysCache")
    insert(cache, b"a", kind="ArraysCache")
    assert n_found(cache, b"a") == 1
    assert len(cache) == 1


def test_log_says_when_the_batch_leaves_no_room(caplog):
    cache = make_cache(LRU, 10 * TOKEN)
    cache.reserve(10 * TOKEN)
    assert not caplog.records
    for _ in range(2):
        cache.reserve(11 * TOKEN)
    (record,) = caplog.records
    assert "see --radix-cache-size" in record.message


def test_what_a_sequence_grows_from_stays_while_room_is_made():
    cache = make_cache(FIFO, 16 * TOKEN)
    insert(cache, b"turn one")
    insert(cache, b"another.")
    insert(cache, b"turn one, two.")
    assert n_found(cache, b"turn one, two.") == 14
    assert n_found(cache, b"another.") == 0


def test_caches_of_two_kinds_are_found_apart():
    cache = make_cache()
    insert(cache, b"a long prompt, then", kind="QuantizedKVCache")
    insert(cache, b"a long", kind="KVCache")
    insert(cache, b"a long prompt", kind="hybrid")
    found, _ = cache.fetch_nearest_cache("m", list(b"a long prompt, then."))
    assert type(found[0]) is QuantizedKVCache
    assert n_found(cache, b"a long prompt, the") == 18
    assert cache.stats().tokens == 19 + 6 + 13


def test_pinned_states_of_a_chat_stay():
    class Pinned(LRU):
        def evictable(self, entry):
            return entry.depth != 4

    cache = make_cache(Pinned)
    for n in range(1, 7):
        insert(cache, b"turn" * n, kind="ArraysCache")
    cache.trim_to(n_bytes=cache.nbytes // 2)
    assert n_found(cache, b"turn") == 4
    assert n_found(cache, b"turn" * 2) == 4


def test_long_entry_does_not_shut_out_what_begins_like_it():
    cache = make_cache(LRU, 20 * TOKEN)
    insert(cache, b"<" + b"a" * 18)
    for text in (b"<" + b"b" * 12, b"<" + b"c" * 12):
        assert n_found(cache, text) == 1
        insert(cache, text)
        assert n_found(cache, text) == 13


def test_leaves_are_ranked_in_one_call_and_a_parent_when_it_becomes_a_leaf():
    class Ranking(LRU):
        def __init__(self, args, clock):
            super().__init__(args, clock)
            self.calls = []

        def rank(self, entries):
            self.calls.append([entry.depth for entry in entries])
            return super().rank(entries)

    cache = make_cache(Ranking)
    for text in (b"system", b"system one", b"other", b"system three"):
        insert(cache, text)
    cache.trim_to(n_bytes=cache.nbytes)
    assert cache.eviction.calls == []
    cache.trim_to(n_bytes=0)
    # "system", " ", "one", "three" and "other": the leaves, and twice their parent.
    assert cache.eviction.calls == [[10, 5, 12], [7], [6]]


def test_system_prompt_stays_one_whoever_stores_it_again():
    cache = make_cache()
    insert(cache, b"system")
    insert(cache, b"system", cache_type="system")
    insert(cache, b"system", cache_type="assistant")
    assert [e.cache_type for e in cache.nodes] == ["system"]


def test_states_stay_when_only_entries_are_too_many():
    cache = make_cache()
    for n in range(1, 7):
        insert(cache, b"turn" * n, kind="ArraysCache")
    cache.trim_to(n_sequences=5)
    assert cache.stats().evictions["superseded"] == 0
    assert len(cache) == 5


def test_state_that_prompts_share_is_not_superseded():
    cache = make_cache()
    insert(cache, b"start", kind="ArraysCache")
    insert(cache, b"start, other", kind="ArraysCache")
    for n in range(1, 7):
        insert(cache, b"start" + b"turn" * n, kind="ArraysCache")
    cache.trim_to(n_bytes=cache.nbytes * 3 // 4)
    assert cache.stats().evictions["superseded"] == 2
    assert n_found(cache, b"start, and") == 5


def test_branch_that_would_save_little_is_not_worth_a_state():
    cache = make_cache()
    prompt = b"0123456789abcdef, and so on"
    insert(cache, prompt, kind="ArraysCache")
    assert cache.branch_point("m", list(prompt[:15]) + [0, 0]) is None
    assert cache.branch_point("m", list(prompt[:16]) + [0, 0]) == 16
    # A segment can be cut at any token, so that no snapshot is needed.
    cache = make_cache()
    insert(cache, prompt)
    assert cache.branch_point("m", list(prompt[:16]) + [0, 0]) is None


def test_superseded_states_of_a_chat_leave_before_what_is_of_use():
    cache = make_cache(LRU)
    other = b"another chat"
    insert(cache, other, kind="hybrid")
    insert(cache, b"system", cache_type="system", kind="hybrid")
    turns = [b"system" + b"turn" * n for n in range(1, 8)]
    for turn in turns:
        insert(cache, turn, kind="hybrid")
    cache.trim_to(n_bytes=cache.nbytes - 1)
    integrity.check(cache)
    assert n_found(cache, other) == len(other)
    # The first of the seven snapshots has left; that of the system prompt stays.
    assert n_found(cache, turns[0]) == 6
    assert n_found(cache, turns[1]) == len(turns[1])
    cache.trim_to(n_bytes=cache.nbytes - 1)
    cache.trim_to(n_bytes=cache.nbytes - 1)
    cache.trim_to(n_bytes=cache.nbytes - 1)
    # The last three snapshots stay for the next turn.
    assert [n_found(cache, t) for t in turns[3:]] == [6, *map(len, turns[4:])]
    assert cache.stats().evictions == {"evicted": 0, "expired": 0, "superseded": 4}


def test_chat_whose_states_do_not_fit_together_goes_on():
    one = make_cache()
    insert(one, b"turn one", kind="ArraysCache")
    # Room for one snapshot.
    cache = make_cache(LRU, one.nbytes)
    for n in range(1, 6):
        insert(cache, b"turn one" * n, kind="ArraysCache")
        assert n_found(cache, b"turn one" * n) == 8 * n


def test_expired_entries_leave_with_what_follows_them():
    class Old(LRU):
        def expired(self, now):
            return [e for e in cache.nodes if e.depth == 6]

    cache = make_cache(Old)
    insert(cache, b"system")
    insert(cache, b"system one")
    insert(cache, b"other one")
    cache.expire()
    integrity.check(cache)
    assert [e.depth for e in cache.nodes] == [9]
    assert cache.stats().evictions["expired"] == 2


def test_stats_count_what_was_found_and_saved():
    cache = make_cache()
    insert(cache, b"system")
    for text in (b"system one", b"system two", b"system six"):
        assert n_found(cache, text) >= 6
        insert(cache, text)
    assert n_found(cache, b"nothing") == 0
    stats = cache.stats()
    # The tokens of "system", " ", "one", "t" and so on are each stored once.
    assert (stats.tokens, stats.bytes) == (16, cache.nbytes)
    assert stats.bytes == 16 * TOKEN
    assert stats.bytes_saved == 3 * 10 * TOKEN - stats.bytes
    assert (stats.hits, stats.misses, stats.hit_tokens) == (3, 1, 6 + 7 + 7)
    assert stats.nodes == len(cache) == 5


# The built-in policies


@pytest.mark.parametrize(
    "policy, first",
    [(LRU, b"twice"), (FIFO, b"twice"), (LFU, b"once"), (TTL, b"twice")],
)
def test_which_leaves_first(policy, first):
    cache = make_cache(policy)
    for text in (b"twice", b"once", b"last"):
        insert(cache, text)
    for text in (b"twice", b"twice", b"once", b"last", b"last"):
        n_found(cache, text)
    kept = cache.nodes.copy()
    cache.trim_to(n_sequences=2)
    (gone,) = set(kept) - set(cache.nodes)
    assert bytes(kept[gone].tokens) == first


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_hot_system_prompt_survives_all_but_fifo(policy):
    cache = make_cache(policy, 40 * TOKEN)
    insert(cache, b"system", cache_type="system")
    for i in range(40):
        assert n_found(cache, b"system") in (0, 6)
        text = b"system" + bytes([i]) * 8
        insert(cache, text if n_found(cache, b"system") else bytes([i]) * 8)
    assert cache.stats().evictions["evicted"] > 30
    if policy is not FIFO:
        assert n_found(cache, b"system") == 6


@pytest.mark.parametrize("policy, survives", [(SLRU, True), (LRU, False)])
def test_slru_resists_a_scan(policy, survives):
    cache = make_cache(policy, 40 * TOKEN)
    for text in (b"useful", b"worthy"):
        insert(cache, text)
        assert n_found(cache, text) == 6
    for i in range(20):
        insert(cache, bytes([i]) * 8)
    found = [n_found(cache, text) for text in (b"useful", b"worthy")]
    assert found == ([6, 6] if survives else [0, 0])


def slru_with_used_entries(n_tokens):
    """A cache with room for ``n_tokens``, and five texts of 8 tokens that were used once."""
    cache = make_cache(SLRU, n_tokens * TOKEN)
    texts = [bytes([65 + i]) * 8 for i in range(5)]
    for text in texts:
        insert(cache, text)
        n_found(cache, text)
    return cache, texts


def test_slru_protects_four_fifths_at_most():
    cache, texts = slru_with_used_entries(40)
    # 40 tokens were used and 32 can be protected: the oldest text is evicted.
    insert(cache, b"new one.")
    assert [n_found(cache, text) for text in texts] == [0, 8, 8, 8, 8]
    assert n_found(cache, b"new one.") == 8


def test_slru_gives_what_lost_its_protection_another_chance():
    cache, texts = slru_with_used_entries(48)
    # The first text is older than these two, and is no longer protected.
    insert(cache, b"newer...")
    insert(cache, b"newest..")
    assert [n_found(cache, text) for text in texts] == [0, 8, 8, 8, 8]
    assert n_found(cache, b"newer...") == 8


def test_slru_follows_a_split():
    cache = make_cache(SLRU, 40 * TOKEN)
    insert(cache, b"useful one")
    n_found(cache, b"useful one")
    insert(cache, b"useful two")
    policy = cache.eviction
    assert sorted(e.depth for e in policy.protected) == [7, 10]
    assert policy.protected_bytes == 10 * TOKEN
    cache.trim_to(n_bytes=0)
    assert policy.protected_bytes == 0 and not policy.protected


def test_gdsf_prefers_what_is_used_and_costs_much_for_its_bytes():
    cache = make_cache(GDSF)
    # Snapshots have one size: that of more tokens costs more to make again.
    insert(cache, b"short", kind="ArraysCache")
    insert(cache, b"a long prompt", kind="ArraysCache")
    cache.trim_to(n_sequences=1)
    assert n_found(cache, b"a long prompt") == 13
    insert(cache, b"used often", kind="ArraysCache")
    for _ in range(3):
        n_found(cache, b"used often")
    cache.trim_to(n_sequences=1)
    assert n_found(cache, b"used often") == 10


def test_gdsf_forgets_old_fame():
    cache = make_cache(GDSF, 24 * TOKEN)
    insert(cache, b"old fame")
    for _ in range(5):
        n_found(cache, b"old fame")
    survived = 0
    while n_found_silently(cache, b"old fame"):
        survived += 1
        insert(cache, bytes([survived]) * 8)
    # Each eviction lifts the floor by what one use is worth.
    assert 5 <= survived <= 14


def n_found_silently(cache, tokens):
    return cache.search("m", [*tokens, 255]).n_tokens


def test_ttl_drops_what_was_not_used_in_time():
    clock = Ticks()
    cache = make_cache(TTL, clock=clock)
    insert(cache, b"stays")
    insert(cache, b"leaves")
    clock.now = 15
    assert n_found(cache, b"stays") == 5
    cache.expire()
    assert len(cache) == 2
    clock.now = 30
    cache.expire()
    assert n_found(cache, b"leaves") == 0
    assert n_found(cache, b"stays") == 5
    assert cache.stats().evictions["expired"] == 1

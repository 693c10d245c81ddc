"""What ranks tell each other, and how they notice that one is lost: with threads for ranks."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
from mlx_lm_ext.distributed import connections, group, heartbeat, launch
from mlx_lm_ext.distributed.connections import RankError
from mlx_lm_ext.engine import group_inbox
from mlx_lm_ext.errors import RequestError


class Collective:
    """The sum over the ranks, of which each is a thread."""

    def __init__(self, n):
        self.n, self.barrier, self.given = n, threading.Barrier(n), []

    def __call__(self, values):
        self.given.append(values)
        self.barrier.wait(60)
        sums = [sum(column) for column in zip(*self.given[-self.n :])]
        self.barrier.wait(60)
        return sums


class FakeGroup:
    def __init__(self, rank, size):
        self.ranks = rank, size

    def rank(self):
        return self.ranks[0]

    def size(self):
        return self.ranks[1]


@pytest.fixture
def make_ranks(monkeypatch):
    """Makes ``n`` ranks that are connected."""
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    made = []

    def make(n=2, timeout=60.0):
        collective = Collective(n)

        class Ranks(group.Ranks):
            def share(self, values):
                return collective(values)

        with ThreadPoolExecutor(n) as pool:
            ranks = pool.map(lambda r: Ranks(FakeGroup(r, n), timeout), range(n))
            made.extend(ranks)
        return made

    yield make
    for rank in made:
        close(rank)


def close(rank):
    """End a rank as the end of its process does."""
    for sockets in (rank.connections.decisions, rank.connections.lives):
        for sock in sockets.values():
            # Its threads read from it, which keeps it open.
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()
    for file in rank.connections.files.values():
        file.close()


def reason_of_loss(rank):
    told, reasons = threading.Event(), []
    rank.on_lost(lambda reason: (reasons.append(reason), told.set()))
    assert told.wait(30)
    return reasons[0]


# Decisions


def test_all_ranks_get_what_rank_0_decides(make_ranks):
    first, *others = make_ranks(3)
    made = first.agree("order", lambda: [3, (1, 2), None])
    assert made == [3, (1, 2), None]
    for other in others:
        assert other.agree("order", pytest.fail) == [3, [1, 2], None]


def test_rank_that_asks_for_another_decision_ends_with_an_error(make_ranks):
    first, second = make_ranks()
    first.agree("order", lambda: 1)
    with pytest.raises(
        RankError, match="has to know 'tokens', and rank 0 tells 'order'"
    ):
        second.agree("tokens", pytest.fail)


def test_decision_within_a_decision_is_not_told(make_ranks):
    first, second = make_ranks()
    first.agree("start", lambda: first.agree("place", lambda: 1) + 1)
    first.agree("next", lambda: 5)
    assert second.agree("start", pytest.fail) == 2
    assert second.agree("next", pytest.fail) == 5


def test_refusal_is_raised_on_all_ranks(make_ranks):
    first, second = make_ranks()

    def refuse():
        raise RequestError(400, "not so", "top_k", "code")

    for rank in (first, second):
        with pytest.raises(RequestError, match="not so") as caught:
            rank.agree("sampling", refuse)
        assert (caught.value.status, caught.value.param) == (400, "top_k")
    first.agree("next", lambda: 5)
    assert second.agree("next", pytest.fail) == 5


def test_what_cannot_be_told_is_made_on_rank_0_only(make_ranks):
    first, second = make_ranks()
    assert first.on_first("sampling", lambda: pytest) is pytest
    assert second.on_first("sampling", pytest.fail) is None


def test_least_is_that_of_all_ranks(make_ranks):
    ranks = make_ranks(3)
    values = [5 << 40, (1 << 40) + 7, 1 << 60]
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda rank, value: rank.least(value), ranks, values)
        assert [*found] == [(1 << 40) + 7] * 3


def test_value_that_differs_is_an_error_on_the_rank_that_has_it(make_ranks):
    first, second = make_ranks()
    first.check("digest", 7)
    with pytest.raises(
        RankError, match="digest of rank 1 is 8, and that of rank 0 is 7"
    ):
        second.check("digest", 8)


def test_facts_that_differ_are_named_on_all_ranks(make_ranks):
    ranks = make_ranks(3)
    facts = [
        {"--batch-size": "8", "a": "1"},
        {"--batch-size": "8"},
        {"--batch-size": "4"},
    ]
    wanted = "the ranks differ in --batch-size: rank 0 has 8, and rank 2 has 4"

    def compare(rank, facts):
        with pytest.raises(RankError, match=wanted):
            rank.compare(facts)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compare, ranks, facts))


def test_connection_without_the_key_is_refused():
    """It neither takes the place of a rank nor keeps the ranks from connecting."""
    shared, is_shared = [], threading.Event()

    def share(values):
        if any(values):
            shared.extend(values)
            is_shared.set()
        assert is_shared.wait(30)
        return shared

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connections.Connections, 0, 2, share)
        assert is_shared.wait(30)
        strangers = [
            socket.create_connection(("127.0.0.1", shared[0]), 60) for _ in range(2)
        ]
        strangers[0].sendall(bytes(16) + bytes([1, 0]))
        strangers[1].shutdown(socket.SHUT_WR)
        second = pool.submit(connections.Connections, 1, 2, share).result(60)
        first = first.result(60)
    first.tell("hello")
    assert second.take() == "hello"
    assert strangers[0].recv(1) == b""
    for sock in [*strangers, *first.lives.values(), *first.decisions.values()]:
        sock.close()
    for sock in [*second.lives.values(), *second.decisions.values()]:
        sock.close()
    for file in [*first.files.values(), *second.files.values()]:
        file.close()


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, ""),
        ({"MLX_HOSTFILE": '[["10.0.0.1:32323"], ["10.0.0.2:32324"]]'}, "10.0.0.1"),
        ({"NCCL_HOST_IP": "10.0.0.3"}, "10.0.0.3"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.4:32323"}, "10.0.0.4"),
    ],
)
def test_host_of_rank_0_is_that_of_the_launcher(
    variables, expected, monkeypatch, tmp_path
):
    for name in ("MLX_HOSTFILE", "NCCL_HOST_IP", "MLX_JACCL_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if name == "MLX_HOSTFILE":
            (tmp_path / "hosts").write_text(value)
            value = str(tmp_path / "hosts")
        monkeypatch.setenv(name, value)
    assert connections.address_of_first() == expected


def test_rank_that_follows_keeps_nothing_of_what_has_left():
    told = []
    cache = RadixPromptCache(agree=lambda kind, make: told)
    kv = KVCache()
    kv.update_and_fetch(mx.zeros((1, 1, 3, 4)), mx.zeros((1, 1, 3, 4)))
    cache.insert_cache("model", [1, 2, 3], [kv])
    told = [["evicted", 1]]
    cache.trim_to(n_sequences=0)
    assert (len(cache), cache.left) == (0, [])


# Life and end


def test_end_of_a_rank_is_noticed_by_all(make_ranks):
    first, second, third = make_ranks(3)
    close(second)
    assert reason_of_loss(first) == "rank 1 has ended"
    # It has no connection to that rank.
    assert reason_of_loss(third) == "rank 1 has ended"


def test_reason_of_the_rank_that_fails_is_known_to_all(make_ranks):
    first, second, third = make_ranks(3)
    assert third.fail("rank 2: no memory") == "rank 2: no memory"
    assert reason_of_loss(first) == reason_of_loss(second) == "rank 2: no memory"
    assert first.fail("rank 0: the collective has failed") == "rank 2: no memory"


def test_loss_ends_the_wait_for_a_decision(make_ranks):
    """The rank that would decide may do nothing at all."""
    first, second = make_ranks()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.agree, "order", pytest.fail)
        second.heartbeat.lose("rank 0 has been silent for 3 seconds")
        with pytest.raises(RankError, match="^rank 0 has been silent for 3 seconds$"):
            waiting.result(30)


def test_request_is_kept_if_the_others_cannot_be_told_of_it(monkeypatch):
    """So that its client gets an error."""

    class Lost(group.OneProcess):
        def agree(self, kind, make):
            make()
            raise RankError("rank 1 has ended")

    monkeypatch.setattr(group_inbox, "to_message", lambda request: None)
    inbox, request = group_inbox.GroupInbox(Lost(), None), SimpleNamespace()
    request.cancelled = False
    inbox.put(request)
    with pytest.raises(RankError):
        inbox.take(block=False)
    assert inbox.requests.get(block=False) is request


def test_silent_rank_counts_as_lost(make_ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENCE", 0.5)
    monkeypatch.setattr(heartbeat.Heartbeat, "beat", lambda self: None)
    first, second = make_ranks()
    # Not while the model is loaded.
    first.advance(is_busy=False)
    assert reason_of_loss(first) == "rank 1 has been silent for 0.5 seconds"


def test_rank_whose_steps_do_not_end_counts_as_stuck(make_ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    first, second = make_ranks(timeout=0.2)
    for rank in (first, second, first):
        rank.advance(is_busy=True)
    assert reason_of_loss(first) == "rank 1 has made no progress for 0.2 seconds"


def test_idle_ranks_are_not_stuck(make_ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.01)
    first, second = make_ranks(timeout=0.05)
    for rank in (first, second):
        rank.advance(is_busy=True)
        rank.advance(is_busy=False)
    assert not first.heartbeat.is_lost.wait(0.5)


def test_end_that_was_announced_is_no_loss(make_ranks):
    first, second = make_ranks()
    first.leave()
    close(first)
    assert not second.heartbeat.is_lost.wait(0.5)


def test_signal_to_a_rank_reaches_rank_0(make_ranks):
    first, second = make_ranks()
    assert not first.must_stop
    second.ask_to_stop()
    with pytest.raises(AssertionError):
        # It comes with the next beats at the latest.
        assert not any(
            first.must_stop or first.heartbeat.is_lost.wait(0.1) for _ in range(50)
        )


# What the model has to have


@pytest.mark.parametrize(
    "config, n, is_right",
    [
        (dict(num_attention_heads=9, num_key_value_heads=3), 3, True),
        (dict(num_attention_heads=9, num_key_value_heads=3), 2, False),
        (dict(num_attention_heads=8, num_key_value_heads=2), 4, False),
        (dict(num_attention_heads=8, num_key_value_heads=1, kv_lora_rank=4), 4, True),
        ({}, 2, True),
    ],
)
def test_heads_have_to_divide_among_the_ranks(config, n, is_right):
    if is_right:
        launch.check_heads(config, n)
    else:
        with pytest.raises(ValueError, match=f"cannot be divided among {n} ranks"):
            launch.check_heads(config, n)


def test_end_tokens_of_a_model_are_compared(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    before = launch.weights(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    after = launch.weights(tmp_path)
    assert {k for k in before if before[k] != after[k]} == {
        "the model's generation_config.json"
    }


def test_digest_of_weights_sees_each_part_of_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    digests = set()
    for i in (None, 0, 150_000, 299_999):
        content = bytearray(300_000)
        if i is not None:
            content[i] = 1
        file.write_bytes(content)
        digests.add(launch.weights(tmp_path)["the model's model.safetensors"])
    assert len(digests) == 4

"""The built-in scheduler policies, on a clock that the tests turn."""

import random
from argparse import Namespace

import pytest

from mlx_lm_ext.interfaces import RequestInfo, SchedulerView
from mlx_lm_ext.policies.scheduling import (
    FCFS,
    LPM,
    POLICIES,
    SJF,
    Fair,
    Priority,
)

ARGS = Namespace(prefill_budget=256, max_wait=30.0)


def make(policy):
    return policy(ARGS, lambda: 0.0)


def request(arrival=0.0, n_prompt=10, max_tokens=10, n_known=0, n_matched=0, **body):
    args = Namespace(max_tokens=max_tokens)
    return RequestInfo("id", args, body, arrival, n_prompt, n_known, n_matched)


def view(now=0.0, running=(), **more):
    return SchedulerView(now, tuple(running), 1, **more)


def order(policy, waiting, now=0.0, running=()):
    """The places in the list of those who go first to last."""
    ordered = policy.order(waiting, view(now, running))
    return (
        list(range(len(waiting)))
        if ordered is None
        else list(map(waiting.index, ordered))
    )


def test_fcfs_keeps_the_order_of_arrival():
    assert order(make(FCFS), [request(n_prompt=n) for n in (3, 1, 2)]) == [0, 1, 2]


def test_lpm_prefers_what_the_cache_has_most_of():
    waiting = [request(n_known=n) for n in (0, 500, 20, 500)]
    assert order(make(LPM), waiting) == [1, 3, 2, 0]


def test_lpm_keeps_the_order_of_arrival_of_a_long_list():
    waiting = [request(n_known=n) for n in range(129)]
    assert make(LPM).order(waiting, view()) is None
    assert make(LPM).order(waiting[:128], view()) == waiting[127::-1]


def test_sjf_prefers_what_has_least_to_run():
    jobs = [(100, 10), (10, 50), (20, 20), (50, 10)]
    waiting = [request(n_prompt=n, max_tokens=m) for n, m in jobs]
    assert order(make(SJF), waiting) == [2, 1, 3, 0]


def test_priority_prefers_the_lowest():
    waiting = [request(priority=p) for p in (5, 0, -1)] + [request()]
    assert order(make(Priority), waiting) == [2, 1, 3, 0]


@pytest.mark.parametrize("policy", [LPM, SJF, Priority])
def test_nobody_waits_longer_than_the_bound(policy):
    """One is served each second, and always something better comes."""
    p = make(policy)
    worst = request(0.0, n_prompt=10_000, priority=100)
    waiting = [worst]
    for now in range(1, 200):
        waiting.append(request(float(now), n_known=50, priority=-1))
        first = p.order(waiting, view(float(now)))[0]
        if first is worst:
            break
        waiting.remove(first)
    # Nobody had come before it.
    assert now == 30


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_everyone_is_served_once_and_in_bounded_time(policy):
    """More come than can be served, for a while."""
    rng = random.Random(3)
    p = make(policy)
    arrivals = [
        request(
            float(i // 2),
            rng.randint(1, 1000),
            rng.randint(1, 100),
            priority=rng.randint(-2, 2),
            user=rng.choice("abc"),
        )
        for i in range(200)
    ]
    waiting, served, waits = [], [], []
    for now in range(400):
        waiting += [r for r in arrivals if r.arrival == now]
        if waiting:
            ordered = p.order(list(waiting), view(float(now))) or waiting
            assert sorted(map(id, ordered)) == sorted(map(id, waiting))
            first = ordered[0]
            p.on_tokens([(first, first.max_tokens)])
            first.n_generated = first.max_tokens
            p.on_finish(first)
            waiting.remove(first)
            served.append(first)
            waits.append(now - first.arrival)
    assert len(set(map(id, served))) == len(served) == 200
    # At most 100 wait when the last one comes.
    assert max(waits) <= 100 + ARGS.max_wait


def serve(policy, waiting, n):
    """Serve ``n`` requests one after the other; gives their users."""
    users = []
    for _ in range(n):
        first = policy.order(waiting, view())[0]
        waiting.remove(first)
        users.append(first.user)
        policy.on_tokens([(first, first.max_tokens)])
    return "".join(users)


def test_fair_shares_between_users_however_many_they_ask():
    waiting = [request(i, user="a") for i in range(20)]
    waiting += [request(20 + i, user="b") for i in range(3)]
    assert serve(make(Fair), waiting, 8) == "abababaa"


def test_fair_counts_tokens_and_not_requests():
    waiting = [request(i, max_tokens=35, user="a") for i in range(20)]
    waiting += [request(20 + i, user="b") for i in range(20)]
    # 10 + 2 x 35 and 10 + 2 x 10.
    assert serve(make(Fair), waiting, 9).count("b") == 6


def test_fair_counts_what_a_hit_saves():
    waiting = [request(i, n_prompt=100, user="a") for i in range(20)]
    waiting += [
        request(20 + i, n_prompt=100, n_matched=80, user="b") for i in range(20)
    ]
    # 100 + 20 and 20 + 20.
    assert serve(make(Fair), waiting, 8).count("b") == 6


def test_fair_lets_nobody_save_up_a_share():
    policy = make(Fair)
    serve(policy, [request(i, user="a") for i in range(20)], 10)
    waiting = [request(i, user="a") for i in range(20)]
    waiting += [request(20 + i, user="late") for i in range(20)]
    users = serve(policy, waiting, 10)
    assert users.count("late") in (5, 6)


def test_fair_remembers_who_was_served_and_comes_back():
    policy = make(Fair)
    assert serve(policy, [request(max_tokens=500, user="a"), request(1, user="b")], 2)
    assert serve(policy, [request(user="b")], 1) == "b"
    waiting = [request(user="a"), *(request(1 + i, user="b") for i in range(3))]
    assert serve(policy, waiting, 4) == "bbba"


def test_fair_forgets_users_who_do_not_come_back():
    policy = make(Fair)
    for i in range(200):
        serve(policy, [request(user=str(i)), request(user="steady")], 2)
    assert len(policy.served) < 20


def test_prefill_is_limited_while_streams_run():
    policy = make(FCFS)
    assert policy.prefill_tokens(view()) is None
    streaming = request()
    assert policy.prefill_tokens(view(running=[streaming])) is None
    streaming.n_generated = 1
    assert policy.prefill_tokens(view(running=[request(), streaming])) == 256
    assert policy.prefill_tokens(view(running=[streaming], gap_tokens=9)) == 9
    unset = FCFS(Namespace(prefill_budget=None), lambda: 0.0)
    assert unset.prefill_tokens(view(running=[streaming], gap_tokens=999)) == 999

"""Replays of traces: the engine without a model, on a clock that is simulated."""

import random
from types import SimpleNamespace

import pytest
from helpers import plugin, read, saying, submit

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.bench.arrivals import Arrival, Outcome, expand, length
from mlx_lm_ext.bench.fit_costs import fit_costs
from mlx_lm_ext.bench.generators import GENERATORS, generate
from mlx_lm_ext.bench.replay import RECORDED, hints, main
from mlx_lm_ext.bench.replay_figures import fairness, hit_ratio
from mlx_lm_ext.bench.simulated_engine import Costs, SimulatedBatch, replay
from mlx_lm_ext.interfaces import EvictionPolicy, RequestStats
from mlx_lm_ext.policies import eviction, scheduling
from mlx_lm_ext.policies.loading import Plugins

COSTS = Costs(step=0.05, row=0.005, token=0.004)
SCHEDULERS = [policy.name for policy in scheduling.POLICIES]
EVICTIONS = [policy.name for policy in eviction.POLICIES]


def run(arrivals, *argv, bytes_per_token=1, costs=COSTS, **hooks):
    """How the requests went, in the order of the requests."""
    args = make_parser().parse_args(argv)
    plugins = Plugins(autoload=False)
    if hooks:
        plugins.add("test", lambda: plugin(**hooks), "tests", "0")
    outcomes = replay(arrivals, args, plugins, costs, bytes_per_token)
    return sorted(outcomes, key=lambda o: o.arrival)


def cached(outcomes):
    return [o.stats.cached_tokens for o in outcomes]


# The engine


def test_a_request_alone_takes_what_the_model_costs():
    (outcome,) = run([Arrival(0.0, [(1, 1001)], [(2, 20)])])
    # The last token of the prompt runs with the decoding.
    first = 1000 * COSTS.token + COSTS.step + COSTS.row
    assert outcome.stats.queue_seconds == 0
    assert outcome.stats.ttft == pytest.approx(first)
    end = first + 19 * (COSTS.step + COSTS.row)
    assert outcome.stats.seconds == pytest.approx(end)


def test_rows_decode_together():
    alone, *_, last = (
        run([Arrival(0.0, [(1, 2)], [(i, 100)]) for i in range(2, 2 + n)])[-1]
        for n in (1, 8)
    )
    more = last.stats.seconds - alone.stats.seconds
    # 100 steps of 7 rows more, and what they wait for each other's prompts.
    assert more == pytest.approx(100 * 7 * COSTS.row, rel=0.1)


def test_a_replay_gives_the_same_times_again():
    arrivals = generate("bursts", 60, 1.0, 0.5, seed=3)
    flags = ["--scheduler", "fair", "--radix-cache-size", "20000"]
    assert run(arrivals, *flags) == run(arrivals, *flags)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("memory", [[], ["--max-kv-bytes", "3000"]])
def test_every_request_ends_once_with_its_answer(scheduler, memory, monkeypatch):
    preempted = []
    preempt = SimulatedBatch.preempt
    monkeypatch.setattr(
        SimulatedBatch,
        "preempt",
        lambda batch, request: preempted.append(preempt(batch, request)),
    )
    rng = random.Random(scheduler)
    arrivals = [
        Arrival(
            i / 3 if i < 46 else 50 + i / 1000,
            [(rng.randint(1, 5), rng.randint(1, 400)), (10 + i, rng.randint(1, 300))],
            # After many short answers, four long ones.
            [(1000 + i, 900 if i >= 46 else rng.randint(1, 60))],
            user=rng.choice("abc"),
            priority=rng.randint(-2, 2),
            max_tokens=rng.choice([None, 1000]),
        )
        for i in range(50)
    ]
    outcomes = run(arrivals, "--scheduler", scheduler, *memory)
    assert bool(preempted) == bool(memory)
    assert [o.arrival for o in outcomes] == [a.seconds for a in arrivals]
    for arrival, outcome in zip(arrivals, outcomes):
        stats = outcome.stats
        assert outcome.user == arrival.user
        assert stats.prompt_tokens == length(arrival.prompt)
        assert stats.completion_tokens == length(arrival.answer)
        assert 0 <= stats.queue_seconds <= stats.ttft <= stats.seconds
        assert stats.finish_reason == "stop"


def test_a_prompt_that_goes_on_after_an_answer_finds_its_kv():
    first, answer = [(1, 100)], [(2, 50)]
    second = first + answer + [(3, 10)]
    arrivals = [Arrival(0.0, first, answer), Arrival(100.0, second, [(4, 5)])]
    # The last token of an answer is not run.
    assert cached(run(arrivals)) == [0, 149]


def test_a_request_with_no_time_for_its_answer_has_failed():
    arrivals = [Arrival(0.0, [(1, 10)], [(2, 1000)])]
    (outcome,) = run(arrivals, "--request-timeout", "5")
    assert outcome.stats.finish_reason == "error"
    assert 5 <= outcome.stats.seconds <= 5 + COSTS.step + COSTS.row


def test_a_policy_that_fails_ends_the_replay():
    class Broken(EvictionPolicy):
        name = "broken"

        def priority(self, entry):
            raise ArithmeticError

    arrivals = [Arrival(10.0 * i, [(1 + i, 1000)], [(0 + 9, 5)]) for i in range(4)]
    hooks = dict(mlx_lm_register_eviction_policies=lambda: [Broken])
    flags = ["--eviction-policy", "broken", "--radix-cache-size", "2000"]
    with pytest.raises(RuntimeError, match="eviction policy 'broken' has failed"):
        run(arrivals, *flags, **hooks)


# The cache


def asked(order):
    """Requests for documents of 1,000 tokens, one long after the other, and each with the same
    answer as before."""
    return [
        Arrival(100.0 * i, [(ord(name), 1000)], [(100 + ord(name), 5)])
        for i, name in enumerate(order)
    ]


def test_lru_keeps_what_was_used_last_and_fifo_what_was_stored_last():
    # There is room for three of them while none runs, and for two beside one that runs.
    flags = ["--radix-cache-size", "3300", "--eviction-policy"]
    arrivals = asked("ABACDA")
    assert cached(run(arrivals, *flags, "lru")) == [0, 0, 999, 0, 0, 999]
    assert cached(run(arrivals, *flags, "fifo")) == [0, 0, 999, 0, 0, 0]


def test_what_expires_leaves_while_nothing_runs():
    flags = ["--eviction-policy", "ttl", "--cache-ttl"]
    assert cached(run(asked("AA"), *flags, "50")) == [0, 0]
    assert cached(run(asked("AA"), *flags, "150")) == [0, 999]


def test_limits_are_for_as_many_tokens_as_with_a_real_model():
    arrivals = asked("ABAB")
    for bytes_per_token in (1, 1000):
        for n_tokens, found in ((4000, 999), (1900, 0)):
            flags = ["--radix-cache-size", str(n_tokens * bytes_per_token)]
            outcomes = run(arrivals, *flags, bytes_per_token=bytes_per_token)
            assert cached(outcomes) == [0, 0, found, found]


def test_policies_see_which_part_of_a_prompt_an_entry_is():
    seen = set()

    class Watching(EvictionPolicy):
        name = "watching"

        def on_insert(self, entry):
            seen.add((entry.cache_type, entry.n_tokens))

        def priority(self, entry):
            return 0

    segments = (("system", 300), ("user", 100))
    arrivals = [Arrival(0.0, [(1, 300), (2, 100)], [(3, 5)], segments=segments)]
    run(
        arrivals,
        "--eviction-policy",
        "watching",
        mlx_lm_register_eviction_policies=lambda: [Watching],
    )
    assert ("system", 300) in seen


def conversations(rng, n):
    """Chats that share beginnings, with tokens that a tiny model has."""

    def text(most):
        return [(rng.randint(20, 200), 1) for _ in range(rng.randint(1, most))]

    systems, chats = [text(150) for _ in range(4)], []
    for i in range(n):
        if not chats or rng.random() < 0.4:
            chats.append(rng.choice(systems))
        j = rng.randrange(len(chats))
        prompt, answer = chats[j] + text(40), text(30)
        chats[j] = prompt + answer
        yield Arrival(10.0 * i, prompt, answer)


@pytest.mark.parametrize(
    "policy",
    [n if n == "lru" else pytest.param(n, marks=pytest.mark.slow) for n in EVICTIONS],
)
def test_as_many_tokens_come_from_the_cache_as_with_a_real_model(policy, start_engine):
    arrivals = [*conversations(random.Random(policy), 40)]
    n_bytes = 512 * 1200
    flags = ["--radix-cache-size", str(n_bytes), "--eviction-policy", policy]
    say = saying(lambda request: request.body["script"])
    engine = start_engine("llama", "--use-prompt-cache", *flags, plugin=say)
    found = []
    for arrival in arrivals:
        script = expand(arrival.answer)
        job = submit(
            engine, expand(arrival.prompt), max_tokens=len(script), script=script
        )
        assert read(job) == script
        found.append(job.n_matched)
    bytes_per_token = engine.batch.kv_memory.nbytes(1, 256) // 256
    assert bytes_per_token == 512
    outcomes = run(arrivals, *flags, bytes_per_token=bytes_per_token)
    assert cached(outcomes) == found
    # Something was found, and something had left.
    n_tokens = sum(length(a.prompt) for a in arrivals)
    assert 0.2 < hit_ratio(outcomes) == sum(found) / n_tokens
    assert cached(run(arrivals)) > found


# The figures


def outcome(arrival, user, queue, ttft, seconds, n_prompt=100, n_tokens=100):
    stats = RequestStats("stop", queue, ttft, seconds, n_prompt, 0, n_tokens)
    return Outcome(arrival, user, stats)


def test_users_who_get_the_same_while_they_wait_are_treated_fairly():
    both = [outcome(0.0, user, 100, 101, 102) for user in "ab"]
    running = [outcome(0.0, user, 0, 0, 100) for user in "ab"]
    assert fairness(both + running, 10) == pytest.approx(1)


def test_of_two_users_who_wait_one_gets_all():
    both = [outcome(0.0, user, 100, 101, 102) for user in "ab"]
    assert fairness([*both, outcome(0.0, "a", 0, 0, 100)], 10) == pytest.approx(
        0.5, abs=0.02
    )


def test_who_waits_for_nothing_is_not_treated_unfairly():
    few, many = outcome(0.0, "a", 0, 1, 100), outcome(0.0, "b", 50, 60, 100)
    assert fairness([few, many, outcome(0.0, "b", 0, 0, 100)], 10) is None


def test_fair_scheduler_is_fairer_than_order_of_arrival():
    # One user floods the server, and another asks now and then.
    arrivals = [
        Arrival(0.1 * i, [(1 + i, 50)], [(1000 + i, 50)], user="a") for i in range(150)
    ]
    arrivals += [
        Arrival(2.0 + i, [(200 + i, 50)], [(2000 + i, 50)], user="b") for i in range(40)
    ]
    arrivals.sort(key=lambda a: a.seconds)
    first, fair = (
        run(arrivals, "--batch-size", "4", "--scheduler", name)
        for name in ("fcfs", "fair")
    )
    assert fairness(fair, 5) > fairness(first, 5) + 0.05


# Costs


@pytest.mark.parametrize("costs", [COSTS, Costs(0.02, 0.0004, 0.001)])
def test_costs_are_found_in_the_times_of_requests(costs):
    outcomes = run(generate("chats", 80, 0.3, 1.0, seed=0), costs=costs)
    fitted = fit_costs(outcomes)
    assert fitted.step == pytest.approx(costs.step, rel=0.1)
    assert fitted.row == pytest.approx(costs.row, rel=0.1)
    assert fitted.token == pytest.approx(costs.token, rel=0.25)


def test_costs_cannot_be_found_in_a_few_requests():
    with pytest.raises(ValueError, match="8 or more recorded answers of 4 or more"):
        fit_costs([outcome(0.0, "a", 0, 1, 2)] * 7)


# Generators


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_give_the_means_that_they_name(name):
    arrivals = generate(name, 4000, 1.0, 1.0, seed=0)
    assert arrivals == generate(name, 4000, 1.0, 1.0, seed=0)
    assert arrivals != generate(name, 4000, 1.0, 1.0, seed=1)
    assert [a.seconds for a in arrivals] == sorted(a.seconds for a in arrivals)
    answers = sum(length(a.answer) for a in arrivals) / len(arrivals)
    wanted = dict(chats=214.5, agents=182, documents=149, bursts=214.5)[name]
    assert answers == pytest.approx(wanted, rel=0.1)
    for a in arrivals:
        assert not a.segments or length(a.segments) == length(a.prompt)


def test_chats_go_on_after_their_answers():
    arrivals = generate("chats", 2000, 1.0, 1.0, seed=0)
    turns = {}
    for a in arrivals:
        before = turns.setdefault(a.user, [])
        if before:
            known = before[-1].prompt + before[-1].answer
            assert a.prompt[: len(known)] == known
        before.append(a)
    assert 1.8 < len(arrivals) / len(turns) < 2.2


# The command


def test_the_table_has_a_row_for_each_pair_of_policies(capsys, tmp_path):
    plot = tmp_path / "replay.png"
    argv = ["bursts", "--requests", "5", "--eviction-policy", "lru,gdsf"]
    argv += ["--scheduler", "fcfs", "--scheduler", "fair", "--plot", str(plot)]
    main(argv)
    head, _, *rows, hint = capsys.readouterr().out.splitlines()
    assert hint.startswith("fairness: there is none")
    assert head.startswith("| policies | hit ratio | median TTFT (s) | p99 TTFT (s) |")
    assert [row.split(" | ")[0] for row in rows] == [
        "| lru, fcfs",
        "| lru, fair",
        "| gdsf, fcfs",
        "| gdsf, fair",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fit_costs, n", [(False, 1), (True, 0)])
def test_recorded_times_are_said_to_be_of_another_machine(fit_costs, n):
    args = SimpleNamespace(fit_costs=fit_costs)
    row = {"fairness": 1.0}
    lines = hints(args, {RECORDED: row, "lru, fcfs": row})
    assert sum("--fit-costs" in line for line in lines) == n


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["no.jsonl"],
            "error: there is no file no.jsonl; what is generated is chats, ",
        ),
        (["chats", "--scheduler", "x"], "error: --scheduler must be one of fair, "),
        (["chats", "--kv-bits", "8"], "--kv-bits: requests that run one at a time"),
        (["chats", "--port", "80"], "unrecognized arguments: --port 80"),
        (["chats", "--fit-costs"], "or more recorded answers of 4 or more tokens, and"),
        (["chats", "--scheduler", "fcfs,,fair"], "'fcfs,,fair' has an empty name"),
        (["chats", "--length-scale", "inf"], "--length-scale: inf must be at most"),
        (["chats", "--requests", "0"], "--requests: 0 must be at least 1"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    text = str(exit.value.code) + capsys.readouterr().err
    assert message in text and text.count("\n") <= 1

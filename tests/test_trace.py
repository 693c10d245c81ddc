"""``--record-trace``: what is written of requests, and that it can be replayed."""

import json
import math
import random
from queue import SimpleQueue

import pytest
from helpers import call, complete, plugin

from mlx_lm_ext.arguments import make_parser, parse_arguments
from mlx_lm_ext.bench.arrivals import expand
from mlx_lm_ext.bench.replay import main
from mlx_lm_ext.bench.simulated_engine import Costs, replay
from mlx_lm_ext.bench.traces import read_trace
from mlx_lm_ext.interfaces import RequestInfo, RequestStats
from mlx_lm_ext.plugins.trace import BLOCK, Recorder
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.request import Request

FIELDS = {
    "timestamp",
    "input_length",
    "output_length",
    "hash_ids",
    "output_hash_ids",
    "token_hashes",
    "cache_key",
    "block_size",
    "segments",
    "user",
    "priority",
    "max_tokens",
    "finish_reason",
    "cached_tokens",
    "queue_ms",
    "ttft_ms",
    "total_ms",
}
SECRETS = ["marmalade", "Paddington", "sesame"]


@pytest.fixture
def record(start_server, tmp_path):
    """Starts a server that records a trace; gives its port, and what waits for so many lines
    and gives the file."""
    ends = SimpleQueue()
    # Called after the hook that records.
    hook = plugin(trylast=True, mlx_lm_request_finished=lambda stats: ends.put(stats))
    engine, port = start_server("llama", "--use-prompt-cache", plugin=hook)
    path = tmp_path / "trace.jsonl"
    engine.cli_args.record_trace = Recorder(str(path))

    def recorded(n):
        for _ in range(n):
            ends.get(timeout=60)
        return path

    return port, recorded


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat(port, *said, **body):
    """An answer to what was said in turn by the user and the assistant."""
    roles = ["system", *["user", "assistant"] * len(said)]
    messages = [dict(role=r, content=c) for r, c in zip(roles, said)]
    body |= dict(messages=messages, max_tokens=body.get("max_tokens", 20))
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]


def conversation(port, **body):
    """A chat of three turns; gives the usage of each."""
    said, usages = ["Be kind to bears from Peru. " * 9], []
    for question in ("Do you like marmalade?", "And why?", "Who is Paddington?"):
        said.append(question)
        answer, usage = chat(port, *said, **body)
        said.append(answer)
        usages.append(usage)
    return usages


def test_a_line_tells_lengths_times_and_who_asked(record):
    port, recorded = record
    usages = conversation(port, user="sesame", priority=3)
    written = lines(recorded(3))
    assert [set(line) for line in written] == [FIELDS] * 3
    for line, usage in zip(written, usages):
        assert line["input_length"] == usage["prompt_tokens"]
        assert line["output_length"] == usage["completion_tokens"]
        details = usage["prompt_tokens_details"]
        assert line["cached_tokens"] == details["cached_tokens"]
        assert line["finish_reason"] in ("length", "stop")
        assert line["priority"] == 3 and line["max_tokens"] == 20
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
        n_blocks = -(-line["input_length"] // BLOCK)
        assert len(line["hash_ids"]) == n_blocks and line["block_size"] == BLOCK
        kinds, lengths = zip(*line["segments"])
        assert kinds[0] == "system" and sum(lengths) == line["input_length"]
    times = [line["timestamp"] for line in written]
    assert times == sorted(times)
    assert len({line["user"] for line in written}) == 1


def test_no_text_and_no_token_is_written(record):
    port, recorded = record
    conversation(port, user="sesame")
    complete(port, "marmalade", max_tokens=5, user="sesame", cache_salt="Paddington")
    path = recorded(4)
    text = path.read_text()
    assert not [word for word in SECRETS if word in text]
    for line in lines(path):
        # The words that a line may have are those of the server.
        words = [line.pop("finish_reason"), *(kind for kind, _ in line.pop("segments"))]
        assert set(words) <= {"length", "stop", "system", "user", "assistant"}
        assert int(line.pop("user"), 16) >= 0
        letters = line.pop("token_hashes")
        assert len(letters) == line["input_length"] + line["output_length"]
        hashes = line.pop("hash_ids") + line.pop("output_hash_ids")
        # Token ids of the model are below 300.
        assert all(type(h) is int and h > 300 for h in hashes)
        assert all(type(value) in (int, float) for value in line.values())


def a_request(prompt, generated=(), **body):
    request = Request.__new__(Request)
    vars(request).update(
        prompt=list(prompt),
        generated=list(generated),
        segments=[list(prompt)],
        segment_types=["user"],
        body=body,
        arrival=1.0,
        key_name=None,
        shares_cache=False,
        args=make_parser().parse_args([]),
        model=type("Model", (), dict(key=("model", None, None))),
    )
    return request


def described(recorder, *args, **body):
    request = a_request(*args, **body)
    stats = RequestStats("stop", 0.1, 0.2, 0.3, 0, 0, len(request.generated))
    return recorder.describe(request, stats)


def test_equal_hashes_mean_equal_beginnings(tmp_path):
    recorder = Recorder(str(tmp_path / "trace"))
    first = described(recorder, range(100))["hash_ids"]
    assert described(recorder, range(100))["hash_ids"] == first
    assert described(recorder, range(64))["hash_ids"] == first[:4]
    # One token in the third block changes it and all that follow.
    other = [*range(40), 7, *range(41, 100)]
    hashes = described(recorder, other)["hash_ids"]
    assert [a == b for a, b in zip(hashes, first)] == [True] * 2 + [False] * 5
    # A later block is not known by its tokens alone.
    assert not {*described(recorder, range(16, 100))["hash_ids"]} & {*first}


def test_the_next_prompt_has_the_hashes_of_the_answer(tmp_path):
    recorder = Recorder(str(tmp_path / "trace"))
    first = described(recorder, range(40), range(40, 80))
    second = described(recorder, range(90))
    assert first["hash_ids"][:2] + first["output_hash_ids"] == second["hash_ids"][:5]


def test_requests_that_share_no_kv_share_no_hashes(tmp_path):
    recorder = Recorder(str(tmp_path / "trace"))
    plain = described(recorder, range(64))["hash_ids"]
    salted = described(recorder, range(64), cache_salt="a")["hash_ids"]
    assert not {*plain} & {*salted}
    # Another start of the server has an empty cache, and a salt of its own.
    again = described(Recorder(str(tmp_path / "trace")), range(64))["hash_ids"]
    assert not {*plain} & {*again}


def test_a_recorded_run_finds_as_much_when_it_is_replayed(record):
    port, recorded = record
    for user in "ab":
        conversation(port, user=user)
    rng = random.Random(0)
    for _ in range(3):
        text = "".join(rng.choices("abcdefgh", k=200))
        for _ in range(2):
            complete(port, text, max_tokens=10)
    arrivals = read_trace(recorded(12))
    args = make_parser().parse_args([])
    costs = Costs(1e-6, 0.0, 0.0)
    outcomes = replay(arrivals, args, Plugins(autoload=False), costs, 512)
    measured = [a.measured.stats for a in arrivals]
    assert len(outcomes) == len(measured) == 12
    assert sum(stats.cached_tokens for stats in measured) > 1000
    for outcome, stats in zip(outcomes, measured):
        assert outcome.stats.prompt_tokens == stats.prompt_tokens
        assert outcome.stats.completion_tokens == stats.completion_tokens
        # The letter of a token may be that of another, but hardly three in a row.
        assert 0 <= outcome.stats.cached_tokens - stats.cached_tokens < 3
    exact = [
        o.stats.cached_tokens == s.cached_tokens for o, s in zip(outcomes, measured)
    ]
    assert sum(exact) > 6


def written_trace(tmp_path, *requests):
    """The requests of a recorded trace."""
    recorder = Recorder(str(tmp_path / "trace.jsonl"))
    # The letters are the same in each run of the tests.
    recorder.salt = bytes(16)
    for request in requests:
        stats = RequestStats("stop", 0.1, 0.2, 0.3, 0, 0, len(request.generated))
        recorder.record(request, stats)
    return read_trace(tmp_path / "trace.jsonl")


def n_alike(a, b):
    same = [x == y for x, y in zip(a, b)]
    return [*same, False].index(False)


def test_prompts_part_at_the_same_token_as_they_did(tmp_path):
    lengths = [0, 1, 5, 16, 17, 31, 32, 50, 77]
    prompts = [[*range(n), *range(1000 + n, 1100)] for n in lengths]
    arrivals = written_trace(tmp_path, *map(a_request, prompts))
    tokens = [expand(a.prompt) for a in arrivals]
    for i, prompt in enumerate(prompts):
        assert len(tokens[i]) == len(prompt)
        for j, other in enumerate(prompts[:i]):
            assert n_alike(tokens[i], tokens[j]) == n_alike(prompt, other)


def test_prompts_go_on_after_answers_that_end_within_a_block(tmp_path):
    turns = [
        a_request(range(21), range(21, 25)),
        a_request(range(40), range(40, 41)),
        # Another answer to the first prompt.
        a_request(range(21), range(300, 340)),
    ]
    first, second, third = written_trace(tmp_path, *turns)
    whole = expand(first.prompt + first.answer)
    assert expand(second.prompt)[:25] == whole
    assert first.prompt == third.prompt
    assert n_alike(whole, expand(third.prompt + third.answer)) == 21


def test_runs_are_as_long_as_prompts_are_alike(tmp_path):
    (alone,) = written_trace(tmp_path, a_request(range(1600)))
    assert len(alone.prompt) == 100


def test_table_begins_with_what_was_recorded(record, capsys):
    port, recorded = record
    for _ in range(3):
        conversation(port)
    main([str(recorded(9)), "--fit-costs"])
    costs, _, _, _, first, second, *_hints = capsys.readouterr().out.splitlines()
    assert costs.startswith("fitted: --step-seconds ")
    assert first.startswith("| recorded | 0.")
    assert second.startswith("| lru, fcfs | 0.")


def test_a_trace_goes_on_in_the_file_that_is_there(record):
    port, recorded = record
    complete(port, "hello", max_tokens=2)
    path = recorded(1)
    Recorder(str(path))
    assert len(lines(path)) == 1


@pytest.mark.parametrize("path", ["no/such/folder/trace.jsonl", "."])
def test_a_file_that_cannot_be_written_ends_the_start(path, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--record-trace", path])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --record-trace: the file cannot be written: " in line


def test_the_flag_is_one_of_the_server(tmp_path):
    args, _ = parse_arguments([])
    assert args.record_trace is None
    path = tmp_path / "trace.jsonl"
    args, _ = parse_arguments(["--record-trace", str(path)])
    assert path.exists()


# Traces of others


def write(tmp_path, *objects):
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)) + "\n")
    return path


def test_traces_of_mooncake_have_blocks_of_512_tokens_and_milliseconds(tmp_path):
    # From conversation_trace.jsonl.
    hashes = [0, *range(14, 28)]
    path = write(
        tmp_path,
        dict(timestamp=3000, input_length=915, output_length=355, hash_ids=[0, 462]),
        dict(timestamp=0, input_length=7322, output_length=490, hash_ids=hashes),
    )
    first, second = read_trace(path)
    assert (first.seconds, second.seconds) == (0, 3)
    a, b = expand(first.prompt), expand(second.prompt)
    assert (len(a), len(b)) == (7322, 915)
    assert a[:512] == b[:512] and not {*a[512:]} & {*b[512:]}
    answers = expand(first.answer), expand(second.answer)
    assert [*map(len, answers)] == [490, 355]
    assert len({*a} | {*b} | {*answers[0]} | {*answers[1]}) == 18


def test_traces_of_alibaba_have_blocks_of_16_tokens_and_seconds(tmp_path):
    line = dict(chat_id=159, parent_chat_id=55, timestamp=61.114, input_length=40)
    line |= dict(output_length=132, type="text", turn=2, hash_ids=[1089, 1090, 1091])
    other = line | dict(timestamp=62.114, hash_ids=[1089, 1092, 1093])
    first, second = read_trace(write(tmp_path, line, other))
    assert second.seconds == pytest.approx(1)
    a, b = expand(first.prompt), expand(second.prompt)
    assert a[:16] == b[:16] and not {*a[16:]} & {*b[16:]}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(timestamp=None), "line 2: "),
        (dict(hash_ids=None), "line 2: "),
        (dict(input_length=0), "line 2: input_length must be an integer from 1 to"),
        (dict(timestamp=math.nan), "line 2: timestamp must be a number from 0 to"),
        (dict(timestamp=-1e20), "line 2: timestamp must be a number from 0 to"),
        (dict(timestamp=1e14), ": the timestamps are more than a year apart"),
        (dict(output_length=1.5), "line 2: output_length must be an integer from 0"),
        (dict(output_length=True), "line 2: output_length must be an integer from 0"),
        (dict(input_length=10**29), "line 2: input_length must be an integer from 1"),
        (dict(block_size=1.5), "line 2: block_size must be an integer from 1 to"),
        (dict(token_hashes=3), "line 2: token_hashes must be a text, not 3"),
        (dict(segments=[["user", 3]]), "line 2: segments do not have the 20 tokens"),
    ],
)
def test_a_line_that_is_wrong_is_named(change, message, tmp_path):
    good = dict(timestamp=0, input_length=20, output_length=3, hash_ids=[1])
    path = write(tmp_path, good, good | change)
    with pytest.raises(SystemExit, match=message):
        main([str(path)])
    missing = {k: v for k, v in good.items() if k not in change}
    if len(missing) < len(good):
        path = write(tmp_path, good, missing)
        (name,) = change
        with pytest.raises(SystemExit, match=f"line 2: there is no {name}"):
            main([str(path)])


@pytest.mark.parametrize(
    "text", ["GET /health 200", "{'timestamp': 0}", "12", "null", "[]", "[" * 10**5]
)
def test_a_file_of_something_else_is_no_trace(text, tmp_path):
    path = tmp_path / "other.log"
    path.write_text(text)
    with pytest.raises(SystemExit, match="line 1: not an object of JSON"):
        main([str(path)])


def test_a_file_of_bytes_is_no_trace(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"\x80\xff")
    with pytest.raises(SystemExit, match="is not a text in UTF-8"):
        main([str(path)])


def test_a_trace_that_cannot_be_written_is_said_once(tmp_path, caplog):
    recorder = Recorder(str(tmp_path / "trace.jsonl"))
    request, stats = RequestInfo("a", None), RequestStats("stop", 0, 0, 0)
    recorder.describe = lambda *_: {}
    recorder.path = str(tmp_path / "no" / "folder")
    for _ in range(3):
        recorder.record(request, stats)
    (tmp_path / "no").mkdir()
    recorder.record(request, stats)
    assert len(lines(tmp_path / "no" / "folder")) == 1
    (record,) = caplog.records
    assert record.message.startswith("--record-trace: requests are not recorded: ")
    assert record.exc_info is None


def test_a_file_without_requests_is_no_trace(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(SystemExit, match="has no requests"):
        main([str(path)])

"""The comparison: its figures on recorded outcomes, and all of it on tiny models."""

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from mlx_lm.utils import load_tokenizer
from processes import reading, started
from test_timings import FAILED, FIRST, SECOND, stream

from mlx_lm_ext.bench import compare, contenders, servers
from mlx_lm_ext.bench.chat_client import Client
from mlx_lm_ext.bench.outcomes import Figure, Outcome, pace_figures
from mlx_lm_ext.bench.prefixes import Prefixes
from mlx_lm_ext.bench.servers import Server
from mlx_lm_ext.bench.workloads import (
    SWEEPS,
    WORKLOADS,
    Plan,
    Sweep,
    Workload,
    conversations,
    late_prompt,
    long_questions,
    mixed_lengths,
    short_chats,
    short_figures,
    wave,
)


def outcome(*throughputs, **kwargs):
    """Tokens per second by label, of requests that take ten seconds."""
    requests = [
        stream(0.0, 1.0, 9.5, tokens=speed * 10, label=label)
        for label, speed in throughputs
    ]
    return Outcome(requests, **kwargs)


PLAN = Plan(clients=[1, 8], max_tokens=4, tokenizer=None, bytes_per_token=10)


def test_figures_of_short_chats():
    ours = outcome(
        ("1 greedy", 10), ("1 sampled", 8), ("8 greedy", 50), ("8 sampled", 40)
    )
    figures = short_figures(PLAN)
    assert [figure.of(ours) for figure in figures] == [10, 8, 50, 40, 5, 0.8]
    assert [figure.bare for figure in figures][:4] == [t.label for t in ours.timings]


def test_figures_of_a_late_prompt():
    streams = [
        # The longest gap ends before the late request is sent.
        stream(0.0, 0.0, 2.75, 4.0, label="stream"),
        stream(0.0, 1.0, 2.0, 4.0, label="stream"),
    ]
    late = stream(3.0, 6.0, label="late")
    figures = WORKLOADS["late"].figures(PLAN)
    assert [figure.of(Outcome([*streams, late])) for figure in figures] == [2.0, 3.0]


def test_figures_of_the_cache():
    ours = Outcome([FIRST, SECOND], 4, distinct_tokens=20, cache_bytes=300)
    figures = WORKLOADS["bytes"].figures(PLAN)
    assert [figure.of(ours) for figure in figures] == [0.75, 1.5]
    ours.cache_bytes = None
    assert figures[1].of(ours) is None


def values(figures, outcome):
    return {figure.name: figure.of(outcome) for figure in figures}


def test_figures_of_the_pace():
    run = [stream(0.0, 1.0, 1.25, 1.5, 2.5), stream(0.0, 2.0, 2.25), FAILED]
    ours = values(
        WORKLOADS["prefix"].figures(PLAN), Outcome(run, peak_memory=7_000_000)
    )
    assert ours.pop("p99 gap") == pytest.approx(977.5)
    assert ours.pop("p99 gap / median gap") == pytest.approx(3.91)
    assert ours == {
        "throughput": 0.3,
        "median TTFT": 1.5,
        "mean gap": 437.5,
        "median gap": 250,
        "longest gap": 1000,
        "peak memory": 7,
    }


def test_no_pace_of_answers_in_one_piece():
    ours = values(pace_figures(), Outcome([stream(0.0, 1.0, tokens=4)]))
    assert [ours[name] for name in ours if "gap" in name] == [None] * 5
    assert ours["median TTFT"] == 1.0


def test_each_number_of_many_clients_has_its_own_pace():
    run = [
        stream(0.0, ttft, ttft + 1, label=label)
        for label, ttft in (("64", 1.0), ("128", 2.0), ("256", 3.0))
    ]
    ours = values(WORKLOADS["many-clients"].figures(PLAN), Outcome(run))
    assert [ours[f"{n} at a time, median TTFT"] for n in (64, 128, 256)] == [1, 2, 3]


def test_figures_of_short_rows_beside_a_long_one():
    run = [
        stream(0.0, 1.0, 2.0, 3.0, label="alone"),
        # Before the long row and after it, the gap is another.
        stream(4.0, 5.0, 9.0, 11.0, 13.0, 19.0, label="beside"),
        stream(4.0, 9.0, 11.0, 13.0, label="long"),
    ]
    figures = WORKLOADS["mixed-lengths"].figures(replace(PLAN, context_length=8192))
    alone, beside, ratio, *_ = figures
    assert beside.name == "mean gap beside one of 6,144 tokens"
    ours = Outcome(run)
    assert [f.of(ours) for f in (alone, beside, ratio)] == [1000, 2000, 2]
    assert values(figures, ours)["all 32 rows: longest gap"] == 6000


def test_the_readme_lists_all_workloads():
    table = Path(compare.__file__).with_name("README.md").read_text()
    table = table.partition("| workload |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.M) == [*WORKLOADS]


def test_by_default_no_workload_runs_for_hours():
    chosen = compare.make_parser().parse_args([]).workloads
    assert set(WORKLOADS) - set(chosen) == {
        "mixed-lengths",
        "long-prompts",
        "many-clients",
    }
    assert compare.make_parser().parse_args(["--workloads", "all"]).workloads == [
        *WORKLOADS
    ]


def test_prefixes_know_what_is_computed():
    known = Prefixes()
    assert known.match([1, 2, 3]) == 0
    known.add([1, 2, 3])
    known.add([1, 2, 4, 5])
    assert known.n_tokens == 5
    assert known.match([1, 2, 4, 9]) == 3
    # One token has to run.
    assert known.match([1, 2, 3]) == 2


def test_failures_are_not_compared():
    reason = contenders.objection(
        ["A", "B"], [Outcome([FIRST]), Outcome([FIRST, FAILED])]
    )
    assert reason == "1 of 2 requests to B failed: HTTP 429: busy"


def test_answers_of_other_lengths_are_not_compared():
    both = [Outcome([FIRST]), Outcome([SECOND])]
    reason = contenders.objection(["A", "B"], both)
    assert reason == "different numbers of tokens: 3 from A and 5 from B"
    assert contenders.objection(["A", "B"], [both[0], both[0]]) is None


SPEED = Figure("speed", "tok/s", lambda o: o.throughput("x"), bare="x")
TTFT = Figure("TTFT", "s", lambda o: o.median_ttft, higher_is_better=False)


def test_gains_are_those_within_a_turn():
    turns = [
        [outcome(("x", 20)), outcome(("x", 10))],
        [outcome(("x", 30)), outcome(("x", 10))],
    ]
    speed, ttft = compare.tabulate([SPEED, TTFT], turns, [{"x": 40}, {"x": 40}])
    assert (speed["ours"], speed["theirs"]) == ([20, 30], [10, 10])
    assert speed["gain"] == [2, 3]
    assert speed["of_bare"] == [0.5, 0.75]
    assert ttft["gain"] == [1, 1] and "bare" not in ttft


def test_what_a_server_does_not_say_is_unknown():
    figure = Figure("bytes", "", lambda o: o.cache_bytes, False)
    (row,) = compare.tabulate([figure], [[Outcome(cache_bytes=5), Outcome()]], [])
    (line,) = compare.table_rows("cache", {"refused": None, "figures": [row]})
    assert line == "| cache: bytes | unknown | 5 |  |  |"


def test_table():
    turns = [[outcome(("x", 20)), outcome(("x", 1234))]] * 2
    part = {
        "refused": None,
        "figures": compare.tabulate([SPEED], turns, [{"x": 40}] * 2),
    }
    assert compare.table_rows("chats", part) == [
        "| chats: speed (tok/s) | 1,234 | 20 | **0.02** (0.02 to 0.02) | 40 (here 50%) |"
    ]
    refused = {"refused": "it failed", "figures": []}
    assert compare.table_rows("chats", refused) == [
        "| chats | | | not compared: it failed | |"
    ]


def test_bytes_of_the_cache_are_the_last_that_was_logged(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "INFO - Prompt Cache: 3 sequences, 1.25 GB\n- user: 1 sequences, 0.50 GB\n"
    )
    assert Server("", log).cache_bytes() == 1_250_000_000
    with log.open("a") as f:
        f.write("INFO - Prompt Cache: 2 sequences, 17.5 MB\n")
    assert Server("", log).cache_bytes() == 17_500_000
    assert Server("").cache_bytes() is None


def test_peak_memory_of_a_process():
    held = b"x" * 50_000_000
    before = Server("", pid=os.getpid()).peak_memory()
    assert before > len(held)
    assert Server("").peak_memory() is None


def test_gpu_memory_of_a_process():
    table = "12, 100\n7, [N/A]\n34, 1\n12, 50\n"
    assert servers.gpu_memory(12, table) == 150 << 20
    assert servers.gpu_memory(7, table) is None
    # A container gives processes other numbers.
    assert servers.gpu_memory(1, "12, 100\n") == 100 << 20
    assert servers.gpu_memory(1, "") is None


def test_the_most_gpu_memory_is_noted(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 12, 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    server = Server("", pid=12)
    with servers.watch_gpu(server, 12):
        pass
    assert server.peak_memory() == 100 << 20


def test_short_chats_share_nothing_and_follow_the_seed():
    chats = short_chats(Random("a"), 16)
    assert chats == short_chats(Random("a"), 16) != short_chats(Random("b"), 16)
    assert len({chat[1]["content"] for chat in chats}) == 16


def ask(port, folder, workload, context_length=None, **sizes):
    """Run a workload on a server of this process."""

    async def run():
        async with contenders.session("EMPTY") as session:
            client = Client(session, f"http://127.0.0.1:{port}/v1", "default_model")
            plan = Plan([1], 4, load_tokenizer(str(folder)), 1.0, context_length)
            return await workload(plan, client, Random(0), **sizes)

    return asyncio.run(run())


def test_conversations_find_nearly_all_that_was_computed(start_server, model_folder):
    engine, port = start_server("llama", "--use-prompt-cache")
    done = ask(port, model_folder(), conversations, n=3, turns=2, system_words=20)
    assert len(done.timings) == 6 and not any(t.error for t in done.timings)
    assert done.distinct_tokens < sum(t.prompt_tokens for t in done.timings)
    assert 0.9 < done.cached_share <= 1.02


def test_without_a_cache_a_conversation_finds_nothing(start_server, model_folder):
    engine, port = start_server()
    done = ask(port, model_folder(), conversations, n=1, turns=3, system_words=20)
    assert done.ideal_cached_tokens > 0
    assert done.cached_share == 0


def test_a_late_prompt_comes_while_streams_run(start_server, model_folder):
    engine, port = start_server()
    done = ask(port, model_folder(), late_prompt, n_words=20)
    (late,) = done.part("late")
    streams = done.part("stream")
    assert len(streams) == 4
    assert late.error is None and late.prompt_tokens > 100
    assert all(t.start < late.start for t in streams)


def test_a_long_row_decodes_beside_short_ones(start_server, model_folder):
    engine, port = start_server()
    done = ask(
        port, model_folder(), mixed_lengths, context_length=2000, n=3, n_tokens=120
    )
    (long,) = done.part("long")
    beside = done.part("beside")
    assert not any(t.error for t in done.timings)
    assert len(beside) == len(done.part("alone")) == 3
    assert 1350 < long.prompt_tokens < 1650
    assert all(90 < t.prompt_tokens < 150 for t in beside)
    assert all(long.arrivals[0] < t.start for t in beside)
    assert all(t.end < min(t.start for t in beside) for t in done.part("alone"))


def test_a_model_that_takes_no_long_prompt_is_not_measured_with_one(model_folder):
    with pytest.raises(
        RuntimeError, match="takes 512 tokens, too few for a long prompt"
    ):
        ask(0, model_folder(), mixed_lengths, context_length=512)


def test_clients_ask_at_once(start_server, model_folder):
    engine, port = start_server()
    chats = partial(long_questions, n_words=60)
    done = ask(port, model_folder(), wave, n=3, make_chats=chats)
    assert not any(t.error for t in done.timings)
    assert max(t.start for t in done.timings) < min(t.end for t in done.timings)
    assert all(t.prompt_tokens > 300 for t in done.timings)


def run_compare(folder, *argv):
    """Exit code of the tool with workloads that fit a tiny model."""
    with pytest.raises(SystemExit) as exit:
        compare.main(
            ["--model", str(folder), "--rounds", "2", "--max-tokens", "3", *argv]
        )
        raise SystemExit(0)
    return exit.value.code


@pytest.fixture
def tiny_workloads(monkeypatch):
    figure = Figure(
        "speed", "tok/s", lambda o: o.throughput("2 greedy"), bare="2 greedy"
    )
    run = partial(wave, n=2, label="2 greedy")
    workload = Workload("two chats", run, lambda plan: [figure])
    monkeypatch.setitem(WORKLOADS, "short", workload)
    few = partial(conversations, system_words=5)
    monkeypatch.setitem(SWEEPS, "conversations", Sweep("chats", [1, 2], few))


@pytest.mark.slow
def test_this_server_beside_upstreams(tiny_workloads, model_folder, tmp_path, capsys):
    files = [tmp_path / name for name in ("table.md", "report.json", "plot.png")]
    argv = ["--workloads", "short", "--sweeps", "conversations", "--clients", "2"]
    for option, file in zip(("--markdown", "--json", "--plot"), files):
        argv += [option, str(file)]
    assert run_compare(model_folder(), *argv) == 0
    table, progress = capsys.readouterr()
    assert files[0].read_text() == table
    turns = re.findall(r"\| short, turn (\d): speed \(tok/s\) \|", progress)
    assert turns == ["1", "2"] and progress.count("| gain | bare engine |") >= 2
    assert (
        "| two chats: speed (tok/s) |" in table and "| 2 chats: cache (MB) |" in table
    )
    report = json.loads(files[1].read_text())
    (row,) = report["workloads"][0]["figures"]
    assert len(row["ours"]) == len(row["theirs"]) == len(row["bare"]) == 2
    assert report["servers"]["theirs"].startswith("mlx_lm.server 0.32")
    assert len(report["sweeps"][0]["points"]) == 2
    assert files[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_against_a_server_that_runs(tiny_workloads, model_folder, start_server, capsys):
    engine, port = start_server()
    url = f"http://127.0.0.1:{port}/v1"
    argv = ["--workloads", "short", "--clients", "2", "--rounds", "1", "--against", url]
    assert run_compare(model_folder(), *argv) == 0
    assert url in capsys.readouterr().out


def test_against_a_stopped_server(model_folder):
    url = f"http://127.0.0.1:{servers.free_port()}/v1"
    code = run_compare(model_folder(), "--against", url)
    assert code.startswith(f"error: no server answers at {url}")


def test_a_server_that_does_not_start_is_not_compared(
    tiny_workloads, model_folder, capsys
):
    command = shlex.join([sys.executable, "-c", "raise SystemExit('it is broken')"])
    argv = ["--workloads", "short", "--clients", "2", "--other", command + " {model}"]
    assert run_compare(model_folder(), *argv) == 1
    for output in capsys.readouterr():
        assert "did not start: it is broken" in output


def test_a_model_that_cannot_be_run_is_one_line(tmp_path):
    code = run_compare(tmp_path, "--workloads", "short")
    assert code.startswith(f"error: the bare engine cannot run {tmp_path}")


# Of a comparison, only that a server runs.
WAITING = """
import sys, time
from mlx_lm_ext.bench import compare

def wait(args, model, ours, theirs):
    with ours.serve() as server:
        print(server.pid, flush=True)
        time.sleep(60)

compare.compare = wait
compare.main(["--model", sys.argv[1], "--server", sys.argv[2]])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_comparison_that_is_ended_ends_its_server(name, tmp_path):
    server = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]
    server += ["--directory", "{model}"]
    command = [sys.executable, "-c", WAITING, str(tmp_path), shlex.join(server)]
    with started(command, stdout=subprocess.PIPE) as process:
        with reading(process):
            pid = int(process.stdout.readline())
            process.send_signal(getattr(signal, name))
            assert process.stderr.read() == "interrupted\n"
        assert process.wait(60) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

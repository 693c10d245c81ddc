"""The measuring tools that a user points at a server."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import run_program
from test_timings import FAILED, FIRST, RUN, SECOND

from mlx_lm_ext.bench import compare, plots, servers
from mlx_lm_ext.bench import timings as figures
from mlx_lm_ext.bench import tradeoff
from mlx_lm_ext.examples import benchmark_client, test_prompt_cache

TOOLS = {
    tool.__name__.rpartition(".")[-1]: Path(tool.__file__)
    for tool in (benchmark_client, test_prompt_cache, compare, tradeoff)
}
DEFAULTS = {
    "base_url": "http://localhost:8080/v1",
    "api_key": "EMPTY",
    "model": "default_model",
    "concurrency": 4,
    "requests": 20,
    "stream": False,
    "min_delay": 0.1,
    "max_delay": 2.0,
    "min_tokens": 10,
    "max_tokens": 512,
}
BENCHMARK, COMPARE = benchmark_client.main, compare.main
QUICK = "--requests 6 --min-delay 0 --max-delay 0 --min-tokens 1 --max-tokens 6".split()


def run(main, port, *argv):
    """Exit code of a tool pointed at ``port``."""
    with pytest.raises(SystemExit) as exit:
        main(["--base-url", f"http://127.0.0.1:{port}/v1", *argv])
        raise SystemExit(0)
    return exit.value.code


def test_defaults_are_the_documented_ones():
    args = vars(benchmark_client.make_parser().parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    args = vars(test_prompt_cache.make_parser().parse_args([]))
    shared = ("base_url", "api_key", "model", "concurrency")
    assert args == {name: DEFAULTS[name] for name in shared}


def test_the_seed_decides_what_is_asked():
    parse = benchmark_client.make_parser().parse_args
    questions = benchmark_client.draw(parse(["--seed", "1", "--requests", "100"]))
    assert questions == benchmark_client.draw(
        parse(["--seed", "1", "--requests", "100"])
    )
    assert questions != benchmark_client.draw(
        parse(["--seed", "2", "--requests", "100"])
    )
    assert all(10 <= q.max_tokens <= 512 for q in questions)
    assert all(0.1 <= q.delay <= 2.0 for q in questions)
    assert len({q.prompt for q in questions}) > 90


@pytest.mark.parametrize("stream", [True, False])
def test_a_run(stream, start_server, tmp_path, capsys):
    engine, port = start_server()
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.svg")]
    argv = [*QUICK, *files, *(["--stream"] if stream else [])]
    assert run(benchmark_client.main, port, *argv) == 0
    report = json.loads((tmp_path / "run.json").read_text())
    tokens = [r["completion_tokens"] for r in report["requests"]]
    assert len(tokens) == report["summary"]["successful_requests"] == 6
    assert report["summary"]["generated_tokens"] == sum(tokens)
    assert "api_key" not in report["settings"]
    out, err = capsys.readouterr()
    assert f"Total tokens generated: {sum(tokens)}\n" in out
    assert ("Average TTFT:" in out) == stream
    assert "6/6" in err
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_report_of_a_run():
    report = benchmark_client.report(figures.summarize(RUN), streamed=True)
    assert report.splitlines() == [
        "Successful requests:    2 of 3",
        "Total tokens generated: 8",
        "Total duration:         10.00 s",
        "Throughput (TPS):       0.80 tokens/s",
        "Average latency:        4.50 s (p50 4.50, p95 5.40, p99 5.48)",
        "Average TTFT:           1.50 s (p50 1.50, p95 1.95, p99 1.99)",
        "Average ITL:            750.00 ms (p50 750.00, p95 975.00, p99 995.00)",
        "Failed:                 1 with HTTP 429: busy",
    ]


def test_a_failed_request_is_reported_by_its_cause(start_server, capsys):
    engine, port = start_server()
    code = run(benchmark_client.main, port, *QUICK, "--model", "no/such-model")
    assert code == 1
    out = capsys.readouterr().out
    assert "Successful requests:    0 of 6" in out
    assert "6 with HTTP 404:" in out


@pytest.mark.parametrize("main", [benchmark_client.main, test_prompt_cache.main])
def test_a_stopped_server_is_one_line(main):
    port = servers.free_port()
    code = run(main, port)
    assert code.startswith(f"error: no server answers at http://127.0.0.1:{port}/v1")
    assert "\n" not in code


@pytest.mark.parametrize(
    "main, argv, said",
    [
        (BENCHMARK, ["--min-delay", "3"], "--min-delay: must be at most --max-delay"),
        (
            BENCHMARK,
            ["--min-tokens", "600"],
            "--min-tokens: must be at most --max-tokens",
        ),
        (BENCHMARK, ["--concurrency", "0"], "must be at least 1"),
        (BENCHMARK, ["--plot", "plot.pdf"], "must end in .png or .svg"),
        (
            COMPARE,
            ["--workloads", "nothing"],
            "unknown: nothing; choose from short, prefix",
        ),
        (COMPARE, ["--plot", "plot.pdf"], "must end in .png or .svg"),
        (
            COMPARE,
            ["--json", "no/such/folder/file"],
            "not a file in an existing folder",
        ),
        (COMPARE, ["--rounds", "0"], "must be at least 1"),
    ],
)
def test_a_wrong_argument_is_one_line(main, argv, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_prompt_cache_is_seen(start_server, monkeypatch, capsys):
    monkeypatch.setattr(test_prompt_cache, "N_WORDS", 500)
    engine, port = start_server("llama", "--use-prompt-cache")
    assert run(test_prompt_cache.main, port, "--concurrency", "2") == 0
    first, second, third = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith("1: a unique prompt") and first.endswith("1.00x")
    assert third.startswith("3: with another suffix")


def test_no_prompt_cache_is_a_failure(start_server, monkeypatch):
    monkeypatch.setattr(test_prompt_cache, "N_WORDS", 20)
    engine, port = start_server()
    code = run(test_prompt_cache.main, port, "--concurrency", "2")
    assert code == "the server does not reuse prefixes: see the cached tokens"


def test_what_prompts_of_a_round_share_is_no_prompt_cache(monkeypatch):
    async def run(args):
        first = replace(FIRST, start=0, prompt_tokens=1000, cached_tokens=50)
        return [[replace(first, arrivals=[seconds])] for seconds in (2, 1)]

    monkeypatch.setattr(test_prompt_cache, "run", run)
    with pytest.raises(SystemExit, match="the server does not reuse prefixes"):
        test_prompt_cache.main([])


def test_speed_up_is_that_of_the_median_first_token():
    slow, fast = [SECOND, FIRST, FIRST], [SECOND, SECOND, FAILED]
    assert test_prompt_cache.speed_ups([slow, fast]) == [1.0, 2.0]


@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_is_a_script(name):
    command = [sys.executable, str(TOOLS[name]), "--help"]
    help = run_program(command)
    assert help.returncode == 0, help.stderr
    assert "--model" in help.stdout


def test_pictures_do_not_change_with_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save_run(RUN, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

"""The metrics at ``GET /metrics``: what they say after known requests, and who may read them."""

import http.client
import json
import math
import re
import shutil
import sys
import threading
from array import array
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import server_process
from helpers import JSON, call, complete, saying, stream
from processes import join, read_until, run_program, started
from prometheus_client.parser import text_string_to_metric_families as parse
from test_api import wait_until

import mlx_lm_ext
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.interfaces import RequestStats, ServerStatistics
from mlx_lm_ext.plugins.metric_families import MetricFamilies
from mlx_lm_ext.plugins.request_metrics import Histogram, RequestMetrics
from mlx_lm_ext.policies.loading import Plugins

# The metrics that vLLM has too, without its prefix, as its server gives them.
VLLM = """
e2e_request_latency_seconds time_to_first_token_seconds inter_token_latency_seconds
prompt_tokens generation_tokens num_requests_running num_requests_waiting kv_cache_usage_perc
request_prompt_tokens request_generation_tokens request_success request_queue_time_seconds
request_prefill_time_seconds request_decode_time_seconds prefix_cache_queries prefix_cache_hits
""".split()


def get(port, method="GET", **headers):
    """The status, the type and the text of /metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            method, "/metrics", headers={"User-Agent": "tests"} | headers
        )
        response = connection.getresponse()
        return (
            response.status,
            response.headers["Content-Type"],
            response.read().decode(),
        )
    finally:
        connection.close()


class Metrics:
    """The samples of an answer of /metrics."""

    def __init__(self, port):
        status, _, text = get(port)
        assert status == 200, text
        self.families = list(parse(text))
        self.samples = [s for family in self.families for s in family.samples]

    def __call__(self, name, **labels):
        """The value of the one sample with this name, without the prefix, and these labels."""
        (value,) = [
            s.value
            for s in self.samples
            if s.name == f"mlx_lm:{name}" and labels.items() <= s.labels.items()
        ]
        return value

    def labels(self, name, label):
        """The value for each value of a label."""
        found = [s for s in self.samples if s.name == f"mlx_lm:{name}"]
        return {s.labels[label]: s.value for s in found}

    def n_ended(self):
        return sum(self.labels("request_success_total", "finished_reason").values())


def after(port, n):
    """The metrics when ``n`` requests have ended. A client has its answer a moment before."""
    wait_until(lambda: Metrics(port).n_ended() >= n)
    return Metrics(port)


def stats(reason="stop", queue=0.5, ttft=1.5, seconds=4.0, **kwargs):
    return RequestStats(reason, queue, ttft, seconds, **kwargs)


# Requests


def test_requests_are_counted(start_server):
    # With the end of the text, an answer that is not cut off has four tokens.
    _, port = start_server("llama", "--use-prompt-cache", plugin=saying("abc"))
    body = dict(prompt="hello world", max_tokens=2)
    cached = 0
    for _ in range(2):
        _, answer = call(port, "POST", "/v1/completions", body)
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 2)
        cached += usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    stream(port, "/v1/completions", prompt="see", max_tokens=10)
    metrics = after(port, 3)
    reasons = metrics.labels("request_success_total", "finished_reason")
    assert {r: n for r, n in reasons.items() if n} == {"length": 2, "stop": 1}
    for name, total in (("prompt_tokens", 25), ("generation_tokens", 8)):
        assert metrics(f"{name}_total") == metrics(f"request_{name}_sum") == total
        assert metrics(f"request_{name}_count") == 3
    assert metrics("request_prompt_tokens_bucket", le="2.0") == 0
    assert metrics("request_prompt_tokens_bucket", le="5.0") == 1
    assert metrics("request_prompt_tokens_bucket", le="20.0") == 3
    assert metrics("request_generation_tokens_bucket", le="2.0") == 2
    assert metrics("prefix_cache_queries_total") == 25
    assert metrics("prefix_cache_hits_total") == cached
    assert metrics("time_to_first_token_seconds_count") == 3
    whole = metrics("e2e_request_latency_seconds_sum")
    parts = ("queue", "prefill", "decode")
    assert sum(metrics(f"request_{part}_time_seconds_sum") for part in parts) == (
        pytest.approx(whole)
    )


def test_each_answer_is_counted_by_how_it_has_ended():
    metrics = RequestMetrics()
    for reason in ("stop", "stop", "cancelled", "another"):
        metrics.add(stats(reason))
    finished, _ = metrics.read()
    assert {r: n for r, n in finished.items() if n} == dict(
        stop=2, cancelled=1, another=1
    )


def test_times_of_a_request_are_those_between_its_arrival_start_first_token_and_end():
    metrics = RequestMetrics()
    metrics.add(stats(queue=0.5, ttft=2.5, seconds=9.5, gaps=[3.0, 4.0]))
    sums = {name: total for name, (_, total) in metrics.read()[1].items()}
    assert sums == dict(
        e2e_request_latency_seconds=9.5,
        request_queue_time_seconds=0.5,
        request_prefill_time_seconds=2.0,
        request_decode_time_seconds=7.0,
        time_to_first_token_seconds=2.5,
        inter_token_latency_seconds=7.0,
        request_prompt_tokens=0,
        request_generation_tokens=0,
    )


def test_request_that_did_not_start_has_no_times_but_its_whole_one():
    metrics = RequestMetrics()
    metrics.add(stats("cancelled", queue=None, ttft=None))
    counts = {name: found[-1] for name, (found, _) in metrics.read()[1].items()}
    assert {name for name, n in counts.items() if n} == {
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    }


def test_value_on_a_bound_is_within_it():
    values = array("d", (0.05, 0.1, 0.2, 0.25, 5, 6))
    histogram = Histogram((0.1, 0.25, 5))
    histogram.add(values)
    assert histogram.cumulative == [2, 4, 5, 6]
    assert histogram.sum == pytest.approx(sum(values))


# The server


def test_each_figure_of_the_server_has_its_metric():
    given = ServerStatistics(
        model="m",
        status="ok",
        seconds=1.0,
        n_running=2,
        n_waiting=3,
        batch_size=4,
        n_connections=5,
        prompt_tokens=6,
        cached_tokens=7,
        generated_tokens=8,
        n_steps=9,
        step_seconds=10.5,
        batch_bytes=11,
        batch_limit=44,
        cache_bytes=13,
        cache_limit=14,
        evictions={"evicted": 15, "expired": 0},
        policy_seconds={"scheduler policy fcfs": 16.5},
        warm_up_left=17,
    )
    families = MetricFamilies(RequestMetrics(), given).collect()
    samples = [s for family in families for s in family.samples]
    assert all(s.labels["model_name"] == "m" for s in samples)
    values = {
        (s.name.removeprefix("mlx_lm:"), *list(s.labels.values())[1:]): s.value
        for s in samples
        if s.value
    }
    assert values == {
        ("num_requests_running",): 2,
        ("num_requests_waiting",): 3,
        ("max_num_requests_running",): 4,
        ("connections",): 5,
        ("prompt_tokens_total",): 6,
        ("prefix_cache_queries_total",): 6,
        ("prefix_cache_hits_total",): 7,
        ("generation_tokens_total",): 8,
        ("steps_total",): 9,
        ("step_seconds_total",): 10.5,
        ("batch_bytes",): 11,
        ("batch_limit_bytes",): 44,
        ("kv_cache_usage_perc",): 0.25,
        ("prompt_cache_bytes",): 13,
        ("prompt_cache_limit_bytes",): 14,
        ("evictions_total", "evicted"): 15,
        ("policy_seconds_total", "scheduler policy fcfs"): 16.5,
        ("warm_up_left",): 17,
    }


def test_figures_of_a_running_server_are_its_own(start_server):
    # Room for about 400 tokens of 512 bytes.
    size = str(400 * 512)
    argv = ["--use-prompt-cache", "--radix-cache-size", size, "--batch-size", "3"]
    engine, port = start_server("llama", *argv)
    for letter in "abcdef":
        complete(port, letter * 100, max_tokens=2)
    metrics = after(port, 6)
    assert metrics("max_num_requests_running") == 3
    # The last one may still be closing.
    assert metrics("connections") >= 1
    assert metrics("steps_total") >= 12
    assert metrics("step_seconds_total") > 0
    wait_until(
        lambda: Metrics(port)("prompt_cache_bytes") == engine.prompt_cache.nbytes
    )
    assert metrics("prompt_cache_limit_bytes") == int(size)
    wait_until(lambda: Metrics(port)("evictions_total", reason="evicted") > 0)
    assert Metrics(port)("policy_seconds_total", policy="scheduler policy fcfs") > 0


def test_servers_of_one_process_count_for_themselves(start_server):
    (_, first), (_, second) = start_server(), start_server()
    complete(first, "hello", max_tokens=2)
    assert after(first, 1).n_ended() == 1
    assert Metrics(second).n_ended() == 0


# The route


def test_names_are_those_of_vllm_with_another_prefix(start_server):
    _, port = start_server()
    names = {family.name for family in Metrics(port).families}
    assert {f"mlx_lm:{name}" for name in VLLM} <= names


@pytest.mark.parametrize(
    "accept",
    ["*/*", "application/openmetrics-text; version=1.0.0", "text/plain; version=x"],
)
def test_names_are_the_same_for_every_caller(accept, start_server):
    _, port = start_server()
    status, kind, text = get(port, Accept=accept)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "\nmlx_lm:num_requests_running{" in text
    assert get(port, "HEAD", Accept=accept)[::2] == (200, "")


def test_names_of_models_are_escaped(start_server):
    name = 'a"b\\c{d}'
    _, port = start_server("llama", "--served-model-name", name)
    assert '{model_name="a\\"b\\\\c{d}"}' in get(port)[2]
    assert all(s.labels["model_name"] == name for s in Metrics(port).samples)


def test_without_prometheus_client_the_route_says_what_to_install(
    start_server, monkeypatch
):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    _, port = start_server()
    assert complete(port, "hello", max_tokens=2)
    status, _, text = get(port)
    message = 'GET /metrics needs pip install "mlx-lm-ext[metrics]" on the server'
    assert (status, json.loads(text)["error"]["message"]) == (501, message)
    assert "\n" not in text


def test_command_line_is_parsed_without_prometheus_client_and_numpy():
    code = (
        "import sys; from mlx_lm_ext.arguments import parse_arguments; parse_arguments([])\n"
        "print([n for n in ('prometheus_client', 'numpy') if n in sys.modules])"
    )
    result = run_program([sys.executable, "-c", code])
    assert result.stdout.strip() == "[]", result.stderr


def test_plugin_can_be_blocked(start_server):
    args = make_parser().parse_args([])
    assert "registers: GET /metrics" in Plugins().describe(args)
    assert ("GET", "/metrics") not in Plugins(["no:metrics"]).routes(args)


def test_metrics_need_the_key_of_the_server(model_folder):
    argv = ["--model", str(model_folder()), "--warmup", "off", "--api-key", "secret"]
    with server_process(*argv) as (port, _, _):
        assert get(port)[0] == 401
        assert get(port, Authorization="Bearer wrong")[0] == 401
        status, _, text = get(port, Authorization="Bearer secret")
        assert status == 200
        assert "secret" not in text


# The dashboard

EXAMPLES = Path(mlx_lm_ext.__file__).parent / "examples"
DASHBOARD = json.loads((EXAMPLES / "grafana.json").read_text())
# What Grafana puts in the place of its variables if everything is chosen.
VARIABLES = {"$__rate_interval": "1m", "$model_name": ".*", "$instance": ".*"}


def queries():
    """What the dashboard asks, by the titles of its panels."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def test_dashboard_asks_for_metrics_that_there_are(start_server):
    _, port = start_server("llama", "--use-prompt-cache")
    complete(port, "hello", max_tokens=2)
    given = {s.name for s in after(port, 1).samples}
    asked = set(re.findall(r"mlx_lm:\w+", json.dumps(DASHBOARD)))
    assert len(asked) > 20
    assert asked <= given


def test_dashboard_has_the_data_source_as_a_variable():
    variables = DASHBOARD["templating"]["list"]
    assert variables[0]["name"] == variables[0]["type"] == "datasource"
    for part in (*DASHBOARD["panels"], *variables[1:]):
        assert part["datasource"]["uid"] == "${datasource}"
        for target in part.get("targets", ()):
            assert target["datasource"] == part["datasource"]
    assert not any("$" in query for _, query in queries())


@contextmanager
def prometheus(folder, scraped):
    """A Prometheus that scrapes these; gives a function that asks it.

    Args:
        folder (Path): For its files.
        scraped (Dict): An entry of ``scrape_configs``.
    """
    scraped = {"job_name": "mlx-lm", "scrape_interval": "200ms", **scraped}
    scraped["scrape_timeout"] = "200ms"
    (folder / "config.yml").write_text(json.dumps({"scrape_configs": [scraped]}))
    command = [
        *("prometheus", f"--config.file={folder}/config.yml"),
        *(f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:0"),
    ]
    with started(command) as process:
        _, lines = read_until(process, "ready to receive web requests")
        port = re.search(r'"Listening on" address=.*:(\d+)', "".join(lines))
        # An unread pipe would block it once it is full.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()

        def ask(query):
            path = "/api/v1/query?" + urlencode({"query": query})
            status, answer = call(int(port[1]), "GET", path)
            assert status == 200, (query, answer)
            return [float(r["value"][1]) for r in answer["data"]["result"]]

        try:
            yield ask
        finally:
            process.kill()
            join(reader)


def send(port, body, key):
    """Read an answer to its end."""
    headers = JSON | {"Authorization": f"Bearer {key}"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.read() and response.status == 200
    connection.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus")
def test_dashboard_shows_what_a_prometheus_has_read(tmp_path, model_folder):
    size = str(400 * 512)
    argv = ["--model", str(model_folder()), "--warmup", "off", "--api-key", "secret"]
    argv += ["--use-prompt-cache", "--radix-cache-size", size]
    with server_process(*argv) as (port, _, _):
        (tmp_path / "key").write_text("secret")
        scraped = {
            "authorization": {"credentials_file": str(tmp_path / "key")},
            "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
        }
        with prometheus(tmp_path, scraped) as ask:
            # A rate needs a value from before the requests.
            wait_until(lambda: ask("mlx_lm:request_generation_tokens_count") == [0])
            # Streams have gaps.
            body = dict(max_tokens=20, stream=True)
            for letter in "abcdef":
                send(port, body | {"prompt": letter * 100}, "secret")
            wait_until(lambda: ask("mlx_lm:request_generation_tokens_count") == [6])
            wait_until(
                lambda: ask("count_over_time(mlx_lm:policy_seconds_total[1m]) > 1")
            )
            for title, query in queries():
                values = ask(query)
                assert values and not any(map(math.isnan, values)), (title, query)
            (per_second,) = ask("sum(rate(mlx_lm:generation_tokens_total[1m]))")
            assert per_second > 0

"""Many clients at once, of which some leave, some come too often, and some take their time."""

import http.client
import json
import random
import threading
import time
from collections import Counter

import pytest
from helpers import JSON, call, plugin, wait_until_idle
from test_access import bearer

N_CLIENTS, SECONDS = 64, 20
KEYS = [f"user-{i}:key-{i}" for i in range(4)]


class Visitor(threading.Thread):
    """A client that sends one request after the other until the time is over."""

    def __init__(self, port, seed, end):
        super().__init__()
        self.port, self.rng, self.end = port, random.Random(seed), end
        self.outcomes = Counter()
        self.start()

    def run(self):
        while time.monotonic() < self.end:
            try:
                self.outcomes[self.visit()] += 1
            except Exception as e:
                self.outcomes[repr(e)] += 1

    def visit(self):
        """Send a request, and say what has become of it."""
        rng = self.rng
        key = rng.choice([*KEYS, "wrong:wrong"]).partition(":")[2]
        body = dict(prompt="x" * rng.randint(1, 300), max_tokens=rng.randint(1, 60))
        body |= dict(stream=rng.random() < 0.6, n=rng.choice([1, 1, 1, 2]))
        body |= dict(temperature=rng.choice([0, 1]), ignore_eos=True)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = JSON | bearer(key)
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            if rng.random() < 0.1:
                return "left"
            response = connection.getresponse()
            if response.status != 200:
                response.read()
                return response.status
            if rng.random() < 0.2:
                response.readline()
                response.close()
                return "left"
            raw = response.read()
            if body["stream"]:
                assert raw.endswith(b"data: [DONE]\n\n")
                return "whole"
            answer = json.loads(raw)
            reasons = {choice["finish_reason"] for choice in answer["choices"]}
            assert reasons == {"length"}
            return "whole"
        finally:
            connection.close()


@pytest.mark.slow
def test_every_request_of_a_crowd_ends_once_and_nothing_is_left(start_server):
    ends, lock = Counter(), threading.Lock()

    def finished(request, stats):
        with lock:
            ends[request.id, request.index] += 1

    argv = ["llama", "--use-prompt-cache", "--radix-cache-size", "2MB"]
    argv += ["--max-queue", "16", "--max-requests-per-key", "12"]
    argv += ["--batch-size", "16", "--request-timeout", "5", "--scheduler", "fair"]
    for key in KEYS:
        argv += ["--api-key", key]
    hook = plugin(mlx_lm_request_finished=finished)
    engine, port = start_server(*argv, plugin=hook)
    end = time.monotonic() + SECONDS
    visitors = [Visitor(port, seed, end) for seed in range(N_CLIENTS)]
    for visitor in visitors:
        visitor.join(60)
    outcomes = sum((v.outcomes for v in visitors), Counter())
    assert set(outcomes) == {"whole", "left", 401, 429}, outcomes
    assert engine.client.admission.wait_until_empty(60)
    wait_until_idle(engine)
    assert ends and set(ends.values()) == {1}
    statistics = engine.client.statistics(0)
    assert (statistics.n_running, statistics.n_waiting) == (0, 0)
    assert statistics.batch_bytes == 0
    cache = engine.prompt_cache
    assert cache.nbytes == sum(entry.nbytes for entry in cache.nodes) <= 2_000_000
    body = dict(prompt="x", max_tokens=1)
    status, _ = call(port, "POST", "/v1/completions", body, **bearer("key-0"))
    assert status == 200

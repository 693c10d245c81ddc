"""One model on several processes: the answers of one, and the end of all when one is lost."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from helpers import JSON, call, complete, texts
from mlx.utils import tree_flatten
from mlx_lm import load
from processes import join, run_program
from rank_processes import free_ports, ranks, served
from tiny_models import CONFIGS
from tiny_models import make_model as make_tiny_model

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.bench.random_model import LLAMA, write_model
from mlx_lm_ext.distributed.launch import check_arguments

# Few bytes for KV, so that entries are evicted and rows have to wait.
CROWDED = ["--radix-cache-size", "300000", "--max-kv-bytes", "250000"]
CROWDED_PIPELINE = ["--radix-cache-size", "450000", "--max-kv-bytes", "350000"]
# The beginning of programs that change the server before it starts.
CHANGED = """
import os
from mlx_lm_ext import blas, batch_server
blas.load()
blas.load = lambda: None
"""
# Runs the server with wrong logits on the ranks that follow, where nothing may be decided, and on
# all ranks with the step of a GPU.
FOLLOWING = """
import mlx.core as mx
from mlx_lm_ext.batch import batch, generator, grouping, groups, pace
from mlx_lm_ext.cache import prompt_cache
from mlx_lm_ext.distributed import group

def decided_by_rank_0(cls, name):
    function = getattr(cls, name)
    def called(*args):
        assert group.Ranks.has_left, name
        return function(*args)
    setattr(cls, name, called)

def leave(self):
    group.Ranks.has_left = True
    left(self)

group.Ranks.has_left = False
left, group.Ranks.leave = group.Ranks.leave, leave
if os.environ["MLX_RANK"] != "0":
    for cls, names in (
        (batch.Batch, ("can_start", "fits", "outgrows_memory", "plan_prefill")),
        (batch.Batch, ("make_sampling",)),
        (grouping.Grouping, ("place", "plan")),
        (groups.GenerationGroups, ("due",)),
        (pace.Pace, ("cost",)),
        (prompt_cache.RadixPromptCache, ("evict_here", "expire_here")),
        (generator.LeanGenerationBatch, ("sample",)),
    ):
        for name in names:
            decided_by_rank_0(cls, name)
    run = generator.LeanGenerationBatch.run
    def perturbed(self, inputs):
        logits = run(self, inputs)
        return logits + mx.random.normal(logits.shape)
    generator.LeanGenerationBatch.run = perturbed
if {of_gpu}:
    generator.on_cpu = lambda: False
batch_server.main()
"""
# Runs the server with rank 1 killed before the last collective of a step. Rank 0 learns it from
# that one, and from the heartbeats only when it has said that it fails.
KILLED_IN_STEP = """
import signal
from threading import Event
import mlx.core as mx
from mlx.nn.layers.distributed import ShardedToAllLinear
from mlx_lm_ext.batch import generator
from mlx_lm_ext.distributed import heartbeat

def run(self, inputs):
    if os.environ["MLX_RANK"] == "1" and len(self.tokens[0]) > 8:
        ShardedToAllLinear.__call__ = call
        call.last = self.model.layers[-1].mlp.down_proj
    return ran(self, inputs)

def call(layer, x):
    if layer is call.last:
        mx.eval(x)
        os.kill(os.getpid(), signal.SIGKILL)
    return called(layer, x)

def lose(self, reason):
    if os.environ["MLX_RANK"] == "0":
        has_failed.wait(20)
    lost(self, reason)

def fail(self, reason):
    has_failed.set()
    return failed(self, reason)

has_failed = Event()
Batch, Heartbeat = generator.LeanGenerationBatch, heartbeat.Heartbeat
called = ShardedToAllLinear.__call__
ran, Batch.run = Batch.run, run
lost, Heartbeat.lose = Heartbeat.lose, lose
failed, Heartbeat.fail = Heartbeat.fail, fail
batch_server.main()
"""


def jobs(n=24):
    """Bodies of completions: greedy and seeded ones, in turn. Groups of three begin alike."""
    heads = texts(n // 3, longest=90, seed=1)
    return [
        dict(
            prompt=heads[i // 3] + tail,
            max_tokens=8 + 5 * (i % 4),
            temperature=0 if i % 2 else 0.9,
            seed=i,
        )
        for i, tail in enumerate(texts(n, longest=40, seed=2))
    ]


SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 23, 456]}},
    "required": ["n"],
}
# What rank 0 does with the logits, and what it computes of prompts.
OTHERS = [
    dict(prompt="abc abc", max_tokens=9, echo=True, logprobs=2),
    dict(prompt="ab", max_tokens=9, echo=True, logprobs=2, best_of=3, seed=4),
    dict(prompt="one two", max_tokens=9, repetition_penalty=1.3, logit_bias={"40": 9}),
    dict(prompt="three", max_tokens=40, min_tokens=20, stop_token_ids=[50, 60, 70]),
    dict(prompt="four", max_tokens=9, n=3, temperature=1, seed=5),
    dict(prompt="five", max_tokens=0),
    dict(prompt="six", max_tokens=9, top_k=-5),
    dict(
        messages=[{"role": "user", "content": "seven"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": SCHEMA},
        },
    ),
]


def answers_to_others(port):
    """What is said, or refused."""
    found = []
    for body in OTHERS:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        status, answer = call(port, "POST", path, body)
        said = [(c.get("text"), c.get("message")) for c in answer.get("choices", ())]
        found.append((status, said, answer.get("error")))
    return found


def answers(port, bodies):
    """The answers to some bodies, 16 at a time."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda body: complete(port, **body), bodies))


def statistics(port):
    return call(port, "GET", "/server_info")[1]["statistics"]


@contextmanager
def open_stream(port, prompt="abc", **body):
    """A stream that has begun; gives the response."""
    body = dict(body, prompt=prompt, stream=True)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
        response = connection.getresponse()
        response.readline()
        yield response


def leave_streams(port, prompts):
    """Begin streams, and leave them."""

    def leave(prompt):
        with open_stream(port, prompt, max_tokens=200, temperature=0.5, seed=3):
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, prompts))


def processor_seconds(pid):
    """What a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes the folder of a model by its name."""
    made = {}
    of_three = dict(LLAMA, hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    of_three["intermediate_size"] = 192
    deep = dict(CONFIGS["deepseek_v2"], num_hidden_layers=3)

    def make(name):
        path = tmp_path_factory.mktemp("ranks") / name
        if name == "three":
            write_model(path, "llama", of_three)
        elif name == "deep":
            write_model(path, "deepseek_v2", deep)
            # Upstream looks there for the files of each rank.
            model, _ = load(str(path), lazy=True)
            names = dict(tree_flatten(model.parameters()))
            index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            make_tiny_model(path, name)
        return path

    def get(name):
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


@pytest.fixture
def expected(start_server, model_folder, folder, monkeypatch):
    """Gives what one process answers."""

    def get(name, bodies):
        monkeypatch.setattr("tiny_models.make_model", lambda path, name: folder(name))
        _, port = start_server(name, "--use-prompt-cache")
        if bodies is OTHERS:
            return answers_to_others(port)
        return answers(port, bodies)

    return get


# The same answers


def test_ranks_answer_as_one_process_beside_cancels_and_evictions(
    expected, folder, tmp_path
):
    """All of it on one group, because each takes seconds to start."""
    model, bodies = folder("llama"), jobs()
    argv = ["--model", str(model), "--use-prompt-cache", "--scheduler", "lpm", *CROWDED]
    with served(2, tmp_path, *argv) as (port, (first, second)):
        # Answers are the same beside streams that are left, and when their prompts are known.
        leaving = threading.Thread(target=leave_streams, args=(port, texts(8, seed=4)))
        leaving.start()
        assert answers(port, bodies) == expected("llama", bodies)
        join(leaving)
        assert answers(port, bodies) == expected("llama", bodies)
        assert answers_to_others(port) == expected("llama", OTHERS)
        done = statistics(port)
        assert done["evictions"]["evicted"] > 0 and done["cached_tokens"] > 0
        # What the ranks cannot serve is refused.
        status, error = call(
            port,
            "POST",
            "/v1/completions",
            dict(prompt="a", model=str(folder("three"))),
        )
        assert (status, error["error"]["param"]) == (404, "model")
        # No rank uses a processor while it waits.
        processes = [first.process, second.process]
        before = [processor_seconds(p.pid) for p in processes]
        threading.Event().wait(2.0)
        used = [processor_seconds(p.pid) - b for p, b in zip(processes, before)]
        assert max(used) < 0.2
        # A signal to any rank ends all, and answers that have begun are finished.
        with open_stream(port, max_tokens=60, temperature=0) as response:
            second.process.send_signal(signal.SIGTERM)
            events = response.read().decode()
        assert "error" not in events and events.endswith("data: [DONE]\n\n")
        assert [first.status(), second.status()] == [0, 0]
        assert "ERROR" not in first.log + second.log


@pytest.mark.parametrize("of_gpu", [False, True])
def test_rank_0_decides_and_its_tokens_count(of_gpu, expected, folder, tmp_path):
    """The step of a GPU is another one."""
    n, name, bodies = (2, "llama", jobs()) if of_gpu else (3, "three", jobs())
    program = ["-c", CHANGED + FOLLOWING.format(of_gpu=of_gpu)]
    argv = ["--model", str(folder(name)), "--use-prompt-cache", *CROWDED]
    argv += ["--eviction-policy", "ttl"]
    with served(n, tmp_path, *argv, program=program) as (port, started):
        assert answers(port, bodies) == expected(name, bodies)
        assert statistics(port)["evictions"]["evicted"] > 0
        name = signal.SIGTERM if of_gpu else signal.SIGINT
        started[0].process.send_signal(name)
        assert [rank.status() for rank in started] == [0] * n


def test_layers_are_shared_out_with_pipeline(expected, folder, tmp_path):
    bodies = jobs(12)
    argv = [
        "--model",
        str(folder("deep")),
        "--use-prompt-cache",
        "--pipeline",
        *CROWDED_PIPELINE,
    ]
    with served(2, tmp_path, *argv) as (port, _):
        assert answers(port, bodies) == expected("deep", bodies)
        assert answers(port, bodies) == expected("deep", bodies)
        assert statistics(port)["evictions"]["evicted"] > 0


def test_mlx_launch_starts_the_ranks(folder, tmp_path):
    port, first = free_ports(2)
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [str(launch), "-n", "2", "--starting-port", str(first)]
    command += [sys.executable, "-m", "mlx_lm_ext.batch_server"]
    command += ["--model", str(folder("llama")), "--port", str(port)]
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(
        command, **pipes, text=True, start_new_session=True
    ) as process:
        try:
            for line in process.stderr:
                if "Ready after" in line:
                    break
            assert complete(port, "abc", max_tokens=3, temperature=0)
            # As Ctrl-C in a terminal does. The launcher ends first.
            os.killpg(process.pid, signal.SIGINT)
            process.wait(30)
            with pytest.raises(ProcessLookupError):
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    os.killpg(process.pid, 0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# A rank is lost


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_loss_of_a_rank_ends_all(name, lost, folder, tmp_path):
    """With SIGSTOP, the rank neither ends nor does anything."""
    with served(2, tmp_path, "--model", str(folder("llama"))) as (port, started):
        other = started[1 - lost]
        with open_stream(port, max_tokens=4000, ignore_eos=True) as response:
            started[lost].process.send_signal(getattr(signal, name))
            start = time.monotonic()
            if lost == 1:
                # The client is told, and the health.
                events = response.read().decode().split("\n\n")
                assert "rank 1 has" in events[-2], events[-4:]
            assert other.status() == 1
            assert time.monotonic() - start < (10 if name == "SIGSTOP" else 5)
        assert f"rank {lost} has" in other.log.splitlines()[-1]
        assert "Traceback" not in other.log


def test_lost_rank_that_a_collective_notices_first_is_no_failed_decision(
    folder, tmp_path
):
    argv = ["--model", str(folder("llama")), "--warmup", "off", "--no-self-check"]
    program = ["-c", CHANGED + KILLED_IN_STEP]
    with served(2, tmp_path, *argv, program=program) as (port, started):
        with open_stream(port, max_tokens=4000, ignore_eos=True):
            assert started[0].status() == 1
        assert "rank 1 has ended" in started[0].log.splitlines()[-1]
        assert "Traceback" not in started[0].log


def test_health_says_why_a_group_has_ended(start_server):
    """In one process: it is gone soon after that."""
    engine, port = start_server()
    with open_stream(port, max_tokens=4000, ignore_eos=True) as response:
        engine.lose("rank 1 has ended")
        health = {"status": "unavailable", "reason": "rank 1 has ended"}
        assert call(port, "GET", "/health") == (503, health)
        assert "rank 1 has ended" in response.read().decode().split("\n\n")[-2]
    status, answer = call(port, "POST", "/v1/completions", dict(prompt="a"))
    assert (status, answer["error"]["message"]) == (503, "rank 1 has ended")


def test_plugin_that_raises_fails_its_request_or_is_replaced(folder, tmp_path):
    """Plugins run on rank 0 only."""
    (tmp_path / "failing.py").write_text(PLUGIN)
    argv = ["--model", str(folder("llama")), "-p", "failing", "--scheduler", "fails"]
    argv += ["--eviction-policy", "fails", "--use-prompt-cache", *CROWDED]
    program = ["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{RUN}"]
    with served(2, tmp_path, *argv, program=program) as (port, (first, second)):
        texts_ = [complete(port, p, max_tokens=9) for p in texts(6, seed=5)]
        assert all(texts_)
        body = dict(prompt="x", max_tokens=9, fails=True)
        assert call(port, "POST", "/v1/completions", body)[0] == 500
        body = dict(body, fails="hook")
        assert call(port, "POST", "/v1/completions", body)[0] == 500
        assert complete(port, "abc", max_tokens=3)
        assert "ArithmeticError: order" in first.log
        assert "fails" not in second.log


RUN = "from mlx_lm_ext.batch_server import main; main()"
PLUGIN = """
from mlx_lm_ext import hookimpl
from mlx_lm_ext.interfaces import EvictionPolicy, SchedulerPolicy


class Scheduler(SchedulerPolicy):
    name = "fails"

    def order(self, waiting, view):
        raise ArithmeticError("order")

    def prefill_tokens(self, view):
        raise ArithmeticError("prefill")


class Eviction(EvictionPolicy):
    name = "fails"

    def priority(self, entry):
        raise ArithmeticError("priority")


@hookimpl
def mlx_lm_register_scheduler_policies():
    return [Scheduler]


@hookimpl
def mlx_lm_register_eviction_policies():
    return [Eviction]


@hookimpl
def mlx_lm_make_logits_processors(request, tokenizer, args):
    def fail(tokens, logits):
        raise ArithmeticError("processor")

    if request.body.get("fails") == "hook":
        raise ArithmeticError("hook")
    return [fail] if request.body.get("fails") else []
"""


# Refused at start


def start_fails(n, folder, *argv, **kwargs):
    """The last line of each rank of a group that ends with 1."""
    with ranks(n, folder, *argv, **kwargs) as started:
        assert [rank.status(120) for rank in started] == [1] * n
        assert not any("Traceback" in rank.log for rank in started)
        return [rank.log.splitlines()[-1] for rank in started]


def test_rank_with_other_arguments_ends_the_start(folder, tmp_path):
    argv = ["--model", str(folder("llama")), "--batch-size", "8"]
    lines = start_fails(2, tmp_path, *argv, others=["--batch-size", "4"])
    why = "the ranks differ in --batch-size: rank 0 has 8, and rank 1 has 4"
    assert all(line.endswith(why) for line in lines)


def test_rank_with_other_weights_ends_the_start(folder, tmp_path):
    other = make_tiny_model(tmp_path / "other", "llama", seed=1)
    argv = ["--model", str(folder("llama"))]
    lines = start_fails(2, tmp_path, *argv, others=["--model", str(other)])
    assert all("the ranks differ in the model's model.safetensors" in n for n in lines)


def test_load_that_fails_on_one_rank_ends_all(folder, tmp_path):
    broken = make_tiny_model(tmp_path / "broken", "llama")
    (broken / "model.safetensors").write_bytes(b"no weights")
    argv = ["--model", str(folder("llama"))]
    lines = start_fails(2, tmp_path, *argv, others=["--model", str(broken)])
    assert all("rank 1: model" in line and "cannot be loaded" in line for line in lines)


def test_heads_that_do_not_divide_end_the_start(folder, tmp_path):
    lines = start_fails(2, tmp_path, "--model", str(folder("three")))
    assert any("3 heads (num_key_value_heads) cannot be divided" in n for n in lines)


# Runs the server with a model whose batches are found wrong, by rank 0 only.
WRONG_BATCHES = """
import os
from mlx_lm_ext import blas, batch_server
blas.load()
blas.load = lambda: None
from mlx_lm_ext.engine import self_check
self_check.TOLERANCE = 1.0 if int(os.environ["MLX_RANK"]) else -1.0
batch_server.main()
"""


def test_wrong_batches_end_the_start(folder, tmp_path):
    argv = ["--model", str(folder("llama"))]
    lines = start_fails(2, tmp_path, *argv, program=["-c", WRONG_BATCHES])
    assert all("in a batch, the logits" in line for line in lines)
    assert all("--no-self-check" in line for line in lines)
    argv.append("--no-self-check")
    with served(2, tmp_path, *argv, program=["-c", WRONG_BATCHES]):
        pass


def test_what_ranks_cannot_do_on_one_of_them_is_named_on_all(folder, tmp_path):
    argv = ["--model", str(folder("llama"))]
    lines = start_fails(2, tmp_path, *argv, others=["--kv-bits", "4"])
    why = "the ranks differ in --kv-bits: rank 0 has None, and rank 1 has 4"
    assert all(why in line for line in lines)


def test_signal_ends_a_rank_that_waits_for_the_others(folder, tmp_path):
    """Rank 1 waits for rank 0, which is not there."""
    ports = [[f"127.0.0.1:{port}"] for port in free_ports(2)]
    (tmp_path / "hosts").write_text(json.dumps(ports))
    env = os.environ | {"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "hosts")}
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--model", str(folder("llama"))]
    with subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if "Importing mlx-lm" in line and "so far" not in line:
                    break
            process.send_signal(signal.SIGTERM)
            # MLX gives up after half a minute.
            assert process.wait(10) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            print(process.stderr.read())


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter-path", "adapter"],
        ["--draft-model", "draft"],
        ["--kv-bits", "4"],
    ],
)
def test_what_ranks_cannot_do_is_refused_by_its_flag(argv):
    args = make_parser().parse_args(argv)
    with pytest.raises(RuntimeError, match=f"{argv[0]} cannot be used with several"):
        check_arguments(args)


def test_process_that_was_launched_without_a_group_does_not_serve_alone(folder):
    env = os.environ | {"MLX_RANK": "0"}
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--model", str(folder("llama"))]
    done = run_program(command, env=env)
    assert done.returncode == 1
    assert "MLX_RANK is set, and MLX finds no other ranks" in done.stderr

"""Errors that are not an ``Exception``, and what ends the generation thread or the process."""

import http.client
import json
import re
import shutil
import signal
import sys
from contextlib import ExitStack

import pytest
from conftest import server_process
from helpers import JSON, Reference, call, complete, plugin, read, submit, texts
from processes import SERVING, read_until, run_program, started

from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import BatchSampler, EvictionPolicy, SchedulerPolicy

ERRORS = [SystemExit, KeyboardInterrupt, GeneratorExit]
REGISTER = "mlx_lm_register_{}"


def raiser(error):
    def method(*args, **kwargs):
        raise error("not for the server")

    return method


def policy(interface, method, error):
    names = {"name": "leaver", method: raiser(error)}
    if interface is EvictionPolicy:
        names.setdefault("priority", lambda self, entry: 0)
    elif interface is BatchSampler:
        names.setdefault("__call__", lambda self, logprobs: logprobs.argmax(axis=-1))
    return type("Leaver", (interface,), names)


@pytest.mark.logs_errors
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "interface, method, kind",
    [
        (EvictionPolicy, "on_insert", "eviction-policy"),
        (SchedulerPolicy, "order", "scheduler"),
        (SchedulerPolicy, "on_finish", "scheduler"),
        (BatchSampler, "__init__", "sampler"),
        (BatchSampler, "__call__", "sampler"),
        (BatchSampler, "filter", "sampler"),
    ],
)
def test_policy_that_exits_is_replaced(
    error, interface, method, kind, start_engine, model_folder, caplog
):
    cls = policy(interface, method, error)
    hook = {"scheduler": "scheduler_policies", "sampler": "samplers"}
    hook = REGISTER.format(hook.get(kind, "eviction_policies"))
    argv = ["--use-prompt-cache", f"--{kind}", "leaver"]
    engine = start_engine("llama", *argv, plugin=plugin(**{hook: lambda: [cls]}))
    reference = Reference(model_folder())
    prompts = texts(3)
    jobs = [submit(engine, p, max_tokens=3 + i) for i, p in enumerate(prompts)]
    for i, (prompt, job) in enumerate(zip(prompts, jobs)):
        assert read(job) == reference.tokens(prompt, 3 + i)
    assert "'leaver' of plugin 'test'" in caplog.text


@pytest.mark.logs_errors
@pytest.mark.parametrize("error", ERRORS)
def test_hook_that_exits_costs_only_its_request(error, start_server):
    def make(request):
        return {"hook": raiser(error), "processor": lambda: [raiser(error)]}.get(
            request.user, lambda: None
        )()

    def finished(request):
        if request.user == "observer":
            raise error

    _, port = start_server(
        plugin=plugin(
            mlx_lm_make_logits_processors=make, mlx_lm_request_finished=finished
        )
    )
    for user, status in (("hook", 500), ("processor", 500), ("observer", 200)):
        body = {"prompt": "x", "user": user, "max_tokens": 2}
        assert call(port, "POST", "/v1/completions", body)[0] == status
    assert complete(port, "hello", max_tokens=2)


@pytest.mark.parametrize("where", ["import", "hook", "policy"])
def test_plugin_that_exits_at_the_start_is_named_in_one_line(
    where, tmp_path, model_folder
):
    source = {
        "import": "raise SystemExit(3)",
        "hook": "def mlx_lm_register_samplers(): raise SystemExit(3)",
        "policy": """
            class P(SchedulerPolicy):
                name = "leaver"
                def __init__(self, args, clock): raise SystemExit(3)
            @hookimpl
            def mlx_lm_register_scheduler_policies(): return [P]
        """,
    }[where]
    lines = [line.removeprefix("            ") for line in source.splitlines()]
    head = "from mlx_lm_ext import hookimpl\n"
    head += "from mlx_lm_ext.interfaces import SchedulerPolicy\n"
    mark = "@hookimpl\n" if where == "hook" else ""
    (tmp_path / "leaving.py").write_text(head + mark + "\n".join(lines))
    argv = ["--scheduler", "leaver"] if where == "policy" else []
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "-p", "leaving"]
    command += ["--model", str(model_folder()), "--port", "0", "--log-level", "ERROR"]
    result = run_program([*command, *argv], cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert "plugin 'leaving'" in line and "SystemExit: 3" in line


class DyingEngine(Engine):
    """Its generation thread ends in the middle of a request."""

    def report(self, idle):
        if self.batch.n_steps > 3:
            raise SystemExit


def test_requests_are_told_that_the_generation_thread_has_ended(start_server, caplog):
    engine, port = start_server(make_engine=DyingEngine)
    body = {"prompt": "x", "max_tokens": 4000}
    status, answer = call(port, "POST", "/v1/completions", body)
    assert (status, answer["error"]["type"]) == (503, "server_error")
    assert "failed" in answer["error"]["message"]
    assert engine.ended.wait(60)
    assert "The generation thread has failed" in caplog.text
    assert call(port, "GET", "/health")[0] == 503
    assert call(port, "POST", "/v1/completions", body)[0] == 503
    with pytest.raises(RequestError):
        submit(engine, "x")


def test_process_exits_when_the_generation_thread_has_ended(tmp_path, model_folder):
    (tmp_path / "killing.py").write_text("""
from mlx_lm_ext import hookimpl

@hookimpl
def mlx_lm_make_logits_processors(request):
    from mlx_lm_ext.engine.loop import Engine

    def report(self, idle):
        raise SystemExit

    Engine.report = report
""")
    argv = ["--model", str(model_folder()), "--warmup", "off", "-p", "killing"]
    with server_process(*argv, cwd=tmp_path) as (port, lines, process):
        body = {"prompt": "x", "max_tokens": 4000}
        assert call(port, "POST", "/v1/completions", body)[0] == 503
        assert process.wait(60) == 1
    assert "The generation thread has failed" in "".join(lines)
    assert lines[-1].startswith("mlx_lm.batch_server: error: the generation thread")


# A plugin that makes a method of the model provider block for ever: when it is called for
# another model than the default one, or at its first call if ``where`` is "start".
BLOCKING = """
import __main__, sys, threading
from mlx_lm_ext import hookimpl

def block(method, where):
    def run(self, model):
        if where == "start" or model not in (self.default_key, DEFAULT):
            # Not ``print``, between whose text and end of line others may write.
            sys.stderr.write("blocked\\n")
            sys.stderr.flush()
            threading.Event().wait()
        return method(self, model)
    return run

@hookimpl
def mlx_lm_register_samplers():
    from mlx_lm.server import ModelDescription
    from mlx_lm_ext.engine.models import BatchModelProvider
    from mlx_lm_ext.server import http_server

    global DEFAULT
    DEFAULT = ModelDescription("default_model", "default_model", None)
    __main__.STOP_TIMEOUT = http_server.CLOSE_TIMEOUT = 0.1
    method = "{method}"
    blocked = block(getattr(BatchModelProvider, method), "{where}")
    setattr(BatchModelProvider, method, blocked)
    return []
"""


@pytest.mark.parametrize(
    "method, where",
    [
        # The generation thread, before the server serves.
        ("switch_to", "start"),
        # The generation thread, for a request that names another model.
        ("switch_to", "request"),
        # The handler thread of such a request, which may download the model.
        ("describe", "request"),
    ],
)
def test_signal_ends_a_server_that_is_loading_or_downloading(
    method, where, tmp_path, model_folder
):
    source = BLOCKING.replace("{method}", method).replace("{where}", where)
    (tmp_path / "blocking.py").write_text(source)
    shutil.copytree(model_folder(), tmp_path / "other")
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--model", str(model_folder()), "--warmup", "off", "-p", "blocking"]
    command += ["--allow-models", "any", "--shutdown-timeout", "0.1"]
    with ExitStack() as opened:
        process = opened.enter_context(started(command, cwd=tmp_path))
        if where == "request":
            serving, _ = read_until(process, SERVING)
            address = "127.0.0.1", int(serving[1])
            client = http.client.HTTPConnection(*address, timeout=60)
            opened.callback(client.close)
            body = {"prompt": "x", "model": str(tmp_path / "other")}
            client.request("POST", "/v1/completions", json.dumps(body), JSON)
        _, lines = read_until(process, "^blocked\n")
        assert not re.search(SERVING, "".join(lines))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

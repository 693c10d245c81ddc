"""Finding plugins, what is wrong with them, and each hook."""

import http.client
import inspect
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers import ALONE, JSON, Always, call, complete, plugin, read, stream, submit
from processes import run_program

from mlx_lm_ext import hookimpl, hookspecs
from mlx_lm_ext.arguments import make_parser, parse_arguments
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import (
    BatchSampler,
    Constraint,
    Entry,
    EvictionPolicy,
    RequestInfo,
    RequestStats,
    SchedulerPolicy,
    SchedulerView,
)
from mlx_lm_ext.policies import loading as plugins
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import BUILTIN, EVICTION, PluginError, Plugins
from mlx_lm_ext.routes import Route

README = (Path(__file__).parent.parent / "README.md").read_text()
HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if hasattr(function, "mlx_lm_ext_spec")
}


def load(*added):
    """The plugins of a process, and then these: "first" and "second"."""
    found = Plugins()
    for name, p in zip(("first", "second"), added):
        found.add(name, lambda: p, f"{name}-dist", "1.0")
    return found


class Largest(EvictionPolicy):
    name = "largest"

    def priority(self, entry):
        return -entry.nbytes


# The contract


def test_every_hook_has_a_test():
    assert HOOKS
    for name in HOOKS:
        assert f"test_hook_{name.removeprefix('mlx_lm_')}" in globals(), name


def hook_table():
    """The table of hooks for the README, made from their specifications."""
    rows = ["| hook | called | what it does |", "|---|---|---|"]
    for name, function in HOOKS.items():
        first, _, rest = inspect.getdoc(function).partition("\n\n")
        arguments = ", ".join(inspect.signature(function).parameters)
        called = re.match(r"Called (.*?)[,.]", " ".join(rest.split()))[1]
        cells = [f"`{name}({arguments})`", called, " ".join(first.split())]
        rows.append(f"| {' | '.join(cells)} |".replace("``", "`"))
    return "\n".join(rows)


def test_table_of_hooks_in_the_readme_is_made_from_the_specifications():
    table = hook_table()
    assert table in README, f"README.md needs this table of hooks:\n\n{table}\n"


def test_every_method_and_field_of_the_interfaces_is_described():
    for interface in (EvictionPolicy, SchedulerPolicy, BatchSampler, Constraint):
        for name, member in vars(interface).items():
            if inspect.isfunction(member) and name != "__init__":
                assert member.__doc__, f"{interface.__name__}.{name}"
    for cls in (Entry, RequestInfo, RequestStats, SchedulerView):
        for field in fields(cls):
            assert f"    {field.name} (" in cls.__doc__, f"{cls.__name__}.{field.name}"


def test_class_that_a_plugin_does_not_register_is_named_in_the_error():
    p = plugin(mlx_lm_register_eviction_policies=lambda: [])
    p.Largest = Largest
    args = make_parser().parse_args(["--eviction-policy", "largest"])
    with pytest.raises(PluginError) as error:
        Policies(load(p), args)
    assert str(error.value).endswith(
        "not 'largest'; plugin 'first' (first-dist 1.0) defines the class Largest, and its "
        "mlx_lm_register_eviction_policies does not return it"
    )


def test_plugin_of_the_readme_works_as_printed(tmp_path, monkeypatch):
    code = re.search(r"```python\n(from mlx_lm_ext.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) <= 15
    (tmp_path / "largest.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = re.search(r"batch_server (-p largest .*)", README)[1].split()
    args, found = parse_arguments(arguments)
    policy = Policies(found, args).eviction.policy
    assert policy.priority(SimpleNamespace(nbytes=7)) == -7


def test_test_of_the_readme_passes_and_fails_as_printed(tmp_path, monkeypatch):
    plugin, test = (
        re.search(rf"```python\n({start}.*?)```", README, re.DOTALL)[1]
        for start in ("from mlx_lm_ext import hookimpl", "from largest")
    )
    monkeypatch.syspath_prepend(tmp_path)
    # What is imported here is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "largest", None)
    for right, wrong in [("", ""), ("return -entry.nbytes", "entry.nbytes = 0")]:
        (tmp_path / "largest.py").write_text(plugin.replace(right, wrong))
        del sys.modules["largest"]
        names = {}
        exec(test, names)
        with pytest.raises(AssertionError) if wrong else nullcontext():
            names["test_largest_first_keeps_the_contract"]()


# Finding


def test_modules_are_loaded_by_name_and_plugins_blocked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one_plugin", "two_plugin"):
        (tmp_path / f"{name}.py").write_text("'''Nothing.'''")
    found = Plugins(["one_plugin", "one_plugin", "two_plugin", "no:two_plugin"])
    assert list(found.sources) == [*BUILTIN, "one_plugin"]
    assert "two_plugin: blocked" in found.describe(make_parser().parse_args([]))


def test_blocking_what_is_not_there_is_an_error():
    with pytest.raises(PluginError, match="-p no:sises: there is no such plugin"):
        Plugins(["no:sises"])


class FakeEntryPoint(SimpleNamespace):
    def load(self):
        return self.plugin


def entry_point(name, dist, plugin=None):
    return FakeEntryPoint(
        name=name, dist=SimpleNamespace(name=dist, version="2.1"), plugin=plugin
    )


@pytest.fixture
def install(monkeypatch):
    """Makes as if these entry points were installed."""

    def set_entry_points(*entries):
        monkeypatch.setattr(plugins, "entry_points", lambda group: list(entries))

    return set_entry_points


def test_installed_plugins_are_found_and_listed(install, capsys):
    hook = plugin(mlx_lm_register_eviction_policies=lambda: [Largest])
    install(entry_point("sizes", "sizes-dist", hook))
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--list-plugins"])
    assert exit.value.code == 0
    assert (
        "plugin 'sizes' (sizes-dist 2.1)\n"
        "  hooks: mlx_lm_register_eviction_policies\n"
        "  registers: --eviction-policy largest\n"
    ) in capsys.readouterr().out


def test_environment_turns_installed_plugins_off(install, monkeypatch):
    install(entry_point("sizes", "sizes-dist", plugin()))
    assert "sizes" in Plugins().sources
    monkeypatch.setenv("MLX_LM_EXT_DISABLE_AUTOLOAD", "1")
    assert "sizes" not in Plugins().sources
    assert "sizes" in Plugins(["sizes"]).sources


def test_installed_plugin_is_blocked_by_name(install):
    install(entry_point("sizes", "sizes-dist", plugin()))
    assert "sizes" not in Plugins(["no:sizes"]).sources


def test_two_distributions_cannot_have_a_plugin_of_one_name(install):
    install(entry_point("x", "first", plugin()), entry_point("x", "second", plugin()))
    with pytest.raises(PluginError, match=r"second 2.1.*first 2.1"):
        Plugins()


# What is wrong with them


class Nameless(Largest):
    name = None


class Incomplete(EvictionPolicy):
    name = "incomplete"


class Unrelated:
    name = "unrelated"


def unmarked():
    return type("Plugin", (), {"mlx_lm_add_arguments": lambda parser: None})()


def wrapper():
    mark = hookimpl(wrapper=True)
    return type("Plugin", (), {"mlx_lm_add_arguments": staticmethod(mark(generate))})()


def generate(parser):
    yield


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: plugin(mlx_lm_registered=lambda: []), "unknown hook"),
        (lambda: plugin(mlx_lm_add_arguments=lambda speed: None), "speed"),
        (unmarked, "mlx_lm_add_arguments is not marked with @mlx_lm_ext.hookimpl"),
        (wrapper, "mlx_lm_add_arguments is a wrapper"),
        (lambda: 1 / 0, "cannot be loaded: ZeroDivisionError: division by zero"),
        (
            lambda: plugin(
                mlx_lm_add_arguments=lambda parser: parser.add_argument("--port")
            ),
            "mlx_lm_add_arguments: ArgumentError: .*--port",
        ),
    ],
)
def test_plugin_that_cannot_be_loaded_is_named(make, reason):
    found = load()
    with pytest.raises(PluginError, match=f"plugin 'bad' \\(bad-dist 0.3\\).*{reason}"):
        found.add("bad", make, "bad-dist", "0.3")
        found.add_arguments(make_parser())


@pytest.mark.parametrize(
    "given, reason",
    [
        ([Nameless], "the eviction policy Nameless has no name"),
        ([Incomplete], "the eviction policy 'incomplete' lacks the method priority"),
        ([Unrelated], "does not derive from mlx_lm_ext.interfaces.EvictionPolicy"),
        ([Largest(None, None)], "does not derive from"),
        (Largest, "must return a list of classes"),
        (
            [Largest, Largest],
            "the eviction policy 'largest' is also one of plugin 'first'",
        ),
    ],
)
def test_class_that_is_not_as_it_must_be_is_named(given, reason):
    found = load(plugin(mlx_lm_register_eviction_policies=lambda: given))
    with pytest.raises(
        PluginError, match=rf"plugin 'first' \(first-dist 1.0\).*{reason}"
    ):
        found.registered(EVICTION)


def test_two_policies_of_one_name_name_both_plugins():
    hook = dict(mlx_lm_register_eviction_policies=lambda: [Largest])
    with pytest.raises(PluginError, match="first-dist 1.0.*second-dist 1.0"):
        load(plugin(**hook), plugin(**hook)).registered(EVICTION)


def test_start_with_a_wrong_plugin_ends_with_one_line(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from mlx_lm_ext import hookimpl\n" "@hookimpl\ndef mlx_lm_nothing(): pass\n"
    )
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "-p", "wrong"]
    result = run_program(command, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "plugin 'wrong' (loaded with -p): unknown hook 'mlx_lm_nothing'" in line


@pytest.mark.parametrize("flag", ["--eviction-policy", "--scheduler", "--sampler"])
def test_wrong_name_of_a_policy_lists_the_right_ones(flag):
    args, found = parse_arguments([flag, "nothing"])
    with pytest.raises(PluginError, match=f"{flag} must be one of .*not 'nothing'"):
        Policies(found, args)


def test_policy_that_cannot_be_made_ends_the_start():
    class Impossible(Largest):
        def __init__(self, args, clock):
            raise OSError("no such file")

    args, _ = parse_arguments(["--eviction-policy", "largest"])
    found = load(plugin(mlx_lm_register_eviction_policies=lambda: [Impossible]))
    with pytest.raises(PluginError, match="'first'.*'largest' cannot be made.*no such"):
        Policies(found, args)


# The hooks


def test_hook_add_arguments(install):
    def add(parser):
        parser.add_argument("--cost", type=int, default=3)

    install(entry_point("flags", "flags-dist", plugin(mlx_lm_add_arguments=add)))
    assert parse_arguments(["--cost", "5"])[0].cost == 5
    assert parse_arguments([])[0].cost == 3


def test_hook_register_eviction_policies(start_engine):
    hook = plugin(mlx_lm_register_eviction_policies=lambda: [Largest])
    # 512 bytes a token: room for 150 beside the 256 of a running request.
    argv = ["--use-prompt-cache", "--radix-cache-size", str(406 * 512)]
    kept = {}
    for policy in ("lru", "largest"):
        engine = start_engine("llama", *argv, "--eviction-policy", policy, plugin=hook)
        # The largest leaf is an answer.
        lengths = ("a" * 20, 2), ("b" * 20, 60), ("c" * 80, 2), ("d", 2)
        for prompt, max_tokens in lengths:
            read(submit(engine, prompt, max_tokens=max_tokens))
        again = submit(engine, "a" * 20, max_tokens=2)
        read(again)
        kept[policy] = again.n_matched
    assert kept == {"lru": 0, "largest": 19}


def test_hook_register_scheduler_policies(start_engine):
    class LastFirst(SchedulerPolicy):
        name = "last"

        def order(self, waiting, view):
            return waiting[::-1]

    hook = plugin(mlx_lm_register_scheduler_policies=lambda: [LastFirst])
    argv = ["--scheduler", "last", "--batch-size", "1"]
    engine = start_engine("llama", *argv, plugin=hook)
    first = submit(engine, "a", max_tokens=4000)
    first.receive(timeout=60)
    jobs = [submit(engine, "b", max_tokens=2) for _ in range(3)]
    engine.client.cancel(first)
    for job in jobs:
        read(job)
    assert jobs[2].started < jobs[1].started < jobs[0].started


def test_hook_register_samplers(start_server):
    hook = plugin(mlx_lm_register_samplers=lambda: [Always])
    engine, port = start_server(plugin=hook)
    job = submit(engine, "hello", max_tokens=5, sampler="always")
    assert read(job) == [65, 66, 67, 68, 69]
    other = submit(engine, "hello", max_tokens=5)
    assert read(other) != [65, 66, 67, 68, 69]
    body = dict(prompt="hello", sampler="never")
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 400
    assert answer["error"]["param"] == "sampler"
    assert "always, default" in answer["error"]["message"]


def only(token):
    """A logits processor that leaves one token."""

    def process(tokens, logits):
        return mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)

    return process


def test_hook_make_logits_processors(start_engine):
    def make(request, args):
        return [only(request.body["only"])] if "only" in request.body else None

    engine = start_engine(plugin=plugin(mlx_lm_make_logits_processors=make))
    plain = submit(engine, "hello", max_tokens=5)
    jobs = [submit(engine, "hello", max_tokens=5, only=n) for n in (70, 80)]
    assert [read(job) for job in jobs] == [[70] * 5, [80] * 5]
    assert set(read(plain)) - {70, 80}


class Only(Constraint):
    """Allows one token, as often as it is told, and then the end."""

    def __init__(self, token, n):
        self.token, self.n_left = token, n

    def advance(self, token):
        assert token == self.token
        self.n_left -= 1

    def fill(self, mask):
        mask[:] = 0
        mask[self.token // 32] |= 1 << self.token % 32


def test_hook_make_constraint(start_engine):
    def make(request, tokenizer):
        if "only" in request.body:
            return Only(request.body["only"], 5)

    engine = start_engine(plugin=plugin(mlx_lm_make_constraint=make))
    plain = submit(engine, "hello", max_tokens=5)
    jobs = [submit(engine, "hello", max_tokens=5, only=n) for n in (70, 95)]
    assert [read(job) for job in jobs] == [[70] * 5, [95] * 5]
    assert set(read(plain)) - {70, 95}


def test_hook_register_routes(start_server):
    def count(request):
        return {"count": len(request.tokenize(request.json()))}

    _, port = start_server(
        plugin=plugin(mlx_lm_register_routes=lambda: [Route("POST", "/count", count)])
    )
    assert call(port, "POST", "/count", dict(prompt="hello")) == (200, {"count": 5})
    status, error = call(port, "GET", "/count")
    assert status == 405 and "takes POST" in error["error"]["message"]


def test_hook_request_finished(start_server):
    seen = SimpleQueue()

    def observe(request, stats):
        seen.put((request.id, request.n_generated, stats))

    _, port = start_server(plugin=plugin(mlx_lm_request_finished=observe))
    body = dict(prompt="hello", max_tokens=5)
    call(port, "POST", "/v1/completions", dict(prompt=""))
    _, answer = call(port, "POST", "/v1/completions", body)
    first, *_ = stream(port, "/v1/completions", **body)
    for expected in (answer, first):
        id, n_generated, stats = seen.get(timeout=60)
        assert id == expected["id"]
        assert n_generated == 5
        assert stats.finish_reason == "length"
        assert 0 <= stats.queue_seconds <= stats.ttft <= stats.seconds
    assert seen.empty()


def test_observers_hear_of_a_client_that_left(start_server):
    seen = SimpleQueue()
    hook = plugin(mlx_lm_request_finished=lambda stats: seen.put(stats))
    _, port = start_server(plugin=hook)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = dict(prompt="hello", max_tokens=4000, stream=True)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    connection.getresponse().close()
    connection.close()
    assert seen.get(timeout=60).finish_reason == "cancelled"


def test_hooks_are_called_last_registered_first_but_for_tryfirst_and_trylast(
    start_engine,
):
    calls = []

    def note(name):
        def make_logits_processors(request):
            return [lambda tokens, logits: calls.append(name) or logits]

        return make_logits_processors

    def noting(name, **options):
        return plugin(mlx_lm_make_logits_processors=note(name), **options)

    engine = start_engine(plugin=noting("early", tryfirst=True))
    for name, options in (("first", {}), ("late", dict(trylast=True)), ("last", {})):
        engine.policies.plugins.add(name, lambda: noting(name, **options), "d", "1")
    read(submit(engine, "hello", max_tokens=1))
    assert calls[:4] == ["early", "last", "first", "late"]


# Plugins that fail while requests are served


@pytest.mark.logs_errors
def test_hook_that_fails_for_a_request_costs_only_that_request(start_server, caplog):
    def make(request):
        raise LookupError("no words")

    _, port = start_server(
        plugin=plugin(
            mlx_lm_make_logits_processors=lambda request: (
                make(request) if request.user == "x" else None
            )
        )
    )
    body = dict(prompt="hello", user="x")
    assert call(port, "POST", "/v1/completions", body)[0] == 500
    assert complete(port, "hello", max_tokens=5)
    assert (
        "plugin 'test' (tests 0): mlx_lm_make_logits_processors failed" in caplog.text
    )


def test_plugin_can_refuse_a_request(start_server):
    def make(request):
        raise RequestError(400, "words must be an array", "words")

    _, port = start_server(plugin=plugin(mlx_lm_make_logits_processors=make))
    status, answer = call(port, "POST", "/v1/completions", dict(prompt="hello"))
    assert status == 400
    assert answer["error"]["param"] == "words"


@pytest.mark.logs_errors
def test_logits_processor_that_gives_another_shape_is_named(start_engine, caplog):
    p = plugin(
        mlx_lm_make_logits_processors=lambda: [lambda tokens, logits: logits.sum()]
    )
    engine = start_engine(plugin=p)
    with pytest.raises(RequestError, match="its log says why"):
        read(submit(engine, "hello", max_tokens=2))
    assert "plugin 'test' (tests 0): a logits processor failed" in caplog.text


@pytest.mark.logs_errors
def test_observer_that_raises_is_logged_and_the_others_are_told(start_server, caplog):
    def fail(request):
        raise LookupError("no file")

    told = SimpleQueue()
    engine, port = start_server(
        plugin=plugin(mlx_lm_request_finished=lambda request: told.put(request))
    )
    engine.policies.plugins.add(
        "bad", lambda: plugin(mlx_lm_request_finished=fail), "bad-dist", "1"
    )
    assert complete(port, "hello", max_tokens=5)
    told.get(timeout=60)
    assert "plugin 'bad' (bad-dist 1): mlx_lm_request_finished failed" in caplog.text


def test_request_that_is_served_alone_refuses_processors_and_samplers(start_server):
    _, port = start_server(
        "llama",
        *ALONE,
        plugin=plugin(
            mlx_lm_register_samplers=lambda: [Always],
            mlx_lm_make_logits_processors=lambda request: (
                [only(70)] if request.user == "x" else []
            ),
        ),
    )
    assert complete(port, "hello")
    for extra in (dict(user="x"), dict(sampler="always")):
        body = dict(prompt="hello", **extra)
        status, answer = call(port, "POST", "/v1/completions", body)
        assert status == 400
        assert "cannot use the samplers" in answer["error"]["message"]

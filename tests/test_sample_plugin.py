"""The sample package: what it does to a server when pip installs it, and only then."""

import ast
import http.client
import importlib.util
import json
import shutil
import site
import sys
import venv
from datetime import datetime
from pathlib import Path

import pytest
from conftest import server_process
from helpers import JSON, call, plugin, stream
from processes import run_program

import mlx_lm_ext

SAMPLE = Path(mlx_lm_ext.__file__).parent / "examples" / "sample_plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh virtual environment that sees what this one has; gives its Python."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()]
    (packages / "parent.pth").write_text("\n".join(lines) + "\n")
    return folder / "venv" / "bin" / "python"


def pip(python, *arguments):
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    result = run_program(command)
    assert result.returncode == 0, result.stderr


def test_sample_uses_public_names_only():
    tree = ast.parse((SAMPLE / "mlx_lm_sample_plugin.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlx_lm"):
            assert node.module in (
                "mlx_lm_ext",
                "mlx_lm_ext.errors",
                "mlx_lm_ext.interfaces",
                "mlx_lm_ext.routes",
            )
            assert not any(alias.name.startswith("_") for alias in node.names)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr == "__init__"


@pytest.mark.slow
def test_own_tests_of_the_sample_pass_where_it_is_not_installed(tmp_path):
    folder = shutil.copytree(SAMPLE, tmp_path / "sample")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = run_program(command, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout


def ask(port, prompt, **body):
    body = dict(prompt=prompt, max_tokens=8, **body)
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 200, answer
    return answer


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def sample(start_server):
    """The port of a server with the routes of the sample plugin."""
    name = "mlx_lm_sample_plugin"
    spec = importlib.util.spec_from_file_location(name, SAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    routes = plugin(mlx_lm_register_routes=module.mlx_lm_register_routes)
    return start_server("llama", "--max-tokens", "8", plugin=routes)[1]


def test_sample_answers_chats_as_ollama_does(sample):
    hello = dict(messages=[{"role": "user", "content": "hello"}])
    _, expected = call(sample, "POST", "/v1/chat/completions", hello)
    (choice,) = expected["choices"]
    text = choice["message"]["content"]
    status, answer = call(sample, "POST", "/api/chat", hello | {"stream": False})
    assert (status, answer["done"], answer["done_reason"]) == (200, True, "length")
    assert answer["message"] == {"role": "assistant", "content": text}
    connection = http.client.HTTPConnection("127.0.0.1", sample, timeout=60)
    connection.request("POST", "/api/chat", json.dumps(hello), JSON)
    response = connection.getresponse()
    assert response.getheader("Content-Type") == "application/x-ndjson"
    lines = list(map(json.loads, response.read().splitlines()))
    connection.close()
    assert "".join(line["message"]["content"] for line in lines) == text
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert datetime.fromisoformat(lines[0]["created_at"]).tzinfo is not None


@pytest.mark.parametrize("streamed", [False, True])
def test_sample_refuses_a_wrong_chat_with_a_400(streamed, sample):
    status, answer = call(sample, "POST", "/api/chat", {"stream": streamed})
    assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.slow
def test_installed_sample_changes_what_the_server_does(
    environment, model_folder, tmp_path
):
    model = ["--model", str(model_folder())]
    # Setuptools builds in the source folder.
    source = shutil.copytree(SAMPLE, tmp_path / "sample")
    pip(
        environment,
        *("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        source,
    )
    log = tmp_path / "log.jsonl"
    # 512 bytes a token: room for 200 beside the 256 of a running request.
    cache = ["--use-prompt-cache", "--radix-cache-size", str(456 * 512)]
    flags = ["--eviction-policy", "cost", "--cost-weight", "1"]
    flags += ["--scheduler", "streams-first", "--request-log", str(log)]
    with server_process(*model, *cache, *flags, python=environment) as (port, _, _):
        # The eviction policy keeps the prompt that takes longest to prefill.
        for prompt in ("a" * 100, "b" * 60, "c" * 60, "d"):
            ask(port, prompt)
        assert cached(ask(port, "a" * 100)) == 99
        # A sampler that is content with no surprise takes the most likely token.
        greedy = ask(port, "hello")["choices"][0]["text"]
        assert (
            ask(port, "hello", sampler="mirostat", mirostat_tau=0)["choices"][0]["text"]
            == greedy
        )
        surprising = ask(port, "hello", sampler="mirostat", mirostat_tau=30)
        assert surprising["choices"][0]["text"] != greedy
        body = dict(prompt="hello", sampler="mirostat", mirostat_tau="much")
        status, answer = call(port, "POST", "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, "mirostat_tau")
        # The logits processor.
        banned = next(c for c in greedy if c.isascii())
        text = ask(port, "hello", banned_words=[banned])["choices"][0]["text"]
        assert banned not in text
        # The constraint.
        no_end = dict.fromkeys("012", -100)
        only = ask(port, "hello", allowed_characters="ab", logit_bias=no_end)
        assert set(only["choices"][0]["text"]) <= {"a", "b"}
        assert len(only["choices"][0]["text"]) == 8
        body = dict(prompt="hello", allowed_characters=["a"])
        status, answer = call(port, "POST", "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, "allowed_characters")
        # The route.
        body = dict(messages=[{"role": "user", "content": "hello"}], stream=False)
        assert call(port, "POST", "/api/chat", body)[1]["done"]
        list(stream(port, "/v1/completions", prompt="hello", max_tokens=3))
        status, answer = call(port, "POST", "/v1/completions", dict(prompt=""))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[4]["cached_tokens"] == 99
    assert lines[-1]["completion_tokens"] == 3
    assert lines[-1]["finish_reason"] == "length"

    pip(environment, "uninstall", "--quiet", "--yes", "mlx-lm-sample-plugin")
    with pytest.raises(RuntimeError, match="unrecognized arguments: --cost-weight"):
        with server_process(*model, "--cost-weight", "1", python=environment):
            pass
    with server_process(*model, *cache, python=environment) as (port, _, _):
        # lru, and the words are not banned.
        for prompt in ("a" * 100, "b" * 60, "c" * 60, "d"):
            ask(port, prompt)
        assert cached(ask(port, "a" * 100)) == 0
        assert ask(port, "hello", banned_words=[banned])["choices"][0]["text"] == greedy
        body = dict(prompt="hello", sampler="mirostat")
        assert call(port, "POST", "/v1/completions", body)[0] == 400
        assert call(port, "POST", "/api/chat", {})[0] == 404

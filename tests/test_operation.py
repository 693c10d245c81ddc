"""What a deployment meets: limits of open files, closed streams, clients of every kind of
HTTP, and models with something wrong."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from conftest import server_process
from helpers import call, complete
from huggingface_hub import constants
from processes import join, run_program
from test_api import (
    BODY,
    CHAT,
    CHUNK,
    CHUNKED,
    HELLO,
    WatchedEngine,
    chat,
    post,
    post_whole,
    send_raw,
    wait_until,
)

from mlx_lm_ext import descriptors
from mlx_lm_ext.batch_server import BatchServer
from mlx_lm_ext.device import on_cpu
from mlx_lm_ext.distributed.group import ONE_PROCESS
from mlx_lm_ext.errors import RequestError, one_line
from mlx_lm_ext.server import connection, http_server
from mlx_lm_ext.server.http_server import BatchHTTPServer
from mlx_lm_ext.server.model_list import cached_models


def run(code, limit, **env):
    """The output of a Python process with this hard limit of open files."""
    if limit > resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 0:
        pytest.skip("fewer open files are allowed here")
    result = run_program(
        ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-c", code],
        env=os.environ | env,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def start_and_fail(model, *argv, shell='exec "$@"', **env):
    """The exit code and the one line of a server that cannot start."""
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--log-level", "ERROR", "--model", str(model), *argv]
    result = run_program(["sh", "-c", shell, "sh", *command], env=os.environ | env)
    (line,) = result.stderr.splitlines()
    assert line.startswith("mlx_lm.batch_server: error: ")
    return result.returncode, line


# Open files

LIMITS = "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
IMPORT = f"""
import resource
from mlx_lm_ext import descriptors
with descriptors.limit_kept():
    import mlx_lm.utils
{LIMITS}
"""


@pytest.mark.parametrize("limit", [1000, 4096, 10000])
def test_import_of_mlx_lm_keeps_the_limit_of_open_files(limit):
    assert run(IMPORT, limit) == f"{limit} {limit}"


def test_others_may_set_limits_while_mlx_lm_is_imported():
    code = IMPORT.replace(
        "    import mlx_lm.utils",
        "    import mlx_lm.utils\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (900, 3000))",
    )
    assert run(code, 5000) == "900 3000"


@pytest.mark.parametrize(
    "before, hard, after",
    [(1000, 20000, 4096), (1000, 2000, 2000), (9000, 9000, 9000)],
)
def test_soft_limit_is_raised_and_never_lowered(before, hard, after):
    code = f"""
import resource
from mlx_lm_ext import descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, ({before}, {hard}))
descriptors.raise_limit()
{LIMITS}
"""
    assert run(code, hard) == f"{after} {hard}"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has it")
def test_plugin_that_imports_mlx_lm_does_not_lower_the_limit(tmp_path, model_folder):
    (tmp_path / "importing.py").write_text("import mlx_lm")
    argv = ["--model", str(model_folder()), "--warmup", "off", "-p", "importing"]
    with server_process(*argv, cwd=tmp_path) as (_, _, process):
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert limits[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_too_few_open_files_are_one_line(model_folder):
    code, line = start_and_fail(model_folder(), shell='ulimit -n 100; exec "$@"')
    assert code == 1
    assert "128" in line and "100" in line


def test_most_connections_leave_open_files_for_the_rest(monkeypatch):
    for limit, most in ((128, 32), (1024, 768), (4096, 3840)):
        monkeypatch.setattr(descriptors, "limit", lambda limit=limit: limit)
        assert descriptors.for_connections() == most


@pytest.mark.slow
def test_more_connections_than_open_files_leave_a_server_that_answers(
    tmp_path, model_folder
):
    argv = ["--model", str(model_folder()), "--warmup", "off"]
    # What MLX compiles has to be compiled anew.
    env = os.environ | {"TMPDIR": str(tmp_path)}
    shell = 'ulimit -n 150; exec "$@"'
    with server_process(*argv, shell=shell, env=env) as (port, lines, _):
        with ExitStack() as opened:
            clients = [
                opened.enter_context(socket.create_connection(("127.0.0.1", port), 60))
                for _ in range(200)
            ]
            # The last one has been closed, so all others have been accepted or closed.
            assert clients[-1].recv(1) == b""
            body = chat(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
            clients[0].sendall(post_whole(body))
            assert clients[0].recv(1000).startswith(b"HTTP/1.1 200 ")
    assert "37 connections at most" in "".join(lines)


def test_server_waits_when_no_connection_can_be_accepted(monkeypatch, caplog):
    accept, refusals = socket.socket.accept, iter(http_server.EXHAUSTED)
    pauses = []

    def refuse(self):
        number = next(refusals, None)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    clock = SimpleNamespace(sleep=pauses.append, time=time.time)
    monkeypatch.setattr(http_server, "time", clock)
    httpd = BatchHTTPServer(("127.0.0.1", 0), lambda *args: None)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    with socket.create_connection(httpd.server_address, timeout=60) as s:
        assert s.recv(1) == b""
    httpd.shutdown()
    join(thread)
    httpd.server_close()
    assert pauses == [http_server.PAUSE] * len(http_server.EXHAUSTED)
    assert errno.EMFILE in http_server.EXHAUSTED
    (line,) = [r.message for r in caplog.records]
    assert "has to wait" in line


def test_connection_that_gets_no_thread_is_closed_with_one_line(monkeypatch, caplog):
    def start(self):
        raise RuntimeError("can't start new thread")

    httpd = BatchHTTPServer(("127.0.0.1", 0), lambda *args: None)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    monkeypatch.setattr(threading.Thread, "start", start)
    with socket.create_connection(httpd.server_address, timeout=60) as s:
        assert s.recv(1) == b""
    monkeypatch.undo()
    httpd.shutdown()
    join(thread)
    httpd.server_close()
    assert not httpd.connections
    assert "no thread" in caplog.text and "Traceback" not in caplog.text


# Files and streams


# Only Linux has a device that is always full.
FULL = ["/dev/full"] if os.path.exists("/dev/full") else []


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "<&- >&-", *(f">{f}" for f in FULL)])
def test_server_needs_no_standard_output(redirection, model_folder):
    argv = ["--model", str(model_folder()), "--warmup", "off"]
    shell = f'exec "$@" {redirection}'
    with server_process(*argv, shell=shell) as (port, lines, process):
        assert complete(port, "hello", max_tokens=2)
        process.terminate()
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection", ["2>&-", "<&- >&- 2>&-", *(f"2>{f}" for f in FULL)]
)
def test_server_needs_no_standard_error(redirection, tmp_path, model_folder):
    # There is no line that tells the port, so the model does not exist.
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--model", str(tmp_path / "none")]
    shell = f'exec "$@" {redirection}'
    result = run_program(["sh", "-c", shell, "sh", *command])
    assert (result.returncode, result.stdout) == (1, "")


def test_closed_streams_are_not_taken_by_the_next_files(tmp_path):
    code = f"""
import os, sys
os.dup2(1, 9)
for number in range(3):
    os.close(number)
sys.stdout = sys.stderr = None
from mlx_lm_ext import descriptors
descriptors.open_standard()
first = open({str(tmp_path / "x")!r}, "w")
print("not in the file", flush=True)
os.write(9, str(first.fileno()).encode())
"""
    assert int(run(code, 1000)) > 2
    assert (tmp_path / "x").read_text() == ""


@pytest.mark.skipif(not on_cpu(), reason="a GPU does not need the folder")
@pytest.mark.parametrize("folder", ["/nonexistent", "/dev/null"])
def test_folder_for_temporary_files_that_cannot_be_used_is_one_line(
    folder, model_folder
):
    code, line = start_and_fail(model_folder(), TMPDIR=folder)
    assert code == 1 and "TMPDIR" in line


@pytest.mark.slow
def test_home_and_caches_that_cannot_be_written_are_not_needed(model_folder):
    argv = ["--model", str(model_folder()), "--warmup", "off"]
    nowhere = dict.fromkeys(("HOME", "HF_HOME", "XDG_CACHE_HOME"), "/dev/null/nothing")
    with server_process(*argv, env=os.environ | nowhere) as (port, _, _):
        assert complete(port, "hello", max_tokens=2)
        assert call(port, "GET", "/v1/models")[0] == 200


def test_default_model_whose_folder_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    server = BatchServer(SimpleNamespace(model=None), None, None)
    with pytest.raises(OSError, match="Not a directory; name a model") as error:
        server.find_model()
    assert str(file) in str(error.value)


def test_hugging_face_cache_that_cannot_be_read_has_no_models(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    long = tmp_path / ("x" * 5000)
    for cache in (file, tmp_path / "none", file / "below", long):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        assert list(cached_models()) == []
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for raw in (b"\xff\xfe", b"a\0b", b""):
        (refs / "main").write_bytes(raw)
        assert list(cached_models()) == []


# Models with something wrong

WRONG_TEMPLATES = ["{% for %}", "{{ messages", "{% if x %}", "{{ x | no_such_filter }}"]


@pytest.fixture
def changed_model(model_folder, tmp_path):
    """Makes the folder of a model of which some files are others."""

    def make(**files):
        folder = shutil.copytree(model_folder(), tmp_path / "changed")
        for name, content in files.items():
            path = folder / name.replace("_json", ".json").replace("_jinja", ".jinja")
            path.write_text(content)
        return folder

    return make


def with_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    return json.dumps(config)


def test_wrong_chat_template_of_the_served_model_ends_the_start(changed_model):
    folder = changed_model(chat_template_jinja="{# fine #}\n{% for %}")
    code, line = start_and_fail(folder)
    assert code == 1
    assert "the chat template is wrong in line 2: " in line


@pytest.mark.parametrize("template", [5, {"a": 1}])
def test_chat_template_that_is_no_text_ends_the_start(
    template, changed_model, model_folder
):
    path = model_folder() / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    folder = changed_model(tokenizer_config_json=json.dumps(config))
    code, line = start_and_fail(folder)
    assert code == 1
    assert "the chat template is not a text" in line


@pytest.mark.parametrize("template", WRONG_TEMPLATES)
def test_wrong_chat_template_of_a_model_that_a_request_names_fails_its_chats(
    template, changed_model, start_server
):
    _, port = start_server("llama", "--allow-models", "any")
    folder = changed_model(chat_template_jinja=template)
    body = {"messages": HELLO, "model": str(folder), "max_tokens": 1}
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "the chat template is wrong in line 1: " in answer["error"]["message"]
    assert complete(port, "hello", max_tokens=2, model=str(folder))


def test_template_of_the_command_line_replaces_a_wrong_one(changed_model, start_server):
    folder = changed_model(chat_template_jinja="{% for %}")
    template = "{{ messages[0].content }}"
    _, port = start_server("llama", "--model", str(folder), "--chat-template", template)
    assert call(port, "POST", CHAT, {"messages": HELLO, "max_tokens": 1})[0] == 200


@pytest.mark.slow
def test_missing_weights_are_named(changed_model, model_folder):
    config = with_config(model_folder(), num_hidden_layers=5)
    code, line = start_and_fail(changed_model(config_json=config))
    assert code == 1
    assert "Missing 27 parameters: model.layers.2." in line


@pytest.mark.parametrize(
    "error, line",
    [
        (
            ValueError("Missing 2 parameters: \na.b,\nc.d."),
            "Missing 2 parameters: a.b, c.d",
        ),
        (
            OSError("Got: ConnectError: no name\nThe snapshot is not there."),
            "The snapshot is not there. Got: ConnectError: no name",
        ),
        (
            OSError(
                "404 Client Error. (Request ID: 1)\n\nRepository Not Found\nCheck it"
            ),
            "Repository Not Found Check it 404 Client Error. (Request ID: 1)",
        ),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (AttributeError("no 'get'"), "AttributeError: no 'get'"),
        (RuntimeError(), "RuntimeError"),
        (RequestError(400, "plain"), "plain"),
    ],
)
def test_reason_of_another_library_is_one_line_that_says_something(error, line):
    assert one_line(error) == line


def test_long_reason_is_cut():
    assert len(one_line(ValueError("x\n" * 1000))) == 400


# Half-closed connections


@pytest.fixture
def patient(monkeypatch):
    """Lets the server wait until the client has closed its sending side."""
    monkeypatch.setattr(connection, "SCRIPT_WAIT", 60.0)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "request_of",
    [
        post_whole,
        lambda raw: post_whole(raw, "1.0"),
        lambda raw: post(f"Connection: close\r\nContent-Length: {len(raw)}", raw),
        lambda raw: post(CHUNKED, b"%X\r\n%b\r\n0\r\n\r\n" % (len(raw), raw)),
    ],
    ids=["plain", "1.0", "close", "chunked"],
)
def test_client_that_closes_its_sending_side_gets_its_answer(
    request_of, streamed, start_server, patient
):
    _, port = start_server()
    answer = send_raw(port, request_of(chat(max_tokens=40, stream=streamed)))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (b"[DONE]" if streamed else b'"finish_reason"') in answer


def test_client_of_connection_close_may_close_its_sending_side_a_little_later(
    start_server, monkeypatch
):
    monkeypatch.setattr(connection, "HALF_CLOSE", 60.0)
    engine, port = start_server(make_engine=WatchedEngine)
    raw = chat(max_tokens=40)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        head = f"User-Agent: x\r\nConnection: close\r\nContent-Length: {len(raw)}"
        s.sendall(post(head, raw))
        assert engine.came.wait(60)
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("headers", ["User-Agent: x", "Connection: close"])
def test_client_that_closes_later_has_left(headers, start_server, monkeypatch):
    monkeypatch.setattr(connection, "HALF_CLOSE", 0.0)
    engine, port = start_server(make_engine=WatchedEngine)
    raw = chat(max_tokens=4000)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(post(f"{headers}\r\nContent-Length: {len(raw)}", raw))
        assert engine.came.wait(60)
    assert engine.left.wait(60)


@pytest.mark.parametrize("resets", [False, True])
def test_client_that_closes_all_at_once_frees_its_row(resets, start_server, patient):
    engine, port = start_server(make_engine=WatchedEngine)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        # Only what is written to it tells that it has left, or a reset.
        s.sendall(post_whole(chat(max_tokens=4000, stream=not resets)))
        s.shutdown(socket.SHUT_WR)
        assert engine.came.wait(60)
        if resets:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert engine.left.wait(60)


# Routes and connections


@pytest.mark.parametrize(
    "target, status",
    [
        ("/v1/models", 200),
        ("/models", 200),
        ("//v1//models//", 200),
        ("/v1/models/?limit=3", 200),
        ("/v1/%6dodels", 200),
        ("http://localhost:1/v1/models?x=/", 200),
        ("/health/", 200),
        ("/v1/health", 200),
        ("/v1/models/nobody%2Fnothing", 404),
        ("/v1/models/%ff%fe", 404),
        ("/v1/models/\xff", 404),
        ("/v1/models/%00", 404),
        ("/v1/models/%zz", 404),
        ("/v2/models", 404),
        ("/v1models", 404),
        ("/v1", 404),
        ("/", 200),
        ("http://localhost:1?x", 200),
        ("*", 404),
        ("http://[x/v1/models", 404),
        ("/v1/chat/completions/", 405),
        ("/completions?x", 405),
    ],
)
def test_path_may_be_written_in_several_ways(target, status, start_server):
    _, port = start_server()
    for method in ("GET", "HEAD"):
        raw = f"{method} {target} HTTP/1.1\r\nConnection: close\r\n\r\n"
        answer = send_raw(port, raw.encode("latin-1"), shut=False)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        (length,) = re.findall(rb"Content-Length: (\d+)", head)
        assert len(body) == (int(length) if method == "GET" else 0)
        assert int(length) > 0


@pytest.mark.parametrize(
    "path",
    ["//v1/chat/completions/", "/chat/completions?api-version=1", "/v1//completions/"],
)
def test_posts_go_to_their_route_however_its_path_is_written(path, start_server):
    _, port = start_server()
    text, chat = {"prompt": "x", "max_tokens": 1}, {"messages": HELLO, "max_tokens": 1}
    is_chat = "chat" in path
    status, answer = call(port, "POST", path, chat if is_chat else text)
    assert status == 200
    assert answer["object"].startswith("chat" if is_chat else "text")
    assert call(port, "POST", "/completions", text)[1]["object"] == "text_completion"


def test_model_may_be_looked_up_by_an_id_with_slashes_and_marks(start_server):
    engine, port = start_server()
    for id in ("org/name", "/models//a name?#%41/", "na\u00efve \u2603"):
        engine.cli_args.model_id = id
        for path in (quote(id), quote(id, safe="")):
            status, model = call(port, "GET", f"/v1/models/{path}")
            assert (status, model["id"]) == (200, id)


def test_lower_case_method_is_an_error_object(start_server):
    _, port = start_server()
    answer = send_raw(port, b"get /health HTTP/1.1\r\n\r\n", shut=False)
    assert answer.startswith(b"HTTP/1.1 405 ") and b"not get" in answer


def receive(s):
    """The head and the body of a response that has a length."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += s.recv(1000)
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    while len(body) < length:
        body += s.recv(1000)
    assert len(body) == length
    return head, body


def test_client_of_http_1_0_may_keep_its_connection(start_server):
    _, port = start_server()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        for raw in (
            b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
            post(f"Connection: keep-alive\r\nContent-Length: {len(BODY)}", BODY, "1.0"),
            b"HEAD /health HTTP/1.0\r\n\r\n",
        ):
            s.sendall(raw)
            if raw.startswith(b"HEAD"):
                break
            head, _ = receive(s)
            assert b"\r\nConnection: keep-alive" in head
        rest = b"".join(iter(lambda: s.recv(1000), b""))
    assert b"\r\nConnection: close" in rest and rest.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("streamed", [False, True])
def test_response_says_that_the_connection_will_be_closed(streamed, start_server):
    _, port = start_server()
    raw = chat(stream=streamed)
    for request in (
        post(f"Connection: close\r\nContent-Length: {len(raw)}", raw),
        post_whole(raw, "1.0"),
        b"OPTIONS /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    ):
        head, _, _ = send_raw(port, request, shut=False).partition(b"\r\n\r\n")
        assert head.count(b"\r\nConnection: close") == 1


@pytest.mark.parametrize(
    "headers",
    [
        "Connection: TE, close",
        "Connection: close, TE",
        "Connection: Upgrade, CLOSE\r\nUpgrade: h2c",
        "Connection: TE\r\nConnection: close",
        "Connection: keep-alive, close",
    ],
)
def test_connection_is_closed_if_that_is_one_of_several_options(headers, start_server):
    _, port = start_server()
    raw = f"GET /health HTTP/1.1\r\n{headers}\r\n\r\n".encode()
    answer = send_raw(port, raw, shut=False)
    assert b"\r\nConnection: close" in answer


def test_connection_of_http_1_0_is_kept_if_that_is_one_of_several_options(start_server):
    _, port = start_server()
    kept = b"GET /health HTTP/1.0\r\nConnection: TE, Keep-Alive\r\n\r\n"
    answer = send_raw(port, kept + b"GET /health HTTP/1.0\r\n\r\n", shut=False)
    assert answer.count(b"HTTP/1.1 200") == 2


def test_empty_lines_before_a_request_are_skipped(start_server):
    _, port = start_server()
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    raw = b"\r\n" + post_whole(BODY) + b"\r\n\n\r\n" + last
    assert send_raw(port, raw, shut=False).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "raw, status, reason",
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, b"Invalid HTTP version (2.0)"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, b"Bad request syntax"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, b"Too Long"),
    ],
    ids=["HTTP/2", "TLS", "long"],
)
def test_what_is_no_request_gets_a_whole_response(raw, status, reason, start_server):
    _, port = start_server()
    answer = send_raw(port, raw, shut=False)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert reason in error["message"].encode()


@pytest.mark.parametrize("coding, status", [("gzip", 415), ("Identity", 200)])
def test_coded_body_is_refused(coding, status, start_server):
    _, port = start_server()
    headers = f"Content-Encoding: {coding}\r\nConnection: close"
    raw = post(f"{headers}\r\nContent-Length: {len(BODY)}", BODY)
    answer = send_raw(port, raw, shut=False)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert (b"Content-Encoding" in answer) == (status == 415)


def test_requests_of_all_kinds_may_be_pipelined(start_server):
    _, port = start_server()
    requests = [
        b"HEAD /v1/models HTTP/1.1\r\n\r\n",
        post_whole(BODY),
        b"GET /nothing HTTP/1.1\r\n\r\n",
        post(CHUNKED, CHUNK + b"0\r\n\r\n"),
        b"OPTIONS /v1/models HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    ]
    answer = send_raw(port, b"".join(requests), shut=False)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
    assert statuses == [b"200", b"200", b"404", b"200", b"204", b"200"]


# The end


@pytest.fixture
def signals():
    """The actions of signals, restored after the test."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, action in before.items():
        signal.signal(name, action)


@pytest.mark.slow
def test_server_ends_in_8_seconds_with_a_stuck_engine_and_a_client_that_takes_nothing(
    signals, start_server
):
    release = threading.Event()
    httpd = BatchHTTPServer(("127.0.0.1", 0), lambda *args: release.wait(60))
    server = BatchServer(None, None, None)
    server.httpd, server.group = httpd, ONE_PROCESS
    server.accepting = threading.Thread(target=httpd.serve_forever)
    server.accepting.start()
    server.engine = SimpleNamespace(
        stop_and_join=lambda timeout: threading.Event().wait(timeout)
    )
    with socket.create_connection(httpd.server_address, timeout=60):
        wait_until(lambda: httpd.connections)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 8
        release.set()


def test_port_that_is_in_use_is_named_in_one_line(model_folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, line = start_and_fail(model_folder(), "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in line

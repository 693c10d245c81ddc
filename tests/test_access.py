"""Who may call: API keys, TLS, and what a key's name is used for."""

import http.client
import json
import logging
import shutil
import socket
import ssl
import sys
from contextlib import suppress
from queue import SimpleQueue

import pytest
from conftest import server_process
from helpers import JSON, call, plugin
from processes import SERVING, read_until, reading, run_program, started
from test_api import WatchedEngine, chat, post_whole, send_raw

from mlx_lm_ext.arguments import parse_arguments
from mlx_lm_ext.routes import Route
from mlx_lm_ext.server import access
from mlx_lm_ext.server.access import Keys
from mlx_lm_ext.server.tls import make_context

KEYS = [
    "--api-key",
    "alice:secret-a",
    "--api-key",
    "bob:secret-b",
    "--api-key",
    "nameless",
]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def ask(port, **headers):
    return call(port, "POST", "/v1/chat/completions", CHAT, **headers)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


# Keys


def test_key_has_the_name_before_its_colon_or_that_of_its_place():
    keys = Keys(["alice:a", "b", "alice:c:d"])
    assert [keys.find(k) for k in ("a", "b", "c:d", "alice:a", "")] == [
        "alice",
        "key-2",
        "alice",
        None,
        None,
    ]


@pytest.mark.parametrize(
    "keys",
    [
        ["x", ""],
        ["x", "two words"],
        ["x", "höher"],
        ["a:same", "b:same"],
        ["key-2:x", "nameless"],
    ],
)
def test_wrong_key_is_an_error_that_does_not_show_it(keys):
    with pytest.raises(ValueError) as e:
        Keys(keys)
    assert not any(k in str(e.value) for k in ("two words", "höher", "same:", ":same"))


def test_every_key_is_compared_whether_or_not_one_was_found(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append(a)
        return a == b

    monkeypatch.setattr(access, "compare_digest", compare)
    keys = Keys(["one", "two", "three"])
    assert [keys.find(k) for k in ("one", "wrong")] == ["key-1", None]
    assert len(compared) == 6 and all(len(digest) == 32 for digest in compared)


def test_keys_come_from_arguments_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# those of the team\n\nbob:from-file\n")
    monkeypatch.setenv("MLX_LM_API_KEY", "carol:from-environment other")
    args, _ = parse_arguments(
        ["--api-key", "a:from-argument", "--api-key-file", str(file)]
    )
    found = {
        k: args.api_keys.find(k)
        for k in ("from-argument", "from-file", "from-environment")
    }
    assert found == {
        "from-argument": "a",
        "from-file": "bob",
        "from-environment": "carol",
    }
    assert args.api_keys.find("other") == "key-4"
    # Plugins get the arguments.
    shown = str(vars(args)) + str(vars(args.api_keys))
    assert not any(key in shown for key in (*found, "other"))


@pytest.mark.parametrize("text", ["", "# nothing\n", None])
def test_file_without_a_key_ends_the_start(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(SystemExit) as e:
        parse_arguments(["--api-key-file", str(tmp_path / "keys")])
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--api-key-file" in line


# Requests


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("secret-c"),
        bearer(""),
        {"Authorization": "Basic secret-a"},
        {"Authorization": "secret-a"},
        {"X-Api-Key": "secret"},
        {**bearer("secret-a"), "X-Api-Key": "secret-b"},
        {**bearer("secret-a"), "X-Api-Key": "wrong"},
    ],
)
def test_request_without_one_right_key_is_a_401(headers, start_server):
    _, port = start_server("llama", *KEYS)
    status, answer = ask(port, **headers)
    assert status == 401
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        bearer("secret-a"),
        {"Authorization": "bearer   nameless"},
        {"X-Api-Key": "secret-b"},
        {**bearer("secret-a"), "X-Api-Key": "secret-a"},
    ],
)
def test_request_with_a_key_is_answered(headers, start_server):
    _, port = start_server("llama", *KEYS)
    assert ask(port, **headers)[0] == 200
    assert call(port, "GET", "/v1/models", **headers)[0] == 200


def test_health_and_the_questions_of_browsers_need_no_key(start_server):
    _, port = start_server("llama", *KEYS)
    assert call(port, "GET", "/health") == (200, {"status": "ok"})
    assert call(port, "GET", "/v1/models")[0] == 401
    assert call(port, "GET", "/nothing")[0] == 401
    head = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert send_raw(port, head).startswith(b"HTTP/1.1 204 ")


def test_body_of_a_request_without_a_key_is_not_waited_for(start_server):
    _, port = start_server("llama", *KEYS)
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    assert send_raw(port, head, shut=False).startswith(b"HTTP/1.1 401 ")


def test_connection_that_is_kept_open_keeps_no_key(start_server):
    hook = plugin(
        mlx_lm_register_routes=lambda: [
            Route("GET", "/who", lambda r: {"who": r.key_name}, needs_key=False)
        ]
    )
    _, port = start_server("llama", *KEYS, plugin=hook)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for path, headers, answer in (
        ("/v1/models", JSON | bearer("secret-a"), None),
        ("/who", JSON, {"who": None}),
        ("/v1/models", JSON, None),
    ):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        assert answer in (None, content)
    assert response.status == 401
    connection.close()


@pytest.mark.parametrize(
    "argv, variable, name",
    [
        ([], " ", "MLX_LM_API_KEY"),
        ([], "a:b c\u00e4", "MLX_LM_API_KEY"),
        (["--api-key", "two words"], None, "--api-key"),
        (["--max-requests-per-key", "3"], None, "--max-requests-per-key"),
    ],
)
def test_wrong_keys_end_the_start_and_their_source_is_named(
    argv, variable, name, monkeypatch, capsys
):
    if variable is not None:
        monkeypatch.setenv("MLX_LM_API_KEY", variable)
    with pytest.raises(SystemExit) as e:
        parse_arguments(argv)
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {name}" in line


def test_name_of_the_key_is_the_user_unless_the_request_names_one(start_server):
    seen = SimpleQueue()
    hook = plugin(
        mlx_lm_request_finished=lambda request: seen.put(
            (request.key_name, request.user)
        )
    )
    _, port = start_server("llama", *KEYS, plugin=hook)
    ask(port, **bearer("secret-b"))
    call(
        port,
        "POST",
        "/v1/chat/completions",
        CHAT | {"user": "me"},
        **bearer("nameless"),
    )
    assert [seen.get(timeout=60) for _ in range(2)] == [("bob", "bob"), ("key-3", "me")]


@pytest.mark.parametrize("argv, n_shared", [([], 0), (["--share-cache"], 40)])
def test_keys_share_kv_only_if_the_command_line_says_so(argv, n_shared, start_server):
    _, port = start_server("llama", "--use-prompt-cache", *KEYS, *argv)

    def n_cached(key):
        body = dict(prompt="x" * 41, max_tokens=1)
        _, answer = call(port, "POST", "/v1/completions", body, **bearer(key))
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert n_cached("secret-a") == 0
    assert n_cached("secret-b") == n_shared
    assert n_cached("secret-a") == 40


def test_lines_of_the_log_have_the_name_and_never_the_key(start_server, caplog):
    caplog.set_level(logging.DEBUG)
    _, port = start_server("llama", *KEYS)
    ask(port, **bearer("secret-a"))
    ask(port, **bearer("secret-wrong"))
    call(port, "GET", "/v1/models?api_key=secret-a")
    text = caplog.text
    assert "alice " in text and " 401 " in text
    assert "secret" not in text


# The process


def test_server_that_others_can_reach_without_a_key_says_so_in_one_line(model_folder):
    argv = ["--model", str(model_folder()), "--warmup", "off", "--host", "0.0.0.0"]
    with server_process(*argv) as (_, lines, _):
        (line,) = [line for line in lines if "Everybody" in line]
    assert "--api-key" in line
    with server_process(*argv, "--api-key", "k") as (port, lines, _):
        assert not [line for line in lines if "Everybody" in line]
        assert ask(port)[0] == 401
        assert ask(port, **bearer("k"))[0] == 200


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The files of a certificate for localhost, and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-out", files[0], "-keyout", files[1]]
    run_program(command, check=True)
    return files


@pytest.fixture
def tls_server(certificate, start_server):
    """Starts servers of https; gives the engine, the port, and what clients trust."""

    def start(*args, **kwargs):
        engine, port = start_server(*args, tls=make_context(*certificate), **kwargs)
        return engine, port, ssl.create_default_context(cafile=certificate[0])

    return start


def connect(port, trusted):
    raw = socket.create_connection(("127.0.0.1", port), timeout=60)
    return trusted.wrap_socket(raw, server_hostname="localhost")


def read_all(connection):
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def test_connections_over_tls_are_kept_open_and_streamed(tls_server):
    _, port, trusted = tls_server()
    last = post_whole(chat(max_tokens=4, stream=True))
    last = last.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with connect(port, trusted) as client:
        # The second request comes in the record of the first one.
        client.sendall(post_whole(chat(max_tokens=2)) + last)
        received = read_all(client)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_large_body_over_tls_arrives(tls_server):
    _, port, trusted = tls_server()
    with connect(port, trusted) as client:
        body = chat(messages=[{"role": "user", "content": "x" * 300_000}])
        head = b"\r\nConnection: close\r\n"
        client.sendall(post_whole(body).replace(b"\r\n", head, 1))
        assert b"maximum context length" in read_all(client)


def test_client_that_leaves_over_tls_frees_its_row(tls_server):
    engine, port, trusted = tls_server(make_engine=WatchedEngine)
    with connect(port, trusted) as client:
        client.sendall(post_whole(chat(max_tokens=4000)))
        assert engine.came.wait(60)
    assert engine.left.wait(60)


def test_client_without_tls_or_handshake_keeps_nobody_waiting(tls_server, caplog):
    _, port, trusted = tls_server()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            with suppress(ConnectionError):
                assert not plain.recv(1 << 16).startswith(b"HTTP")
        with connect(port, trusted) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert read_all(client).startswith(b"HTTP/1.1 200 ")
        silent.sendall(b"\x16\x03")
    assert "Traceback" not in caplog.text


def test_idle_connection_over_tls_is_closed_when_the_server_ends(
    certificate, model_folder
):
    files = [
        "--ssl-certfile",
        str(certificate[0]),
        "--ssl-keyfile",
        str(certificate[1]),
    ]
    argv = ["--model", str(model_folder()), "--warmup", "off", *files]
    trusted = ssl.create_default_context(cafile=certificate[0])
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0", *argv]
    with started(command) as process:
        serving, _ = read_until(process, SERVING)
        assert "https://127.0.0.1:" in serving[0]
        port = int(serving[1])
        with connect(port, trusted) as client:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.sock = client
            connection.request(
                "POST", "/v1/completions", json.dumps({"prompt": "x"}), JSON
            )
            assert connection.getresponse().read()
            process.terminate()
            assert client.recv(1) == b""
        assert process.wait(60) == 0
        with reading(process):
            assert "did not end" not in process.stderr.read()


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        ("a certificate", "there is no private key"),
        ("no certificate and no PRIVATE KEY", "cannot be used"),
    ],
)
def test_certificate_that_cannot_be_used_ends_the_start(
    content, reason, tmp_path, capsys
):
    file = tmp_path / "certificate.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as e:
        parse_arguments(["--ssl-certfile", str(file)])
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ssl-certfile" in line and str(file) in line and reason in line


def test_keyfile_without_certificate_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--ssl-keyfile", "key.pem"])
    assert "needs --ssl-certfile" in capsys.readouterr().err

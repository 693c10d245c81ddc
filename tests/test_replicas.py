"""Two servers behind nginx and HAProxy, with the files of ``examples/deploy`` in which only
addresses and folders are others."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import server_process
from helpers import JSON
from processes import PATIENCE

import mlx_lm_ext

DEPLOY = Path(mlx_lm_ext.__file__).parent / "examples" / "deploy"
# Debian has them where the path of a user does not lead.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
# Those in the files: of the proxy and of the servers.
ADDRESSES = ["127.0.0.1:8080", "127.0.0.1:8081", "127.0.0.1:8082"]
N_CONVERSATIONS, N_CHATS = 20, 40

pytestmark = pytest.mark.slow


class Replica:
    """A server that can be ended, and started again on its port."""

    def __init__(self, model):
        self.argv = ["--model", str(model), "--warmup", "off", "--use-prompt-cache"]
        self.start()
        self.argv += ["--port", str(self.port)]

    def start(self):
        self.running = server_process(*self.argv)
        self.port, _, self.process = self.running.__enter__()
        self.name = f"127.0.0.1:{self.port}"

    def end(self, name):
        self.process.send_signal(getattr(signal, name))
        code = self.process.wait(60)
        self.running.__exit__(None, None, None)
        return code


@pytest.fixture(scope="module")
def replicas(model_folder):
    started = []
    try:
        started.extend(Replica(model_folder()) for _ in range(2))
        yield started
    finally:
        for replica in started:
            replica.end("SIGKILL")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class Proxy:
    """A proxy that has been started.

    Args:
        port (int): Where it listens.
    """

    def __init__(self, port):
        self.port = port

    def request(self, method, path, body=None, **headers):
        """Send a request; gives the connection and the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        raw = None if body is None else json.dumps(body)
        connection.request(method, path, raw, JSON | headers)
        return connection, connection.getresponse()

    def wait_until_used(self, replica):
        """Wait until requests go to a server again."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            connection, response = self.request("GET", "/health")
            response.read()
            connection.close()
            if (response.status, response.headers["X-Replica"]) == (200, replica.name):
                return
        raise AssertionError(f"no request goes to {replica.name}")


def nginx_command(text, folder):
    text = re.sub("/run/|/var/log/nginx/", f"{folder}/", text)
    # Its own folders are those of another user.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    file = folder / "nginx.conf"
    file.write_text(text.replace("http {", "http { " + paths))
    return ["-c", str(file), "-g", f"error_log {folder}/errors;"]


def haproxy_command(text, folder):
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return ["-D", "-f", str(file), "-p", str(folder / "haproxy.pid")]


@pytest.fixture(params=["nginx", "haproxy"])
def proxy(request, replicas, tmp_path):
    program = shutil.which(request.param, path=PATH)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    for replica in replicas:
        # A test may have ended it.
        if replica.process.poll() is not None:
            replica.start()
    port = free_port()
    (file,) = DEPLOY.glob(f"{request.param}.c*")
    text = file.read_text()
    addresses = [f"127.0.0.1:{port}", *(replica.name for replica in replicas)]
    for old, new in zip(ADDRESSES, addresses):
        assert text.count(old) == 1
        text = text.replace(old, new)
    make_command = {"nginx": nginx_command, "haproxy": haproxy_command}[request.param]
    command = make_command(text, tmp_path)
    # It listens when the command has ended, and goes on in the background.
    subprocess.run([program, *command], check=True, timeout=PATIENCE)
    yield Proxy(port)
    (pid,) = tmp_path.glob("*.pid")
    os.kill(int(pid.read_text()), signal.SIGTERM)


class Chat:
    """A chat that is answered, in one piece or as a stream, or that is lost.

    Attributes:
        replica (Optional[str]): The server that the response is from.
        is_complete (bool): Whether the answer has come to its end.
        usage (Dict): Of a complete answer.
        times (List[float]): When its events came, in seconds.
    """

    def __init__(self, proxy, messages, stream=False, max_tokens=8, **headers):
        self.proxy, self.headers, self.stream = proxy, headers, stream
        self.body = dict(messages=messages, max_tokens=max_tokens, ignore_eos=True)
        if stream:
            self.body |= dict(stream=True, stream_options={"include_usage": True})
        self.began = threading.Event()
        self.replica, self.is_complete, self.times = None, False, []

    def run(self):
        try:
            self.exchange()
        except (OSError, http.client.HTTPException):
            pass  # it is lost
        self.began.set()
        return self

    def exchange(self):
        connection, response = self.proxy.request(
            "POST", "/v1/chat/completions", self.body, **self.headers
        )
        self.replica = (response.headers["X-Replica"] or "").split(", ")[-1]
        if response.status == 200 and not self.stream:
            answer = json.loads(response.read())
            self.text = answer["choices"][0]["message"]["content"]
            self.usage, self.is_complete = answer["usage"], True
        elif response.status == 200:
            for line in response:
                if line.startswith(b"data: {"):
                    self.times.append(time.monotonic())
                    self.began.set()
                self.is_complete |= line == b"data: [DONE]\n"
        connection.close()


def message(role, content):
    return {"role": role, "content": content}


def two_turns(proxy, system, question, **headers):
    """The chats of a conversation's first two turns."""
    messages = [message("system", system), message("user", question)]
    first = Chat(proxy, messages, **headers).run()
    messages += [message("assistant", first.text), message("user", "Go on.")]
    return first, Chat(proxy, messages, **headers).run()


@pytest.mark.parametrize("by", ["header", "first message of the user"])
def test_second_turns_find_their_prefix(by, proxy, replicas):
    def talk(i):
        if by == "header":
            # What users say is the same in all of them.
            instructions = f"You are assistant {i}. " * 10
            return two_turns(proxy, instructions, "Hello!", X_Conversation=f"c{i}")
        return two_turns(proxy, "You are an assistant. " * 20, f'Say "{i}".')

    with ThreadPoolExecutor(3) as pool:
        turns = list(pool.map(talk, range(N_CONVERSATIONS)))
    found = [
        second.usage["prompt_tokens_details"]["cached_tokens"]
        >= first.usage["prompt_tokens"] - 1
        for first, second in turns
    ]
    assert sum(found) == N_CONVERSATIONS
    assert {second.replica for _, second in turns} == {r.name for r in replicas}


def test_stream_comes_in_pieces(proxy):
    start = time.monotonic()
    chat = Chat(proxy, [message("user", "Hello!")], stream=True, max_tokens=400).run()
    assert chat.is_complete
    first, *_, last = chat.times
    assert last - first > (last - start) / 2
    # Not in lumps of 4 KB, with 16 events each.
    assert len({round(t, 3) for t in chat.times}) > len(chat.times) / 4


def test_server_that_is_killed_takes_along_only_streams_that_have_begun(
    proxy, replicas
):
    chats = [
        Chat(proxy, [message("user", f"Chat {i}")], stream=i % 2 == 0, max_tokens=200)
        for i in range(N_CHATS)
    ]
    killed = replicas[0]
    with ThreadPoolExecutor(N_CHATS) as pool:
        done = [pool.submit(chat.run) for chat in chats]
        for chat in chats[::2]:
            chat.began.wait(60)
            if chat.replica == killed.name:
                break
        killed.end("SIGKILL")
        for future in done:
            future.result(PATIENCE)
    lost = [chat for chat in chats if not chat.is_complete]
    print(f"answered: {N_CHATS - len(lost)} of {N_CHATS}")
    assert all(chat.stream and chat.replica == killed.name for chat in lost)


def test_rolling_restart_loses_no_chat(proxy, replicas):
    ended = threading.Event()

    def talk(i):
        chats = []
        while not ended.is_set():
            question = message("user", f"Chat {i} {len(chats)}")
            stream = len(chats) % 2 == 0
            chats.append(Chat(proxy, [question], stream, max_tokens=50).run())
        return chats

    for replica in replicas:
        proxy.wait_until_used(replica)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(talk, i) for i in range(4)]
        try:
            for replica in replicas:
                assert replica.end("SIGTERM") == 0
                replica.start()
                proxy.wait_until_used(replica)
        finally:
            ended.set()
        chats = [chat for future in done for chat in future.result(PATIENCE)]
    assert {chat.replica for chat in chats} == {r.name for r in replicas}
    assert all(chat.is_complete for chat in chats)

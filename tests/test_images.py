"""Images of requests: checks, what is fetched, and what a client is told."""

import base64
import io
import socket
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from helpers import call
from PIL import Image
from processes import join
from test_api import CHAT

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request import images
from mlx_lm_ext.request.images import fetch, inline_images, is_public
from mlx_lm_ext.request.preparation import Preparations


def png(width=3, height=2):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(raw):
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def inline(*urls, allow_urls=False, preparation=None):
    parts = [part(url) for url in urls]
    inline_images(parts, allow_urls, preparation or Preparations().begin())
    return [p["image_url"]["url"] for p in parts]


class Site(BaseHTTPRequestHandler):
    """A web site with an image and other answers."""

    seen = []

    def do_GET(self):
        self.seen.append(self.path)
        if self.path == "/image":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif self.path == "/silent":
            self.send_response(200)
            self.end_headers()
            self.rfile.read()
        else:
            self.send_error(403, "a secret of this site")

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """The URL of a site whose address counts as public."""
    monkeypatch.setattr(images, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(Site, "seen", [])
    server = HTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_data_url_is_an_image():
    url = data_url(png())
    assert inline(url, url.replace("data:", "DATA:")) == [url, url]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "ftp://example.com/x.png",
        "/etc/passwd",
        "data:image/png;base64,AAAA",
        "data:image/png;base64,A",
        "data:,",
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        7,
        None,
        [],
    ],
)
def test_part_that_is_not_an_image_is_refused(url):
    with pytest.raises(RequestError) as error:
        inline(url)
    assert (error.value.status, error.value.param) == (400, "messages")


def test_image_that_would_fill_the_memory_is_refused():
    header = struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk
    with pytest.raises(RequestError, match="pixels"):
        inline(
            data_url(bomb + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
        )
    with pytest.raises(RequestError, match="all images together"):
        inline(*[data_url(png(2000, 2000))] * 11)
    with pytest.raises(RequestError, match="64"):
        inline(*[data_url(png())] * 65)


@pytest.mark.parametrize("model", ["default_model", "no/such"])
def test_server_of_a_text_model_connects_to_nothing(model, start_server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        _, port = start_server("llama", "--allow-image-urls")
        messages = [{"role": "user", "content": [part(url)]}]
        status, answer = call(
            port, "POST", CHAT, {"messages": messages, "model": model}
        )
        assert status == (404 if model == "no/such" else 400)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    "address, expected",
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fc00::1", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("fec0::1", False),
        ("::127.0.0.1", False),
        ("3fff::1", False),
        ("192.88.99.1", False),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) == expected


def test_image_is_not_fetched_unless_that_is_allowed(site):
    with pytest.raises(RequestError, match="--allow-image-urls"):
        inline(f"{site}/image")
    assert not Site.seen


def test_image_is_fetched_from_where_that_is_allowed(site):
    assert fetch(f"{site}/image", Preparations().begin()) == png()
    (url,) = inline(f"{site}/to?{site}/image", allow_urls=True)
    assert base64.b64decode(url.partition(",")[2]) == png()


def test_name_of_which_one_address_is_private_is_not_connected_to(monkeypatch):
    infos = [(0, 0, 0, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(images.socket, "getaddrinfo", lambda *args, **kwargs: infos)
    monkeypatch.setattr(images.socket, "create_connection", None)
    with pytest.raises(RequestError):
        inline("http://both.example/", allow_urls=True)


def test_error_of_a_fetch_does_not_depend_on_the_answer_of_the_site(
    site, monkeypatch, caplog
):
    with socket.create_server(("127.0.0.1", 0)) as banner, socket.socket() as closed:

        def greet():
            connection, _ = banner.accept()
            with connection:
                connection.sendall(b"SSH-2.0-a secret\r\n")
                connection.recv(1000)

        threading.Thread(target=greet).start()
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(images, "MAX_BYTES", 1_000_000)
        urls = [
            f"{site}/forbidden",
            f"{site}/endless",
            f"{site}/to?http://127.0.0.2/",
            f"{site}/to?file:///etc/passwd",
            f"{site}/to?/to?/to?/to?/image",
            f"http://127.0.0.1:{banner.getsockname()[1]}/",
            f"http://127.0.0.1:{closed.getsockname()[1]}/",
            "http://10.0.0.1/",
            "http://127.0.0.1:99999/",
            "http://[::1/",
            "http://127.0.0.1/\r\nX: y",
        ]
        messages = set()
        for url in urls:
            with pytest.raises(RequestError) as error:
                inline(url, allow_urls=True)
            messages.add(str(error.value))
    assert messages == {"an image cannot be fetched"}


@pytest.mark.parametrize("reason", ["the client leaves", "it takes too long"])
def test_fetch_ends_when(reason, site):
    leaves = reason == "the client leaves"
    server = Preparations(seconds=30 if leaves else 0.2)
    preparation = server.begin(lambda: leaves and bool(Site.seen))

    def watch():
        while not stop.wait(0.01):
            server.end_due()

    stop = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    expected = ConnectionError if leaves else RequestError
    try:
        with pytest.raises(expected), preparation.turn(server.fetches):
            inline(f"{site}/silent", allow_urls=True, preparation=preparation)
    finally:
        stop.set()
        join(watcher)

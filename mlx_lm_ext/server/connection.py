"""HTTP/1.1 on Python's ``http.server``: bodies, responses and event streams.

Rules:
1. Every response but a stream has a length, and every error is OpenAI's JSON.
2. A connection serves another request only after a body that was read whole.
3. A client that is gone is no error: nothing is written, nothing is logged.
4. Whatever a client sends has a limit of bytes and of time.
"""

import io
import json
import logging
import re
import select
import socket
import sys
import threading
import time
from email.errors import MissingHeaderBodySeparatorDefect
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Callable, Dict, List, Optional

from mlx_lm.server import APIHandler

from ..errors import RequestError, internal_error
from ..request.preparation import Preparations
from .browsers import LOOPBACK, BrowserGuard

# Connections, and bytes of the bodies of all of them, that a server has at a time.
MAX_CONNECTIONS = 1000
MAX_BODIES = 512 << 20
# Bytes that are read at a time, and up to which a body is always taken.
SLICE, SMALL_BODY = 1 << 16, 1 << 18
# Seconds for a request to arrive, and how many bytes of it are worth another one.
ARRIVAL_SECONDS, BYTES_A_SECOND = 60.0, 50_000
# Seconds in which the rest of a body is read that was refused, and in which the
# connections are to end when the server stops.
LINGER, CLOSE_TIMEOUT = 3.0, 5.0
# Of what goes with the chunks of a body.
MAX_LINE, MAX_TRAILERS = 1 << 12, 100
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


# That the other side has closed, although it sent something that is not read. Not on macOS,
# which says so with POLLHUP.
POLLRDHUP = getattr(select, "POLLRDHUP", 0)


class Incoming(io.RawIOBase):
    """What a client sends, which has to come at some pace.

    Args:
        connection (socket.socket): Read in the blocking way.
        idle_timeout (float): Seconds for it to send anything.
    """

    def __init__(self, connection: socket.socket, idle_timeout: float):
        self.connection = connection
        self.idle_timeout = idle_timeout
        self.begin()

    def begin(self) -> None:
        """What comes next is another request."""
        self.start, self.n = None, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        wait = self.idle_timeout
        if self.start is not None:
            end = self.start + ARRIVAL_SECONDS + self.n / BYTES_A_SECOND
            wait = min(wait, end - time.monotonic())
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if wait <= 0 or not poll.poll(wait * 1000):
            raise TimeoutError("the request did not arrive in time")
        if self.start is None:
            self.start = time.monotonic()
        n = self.connection.recv_into(buffer)
        self.n += n
        return n


class BatchHTTPServer(ThreadingHTTPServer):
    """A thread for each connection, and room for bursts of new ones.

    Args:
        address (Tuple[str, int]): Host name or address, and port; 0 takes a free one.
        handler (Callable): Makes the handler of a connection.
        allowed_origins (List[str]): See ``BrowserGuard``.
        allowed_hosts (Optional[List[str]]): See ``BrowserGuard``.
    """

    request_queue_size = 512
    # Their end is waited for in ``server_close``, for a while.
    daemon_threads = True

    def __init__(
        self,
        address,
        handler,
        allowed_origins: List[str] = (LOOPBACK,),
        allowed_hosts: Optional[List[str]] = None,
    ):
        name = address[0]
        infos = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, _, _, _, address = infos[0]
        self.connections = set()
        # Of bodies.
        self.n_bytes = 0
        self.changed = threading.Condition()
        self.preparations = Preparations()
        super().__init__(address, handler)
        self.guard = BrowserGuard(
            allowed_origins, allowed_hosts, self.server_address[0], name
        )

    def server_bind(self):
        # HTTPServer's own asks a name server for the host's full name, and waits.
        TCPServer.server_bind(self)

    def service_actions(self):
        try:
            self.preparations.look()
        except Exception:
            # Without this thread nobody is served any more.
            logging.exception("Looking after the requests failed")

    def reserve(self, n: int, is_large: bool = False) -> None:
        """Make room for bytes of a body; they are given back with ``-n``.

        Args:
            n (int): How many.
            is_large (bool): Whether the body is one that has to wait for others.

        Raises:
            RequestError: A 503 if there is no room for a large one.
        """
        with self.changed:
            if is_large and self.n_bytes + n > MAX_BODIES:
                raise RequestError(503, "too many large requests at a time")
            self.n_bytes += n

    def process_request(self, request, client_address):
        with self.changed:
            if len(self.connections) >= MAX_CONNECTIONS:
                # It is not even read: there may be no thread for that.
                self.shutdown_request(request)
                return
            self.connections.add(request)
        try:
            super().process_request(request, client_address)
        except Exception:
            # There is no thread for it.
            self.forget(request)
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.forget(request)

    def forget(self, connection: socket.socket) -> None:
        with self.changed:
            self.connections.discard(connection)
            self.changed.notify_all()

    def server_close(self):
        """Let the open answers end, and idle connections close."""
        self.preparations.stop()
        with self.changed:
            for connection in self.connections:
                try:
                    connection.shutdown(socket.SHUT_RD)
                except OSError:
                    pass  # it has just ended
            if not self.changed.wait_for(lambda: not self.connections, CLOSE_TIMEOUT):
                logging.warning(f"{len(self.connections)} connections did not end")
        super().server_close()

    def handle_error(self, request, client_address):
        if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            return
        logging.exception(f"A connection from {client_address[0]} failed")


class HTTPHandler(APIHandler):
    """A connection. A subclass answers with ``get`` and ``post``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # Seconds for a client to send its request, or to take what is sent to it.
    timeout = 60

    # Bytes of a request body.
    max_body = 8 << 20
    # Those that the server holds for this connection.
    n_reserved = 0
    # Whether the client waits to be told that it may send the body.
    expects_continue = False
    # Whether a part of the body is left in the connection.
    is_unread = False

    def setup(self):
        super().setup()
        self.rfile.close()
        self.incoming = Incoming(self.connection, self.timeout)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self):
        self.incoming.begin()
        self.expects_continue = False
        super().handle_one_request()

    def finish(self):
        super().finish()
        if self.is_unread:
            self.linger()

    def linger(self) -> None:
        """Read on for a while: if a connection is closed before that, its client may not
        see the answer."""
        end = time.monotonic() + LINGER
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER)
            while time.monotonic() < end and self.connection.recv(1 << 16):
                pass
        except OSError:
            pass  # it has ended

    def get(self) -> None:
        """Answer a GET request."""
        raise NotImplementedError

    def post(self) -> None:
        """Answer a POST request."""
        raise NotImplementedError

    def wrong_route(self) -> RequestError:
        """The error for a path that is not there, or takes another method."""
        raise NotImplementedError

    def parse_request(self):
        if not super().parse_request():
            return False
        # Python takes what follows such a line for no headers.
        if MissingHeaderBodySeparatorDefect in map(type, self.headers.defects):
            self.send_error(400, "a line of the headers has no name")
            return False
        try:
            self.server.guard.check(self.headers)
        except RequestError as e:
            # A browser does not tell the page's author.
            logging.info(f"A request is refused: {e}")
            self.send_error(e.status, str(e))
            return False
        return True

    def do_GET(self):
        self.ignore_body()
        self.respond(self.get)

    def do_OPTIONS(self):
        self.ignore_body()
        self.send_response(204)
        self.send_cors_headers()
        self.end_headers()

    def do_POST(self):
        try:
            self.respond(self.post)
        finally:
            self.server.reserve(-self.n_reserved)
            self.n_reserved = 0

    def handle_expect_100(self):
        # Only when it is certain that the body will be read.
        self.expects_continue = True
        return True

    def send_continue(self) -> None:
        """Let a client send the body that waits to be told so."""
        if self.expects_continue:
            self.expects_continue = False
            self.send_response_only(100)
            self.end_headers()

    def respond(self, method: Callable[[], None]) -> None:
        """Answer one request; what is raised becomes an error response."""
        self.created = int(time.time())
        try:
            try:
                method()
            except RequestError as e:
                self.send_json(e.status, e.to_json(), e.headers)
            except (ConnectionError, TimeoutError):
                raise
            except BaseException:
                logging.exception("A request failed")
                error = internal_error()
                self.send_json(error.status, error.to_json())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def ignore_body(self) -> None:
        """A body of a request that takes none is not the next request."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = self.is_unread = True

    def read_body(self) -> bytes:
        """Read the whole body, so that the connection can serve another request."""
        # Until it is read, nothing after it can be.
        close, self.close_connection = self.close_connection, True
        self.is_unread = True
        # Other types a browser sends for any page, without asking first.
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "the Content-Type must be application/json")
        try:
            if "Transfer-Encoding" in self.headers:
                raw = self.read_chunks()
            else:
                raw = self.read_exactly(self.content_length())
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time")
        self.close_connection, self.is_unread = close, False
        return raw

    def too_large(self) -> RequestError:
        return RequestError(413, f"the body may have {self.max_body} bytes at most")

    def content_length(self) -> int:
        """How many bytes the body has, by the header."""
        length, *others = self.headers.get_all("Content-Length") or [None]
        if length is None:
            raise RequestError(411, "send a body, with its Content-Length or in chunks")
        if any(other != length for other in others):
            raise RequestError(400, "the Content-Length headers differ")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, "the Content-Length header must be a number")
        # The count of digits first: Python refuses to read very long numbers.
        if len(length) > 15 or int(length) > self.max_body:
            raise self.too_large()
        return int(length)

    def read_exactly(self, n: int) -> bytes:
        self.send_continue()
        raw = bytearray()
        while len(raw) < n:
            part = self.rfile.read(min(n - len(raw), SLICE))
            if not part:
                message = f"the body was cut short after {len(raw)} of {n} bytes"
                raise RequestError(400, message)
            # What has come, and not what is announced: that costs nothing.
            self.server.reserve(len(part), self.n_reserved >= SMALL_BODY)
            self.n_reserved += len(part)
            raw += part
        return bytes(raw)

    def read_chunks(self) -> bytes:
        """Read a body in chunks, as RFC 9112, section 7.1 has them."""
        codings = self.headers.get_all("Transfer-Encoding")
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise RequestError(400, "Transfer-Encoding may only be chunked")
        if self.request_version != "HTTP/1.1":
            raise RequestError(400, "a body in chunks needs HTTP/1.1")
        # Proxies may have gone by the other.
        if "Content-Length" in self.headers:
            message = "a body in chunks must not have a Content-Length"
            raise RequestError(400, message)
        raw, n_lines = bytearray(), 0
        self.send_continue()
        while True:
            line = self.rfile.readline(MAX_LINE)
            size = CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise RequestError(400, "a chunk of the body must begin with its size")
            n = int(size[1], 16)
            # What goes with the sizes counts, but for sizes themselves.
            n_lines += max(0, len(line) - 20)
            if n_lines + len(raw) + n > self.max_body:
                raise self.too_large()
            if not n:
                break
            raw += self.read_exactly(n)
            if self.rfile.read(2) != b"\r\n":
                raise RequestError(
                    400, "a chunk of the body is not as long as its size"
                )
        for _ in range(MAX_TRAILERS):
            line = self.rfile.readline(MAX_LINE)
            if line == b"\r\n":
                return bytes(raw)
            if not line.endswith(b"\r\n"):
                break
        raise RequestError(400, "the trailers of the body are too many or too long")

    def client_is_gone(self) -> bool:
        """Whether the client has closed its side (any thread)."""
        poll = select.poll()
        try:
            poll.register(self.connection, select.POLLIN | POLLRDHUP)
            events = sum(event for _, event in poll.poll(0))
            gone = bool(events & (POLLRDHUP | select.POLLHUP | select.POLLERR))
            if events and not gone:
                gone = not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True  # it was reset, or has just been closed here
        # Or ``server_close`` has closed it, and the last events are to be sent.
        return gone and not self.server.preparations.stopping

    def send_cors_headers(self) -> None:
        """Let the page that asks read the answer: the guard has let it in."""
        origin = self.headers.get("Origin")
        if origin is None or not self.server.guard.allows_origin(origin):
            return
        self.send_header("Access-Control-Allow-Origin", origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "*")
        # "*" is all headers but this one.
        self.send_header("Access-Control-Allow-Headers", "*, Authorization")

    def send_json(
        self, status: int, content: Dict[str, Any], headers: Dict[str, str] = {}
    ) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def start_events(self) -> None:
        """Send the headers of a stream of server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.chunked = self.request_version == "HTTP/1.1"
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.send_cors_headers()
        self.end_headers()

    def send_event(self, data: str) -> None:
        self.write(f"data: {data}\n\n".encode())

    def send_keepalive(self) -> None:
        """Send a comment, which clients ignore."""
        self.write(b": keepalive\n\n")

    def end_events(self) -> None:
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def write(self, raw: bytes) -> None:
        if self.chunked:
            raw = b"%x\r\n%b\r\n" % (len(raw), raw)
        self.wfile.write(raw)

    def send_error(self, code, message=None, explain=None):
        """What ``http.server`` refuses by itself, in OpenAI's shape."""
        self.close_connection = self.is_unread = True
        self.headers = getattr(self, "headers", None) or {}
        error = RequestError(code, message or explain or "the request is not HTTP")
        if code == 501:
            error = self.wrong_route()
        self.send_json(error.status, error.to_json(), error.headers)

    def log_error(self, format, *args):
        # An idle connection that times out, or an error that was answered.
        logging.debug(format, *args)

    def log_message(self, format, *args):
        # Escaped, since a client chooses what it says.
        message = (format % args).encode("unicode_escape").decode()
        logging.info(f"{self.address_string()} {message}")

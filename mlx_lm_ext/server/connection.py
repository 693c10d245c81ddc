"""One HTTP/1.1 connection: its requests, its responses and its event streams.

Rules:
1. Every response but an event stream has a length, and every error is OpenAI's JSON.
2. A connection serves another request only if the body of the last one was read whole.
3. A client that has left is not an error: nothing is written, nothing is logged.
4. A client may close its sending side right after its request and wait for the answer. One
   that closes it later has left. Nothing else tells the two apart until something is
   written.
"""

import io
import json
import logging
import re
import select
import socket
import ssl
import time
import uuid
from email.errors import MissingHeaderBodySeparatorDefect
from email.message import Message
from functools import partial
from http import HTTPStatus
from typing import Any, Callable, Mapping, Optional
from urllib.parse import unquote_to_bytes, urlsplit

from mlx_lm.server import APIHandler

from ..errors import RequestError, internal_error
from .bodies import SLICE, BodyReader, Incoming

logger = logging.getLogger(__name__)

# What a read or a write raises if the client has left, is too slow, or breaks TLS.
GONE = (ConnectionError, TimeoutError, ssl.SSLError)
# An ``X-Request-Id`` that is accepted: no blanks, because it is written into the log.
REQUEST_ID = re.compile(r"[!-~]{1,128}")
# The type of server-sent events.
EVENTS = "text/event-stream"
# What in the first line of a request may be secret: what follows the path, and a password.
QUERY = re.compile(r"\?\S*")
USER = re.compile(r"//[^/@\s]*@")

# Seconds in which the rest of a refused body is read.
LINGER = 3.0

# A client that closes its sending side within HALF_CLOSE seconds of its request may wait for
# the answer. If preparing the request takes more than PATIENCE seconds, it has left after all.
HALF_CLOSE, PATIENCE = 0.25, 5.0
# Seconds in which a client without a User-Agent, which is a script, may do so first.
SCRIPT_WAIT = 0.02

# The event that the other side has closed its sending side. macOS lacks it, and reports
# POLLHUP instead, which elsewhere means that both sides are closed.
HAS_RDHUP = hasattr(select, "POLLRDHUP")
POLLRDHUP = getattr(select, "POLLRDHUP", select.POLLHUP)
CLOSED = select.POLLERR | (select.POLLHUP & ~POLLRDHUP)


def clean(path: str) -> str:
    """A path without doubled and trailing slashes."""
    return "/" + "/".join(name for name in path.split("/") if name)


def path_of(target: str) -> str:
    """The clean path that a request asks for, decoded and without its query.

    Args:
        target (str): The second word of the request, in Latin-1. It may be a whole URL.
    """
    if not target.startswith("/"):
        try:
            target = urlsplit(target).path
        except ValueError:
            pass  # no route is like this
    raw = target.partition("?")[0].encode("latin-1", "replace")
    return clean(unquote_to_bytes(raw).decode("utf-8", "replace"))


class HTTPHandler(APIHandler):
    """The handler of one connection. A subclass answers in ``get`` and ``post``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    # What a subclass keeps of the current request.
    body: Any = None
    args: Any = None
    # Bytes that the server has reserved for the body of the current request.
    n_reserved = 0
    # Whether the client waits for "100 Continue" before it sends the body.
    expects_continue = False
    # Whether a part of a body may be unread.
    is_unread = False
    # The path of the request.
    route = ""
    # The id of the request, which the client may give and every response has, and the name of
    # its API key.
    x_request_id = ""
    key_name: Optional[str] = None
    # What was wrong with the request, for the log.
    failure = ""
    # When the request had arrived, and whether it has been submitted to the engine.
    arrived = 0.0
    is_submitted = False
    # Since when it has been prepared, without the time in which the model was loaded.
    prepared_since = 0.0
    # Whether the client has closed its sending side in time.
    is_half_closed = False
    # Whether the response is a stream that has begun, and its type.
    in_events = False
    events_type = EVENTS

    @property
    def max_body(self) -> int:
        """Bytes that the body of a request may have."""
        raise NotImplementedError

    @property
    def needs_key(self) -> bool:
        """Whether the route of the request is only for those who have an API key."""
        raise NotImplementedError

    @property
    def is_stopping(self) -> bool:
        """Whether no requests are taken any more."""
        raise NotImplementedError

    def setup(self):
        # Seconds to wait for a client that sends nothing, or takes nothing.
        self.timeout = self.server.idle_timeout
        super().setup()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()
        self.rfile.close()
        self.incoming = Incoming(
            self.connection, self.timeout, self.server.header_timeout
        )
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self):
        self.incoming.begin()
        self.x_request_id, self.key_name = uuid.uuid4().hex, None
        self.failure = ""
        self.expects_continue = self.is_half_closed = self.is_submitted = False
        self.in_events = False
        super().handle_one_request()

    def finish(self):
        super().finish()
        if isinstance(self.connection, ssl.SSLSocket):
            # Without waiting for the client's own end, which many never send.
            self.connection.settimeout(0)
            try:
                self.connection.unwrap()
            except (OSError, ValueError):
                pass
        if self.is_unread:
            self.linger()

    def linger(self) -> None:
        """Read the rest of a body for a while. If a connection is closed while data is
        unread, the client's system may drop the answer before the client has read it.
        """
        end = time.monotonic() + LINGER
        try:
            connection = self.connection
            connection.settimeout(LINGER)
            # Not the methods of a TLS socket: what is thrown away need not be decrypted.
            socket.socket.shutdown(connection, socket.SHUT_WR)
            while time.monotonic() < end and socket.socket.recv(connection, 1 << 16):
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
        """The error for a path that does not exist, or has no such method."""
        raise NotImplementedError

    def parse_request(self):
        if not self.raw_requestline.strip():
            # Some clients send an empty line after a body.
            self.close_connection = False
            return False
        if not super().parse_request():
            return False
        self.incoming.in_headers = False
        given = self.headers.get("X-Request-Id", "")
        if REQUEST_ID.fullmatch(given):
            self.x_request_id = given
        # Python's parser knows only a single option, in a single header.
        values = ",".join(self.headers.get_all("Connection", []))
        options = {option.strip().lower() for option in values.split(",")}
        if "close" in options:
            self.close_connection = True
        elif "keep-alive" in options:
            self.close_connection = False
        self.route = path_of(self.path)
        # Python's parser ignores all headers after such a line.
        if MissingHeaderBodySeparatorDefect in map(type, self.headers.defects):
            self.send_error(400, "a line of the headers has no name")
            return False
        try:
            self.server.guard.check(self.headers)
            # A browser asks without a key whether a page may call.
            if self.needs_key and self.command != "OPTIONS":
                self.key_name = self.server.keys.check(self.headers)
        except RequestError as e:
            self.refuse(e)
            return False
        return True

    def do_GET(self):
        self.ignore_body()
        self.respond(self.get)

    # ``send_json`` leaves out the body.
    do_HEAD = do_GET

    def do_OPTIONS(self):
        self.ignore_body()
        self.send_response(204)
        self.end_head()

    def do_POST(self):
        try:
            self.respond(self.post)
        finally:
            self.server.release(self.n_reserved)
            self.n_reserved = 0

    def handle_expect_100(self):
        # It is sent later, when it is certain that the body will be read.
        self.expects_continue = True
        return True

    def send_continue(self) -> None:
        """Send "100 Continue" if the client waits for it."""
        if self.expects_continue:
            self.expects_continue = False
            self.send_response_only(100)
            self.end_headers()

    def respond(self, method: Callable[[], None]) -> None:
        """Answer one request; what is raised becomes an error response."""
        self.created = int(time.time())
        self.arrived = self.prepared_since = time.monotonic()
        try:
            try:
                method()
            except RequestError as e:
                self.send_failure(e)
            except GONE:
                raise
            except BaseException:
                logger.exception("A request failed")
                self.send_failure(internal_error())
        except GONE:
            self.close_connection = True
        finally:
            # An idle connection holds no body.
            self.body = self.args = None

    def ignore_body(self) -> None:
        """Close the connection after a request that should have no body and has one: it
        must not be taken for the next request."""
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = self.is_unread = True

    def read_body(self) -> bytes:
        """Read the whole body, so that the connection can serve another request.

        Raises:
            RequestError: If its type is not JSON, or it cannot be read.
        """
        # If this raises, the next request cannot be found.
        close, self.close_connection = self.close_connection, True
        self.is_unread = True
        # A page of any site can send bodies of other types without asking first, and one
        # without a type with its ``Origin``.
        has_type = "Content-Type" in self.headers or "Origin" in self.headers
        if has_type and self.headers.get_content_type() != "application/json":
            raise RequestError(415, "the Content-Type must be application/json")
        encoding = self.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise RequestError(415, "the body must have no Content-Encoding")
        reader = BodyReader(
            self.rfile,
            self.headers,
            self.request_version,
            self.max_body,
            self.reserve,
            self.send_continue,
        )
        try:
            raw = reader.read()
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time")
        except RequestError:
            if self.is_stopping:
                # The server has ended the connection itself.
                raise RequestError(503, "the server is stopping")
            raise
        self.close_connection, self.is_unread = close, False
        self.arrived = self.prepared_since = time.monotonic()
        if "User-Agent" not in self.headers:
            self.poll(POLLRDHUP, SCRIPT_WAIT)
        return raw

    def reserve(self, n: int) -> None:
        """Take room for ``n`` bytes of the body, until the request ends."""
        self.server.reserve(n, self.n_reserved)
        self.n_reserved += n

    def client_is_gone(self) -> bool:
        """Whether the client has left (any thread)."""
        # Asked last: while the server stops, ``server_close`` shuts the reading sides itself,
        # and the last events are still to be sent.
        return self.is_closed() and not self.server.preparations.stopping

    def is_closed(self) -> bool:
        """Whether the other side has closed the connection, as far as can be told."""
        try:
            events = self.poll(select.POLLIN | POLLRDHUP)
            if events & CLOSED:
                return True
            if not events & POLLRDHUP:
                # It may have sent another request. Where there is no event of its own for
                # the end, only a read tells.
                # Not the method of a TLS socket, which cannot look at bytes without taking them.
                peek = partial(socket.socket.recv, self.connection, 1, socket.MSG_PEEK)
                if HAS_RDHUP or not events or peek():
                    return False
        except (OSError, ValueError):
            return True  # it was reset, or has just been closed here
        now = time.monotonic()
        is_new = now - self.arrived < HALF_CLOSE
        # A client that wants no other request may close its side at any time.
        if is_new and (self.close_connection or not self.is_submitted):
            self.is_half_closed = True
        waits = self.is_submitted or now - self.prepared_since < PATIENCE
        return not (self.is_half_closed and waits)

    def poll(self, events: int, timeout: float = 0.0) -> int:
        """Wait for events of the connection, and give those that there are."""
        poll = select.poll()
        poll.register(self.connection, events)
        return sum(event for _, event in poll.poll(timeout * 1000))

    def send_cors_headers(self) -> None:
        """Let the page that asks read the answer, if its origin is allowed."""
        origin = self.headers.get("Origin")
        if origin is None or not self.server.guard.allows_origin(origin):
            return
        self.send_header("Access-Control-Allow-Origin", origin)
        self.send_header("Vary", "Origin")
        self.send_header("Access-Control-Allow-Methods", "*")
        # "*" stands for all headers but Authorization.
        self.send_header("Access-Control-Allow-Headers", "*, Authorization")
        self.send_header("Access-Control-Expose-Headers", "X-Request-Id")

    def end_head(self) -> None:
        """Send the headers that every response has, and end them."""
        if self.is_stopping:
            self.close_connection = True
        self.send_header("X-Request-Id", self.x_request_id)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            # Such a client has asked for it, and else waits for the end.
            self.send_header("Connection", "keep-alive")
        self.send_cors_headers()
        self.end_headers()

    def send_json(
        self, status: int, content: Any, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        raw = json.dumps(content).encode()
        self.send_content(status, raw, "application/json", headers)

    def send_content(
        self,
        status: int,
        raw: bytes,
        content_type: str,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(raw)))
        if status == 503:
            self.send_header("Retry-After", "1")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_head()
        if self.command != "HEAD":
            # In pieces, because the time for a client that takes nothing is that of a write.
            for start in range(0, len(raw), SLICE):
                self.wfile.write(raw[start : start + SLICE])

    def send_failure(self, error: RequestError) -> None:
        """Send an error: as the last event of a stream, or as the whole response."""
        self.failure = str(error)
        if self.in_events and self.events_type != EVENTS:
            # In a stream of another kind, only its missing end tells.
            self.close_connection = True
        elif self.in_events:
            self.send_event(json.dumps(error.to_json()))
            self.end_events()
        else:
            self.send_json(error.status, error.to_json(), error.headers)

    def start_events(
        self,
        status: int = 200,
        content_type: str = EVENTS,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        """Send the headers of a stream of server-sent events, unless it has begun."""
        if self.in_events:
            return
        self.in_events, self.events_type = True, content_type
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-cache")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.chunked = self.request_version == "HTTP/1.1"
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_head()

    def send_event(self, data: str) -> None:
        self.write(f"data: {data}\n\n".encode())

    def send_keepalive(self) -> None:
        """Send a comment, which clients ignore, so that nobody takes the connection for
        dead."""
        self.write(b": keepalive\n\n")

    def end_events(self) -> None:
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def write(self, raw: bytes) -> None:
        if self.chunked:
            raw = b"%x\r\n%b\r\n" % (len(raw), raw)
        self.wfile.write(raw)

    def send_error(self, code, message=None, explain=None):
        """Answer what ``http.server`` refuses by itself, in OpenAI's shape."""
        error = RequestError(code, message or explain or HTTPStatus(code).phrase)
        self.refuse(self.wrong_route() if code == 501 else error)

    def refuse(self, error: RequestError) -> None:
        """Answer a request whose body is not read."""
        self.close_connection = self.is_unread = True
        self.failure = str(error)
        self.headers = getattr(self, "headers", None) or Message()
        if self.request_version == self.default_request_version:
            # The version that a request without one has, which would get no headers.
            self.request_version = self.protocol_version
        self.send_json(error.status, error.to_json(), error.headers)

    def log_error(self, format, *args):
        # About an idle connection that timed out, or an error that was answered.
        logger.debug(format, *args)

    def log_request(self, code="-", size="-"):
        # A client may have put a key into the query.
        line = USER.sub("//...@", QUERY.sub("?...", self.requestline))
        # Escaped, because a client chooses a part of it.
        line = line.encode("unicode_escape").decode()
        status = int(code)
        fields = {
            "request_id": self.x_request_id,
            "client": self.address_string(),
            "request": line,
            "status": status,
        }
        message = f'{fields["client"]} "{line}" {status} {self.x_request_id}'
        if self.failure:
            fields["error"] = self.failure
            message += f": {self.failure}".encode("unicode_escape").decode()
        level = logging.INFO if status >= 400 else logging.DEBUG
        logger.log(level, message, extra={"fields": fields})

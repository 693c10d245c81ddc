"""Reading requests from a connection: the pace of what arrives, and the bodies.

Rules:
1. Whatever a client sends has a limit of bytes and of time.
2. Where a body ends must be certain, because the next request begins there: a body of
   which the end is in doubt is refused.
"""

import io
import re
import select
import socket
import time
from email.message import Message
from typing import BinaryIO, Callable, Optional

from ..errors import RequestError

# Bytes that are read at a time.
SLICE = 1 << 16
# Seconds for a request to arrive, and the bytes of it that earn another second.
ARRIVAL_SECONDS, BYTES_A_SECOND = 60.0, 50_000
# Bytes of a line, and number of trailer lines, of a body in chunks.
MAX_LINE, MAX_TRAILERS = 1 << 12, 100
# Bytes of a line with the size of a chunk that do not count as part of the body.
SIZE_LINE = 20
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


class Incoming(io.RawIOBase):
    """The bytes that a client sends, which have to arrive at a minimum pace.

    Args:
        connection (socket.socket): A blocking socket, which may be one of TLS.
        idle_timeout (float): Seconds to wait for the next bytes.
        header_timeout (float): Seconds from the first byte of a request to the end of its
          headers.
    """

    def __init__(
        self, connection: socket.socket, idle_timeout: float, header_timeout: float
    ):
        self.connection = connection
        self.idle_timeout = idle_timeout
        self.header_timeout = header_timeout
        self.begin()

    def begin(self) -> None:
        """Start the time and the count anew: what comes next is another request."""
        # The time of the first byte, and how many have come since.
        self.start: Optional[float] = None
        self.n = 0
        # Whether the headers have not ended.
        self.in_headers = True

    def readable(self):
        return True

    def readinto(self, buffer):
        wait = self.idle_timeout
        if self.start is not None:
            seconds = ARRIVAL_SECONDS + self.n / BYTES_A_SECOND
            if self.in_headers:
                seconds = self.header_timeout
            wait = min(wait, self.start + seconds - time.monotonic())
        if wait <= 0 or not self.wait_for_bytes(wait):
            raise TimeoutError("the request did not arrive in time")
        if self.start is None:
            self.start = time.monotonic()
        # A record of TLS is read as a whole, and may not have arrived.
        self.connection.settimeout(wait)
        try:
            n = self.connection.recv_into(buffer)
        finally:
            self.connection.settimeout(self.idle_timeout)
        self.n += n
        return n

    def wait_for_bytes(self, seconds: float) -> bool:
        """Wait until there are bytes, or the end, to be read."""
        # A record of TLS may have more than was read of it.
        pending = getattr(self.connection, "pending", None)
        if pending is not None and pending():
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


class BodyReader:
    """Reads the body of one request.

    Args:
        file (BinaryIO): The connection, at the start of the body.
        headers (Message): The headers of the request.
        version (str): The HTTP version of the request, as "HTTP/1.1".
        limit (int): Bytes that the body may have.
        reserve (Callable): Called with the bytes of each part that has arrived; raises a
          ``RequestError`` if the server has no room for it.
        send_continue (Callable): Called when it is certain that the body will be read.
    """

    def __init__(
        self,
        file: BinaryIO,
        headers: Message,
        version: str,
        limit: int,
        reserve: Callable[[int], None],
        send_continue: Callable[[], None],
    ):
        self.file = file
        self.headers = headers
        self.version = version
        self.limit = limit
        self.reserve = reserve
        self.send_continue = send_continue

    def read(self) -> bytes:
        """The whole body.

        Raises:
            RequestError: If it is too large, cut short, or not framed as HTTP asks.
            TimeoutError: If it arrives too slowly.
        """
        if "Transfer-Encoding" in self.headers:
            self.check_chunked()
            self.send_continue()
            return self.read_chunks()
        n = self.content_length()
        self.send_continue()
        return self.read_exactly(n)

    def too_large(self) -> RequestError:
        return RequestError(413, f"the body may have {self.limit} bytes at most")

    def content_length(self) -> int:
        """Bytes of the body according to the header ``Content-Length``."""
        length, *others = self.headers.get_all("Content-Length") or [None]
        if length is None:
            raise RequestError(411, "send a body, with its Content-Length or in chunks")
        if any(other != length for other in others):
            raise RequestError(400, "the Content-Length headers differ")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, "the Content-Length header must be a number")
        # The digits are counted first, because ``int`` refuses very long numbers.
        if len(length) > 15 or int(length) > self.limit:
            raise self.too_large()
        return int(length)

    def check_chunked(self) -> None:
        """Refuse a transfer encoding other than chunks, and chunks in doubt."""
        codings = self.headers.get_all("Transfer-Encoding")
        if [coding.lower() for coding in codings] != ["chunked"]:
            raise RequestError(400, "Transfer-Encoding may only be chunked")
        if self.version != "HTTP/1.1":
            raise RequestError(400, "a body in chunks needs HTTP/1.1")
        # A proxy may have used the length to find the end of the body.
        if "Content-Length" in self.headers:
            message = "a body in chunks must not have a Content-Length"
            raise RequestError(400, message)

    def read_exactly(self, n: int) -> bytes:
        raw = bytearray()
        while len(raw) < n:
            part = self.file.read(min(n - len(raw), SLICE))
            if not part:
                message = f"the body was cut short after {len(raw)} of {n} bytes"
                raise RequestError(400, message)
            # Only what has arrived takes room: to announce a large body costs nothing.
            self.reserve(len(part))
            raw += part
        return bytes(raw)

    def read_chunks(self) -> bytes:
        """Read chunks and trailers as RFC 9112, section 7.1 defines them."""
        raw, n_extra = bytearray(), 0
        while True:
            line = self.file.readline(MAX_LINE)
            size = CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise RequestError(400, "a chunk of the body must begin with its size")
            n = int(size[1], 16)
            # Extensions of chunks count as part of the body.
            n_extra += max(0, len(line) - SIZE_LINE)
            if n_extra + len(raw) + n > self.limit:
                raise self.too_large()
            if not n:
                break
            raw += self.read_exactly(n)
            if self.file.read(2) != b"\r\n":
                raise RequestError(
                    400, "a chunk of the body is not as long as its size"
                )
        for _ in range(MAX_TRAILERS):
            line = self.file.readline(MAX_LINE)
            if line == b"\r\n":
                return bytes(raw)
            if not line.endswith(b"\r\n"):
                break
        raise RequestError(400, "the trailers of the body are too many or too long")

"""The HTTP server: listening, its connections, the room for their bodies, and the end.

Rules:
1. The number of connections, and the bytes of the bodies of all of them, are bounded. There
   are always file descriptors left for the rest of the process.
2. The thread that accepts connections never fails, and never waits for a client.
"""

import errno
import logging
import socket
import ssl
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from .. import descriptors
from ..errors import RequestError
from ..request.preparation import Preparations
from .access import Keys
from .browsers import LOOPBACK, BrowserGuard
from .connection import GONE

logger = logging.getLogger(__name__)

# Bytes of the bodies of all connections together. A body is always taken up to SMALL_BODY.
MAX_BODIES, SMALL_BODY = 512 << 20, 1 << 18
# Seconds for the connections to end when the server stops. A client may take nothing.
CLOSE_TIMEOUT = 2.5
# The errors with which the system refuses a new connection for lack of something, and the
# seconds to wait then. The connection stays in the system's queue.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE = 0.2


class BatchHTTPServer(ThreadingHTTPServer):
    """Serves each connection on a thread of its own.

    Args:
        address (Tuple[str, int]): Host name or address, and port; 0 takes a free one.
        handler (Callable): Makes the handler of a connection.
        allowed_origins (List[str]): See ``BrowserGuard``.
        allowed_hosts (Optional[List[str]]): See ``BrowserGuard``.
        keys (Optional[Keys]): The API keys, if callers have to send one.
        routes (Optional[Dict]): The routes of plugins by method and path, each with the
          plugin that has registered it.
        max_connections (int): Connections that are kept at a time.
        idle_timeout (float): Seconds to wait for a client that sends no request, or takes
          nothing.
        header_timeout (float): Seconds for the headers of a request to arrive.
        tls (Optional[ssl.SSLContext]): To serve over https.

    Raises:
        OSError: If the address is not known, or cannot be listened on.
    """

    # Connections that the system keeps until they are accepted: they come in bursts.
    request_queue_size = 512
    # ``server_close`` waits for them itself, with a time limit.
    daemon_threads = True

    def __init__(
        self,
        address: Tuple[str, int],
        handler: Any,
        allowed_origins: Sequence[str] = (LOOPBACK,),
        allowed_hosts: Optional[List[str]] = None,
        *,
        keys: Optional[Keys] = None,
        routes: Optional[Dict[Tuple[str, str], Any]] = None,
        max_connections: int = 1000,
        idle_timeout: float = 60.0,
        header_timeout: float = 30.0,
        tls: Optional[ssl.SSLContext] = None,
    ):
        name, port = address
        infos = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found: Any
        self.address_family, _, _, _, found = infos[0]
        self.keys = keys or Keys([])
        self.routes = routes or {}
        self.idle_timeout, self.header_timeout = idle_timeout, header_timeout
        self.tls = tls
        self.max_connections = min(max_connections, descriptors.for_connections())
        if self.max_connections < max_connections:
            logger.warning(
                f"{self.max_connections} connections at most, because this process may have "
                f"{descriptors.limit()} open files (ulimit -n)"
            )
        # Whether the last connection was refused: by the system, or as one too many.
        self.is_exhausted = self.is_full = False
        self.connections: Set[socket.socket] = set()
        # Bytes of bodies that are held now.
        self.n_bytes = 0
        # Guards the two above, and tells ``server_close`` when a connection ends.
        self.changed = threading.Condition()
        self.preparations = Preparations()
        # In seconds since 1970.
        self.started = int(time.time())
        super().__init__(found, handler)
        self.guard = BrowserGuard(
            allowed_origins, allowed_hosts, str(self.server_address[0]), name
        )

    def server_bind(self):
        # Not that of ``HTTPServer``, which waits for a name server to give the host's
        # full name.
        TCPServer.server_bind(self)

    def get_request(self):
        try:
            connection, address = super().get_request()
        except OSError as e:
            if e.errno in EXHAUSTED:
                if not self.is_exhausted:
                    logger.warning(f"A connection has to wait: {e.strerror}")
                self.is_exhausted = True
                time.sleep(PAUSE)
            raise  # ``serve_forever`` tries again
        self.is_exhausted = False
        if self.tls is not None:
            # The handshake waits for the client, so it is made on the connection's thread.
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def service_actions(self):
        try:
            self.preparations.end_due()
        except Exception:
            # It must not end the thread that accepts connections.
            logger.exception("Ending the overdue preparations failed")

    def reserve(self, n: int, n_held: int) -> None:
        """Take room for a part of a body.

        Args:
            n (int): Bytes of the part.
            n_held (int): Bytes of the same body that have room already.

        Raises:
            RequestError: A 503 if there is no room and the body is not a small one.
        """
        with self.changed:
            if n_held >= SMALL_BODY and self.n_bytes + n > MAX_BODIES:
                raise RequestError(503, "too many large requests at a time")
            self.n_bytes += n

    def release(self, n: int) -> None:
        """Give back room for ``n`` bytes."""
        with self.changed:
            self.n_bytes -= n

    def process_request(self, request, client_address):
        with self.changed:
            is_full = len(self.connections) >= self.max_connections
            if not is_full:
                self.connections.add(request)
        if is_full and not self.is_full:
            logger.warning(
                f"{self.max_connections} connections are open: others are closed at once"
            )
        self.is_full = is_full
        if is_full:
            # It gets no answer, for which a thread would be needed.
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except Exception as e:
            logger.warning(f"A connection is closed, because it gets no thread: {e}")
            self.forget(request)
            self.shutdown_request(request)

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
        """Close idle connections at once, and the others when their answers end."""
        self.preparations.stop()
        with self.changed:
            for connection in self.connections:
                try:
                    # Not the method of a TLS socket, with which a thread could no longer
                    # write to it.
                    socket.socket.shutdown(connection, socket.SHUT_RD)
                except OSError:
                    pass  # it has ended by itself
            if not self.changed.wait_for(lambda: not self.connections, CLOSE_TIMEOUT):
                logger.warning(f"{len(self.connections)} connections did not end")
        super().server_close()

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if isinstance(error, ssl.SSLError):
            logger.info(f"{client_address[0]}: no TLS: {error.reason or error}")
        if isinstance(error, GONE):
            return
        logger.exception(f"A connection from {client_address[0]} failed")

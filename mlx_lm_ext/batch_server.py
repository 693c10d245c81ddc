"""The server's process: ``mlx_lm.batch_server`` from its start to its exit.

Rules:
1. A wrong argument ends the start with exit code 2, anything else that keeps the
   server from starting with exit code 1. Both print one line that says why.
2. MLX is imported after the arguments are parsed, so that wrong ones are reported at
   once, and after a fast BLAS is loaded and the settings for CUDA are made.
3. After a signal, requests that are there may end for ``--shutdown-timeout``; then the
   process ends within seconds, whatever its threads are doing. A second signal ends it at
   once.
"""

import argparse
import gc
import logging
import os
import re
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from threading import Thread
from typing import Any, Dict, List, Optional

from . import blas, cuda, demo_model, descriptors
from .arguments import make_parser, parse_arguments
from .folders import cache_directory
from .log import LogWriter, stage
from .policies.loading import PluginError, Plugins

logger = logging.getLogger(__name__)

STARTED = time.perf_counter()
# The body of a request to try the server with.
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
)
# Seconds for the generation thread to end: it may be loading a model, or in a long step.
# With ``--shutdown-timeout 0``, all of the end takes less than 10, after which container
# engines kill.
STOP_TIMEOUT = 4.0
# The same after another rank was lost, for which it may wait in vain: long enough for the
# handlers to tell their clients.
LOST_TIMEOUT = 1.0


def main(argv: Optional[List[str]] = None) -> None:
    """Serve until SIGINT or SIGTERM, then exit with 0."""
    descriptors.open_standard()
    # Before the plugins, because they may import MLX and mlx-lm.
    lines = [blas.load(), *cuda.prepare()]
    with descriptors.limit_kept():
        args, plugins = parse_arguments(argv)
    log = LogWriter(args.log_level, args.log_format)
    for line in filter(None, lines):
        logger.info(line)
    server = BatchServer(args, plugins, log)
    code = 0
    error: Optional[Exception] = None
    try:
        try:
            server.start()
            server.wait()
        finally:
            server.stop()
    except PluginError as e:
        code, error = 2, e
    except (OSError, RuntimeError) as e:
        code, error = 1, e
    except KeyboardInterrupt:
        pass
    if error is not None and args.log_format == "json":
        logger.critical(error)
        error = None
    # If nobody reads the log lines, printing one more would block for ever.
    if log.drain(timeout=1.0):
        # Nobody may be left who reads it, or there may be no room on the disk.
        with suppress(OSError, ValueError):
            if error is not None:
                print(f"mlx_lm.batch_server: error: {error}", file=sys.stderr)
            sys.stderr.flush()
            sys.stdout.flush()
    # Not ``sys.exit``: MLX frees what it keeps for a thread after the thread's Python
    # part has ended. If the interpreter is finalized by then, the process aborts.
    os._exit(code)


def check_mlx_lm() -> None:
    """Check that the installed mlx-lm has the private names that are used here.

    Raises:
        RuntimeError: If the installed mlx-lm is not one of those that this package is made for.
    """
    installed = version("mlx-lm")
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed)[:3])
    if not (0, 32, 2) <= numbers < (0, 33):
        raise RuntimeError(
            f"mlx-lm {installed} is installed, and mlx-lm-ext needs mlx-lm>=0.32.2,<0.33"
        )


def interrupt(number: int, frame: Any) -> None:
    """The first signal: it ends what the main thread waits for.

    Raises:
        KeyboardInterrupt: Always.
    """
    end_at_once()
    raise KeyboardInterrupt


def end_at_once() -> None:
    """Let the next signal end the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class BatchServer:
    """The HTTP server and the engine of this process.

    Args:
        args (argparse.Namespace): The command line.
        plugins (Plugins): The plugins that it names.
        log (LogWriter): Writes the log.
    """

    def __init__(self, args: argparse.Namespace, plugins: Plugins, log: LogWriter):
        self.args = args
        self.plugins = plugins
        self.log = log
        # Any: their classes import MLX, and OpenBLAS must be loaded before it.
        self.httpd: Any = None
        self.engine: Any = None
        self.client: Any = None
        self.group: Any = None
        self.accepting: Optional[Thread] = None

    def start(self) -> None:
        """Listen, load the model, and begin to serve.

        Raises:
            OSError: If the address cannot be listened on.
            PluginError: If a policy cannot be used.
            RuntimeError: If the model cannot be loaded.
            KeyboardInterrupt: On SIGINT or SIGTERM.
        """
        # First, because the first process of a container is not ended by it otherwise.
        signal.signal(signal.SIGTERM, interrupt)
        # A shell lets processes in the background ignore it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        descriptors.raise_limit()
        check_mlx_lm()
        with stage("Importing mlx-lm"), descriptors.limit_kept():
            import mlx_lm.utils  # noqa: F401

            from .device import check_compiler, share_arenas
            from .distributed.launch import join
            from .policies.follower import FollowerPolicies
            from .policies.guard import Policies

        share_arenas()
        check_compiler()
        self.log.take_over("transformers", "huggingface_hub")
        self.group = join(self.args, vars(make_parser().parse_args([])))
        if self.group.rank:
            self.find_model()
            self.start_engine(FollowerPolicies(self.args))
        else:
            policies = Policies(self.plugins, self.args)
            # Before a model is fetched.
            routes = self.plugins.routes(self.args)
            self.find_model()
            self.listen(routes)
            self.start_engine(policies)
            self.accept()
        self.engine.loaded.wait()
        if self.engine.load_error is not None:
            raise RuntimeError(self.engine.load_error)
        if self.group.rank:
            logger.info(f"Rank {self.group.rank} of {self.group.size} is ready")
        else:
            self.tell_address()

    def accept(self) -> None:
        """Begin to accept connections."""
        accepting = Thread(target=self.httpd.serve_forever)
        accepting.start()
        # Assigned after its start, because ``stop`` waits for its end.
        self.accepting = accepting

    def tell_address(self) -> None:
        """Log where the server is, and a command to try it with."""
        args = self.args
        host = f"[{args.host}]" if ":" in args.host else args.host
        if args.host in ("", "0.0.0.0", "::"):
            host = "localhost"
        scheme = "http" if args.ssl_certfile is None else "https"
        port = self.httpd.server_address[1]
        names = ", ".join(self.client.served_names)
        logger.info(f"Serving {names} at {scheme}://{host}:{port}/v1")
        key = "-H 'Authorization: Bearer KEY' " if args.api_keys else ""
        seconds = time.perf_counter() - STARTED
        logger.info(
            f"Ready after {seconds:.1f} s. Try it: curl "
            f"{scheme}://{host}:{port}/v1/chat/completions {key}"
            f"-H 'Content-Type: application/json' -d '{EXAMPLE}'"
        )

    def find_model(self) -> None:
        """Set ``args.model``, and ``args.model_id``, the name that clients see.

        Raises:
            OSError: If the default model is needed, and its folder cannot be used.
            RuntimeError: If it cannot be fetched.
        """
        from .device import on_cpu

        args = self.args
        args.model_id = args.model
        if args.model is None:
            args.model_id = demo_model.NAME
            try:
                args.model = str(demo_model.ensure(quantized=not on_cpu()))
            except OSError as e:
                raise OSError(
                    f"the default model cannot be kept in {cache_directory()}: "
                    f"{e.strerror or e}; name a model with --model, or set XDG_CACHE_HOME"
                )
            logger.info(f"No --model was given: serving {args.model_id}")

    def listen(self, routes: Dict[Any, Any]) -> None:
        """Open the port. Connections are accepted later, when there is an engine.

        Args:
            routes (Dict): The routes of plugins by method and path.
        """
        from .server.browsers import is_loopback
        from .server.http_server import BatchHTTPServer

        args = self.args
        try:
            self.httpd = BatchHTTPServer(
                (args.host, args.port),
                None,
                args.allowed_origins,
                args.allowed_hosts,
                keys=args.api_keys,
                routes=routes,
                max_connections=args.max_connections,
                idle_timeout=args.idle_timeout,
                header_timeout=args.header_timeout,
                tls=args.tls,
            )
        except (OSError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or e
            raise OSError(f"cannot listen on {args.host} port {args.port}: {reason}")
        if not (args.api_keys or is_loopback(str(self.httpd.server_address[0]))):
            logger.warning(
                f"Everybody who can reach {args.host} may use this server, because no "
                "--api-key was given"
            )

    def start_engine(self, policies) -> None:
        """Start the generation thread, which begins to load the model."""
        from mlx_lm.server import get_system_fingerprint

        from .cache.prompt_cache import RadixPromptCache
        from .engine.client import EngineClient
        from .engine.group_inbox import GroupInbox
        from .engine.inbox import Inbox
        from .engine.loop import Engine
        from .engine.models import BatchModelProvider
        from .server.api import BatchAPIHandler

        cache = None
        if self.args.use_prompt_cache:
            cache = RadixPromptCache(
                max_bytes=self.args.radix_cache_size,
                eviction=policies.eviction,
                clock=policies.clock,
                agree=self.group.agree,
            )
        fingerprint = get_system_fingerprint()
        # What was imported stays until the end. For the garbage collector to visit it
        # takes 20 to 160 ms, during which all streams would stand still.
        gc.freeze()
        group = self.group
        provider = BatchModelProvider(self.args, group)
        inbox = GroupInbox(group, provider) if group.size > 1 else Inbox()
        self.engine = Engine(provider, policies, cache, group, inbox)
        if group.rank == 0:
            self.client = EngineClient(provider, policies, inbox, self.engine.counters)
            self.httpd.RequestHandlerClass = partial(
                BatchAPIHandler, self.client, system_fingerprint=fingerprint
            )
        self.engine.start()

    def wait(self) -> None:
        """Serve until a signal comes or one of the threads has failed. After a signal, let the
        requests that are there end.

        Raises:
            RuntimeError: If the generation thread or the accepting one has failed.
        """
        if self.group.rank:
            self.follow()
            return
        try:
            while not (self.engine.ended.wait(1.0) or self.group.must_stop):
                if not self.accepting.is_alive():
                    raise RuntimeError("no connections are accepted; the log says why")
        except KeyboardInterrupt:
            pass
        if not self.engine.ended.is_set():
            self.drain()
        self.check_end()

    def follow(self) -> None:
        """Run what rank 0 decides, until it ends. It is told of a signal.

        Raises:
            RuntimeError: If the generation thread has failed.
        """
        try:
            self.engine.ended.wait()
        except KeyboardInterrupt:
            self.group.ask_to_stop()
            self.engine.ended.wait()
        self.check_end()

    def check_end(self) -> None:
        """Check that the engine has not ended because of an error.

        Raises:
            RuntimeError: If the generation thread or another rank has failed.
        """
        if self.engine.has_failed:
            reason = "the generation thread has failed; the log says why"
            raise RuntimeError(self.group.lost or reason)

    def drain(self) -> None:
        """Take no new requests, and wait until those that are there have ended, or for
        ``--shutdown-timeout``."""
        admission = self.client.admission
        admission.close()
        if n := len(admission.tickets):
            logger.info(
                f"Stopping: {n} of the requests may end within "
                f"{self.args.shutdown_timeout:g} seconds (--shutdown-timeout)"
            )
        deadline = time.monotonic() + self.args.shutdown_timeout
        while not self.engine.ended.is_set():
            left = deadline - time.monotonic()
            if left <= 0 or admission.wait_until_empty(min(left, 1.0)):
                break
        if admission.tickets:
            logger.warning(f"{len(admission.tickets)} requests did not end in time")

    def stop(self) -> None:
        """End what was started: open requests are told that the server is stopping."""
        end_at_once()
        if self.client is not None:
            self.client.admission.close()
        if self.engine is not None:
            timeout = LOST_TIMEOUT if self.group.lost else STOP_TIMEOUT
            if not self.engine.stop_and_join(timeout):
                logger.warning(
                    f"The generation thread did not end in {timeout:g} seconds"
                )
        # Last, so that those who come meanwhile are told.
        if self.accepting is not None:
            self.httpd.shutdown()
        if self.httpd is not None:
            self.httpd.server_close()
        if self.accepting is not None:
            logger.info("Stopped")


if __name__ == "__main__":
    main()

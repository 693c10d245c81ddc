"""The command line of ``mlx_lm.batch_server``.

Rules:
1. A wrong argument ends the start with exit code 2, anything else that keeps the
   server from starting with exit code 1; each says why in one line.
2. MLX is imported after a fast BLAS is loaded, and here after the arguments are parsed:
   what is wrong with them shows at once.
"""

import argparse
import gc
import logging
import os
import resource
import signal
import sys
from functools import partial
from threading import Thread
from typing import List, Optional

from . import blas, demo_model
from .arguments import parse_arguments
from .log import LogWriter
from .policies.loading import PluginError, Plugins


def main(argv: Optional[List[str]] = None) -> None:
    """Serve until SIGINT or SIGTERM, then exit with 0."""
    # Before plugins, which may import MLX.
    blas_line = blas.load()
    args, plugins = parse_arguments(argv)
    log = LogWriter(args.log_level)
    if blas_line:
        logging.info(blas_line)
    code, error = 0, None
    try:
        serve(args, plugins, log)
    except PluginError as e:
        code, error = 2, e
    except (OSError, RuntimeError) as e:
        code, error = 1, e
    except KeyboardInterrupt:
        pass
    # If nobody reads the lines, writing one more would wait for ever.
    if log.drain(timeout=1.0):
        if error is not None:
            print(f"mlx_lm.batch_server: error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    # Without Python's finalization: MLX frees what it keeps for a thread after the
    # thread's Python part has ended. If the interpreter is gone by then, the process
    # aborts.
    os._exit(code)


def check_open_files() -> None:
    """Raise a ``RuntimeError`` under a limit with which mlx-lm cannot be imported: it
    sets that of open files to 4096."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < 4096:
        raise RuntimeError(
            f"mlx-lm needs 4096 open files, and this process may have {limit} (ulimit -Hn)"
        )


def serve(args: argparse.Namespace, plugins: Plugins, log: LogWriter) -> None:
    """Load the model and serve it.

    Args:
        args (argparse.Namespace): The command line.
        plugins (Plugins): The plugins that it names.
        log (LogWriter): Writes the log.

    Raises:
        OSError: If the address cannot be listened on.
        PluginError: If a policy cannot be used.
        RuntimeError: If the model cannot be loaded.
        KeyboardInterrupt: On SIGINT or SIGTERM, after the server has stopped.
    """
    check_open_files()
    import mlx.core as mx

    from .engine.upstream import check_version

    check_version()
    from mlx_lm.server import get_system_fingerprint

    from .cache.prompt_cache import RadixPromptCache
    from .device import reserve_little
    from .engine.loop import Engine
    from .engine.models import BatchModelProvider
    from .policies.guard import Policies
    from .server.api import BatchAPIHandler
    from .server.http_server import BatchHTTPServer

    reserve_little()
    log.take_over("transformers", "huggingface_hub")
    policies = Policies(plugins, args)

    if mx.distributed.init().size() > 1:
        raise RuntimeError("several machines are not supported; use mlx_lm.server")
    args.model_id = args.model
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.model is None:
        args.model_id = demo_model.NAME
        args.model = str(demo_model.ensure(mx.default_device() != mx.cpu))
        logging.info(f"No --model was given: serving {args.model_id}")

    try:
        httpd = BatchHTTPServer(
            (args.host, args.port), None, args.allowed_origins, args.allowed_hosts
        )
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OSError(f"cannot listen on {args.host} port {args.port}: {reason}")
    cache = None
    if args.use_prompt_cache:
        cache = RadixPromptCache(
            max_bytes=args.radix_cache_size,
            eviction=policies.eviction,
            clock=policies.clock,
        )
    fingerprint = get_system_fingerprint()
    # What was imported stays. To look through it takes the collector 20 to 160 ms, for
    # which all streams would stand still.
    gc.freeze()
    engine = Engine(BatchModelProvider(args), policies, cache)
    httpd.RequestHandlerClass = partial(
        BatchAPIHandler, engine, system_fingerprint=fingerprint
    )
    accepting = Thread(target=httpd.serve_forever)
    try:
        accepting.start()
        engine.loaded.wait()
        if engine.load_error is not None:
            raise RuntimeError(engine.load_error)
        host = f"[{args.host}]" if ":" in args.host else args.host
        port = httpd.server_address[1]
        logging.info(f"Serving {args.model_id} at http://{host}:{port}/v1")
        while not engine.ended.wait(1.0):
            if not accepting.is_alive():
                raise RuntimeError("no connections are accepted; the log says why")
        raise RuntimeError("the generation thread has failed; the log says why")
    finally:
        # A second signal ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        httpd.shutdown()
        engine.stop_and_join()
        httpd.server_close()


if __name__ == "__main__":
    main()

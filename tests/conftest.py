"""Fixtures: tiny models made on the spot, and servers on free ports."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from mlx_lm_ext import blas, descriptors

blas.load()
# Servers that tests start have the limit of this process.
with descriptors.limit_kept():
    import mlx_lm.utils  # noqa: F401

import gc
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import tiny_models
from processes import PATIENCE, SERVING, join, read_until, started

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.policies import loading
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.server.access import Keys


def pytest_collection_finish():
    """What is there now stays until the end. For the garbage collector to visit it takes more
    than the rest of the end of an engine, as in the server itself."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_installed_plugins(monkeypatch):
    """Plugins that are installed beside this package take no part in tests."""
    monkeypatch.setattr(loading, "entry_points", lambda group: [])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Makes the folder of a tiny model of an architecture, once a session."""
    folders = {}

    def make(architecture="llama"):
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("models") / architecture
            folders[architecture] = tiny_models.make_model(folder, architecture)
        return folders[architecture]

    return make


@pytest.fixture
def start_engine(request, model_folder, caplog):
    """Starts engines with arguments as on the command line.

    After a failed step the answers are as they should be, and a test of answers would not
    notice it. So a test fails if an error was logged, unless it has the marker
    ``logs_errors``.
    """
    # They may not fit another mlx-lm, of which test_upstream_contract.py says what is different.
    from mlx_lm_ext.cache.prompt_cache import RadixPromptCache
    from mlx_lm_ext.engine.client import EngineClient
    from mlx_lm_ext.engine.loop import Engine
    from mlx_lm_ext.engine.models import BatchModelProvider
    from mlx_lm_ext.policies.guard import Policies

    engines = []

    def start(
        architecture="llama",
        *argv,
        make_engine=Engine,
        plugin=None,
        clock=time.monotonic,
    ):
        args = make_parser().parse_args(
            [
                *("--warmup", "off", "--no-self-check"),
                *("--model", str(model_folder(architecture)), *argv),
            ]
        )
        args.model_id = args.model
        plugins = Plugins()
        if plugin is not None:
            plugins.add("test", lambda: plugin, "tests", "0")
        policies = Policies(plugins, args, clock)
        cache = None
        if args.use_prompt_cache:
            cache = RadixPromptCache(
                max_bytes=args.radix_cache_size,
                eviction=policies.eviction,
                clock=policies.clock,
            )
        engine = make_engine(BatchModelProvider(args), policies, cache)
        engine.client = EngineClient(
            engine.model_provider, policies, engine.inbox, engine.counters
        )
        engine.start()
        engines.append(engine)
        assert engine.loaded.wait(PATIENCE)
        assert engine.load_error is None
        return engine

    yield start
    for engine in engines:
        assert engine.stop_and_join(PATIENCE)
    if request.node.get_closest_marker("logs_errors") is None:
        errors = [
            r.message for r in caplog.get_records("call") if r.levelname == "ERROR"
        ]
        assert not errors


@pytest.fixture
def start_server(start_engine):
    """Starts HTTP servers in this process; gives (engine, port)."""
    from mlx_lm_ext.server.api import BatchAPIHandler
    from mlx_lm_ext.server.http_server import BatchHTTPServer

    servers = []

    def start(*args, tls=None, handler=BatchAPIHandler, **kwargs):
        engine = start_engine(*args, **kwargs)
        args = engine.cli_args
        httpd = BatchHTTPServer(
            ("127.0.0.1", 0),
            partial(handler, engine.client, system_fingerprint=""),
            args.allowed_origins,
            args.allowed_hosts,
            keys=Keys([*args.api_key, *args.api_key_file]),
            routes=engine.policies.plugins.routes(args),
            max_connections=args.max_connections,
            idle_timeout=args.idle_timeout,
            header_timeout=args.header_timeout,
            tls=tls,
        )
        # How often it looks whether it has to end, in seconds.
        serve = partial(httpd.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve).start()
        servers.append(httpd)
        engine.httpd = httpd
        return engine, httpd.server_address[1]

    yield start
    for httpd in servers:
        httpd.shutdown()
        httpd.server_close()


@contextmanager
def server_process(*argv, python=sys.executable, shell='exec "$@"', **kwargs):
    """A started ``mlx_lm.batch_server`` process; gives its port and its output. ``shell`` is
    the script that starts it."""
    command = ["sh", "-c", shell, "sh", python, "-m", "mlx_lm_ext.batch_server"]
    command += ["--port", "0", *argv]
    with started(command, **kwargs) as process:
        match, lines = read_until(process, SERVING)
        # An unread pipe would block the server once it is full.
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))
        reader.start()
        try:
            yield int(match[1]), lines, process
        finally:
            process.terminate()
            process.wait(PATIENCE)
            join(reader)

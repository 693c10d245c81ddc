"""Plugin of pytest: of mlx-lm's tests of its server, those that talk HTTP ask ours."""

import inspect

from mlx_lm_ext import blas

blas.load()

from upstream_cases import MODEL

from mlx_lm_ext.arguments import parse_arguments
from mlx_lm_ext.batch_server import BatchServer
from mlx_lm_ext.log import LogWriter

ARGUMENTS = ["--model", MODEL, "--any-model-name", "--port", "0", "--warmup", "off"]
ARGUMENTS += ["--use-prompt-cache"]
# What the test cases of a class are about.
MORE_ARGUMENTS = {
    "TestServerWithDraftModel": ["--draft-model", MODEL],
    "TestServerKVCacheQuantization": ["--kv-bits", "4", "--quantized-kv-start", "0"],
}


def start(cls):
    """Takes the place of ``setUpClass``."""
    argv = [*ARGUMENTS, *MORE_ARGUMENTS.get(cls.__name__, [])]
    args, plugins = parse_arguments(argv)
    cls.server = BatchServer(args, plugins, LogWriter(args.log_level))
    cls.server.start()
    cls.port = cls.server.httpd.server_address[1]
    # The cases end its thread with ``stop_and_join``.
    cls.response_generator = cls.server.engine


def stop(cls):
    """Takes the place of ``tearDownClass``."""
    cls.server.stop()


def pytest_pycollect_makeitem(collector, name, obj):
    if inspect.isclass(obj) and "setUpClass" in vars(obj):
        obj.setUpClass, obj.tearDownClass = classmethod(start), classmethod(stop)


def pytest_collection_modifyitems(items):
    sources = {item: inspect.getsource(item.function) for item in items}
    # A case that ends the generation thread has its server to itself.
    items[:] = sorted(
        (item for item in items if "self.port" in sources[item]),
        key=lambda item: "stop_and_join" in sources[item],
    )

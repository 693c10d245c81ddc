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
from typing import List, Optional, Tuple

from . import __version__, blas, demo_model
from .arguments import (
    ArgumentParser,
    chat_template,
    json_object,
    names,
    number,
    size,
)
from .log import LogWriter
from .policies.loading import KINDS, PluginError, Plugins


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the server. Those of ``mlx_lm.server`` mean what they do there."""
    parser = ArgumentParser(
        prog="mlx_lm.batch_server",
        description="Serve a model over an OpenAI-compatible HTTP API, in batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )

    model = parser.add_argument_group("model").add_argument
    model(
        "--model",
        help=f"path or Hugging Face repository of an MLX model; without it, "
        f"{demo_model.NAME} is fetched once and served",
    )
    model("--adapter-path", help="path of LoRA adapter weights and their config")
    model(
        "--draft-model",
        help="model for speculative decoding; requests are then served one at a time",
    )
    model(
        "--num-draft-tokens",
        type=number(int, 1),
        default=3,
        help="tokens to draft at a time",
    )
    model(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model or its tokenizer",
    )
    model(
        "--chat-template",
        type=chat_template,
        default="",
        help="chat template to use instead of the model's: its text, or a file's path",
    )
    model(
        "--use-default-chat-template",
        action="store_true",
        help="use the tokenizer's default chat template if the model has none",
    )
    model(
        "--chat-template-args",
        type=json_object,
        default="{}",
        help="""JSON object of arguments for the chat template,
        e.g. '{"enable_thinking": false}'""",
    )

    model(
        "--allow-models",
        nargs="*",
        metavar="NAME",
        help="other models, adapters and draft models that requests may name: paths or "
        "repositories, * stands for any characters but slashes; any allows all; unset, "
        "what the Hugging Face cache holds",
    )

    server = parser.add_argument_group("server").add_argument
    server("--host", default="127.0.0.1", help="address to listen on")
    server(
        "--port",
        type=number(int, 0, 65535),
        default=8080,
        help="port to listen on; 0 takes a free one",
    )
    server(
        "--allowed-origins",
        type=names,
        default="loopback",
        help="origins of the web pages that may call, with commas between them: "
        "https://chat.example, https://*.example, loopback for pages of this machine, * "
        "for all; others are refused",
    )
    server(
        "--allowed-hosts",
        type=names,
        help="names that clients may call the server by, with commas between them; "
        "unset, those of this machine if --host is one, else all",
    )
    server(
        "--max-body-bytes",
        type=size,
        default=8 << 20,
        help="bytes of a request's body, without its images; also 512KB, 8MB",
    )
    server(
        "--allow-image-urls",
        action="store_true",
        help="fetch images that requests name by http(s) URLs, from public addresses; "
        "else they must be data URLs",
    )
    server(
        "--log-level",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        default="INFO",
        help="least severity of what is logged",
    )

    batch = parser.add_argument_group("batch").add_argument
    batch(
        "--batch-size",
        type=number(int, 1),
        default=32,
        help="requests to decode at a time",
    )
    batch(
        "--prompt-concurrency",
        type=number(int, 1),
        default=256,
        help="prompts to process at a time, if so many fit into --batch-size and "
        "--prefill-step-size",
    )
    batch(
        "--prefill-step-size",
        type=number(int, 1),
        default=2048,
        help="tokens of all prompts to process in one step; on a CPU, which is slower with "
        "more, 256 at most",
    )
    batch(
        "--prefill-budget",
        type=number(int, 1),
        help="tokens of all prompts to process between two decode steps of streams that "
        "have begun: fewer make shorter gaps in those, more a shorter wait for new ones; "
        "unset, 256, and 2048 with CUDA",
    )
    batch(
        "--max-kv-bytes",
        type=size,
        help="bytes of the running batch's KV, each answer at its max_tokens; also "
        "512MB, 2GB; unset, nine tenths of the memory beside the model",
    )
    batch(
        "--max-wait",
        type=number(float, 0),
        default=30.0,
        help="seconds after which a request goes before those that came later, whatever "
        "--scheduler prefers",
    )

    batch(
        "--request-timeout",
        type=number(float, 0),
        metavar="SECONDS",
        help="end a request that takes longer, waiting included, with HTTP 408; unset, "
        "it may take any time",
    )
    batch(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run batches of all sizes that fit before the first request, which then need "
        "not wait until kernels are compiled",
    )

    cache = parser.add_argument_group("cache").add_argument
    cache(
        "--use-prompt-cache",
        action="store_true",
        help="keep the KV of prompts and answers for requests that share a prefix",
    )
    cache(
        "--radix-cache-size",
        type=size,
        default=1 << 30,
        help="bytes that the prompt cache and the running batch may take; "
        "also 512MB, 2GB",
    )
    cache(
        "--cache-ttl",
        type=number(float, 0),
        default=3600.0,
        help="seconds without use after which --eviction-policy ttl drops KV",
    )
    cache(
        "--cache-salt-required",
        action="store_true",
        help="refuse requests without a cache_salt, in the body or in the header "
        "X-Cache-Salt: no two with different ones share KV",
    )
    cache(
        "--kv-bits",
        type=int,
        choices=[2, 3, 4, 5, 6, 8],
        help="quantize the KV; requests are then served one at a time",
    )
    cache(
        "--kv-group-size",
        type=int,
        choices=[32, 64, 128],
        default=64,
        help="group size of quantized KV",
    )
    cache(
        "--quantized-kv-start",
        type=number(int, 0),
        default=5000,
        help="tokens of a sequence after which its KV is quantized",
    )

    plugin = parser.add_argument_group("plugins").add_argument
    plugin(
        "-p",
        action="append",
        default=[],
        metavar="NAME",
        dest="plugins",
        help="load a plugin, the module NAME; no:NAME blocks one that is installed",
    )
    plugin(
        "--list-plugins",
        action="store_true",
        help="print the plugins and what they register, and exit",
    )
    for kind in KINDS:
        plugin(kind.flag, default=kind.default, metavar="NAME", help=kind.title)

    defaults = parser.add_argument_group("defaults of requests").add_argument
    defaults(
        "--max-tokens",
        type=number(int, 1),
        default=512,
        help="tokens to generate",
    )
    defaults(
        "--temp",
        type=number(float, 0, 1e9),
        default=0.0,
        help="sampling temperature; 0 takes the most likely token",
    )
    defaults("--top-p", type=number(float, 0, 1), default=1.0, help="nucleus sampling")
    defaults("--top-k", type=number(int, 0), default=0, help="top-k sampling; 0 is off")
    defaults(
        "--min-p",
        type=number(float, 0, 1),
        default=0.0,
        help="min-p sampling; 0 is off",
    )
    return parser


def parse_arguments(
    argv: Optional[List[str]] = None,
) -> Tuple[argparse.Namespace, Plugins]:
    """The command line, with the flags of the plugins that it names."""
    parser = make_parser()
    first = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("-p", action="append", default=[])
    try:
        plugins = Plugins(first.parse_known_args(argv)[0].p)
        plugins.add_arguments(parser)
        args = parser.parse_args(argv)
        if args.list_plugins:
            print(plugins.describe())
            parser.exit()
    except PluginError as e:
        parser.error(str(e))
    return args, plugins


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
    from .engine.client import EngineClient
    from .engine.loop import Engine
    from .engine.models import BatchModelProvider
    from .policies.guard import Policies
    from .server.api import BatchAPIHandler
    from .server.connection import BatchHTTPServer

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
    client = EngineClient(engine.model_provider, policies, engine.inbox)
    engine.start()
    httpd.RequestHandlerClass = partial(
        BatchAPIHandler, client, system_fingerprint=fingerprint
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

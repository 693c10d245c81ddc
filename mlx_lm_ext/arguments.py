"""The command line of ``mlx_lm.batch_server``, and the argument types that it shares with
the tools.

Rules:
1. A wrong argument ends the start with one line that names it and says what is right.
2. Nothing here imports MLX: wrong arguments are reported at once.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

from jinja2 import Environment, TemplateSyntaxError

from . import __version__, demo_model
from .log import FORMATS
from .policies.loading import KINDS, PluginError, Plugins
from .server.access import Keys
from .server.tls import make_context

# The environment variable with API keys.
KEY_VARIABLE = "MLX_LM_API_KEY"


class ArgumentParser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Given(argparse.Action):
    """Stores a value as usual, and the field of a request that it is the default of in
    ``args.given``: a default value does not tell whether it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        field = "temperature" if self.dest == "temp" else self.dest
        namespace.given = namespace.given | {field}


def number(
    kind: type, minimum: float, maximum: float = math.inf
) -> Callable[[str], Any]:
    """Make an argument type: a number from ``minimum`` to ``maximum``, both included."""

    def parse(text: str) -> Any:
        value = kind(text)
        # Not ``value < minimum or ...``: NaN must fail too.
        if not minimum <= value <= maximum:
            limit = f"at most {maximum}" if value > maximum else f"at least {minimum}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def size(text: str) -> int:
    """An argument type: a number of bytes, as ``1073741824``, ``512MB`` or ``2GB``."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write 1073741824, 512MB or 2GB"
        )
    if len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is too large")
    return int(float(match[1]) * units[match[2]])


def names(text: str) -> List[str]:
    """An argument type: names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def json_object(text: str) -> Dict[str, Any]:
    """An argument type: a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {e}")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def served_name(text: str) -> str:
    """An argument type: what clients call the model."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a name")
    return text


def key_lines(path: str) -> List[str]:
    """An argument type: a file with an API key in each line. Empty lines, and those that begin
    with ``#``, do not count."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise argparse.ArgumentTypeError(f"the file cannot be read: {e}")
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise argparse.ArgumentTypeError(f"there is no key in {path}")
    return keys


def chat_template(text: str) -> str:
    """An argument type: a chat template, or the path of a file that holds one."""
    try:
        is_file = text and Path(text).is_file()
    except (OSError, ValueError):
        is_file = False  # the text cannot be a path: it is too long, for example
    try:
        if is_file:
            text = Path(text).read_text(encoding="utf-8")
        # Without this check a misspelled path would be taken for a template.
        elif text and "{" not in text:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither a file nor a template"
            )
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as e:
        raise argparse.ArgumentTypeError(f"the file cannot be read: {e}")
    except TemplateSyntaxError as e:
        # Transformers defines tags that this environment does not know.
        if "unknown tag" not in str(e):
            raise argparse.ArgumentTypeError(f"the template is wrong: {e}")
    return text


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help=f"path or Hugging Face repository of an MLX model; without it, "
        f"{demo_model.NAME} is fetched once and served",
    )
    add("--adapter-path", help="path of LoRA adapter weights and their config")
    add(
        "--context-length",
        type=number(int, 1),
        metavar="TOKENS",
        help="most tokens of a prompt and its answer; unset, what the model's "
        "configuration says",
    )
    add(
        "--dequantize",
        choices=["auto", "on", "off"],
        default="auto",
        help="turn weights into a type with which steps are faster, if they fit: auto "
        "turns quantized ones into 16-bit ones with CUDA, and quantized and 16-bit ones "
        "into float32 on a Linux CPU; on does so on a Mac too, 16-bit ones with Metal, and "
        "ends the start if they do not fit; off leaves all as they are",
    )
    add(
        "--draft-model",
        help="model for speculative decoding; requests are then served one at a time",
    )
    add(
        "--num-draft-tokens",
        type=number(int, 1),
        default=3,
        help="tokens to draft at a time",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model or its tokenizer",
    )
    add(
        "--chat-template",
        type=chat_template,
        default="",
        help="chat template to use instead of the model's: its text, or a file's path",
    )
    add(
        "--use-default-chat-template",
        action="store_true",
        help="use the tokenizer's default chat template if the model has none",
    )
    add(
        "--chat-template-args",
        type=json_object,
        default="{}",
        help="""JSON object of arguments for the chat template,
        e.g. '{"enable_thinking": false}'""",
    )
    add(
        "--allow-models",
        nargs="*",
        metavar="NAME",
        help="other models, adapters and draft models that requests may name: paths or "
        "repositories, * stands for any characters but slashes; any allows all; unset, "
        "what the Hugging Face cache holds",
    )


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several machines or GPUs").add_argument
    add(
        "--pipeline",
        action="store_true",
        help="under mlx.launch, give each rank some layers of the model; without it, each rank "
        "has a part of all layers",
    )
    add(
        "--rank-timeout",
        type=number(float, 1),
        default=120.0,
        metavar="SECONDS",
        help="under mlx.launch, end all ranks if one has made no progress for so long while "
        "requests run",
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add(
        "--port",
        type=number(int, 0, 65535),
        default=8080,
        help="port to listen on; 0 takes a free one",
    )
    add(
        "--served-model-name",
        type=served_name,
        nargs="+",
        metavar="NAME",
        help="what clients may call the served model; metrics and the log have the first "
        "one; unset, what --model says",
    )
    add(
        "--any-model-name",
        action="store_true",
        help="answer requests for models that are not on this machine with the served one, "
        "for clients that insist on a name",
    )
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="[NAME:]KEY",
        help="a key that callers must send, repeatable; NAME stands for it in the log and in "
        "--scheduler fair; others on this machine can see it, unless it is in a file or in "
        f"the environment variable {KEY_VARIABLE}, with blanks between several",
    )
    add(
        "--api-key-file",
        type=key_lines,
        action="extend",
        default=[],
        metavar="FILE",
        help="a file with a [NAME:]KEY in each line",
    )
    add(
        "--ssl-certfile",
        metavar="FILE",
        help="certificate, with those that have signed it, in PEM, to serve over https",
    )
    add(
        "--ssl-keyfile",
        metavar="FILE",
        help="private key of the certificate; unset, it is in --ssl-certfile",
    )
    add(
        "--max-connections",
        type=number(int, 1),
        default=1000,
        help="connections to keep at a time; others are closed at once",
    )
    add(
        "--header-timeout",
        type=number(float, 0.1, 1e6),
        default=30.0,
        metavar="SECONDS",
        help="seconds for the headers of a request to arrive, from its first byte on",
    )
    add(
        "--idle-timeout",
        type=number(float, 0.1, 1e6),
        default=60.0,
        metavar="SECONDS",
        help="seconds after which a connection is closed whose client sends no request, or "
        "takes nothing of an answer",
    )
    add(
        "--shutdown-timeout",
        type=number(float, 0, 1e6),
        default=30.0,
        metavar="SECONDS",
        help="seconds after SIGTERM or Ctrl-C in which the requests that are there may end; a "
        "second signal ends the process at once",
    )
    add(
        "--allowed-origins",
        type=names,
        default="loopback",
        help="origins of the web pages that may call, with commas between them: "
        "https://chat.example, https://*.example, loopback for pages of this machine, * "
        "for all; others are refused",
    )
    add(
        "--allowed-hosts",
        type=names,
        help="names that clients may call the server by, with commas between them; "
        "unset, those of this machine if --host is one, else all",
    )
    add(
        "--max-body-bytes",
        type=size,
        default=8 << 20,
        help="bytes of a request's body, without its images; also 512KB, 8MB",
    )
    add(
        "--allow-image-urls",
        action="store_true",
        help="fetch images that requests name by http(s) URLs, from public addresses; "
        "else they must be data URLs",
    )
    add(
        "--log-level",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        default="INFO",
        help="least severity of what is logged; with DEBUG, prompts and answers too",
    )
    add(
        "--log-format",
        choices=list(FORMATS),
        default="text",
        help="text, or an object of JSON in each line",
    )


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("batch").add_argument
    add(
        "--batch-size",
        type=number(int, 1),
        default=32,
        help="requests to decode at a time",
    )
    add(
        "--prompt-concurrency",
        type=number(int, 1),
        default=256,
        help="prompts to process at a time, if so many fit into --batch-size and "
        "--prefill-step-size",
    )
    add(
        "--prefill-step-size",
        type=number(int, 1),
        default=2048,
        help="tokens of all prompts to process at a time; on a CPU, which is slower with "
        "more, 256 at most",
    )
    add(
        "--prefill-budget",
        type=number(int, 1),
        help="tokens of all prompts to process at most between two decode steps of streams "
        "that have begun, also if --max-gap leaves time for more",
    )
    add(
        "--max-gap",
        type=number(float, 0),
        metavar="SECONDS",
        help="about so many seconds between two tokens of streams that have begun while "
        "prompts are processed: less makes smoother streams, more a shorter wait for new "
        "ones; unset, 0.1, or the time of 4 decode steps if they take longer, beside long "
        "prompts of 5, and on a CPU of 7",
    )
    add(
        "--max-kv-bytes",
        type=size,
        help="bytes of the running batch's KV; if answers outgrow them, the newest "
        "requests wait; also 512MB, 2GB; unset, nine tenths of the memory beside the model",
    )
    add(
        "--max-wait",
        type=number(float, 0),
        default=30.0,
        help="seconds after which a request goes before those that came later, with the "
        "schedulers lpm, sjf and priority",
    )
    add(
        "--request-timeout",
        type=number(float, 0),
        metavar="SECONDS",
        help="end an answer that takes longer, waiting included, with what there is of it; "
        "unset, it may take any time",
    )
    add(
        "--max-queue",
        type=number(int, 1),
        default=1000,
        help="answers that may wait for their turn, or be tokenized; more are refused with "
        "HTTP 429",
    )
    add(
        "--max-requests-per-key",
        type=number(int, 1),
        metavar="N",
        help="answers that may wait or run for one API key; more are refused with HTTP 429",
    )
    add(
        "--warmup",
        choices=["background", "full", "off"],
        default="background",
        help="run batches of all kinds and sizes that fit, so that no request has to wait "
        "until kernels are compiled: in the background while nothing else is to be done, "
        "or in full before the first request",
    )
    add(
        "--no-warmup",
        action="store_const",
        const="off",
        dest="warmup",
        default=argparse.SUPPRESS,
        help="the same as --warmup off",
    )
    add(
        "--self-check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="when a model is loaded, compare a batch of two short prompts with each of them "
        "alone, and serve its requests one at a time if they differ by more than rounding",
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("cache").add_argument
    add(
        "--use-prompt-cache",
        action="store_true",
        help="keep the KV of prompts and answers for requests that share a prefix",
    )
    add(
        "--radix-cache-size",
        type=size,
        default=1 << 30,
        help="bytes that the prompt cache and the running batch may take; "
        "also 512MB, 2GB",
    )
    add(
        "--cache-ttl",
        type=number(float, 0),
        default=3600.0,
        help="seconds without use after which --eviction-policy ttl drops KV",
    )
    add(
        "--cache-salt-required",
        action="store_true",
        help="refuse requests without a cache_salt, in the body or in the header "
        "X-Cache-Salt: no two with different ones share KV",
    )
    add(
        "--share-cache",
        action="store_true",
        help="let requests with different API keys share KV: how long an answer takes then "
        "tells how much of its prompt others have sent",
    )
    add(
        "--kv-bits",
        type=int,
        choices=[2, 3, 4, 5, 6, 8],
        help="quantize the KV; requests are then served one at a time",
    )
    add(
        "--kv-group-size",
        type=int,
        choices=[32, 64, 128],
        default=64,
        help="group size of quantized KV",
    )
    add(
        "--quantized-kv-start",
        type=number(int, 0),
        default=5000,
        help="tokens of a sequence after which its KV is quantized",
    )


def add_plugin_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plugins").add_argument
    add(
        "-p",
        action="append",
        default=[],
        metavar="NAME",
        dest="plugins",
        help="load the plugin NAME, a module; no:NAME blocks a plugin by its name in "
        "--list-plugins",
    )
    add(
        "--list-plugins",
        action="store_true",
        help="print the plugins and what they register, and exit",
    )
    for kind in KINDS:
        add(kind.flag, default=kind.default, metavar="NAME", help=kind.title)


def add_request_defaults(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(given=frozenset())
    add = parser.add_argument_group("defaults of requests").add_argument
    add(
        "--max-tokens",
        type=number(int, 1),
        action=Given,
        default=512,
        help="tokens to generate; if this is not given, answers with a response_format may "
        "have 32768",
    )
    add(
        "--temp",
        type=number(float, 0, 1e9),
        action=Given,
        default=0.0,
        help="sampling temperature; 0 takes the most likely token",
    )
    add(
        "--top-p",
        type=number(float, 0, 1),
        action=Given,
        default=1.0,
        help="nucleus sampling; 0 takes the most likely token",
    )
    add(
        "--top-k",
        type=number(int, 0),
        action=Given,
        default=0,
        help="top-k sampling; 0 is off",
    )
    add(
        "--min-p",
        type=number(float, 0, 1),
        action=Given,
        default=0.0,
        help="min-p sampling; 0 is off",
    )
    add(
        "--generation-config",
        choices=["none", "model"],
        default="none",
        help="model takes temperature, top_p, top_k, min_p and repetition_penalty from "
        "the model's generation_config.json, where these arguments are not given",
    )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the server. An argument that ``mlx_lm.server`` has too means the
    same there, but for a ``--top-p`` of 0, which is none there."""
    parser = ArgumentParser(
        prog="mlx_lm.batch_server",
        description="Serve a model over an OpenAI-compatible HTTP API, in batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    add_model_arguments(parser)
    add_server_arguments(parser)
    add_batch_arguments(parser)
    add_cache_arguments(parser)
    add_rank_arguments(parser)
    add_plugin_arguments(parser)
    add_request_defaults(parser)
    return parser


def collect_keys(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set ``args.api_keys``, and take away the keys themselves: plugins get the arguments."""
    sources = {"--api-key": args.api_key, "--api-key-file": args.api_key_file}
    if KEY_VARIABLE in os.environ:
        sources[KEY_VARIABLE] = os.environ[KEY_VARIABLE].split()
        if not sources[KEY_VARIABLE]:
            # The server would be open to all without it.
            parser.error(f"{KEY_VARIABLE} is set and has no key")
    del args.api_key, args.api_key_file
    for name, keys in sources.items():
        try:
            Keys(keys)
        except ValueError as e:
            parser.error(f"{name}: {e}")
    try:
        args.api_keys = Keys([key for keys in sources.values() for key in keys])
    except ValueError as e:
        parser.error(f"{', '.join(sources)}: {e}")
    if args.max_requests_per_key is not None and not args.api_keys:
        parser.error("--max-requests-per-key needs --api-key")


def load_certificate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set ``args.tls``: what connections are encrypted with, if they are."""
    args.tls = None
    files = [f for f in (args.ssl_certfile, args.ssl_keyfile) if f is not None]
    if files and args.ssl_certfile is None:
        parser.error("--ssl-keyfile needs --ssl-certfile")
    for name, file in zip(("--ssl-certfile", "--ssl-keyfile"), files):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            parser.error(f"argument {name}: the file cannot be read: {e}")
        if file is files[-1] and "PRIVATE KEY" not in text:
            parser.error(f"argument {name}: there is no private key in {file}")
    try:
        args.tls = make_context(*files) if files else None
    except OSError as e:
        parser.error(
            f"argument --ssl-certfile: {' and '.join(files)} cannot be used: {e}"
        )


def parse_arguments(
    argv: Optional[List[str]] = None,
) -> Tuple[argparse.Namespace, Plugins]:
    """Parse the command line, with the flags that plugins add.

    Args:
        argv (Optional[List[str]]): The arguments; those of the process if not given.

    Returns:
        The parsed arguments, and the plugins that are installed or named by ``-p``.

    Raises:
        SystemExit: With 2 if an argument or a plugin is wrong, with 0 after ``--help``,
          ``--version`` or ``--list-plugins``.
    """
    parser = make_parser()
    # The plugins have to be known before the rest can be parsed.
    first = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("-p", action="append", default=[])
    try:
        plugins = Plugins(first.parse_known_args(argv)[0].p)
        plugins.add_arguments(parser)
        args = parser.parse_args(argv)
        collect_keys(parser, args)
        load_certificate(parser, args)
        if args.list_plugins:
            print(plugins.describe(args))
            parser.exit()
    except PluginError as e:
        parser.error(str(e))
    return args, plugins

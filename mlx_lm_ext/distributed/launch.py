"""How a process finds the group that it was launched in, and what has to be the same on all of
its ranks."""

import argparse
import hashlib
import os
import signal
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator

import mlx.core as mx

from ..device import device_kind
from .group import OneProcess, Ranks

PACKAGES = ("mlx", "mlx-lm", "mlx-lm-ext")
# Arguments that may differ: those of rank 0's sockets and of the log, and paths. What is in the
# model's folder is compared.
MAY_DIFFER = {
    "allow_models",
    "allowed_hosts",
    "allowed_origins",
    "api_key",
    "api_key_file",
    "api_keys",
    "given",
    "host",
    "log_format",
    "log_level",
    "model",
    "model_id",
    "port",
    "ssl_certfile",
    "ssl_keyfile",
    "tls",
}
# Files of a model that name the tokens that end an answer, beside what it is.
CONFIGURATIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
# Bytes of the pieces of a file of weights that are compared.
PIECE = 1 << 16


def join(args: argparse.Namespace, names: Iterable[str]) -> OneProcess:
    """The group of this process: that of its launcher, or one of its own.

    Args:
        args (argparse.Namespace): The command line.
        names (Iterable[str]): The arguments that are not those of plugins, which run on rank 0
          only.

    Raises:
        RankError: If the other ranks cannot be reached, or differ from this one.
        RuntimeError: If the process was launched as one of several, and cannot be it, or an
          argument cannot be used with several.
    """
    is_launched = "MLX_RANK" in os.environ
    try:
        with default_signals():
            group = mx.distributed.init()
    except (RuntimeError, ValueError) as e:
        raise RuntimeError(f"MLX cannot join the other ranks: {e}")
    if group.size() == 1:
        if is_launched and os.environ.get("MLX_WORLD_SIZE") != "1":
            raise RuntimeError(
                "MLX_RANK is set, and MLX finds no other ranks: start all of them with "
                "mlx.launch, or unset MLX_RANK to serve from one process"
            )
        return OneProcess()
    ranks = Ranks(group, args.rank_timeout)
    ranks.compare(facts(args, names))
    # Now, because it is the same on all ranks: none waits for another one.
    check_arguments(args)
    return ranks


@contextmanager
def default_signals() -> Iterator[None]:
    """Let a signal end the process at once: MLX waits for the other ranks, and meanwhile no
    handler of Python runs."""
    handlers = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what mlx-lm cannot do with a model on several ranks.

    Raises:
        RuntimeError: If an argument asks for it.
    """
    for name in ("adapter_path", "draft_model", "kv_bits"):
        if getattr(args, name) is not None:
            raise RuntimeError(
                f"{flag(name)} cannot be used with several ranks; leave it out, or start one "
                "process"
            )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def facts(args: argparse.Namespace, names: Iterable[str]) -> Dict[str, str]:
    """What has to be the same on all ranks before the model is loaded."""
    found = {"the device": device_kind()}
    for package in PACKAGES:
        try:
            found[f"the version of {package}"] = version(package)
        except PackageNotFoundError:
            continue
    for name in sorted(set(names) - MAY_DIFFER):
        found[flag(name)] = str(getattr(args, name))
    return found


def weights(path: Path) -> Dict[str, str]:
    """A digest of each file of a model that is on this machine, and decides what it computes
    and where its answers end. Of the weights, the beginning, the middle and the end are read.
    """
    digests = {}
    others = [path / name for name in CONFIGURATIONS]
    for file in sorted([*path.glob("*.safetensors"), *filter(Path.is_file, others)]):
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(file, "rb") as f:
            for start in (0, size // 2, max(0, size - PIECE)):
                f.seek(start)
                digest.update(f.read(PIECE))
        digests[f"the model's {file.name}"] = digest.hexdigest()[:16]
    return digests


def check_heads(config: Dict[str, Any], size: int) -> None:
    """Refuse a model whose heads cannot be shared out: upstream rounds, and the model fails when
    it runs.

    Args:
        config (Dict[str, Any]): The configuration of its text model.
        size (int): How many ranks there are.

    Raises:
        ValueError: If they cannot.
    """
    names = ["num_attention_heads"]
    # Latents are not shared out by heads.
    if config.get("kv_lora_rank") is None:
        names.append("num_key_value_heads")
    for name in names:
        n = config.get(name)
        if isinstance(n, int) and n % size:
            raise ValueError(
                f"{n} heads ({name}) cannot be divided among {size} ranks; start as many ranks "
                "as divide them, or try --pipeline"
            )

"""Models with random weights, for measurements and tests.

Run as a script, it writes a model with the tokenizer of a real one, here of two layers::

    python -m mlx_lm_ext.bench.random_model two_layers --config num_hidden_layers=2
"""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any, Dict, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel

from mlx_lm_ext import demo_model
from mlx_lm_ext.arguments import ArgumentParser
from mlx_lm_ext.demo_model import write_tokenizer
from mlx_lm_ext.descriptors import limit_kept

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    max_position_embeddings=4096,
)
LLAMA = dict(COMMON, model_type="llama", num_hidden_layers=2, rms_norm_eps=1e-5)


def make_model(architecture: str, config: Dict[str, Any], seed: int) -> Any:
    """Make a model from the contents of a ``config.json``."""
    # For the servers that this process may start.
    with limit_kept():
        module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(seed)
    return module.Model(module.ModelArgs.from_dict(config))


def save(folder: Path, weights: Dict[str, mx.array], config: Dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))


def write_model(
    folder: Path,
    architecture: str,
    config: Dict[str, Any],
    seed: int = 0,
    special: Sequence[str] = SPECIAL,
    chat_template: str = TEMPLATE,
) -> Path:
    """Write a float32 model and its tokenizer.

    Args:
        folder (Path): A folder that does not exist.
        architecture (str): A module of ``mlx_lm.models``.
        config (Dict[str, Any]): Its ``config.json``. ``vocab_size`` and ``eos_token_id`` are
          added.
        seed (int): Seed of the weights.
        special (Sequence[str]): The tokens that come before those of the 256 bytes.
        chat_template (str): A Jinja template.
    """
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    config = config | dict(
        vocab_size=len(tokens), eos_token_id=tokens.index("<|im_end|>")
    )
    model = make_model(architecture, config, seed)
    # Larger than MLX's default weights, so that the logits differ clearly.
    weights = [
        (k, v * 3 if v.ndim > 1 else v) for k, v in tree_flatten(model.parameters())
    ]
    save(folder, dict(weights), config)
    write_tokenizer(
        folder,
        tokens,
        [],
        special=list(special),
        chat_template=chat_template,
        eos_token="<|im_end|>",
    )
    return folder


def write_like(
    folder: Path, source: Path, changes: Dict[str, Any], dtype: str, seed: int = 0
) -> Path:
    """Write a model with random weights and the tokenizer of the model in ``source``.

    It has no end-of-text token, which could otherwise end an answer at any time.

    Args:
        folder (Path): A folder that does not exist.
        source (Path): The folder of a model.
        changes (Dict[str, Any]): Values to change in its ``config.json``.
        dtype (str): Type of the weights.
        seed (int): Seed of the weights.
    """
    config = json.loads((source / "config.json").read_text()) | changes
    config.pop("eos_token_id", None)
    model = make_model(config["model_type"], config, seed)
    model.set_dtype(getattr(mx, dtype))
    save(folder, dict(tree_flatten(model.parameters())), config)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(("config.", "model")):
            shutil.copy(path, folder)
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("eos_token", None)
    path.write_text(json.dumps(tokenizer))
    return folder


def main() -> None:
    parser = ArgumentParser(description="Write a model with random weights.")
    parser.add_argument(
        "folder", type=Path, help="folder to write to; it must not exist"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="model whose tokenizer and config to use (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--config",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="values to change in the config, as JSON",
    )
    parser.add_argument("--dtype", default="float32", help="type of the weights")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists already")
    changes = {}
    for change in args.config:
        name, _, value = change.partition("=")
        try:
            changes[name] = json.loads(value)
        except ValueError:
            parser.error(
                f"--config must be NAME=VALUE with a JSON value, not {change!r}"
            )
    source = args.like or demo_model.ensure(quantized=False)
    print(write_like(args.folder, source, changes, args.dtype))


if __name__ == "__main__":
    main()

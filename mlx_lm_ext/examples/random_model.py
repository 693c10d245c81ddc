"""Models of random weights, with one token a byte: for measurements and tests."""

import importlib
import json
from pathlib import Path
from typing import Any, Dict, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel

from mlx_lm_ext.demo_model import write_tokenizer

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
        config (Dict[str, Any]): Its ``config.json``, but for the tokens.
        seed (int): Of the weights.
        special (Sequence[str]): The tokens before those of the 256 bytes.
        chat_template (str): A Jinja template.
    """
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    config = config | dict(
        vocab_size=len(tokens), eos_token_id=tokens.index("<|im_end|>")
    )
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    # Larger than the default, so that the likely tokens stand apart.
    weights = [
        (k, v * 3 if v.ndim > 1 else v) for k, v in tree_flatten(model.parameters())
    ]
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(
        folder,
        tokens,
        [],
        special=list(special),
        chat_template=chat_template,
        eos_token="<|im_end|>",
    )
    return folder

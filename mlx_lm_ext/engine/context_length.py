"""How many tokens a model takes, by its configuration."""

from math import isfinite
from typing import Any, Dict, Iterator, Optional

# Where configurations say it. If several do, the smallest counts.
KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "model_max_length",
)
# The models of mlx-lm that look positions up in a table of ``n_positions`` rows. MLX would
# read beyond it.
TABLE_MODELS = ("gpt2", "gpt_bigcode")
# The kinds of RoPE whose factor stretches the length that the keys above give. For others,
# such as llama3 and longrope, that length is stretched already.
STRETCHED = ("linear", "dynamic", "yarn", "deepseek_yarn", "telechat3-yarn")


def find_context_length(
    config: Dict[str, Any], wanted: Optional[int] = None
) -> Optional[int]:
    """The most tokens of prompt and answer together.

    Args:
        config (Dict[str, Any]): The configuration of a model.
        wanted (Optional[int]): ``--context-length``, which takes precedence.

    Returns:
        Optional[int]: None if neither says it.

    Raises:
        ValueError: If ``wanted`` is more than the model has positions for.
    """
    config = config | (config.get("text_config") or {})
    if wanted is not None:
        n_positions = config.get("n_positions")
        is_table = config.get("model_type") in TABLE_MODELS
        if is_table and n_positions is not None and wanted > n_positions:
            raise ValueError(
                f"--context-length may be {n_positions} at most: the model has no more "
                "positions"
            )
        return wanted
    length = min((n for n in map(config.get, KEYS) if is_length(n)), default=None)
    # That of Gemma 3 is stretched already.
    if length is None or str(config.get("model_type")).startswith("gemma3"):
        return length
    return max(length, *(stretched(length, rope) for rope in ropes(config)))


def is_length(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def ropes(config: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The parameters of the RoPE, or those of each kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name) or {}
        yield from (
            p for p in (parameters, *parameters.values()) if isinstance(p, dict)
        )


def stretched(length: int, rope: Dict[str, Any]) -> int:
    """How many tokens a model takes with a RoPE.

    Args:
        length (int): What the configuration says, which is the length before or after.
        rope (Dict[str, Any]): The parameters of the RoPE.
    """
    factor = rope.get("factor")
    kind = rope.get("type") or rope.get("rope_type")
    if (
        kind not in STRETCHED
        or not isinstance(factor, (int, float))
        or not isfinite(factor)
    ):
        return length
    original = rope.get("original_max_position_embeddings")
    return int((original if is_length(original) else length) * factor)

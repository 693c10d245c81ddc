"""How many tokens a model takes and knows, by its configuration."""

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
# Where it stands if none of them is there. In other models this is the size of something else.
LAST_KEY = "block_size"
# The models of mlx-lm that look positions up in a table of ``n_positions`` rows. MLX would
# read beyond it.
TABLE_MODELS = ("gpt2", "gpt_bigcode")
# The kinds of RoPE whose factor stretches the length that the keys above give. For others,
# such as llama3 and longrope, that length is stretched already.
STRETCHED = ("linear", "dynamic", "yarn", "deepseek_yarn", "telechat3-yarn")
# A larger factor is none.
MAX_FACTOR = 1e6


def text_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """The configuration of what takes text, in that of a model that also takes images."""
    part = config.get("text_config")
    if not isinstance(part, dict):
        return config
    return config | {name: part[name] for name in part if part[name] is not None}


def find_vocabulary_size(config: Dict[str, Any]) -> Optional[int]:
    """The rows of the embedding; None if the configuration does not say it."""
    n = text_config(config).get("vocab_size")
    return n if is_length(n) else None


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
    config = text_config(config)
    if wanted is not None:
        n_positions = config.get("n_positions")
        is_table = config.get("model_type") in TABLE_MODELS
        if is_table and is_length(n_positions) and wanted > n_positions:
            raise ValueError(
                f"--context-length may be {n_positions} at most: the model has no more "
                "positions"
            )
        return wanted
    lengths = [n for n in map(config.get, KEYS) if is_length(n)]
    length = min(lengths or filter(is_length, [config.get(LAST_KEY)]), default=None)
    # That of Gemma 3 is stretched already.
    if length is None or str(config.get("model_type")).startswith("gemma3"):
        return length
    return max([length, *(stretched(length, rope) for rope in ropes(config))])


def is_length(value: Any) -> bool:
    return type(value) is int and value > 0


def ropes(config: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The parameters of the RoPE, or those of each kind of layer."""
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name)
        if isinstance(parameters, dict):
            of_layers = (p for p in parameters.values() if isinstance(p, dict))
            yield from (parameters, *of_layers)


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
        or not 0 < factor <= MAX_FACTOR
    ):
        return length
    original = rope.get("original_max_position_embeddings")
    return int((original if is_length(original) else length) * factor)

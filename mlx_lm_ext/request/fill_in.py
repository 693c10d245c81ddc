"""Prompts of models that can fill in the middle: what comes before the answer, and after it."""

from typing import Any, Dict, List, Optional, Tuple, Union

from ..errors import RequestError

# Stand for the prompt and for the suffix.
PROMPT, SUFFIX = "", None
# How models write such prompts, by the names of their tokens.
FORMS: List[Tuple[Optional[str], ...]] = [
    # Qwen, CodeGemma
    ("<|fim_prefix|>", PROMPT, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),
    # StarCoder, Granite; SantaCoder
    ("<fim_prefix>", PROMPT, "<fim_suffix>", SUFFIX, "<fim_middle>"),
    ("<fim-prefix>", PROMPT, "<fim-suffix>", SUFFIX, "<fim-middle>"),
    # CodeLlama
    ("▁<PRE>", PROMPT, "▁<SUF>", SUFFIX, "▁<MID>"),
    ("<PRE>", PROMPT, "<SUF>", SUFFIX, "<MID>"),
    # DeepSeek
    ("<｜fim▁begin｜>", PROMPT, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),
    # GLM
    ("<|code_prefix|>", PROMPT, "<|code_suffix|>", SUFFIX, "<|code_middle|>"),
    # Codestral
    ("[SUFFIX]", SUFFIX, "[PREFIX]", PROMPT),
]


def find_form(vocabulary: Dict[str, int]) -> Optional[Tuple[Optional[str], ...]]:
    """The form of a model with these tokens; None if it cannot fill in the middle."""
    for form in FORMS:
        if all(name in vocabulary for name in form if name):
            return form
    return None


def fill_in(
    prompt: Union[str, List[int]],
    suffix: str,
    form: Optional[Tuple[Optional[str], ...]],
    tokenizer: Any,
) -> List[int]:
    """Make the prompt of an answer between a prompt and a suffix.

    Args:
        prompt (Union[str, List[int]]): A text, or token ids.
        suffix (str): What comes after the answer.
        form (Optional[Tuple]): That of the model, which ``find_form`` has given.
        tokenizer (Any): The model's tokenizer.

    Raises:
        RequestError: If the model cannot fill in the middle, or a text does not fit.
    """
    if form is None:
        message = "suffix must be empty: the model has no tokens to fill in the middle"
        raise RequestError(400, message, "suffix", "unsupported_value")
    bos = [tokenizer.bos_token_id]
    if isinstance(prompt, str):
        has_bos = tokenizer.encode("")[:1] == bos
        before: List[int] = tokenizer.encode(prompt, add_special_tokens=False)
    else:
        has_bos, before = prompt[:1] == bos, prompt
    # A text may begin with this token, too.
    before = before[1:] if before[:1] == bos else before
    ids: List[int] = bos if has_bos else []
    for part in form:
        if part == PROMPT:
            ids = ids + before
        elif part == SUFFIX:
            ids = ids + tokenizer.encode(suffix, add_special_tokens=False)
        else:
            ids = ids + [tokenizer.convert_tokens_to_ids(part)]
    return ids

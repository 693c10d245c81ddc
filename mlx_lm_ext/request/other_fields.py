"""Fields of OpenAI's API and of other servers that this server does not have.

Rules:
1. What would change the answer is refused by name, unless the value asks for what is done
   without the field.
2. What is only a hint, or says what is so in any case, has no effect.
3. A field of another name for one that is there is refused, and the error names the right one.
"""

from typing import Any, Dict, Tuple

from ..errors import RequestError

# The values that ask for what is done without the field, and what to send instead of others.
REFUSED: Dict[str, Tuple[Tuple[Any, ...], str]] = {
    # Of OpenAI's API.
    "web_search_options": ((), ""),
    # Of vLLM.
    "allowed_token_ids": (([],), "use logit_bias"),
    "bad_words": (([],), ""),
    "early_stopping": ((False,), ""),
    "guided_whitespace_pattern": ((), ""),
    "length_penalty": ((1,), ""),
    "prompt_logprobs": ((), "use echo with logprobs"),
    "return_token_ids": ((False,), ""),
    "return_tokens_as_token_ids": ((False,), ""),
    "truncate_prompt_tokens": ((), ""),
    "use_beam_search": ((False,), ""),
    # Of SGLang, TGI, llama.cpp and others.
    "dry_multiplier": ((0,), ""),
    "dynatemp_range": ((0,), ""),
    "epsilon_cutoff": ((0,), ""),
    "eta_cutoff": ((0,), ""),
    "max_new_tokens": ((), "use max_tokens"),
    "min_new_tokens": ((0,), "use min_tokens"),
    "mirostat": ((0,), ""),
    "mirostat_mode": ((0,), ""),
    "n_predict": ((), "use max_tokens"),
    "n_probs": ((0,), "use logprobs"),
    "no_repeat_ngram_size": ((0,), ""),
    "no_stop_trim": ((False,), "use include_stop_str_in_output"),
    "num_beams": ((1,), ""),
    "num_predict": ((), "use max_tokens"),
    "repeat_penalty": ((0, 1), "use repetition_penalty"),
    "repetition_penalty_range": ((), "use repetition_context_size"),
    "repetition_range": ((), "use repetition_context_size"),
    "smoothing_factor": ((0,), ""),
    "stop_regex": (("", []), ""),
    "tfs": ((1,), ""),
    "tfs_z": ((1,), ""),
    "top_a": ((0,), ""),
    "top_n_sigma": ((-1, 0), ""),
    "typical": ((1,), ""),
    "typical_p": ((1,), ""),
}

# Fields of text completions only, and of chats only.
TEXT_ONLY = ("echo", "suffix")
CHAT_ONLY = ("messages", "tools")


def is_same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal. In Python, true is also equal to 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def check_other_fields(body: Dict[str, Any]) -> None:
    """Refuse the fields of ``REFUSED`` unless they ask for what is done without them.

    Raises:
        RequestError: A 400 that names the field.
    """
    for name, (values, instead) in REFUSED.items():
        if name in body and not any(is_same(body[name], value) for value in values):
            raise unsupported(name, instead)


def check_endpoint(body: Dict[str, Any], is_chat: bool) -> None:
    """Refuse fields that only requests to the other endpoint may have. Empty ones of a chat
    are dropped in place: what has ``messages`` is taken for a chat.

    Raises:
        RequestError: A 400 that names the field.
    """
    for name in TEXT_ONLY:
        if is_chat and body.get(name):
            raise unsupported(name, "only text completions have it")
    for name in CHAT_ONLY:
        if not is_chat and body.pop(name, None):
            raise unsupported(name, "only chats have it")
    if body.get("add_special_tokens", not is_chat) == is_chat:
        right = "false for a chat" if is_chat else "true for a text completion"
        raise unsupported("add_special_tokens", f"it is {right}", "this value of ")


def unsupported(name: str, right: str, what: str = "") -> RequestError:
    """The error for a field that is not supported.

    Args:
        name (str): The field.
        right (str): What is right instead, if anything is.
        what (str): What of it is not supported.
    """
    message = f"{what}{name} is not supported" + (f"; {right}" if right else "")
    return RequestError(400, message, name, "unsupported_value")

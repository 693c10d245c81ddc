"""The format of the answers of gpt-oss, which mlx-lm does not know: channels for the reasoning,
for calls and for the answer itself.

Rule: where mlx-lm knows the format of a model, nothing here is used.
"""

from typing import Any, Dict, List

from .presented import Presented
from .tool_formats import HEADED, Calls

ANALYSIS = "<|channel|>analysis<|message|>"
CALL = " to=functions."
ANSWERS = [
    ("<|channel|>final<|message|>", "normal"),
    ("<|channel|>commentary<|message|>", "normal"),
    ("<|start|>assistant", "normal"),
    ("<|end|>", "normal"),
]
CALLS = [
    (f"<|channel|>{channel}{CALL}", "tool") for channel in ("commentary", "analysis")
]


class Harmony(Presented):
    """The tokenizer of gpt-oss as one that knows the format."""

    has_tool_calling = True
    # A call ends with the answer.
    tool_call_start, tool_call_end = CALL, ""
    response_transitions = {
        "normal": [(ANALYSIS, "reasoning"), (CALL, "tool"), *ANSWERS, *CALLS],
        "reasoning": [*ANSWERS, *CALLS],
    }

    @staticmethod
    def tool_parser(text: str, tools: List[Dict[str, Any]]) -> Calls:
        return HEADED["harmony"].read(text)


def with_channels(tokenizer: Any) -> Any:
    """The tokenizer, presented as ``Harmony`` if it is that of a model with channels."""
    if (
        tokenizer.has_thinking
        or tokenizer.response_transitions
        or ANALYSIS not in str(getattr(tokenizer, "chat_template", None))
    ):
        return tokenizer
    return Harmony(tokenizer)

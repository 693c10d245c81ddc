"""The calls of a model whose format of calls is not known, if a request forces it to make some: a
JSON array of objects with ``name`` and ``arguments``, and nothing else.

Rule: an answer that is something else stays text.
"""

from typing import Any, Dict, List, Tuple

from .presented import Presented
from .tool_formats import read_json


class BareCalls(Presented):
    """The tokenizer of such a model as one that begins its calls with a bracket."""

    tool_call_start, tool_call_end = "[", ""

    @property
    def response_transitions(self) -> Dict[str, List[Tuple[str, str]]]:
        # Not ``has_tool_calling``, with which calls could begin within the reasoning.
        edges = self.tokenizer.response_transitions
        normal = [*edges.get("normal", []), (self.tool_call_start, "tool")]
        return {**edges, "normal": normal, "tool": []}

    @staticmethod
    def tool_parser(text: str, tools: List[Dict[str, Any]]) -> List[Any]:
        return read_json(BareCalls.tool_call_start + text)

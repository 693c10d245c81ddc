"""From token ids to what a client reads: text, reasoning and tool calls.

Rules:
1. Runs on a handler thread, and takes all tokens that have piled up at once.
2. Streamed or not, the pieces add up to the same text.
3. Stop words are found in the text, however they were tokenised.
4. Tools are called only by answers to requests that have some: to others a call is text.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import ToolCallFormatter

from ..request.request import Request, Token
from .stop_words import StopWords

# Bounds for what upstream's tool parsers get: some take a time that grows with the
# characters times the marks in them, and cannot be interrupted.
MAX_TOOL_TEXT = 1 << 16
MAX_TOOL_MARKS = 64
TOOL_MARK = re.compile(r"call:|<\|open\|>|<\w*arg_key>|<atem:|<escape>")

# What OpenAI's API gives for tokens that are ruled out.
LEAST_LOGPROB = -9999.0


@dataclass
class Delta:
    """What some tokens add to an answer.

    Args:
        text (str): The answer itself.
        reasoning (str): What a reasoning model thinks before it answers.
        tool_calls (List[Dict]): Whole tool calls in OpenAI's shape.
        tokens (List[Token]): The tokens it was made from.
        finish_reason (Optional[str]): Set on the last one.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: List[Dict[str, Any]] = field(default_factory=list)
    tokens: List[Token] = field(default_factory=list)
    finish_reason: Optional[str] = None


class WithoutTools:
    """A tokenizer as one of a model that calls no tools."""

    has_tool_calling = False

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    @property
    def response_transitions(self) -> Dict[str, List[Tuple[str, str]]]:
        return {
            state: [(text, after) for text, after in edges if after != "tool"]
            for state, edges in self.tokenizer.response_transitions.items()
        }


class Delivery:
    """The text of one answer, made as its tokens arrive.

    Args:
        request (Request): The request, of which a token has arrived.
        stream (bool): Number the tool calls, as streams do.
    """

    def __init__(self, request: Request, stream: bool):
        tokenizer = request.model.tokenizer
        self.detokenizer = tokenizer.detokenizer
        self.format_tool_calls = ToolCallFormatter(
            tokenizer.tool_parser, request.completion.tools, stream
        )
        if not request.completion.tools:
            tokenizer = WithoutTools(tokenizer)
        # A text completion is all text.
        is_chat = request.completion.request_type == "chat"
        machine = make_text_state_machine(tokenizer) if is_chat else TextStateMachine()
        self.state = machine.make_state(request.initial_state)
        self.stop_words = StopWords(request.args.stop_words)
        self.tool_text = ""
        self.made_tool_call = False
        self.takes_one_call = request.body.get("parallel_tool_calls") is False

    def feed(self, tokens: List[Token]) -> Delta:
        """Turn the next tokens into text.

        Args:
            tokens (List[Token]): At least one. With the last one of the answer comes
              what was held back.

        Returns:
            What they add. A stop word ends the answer and drops the tokens after it, and
            so does a tool call if only one is wanted.
        """
        delta = Delta()
        # One by one, so that what ends the answer does so at the same token however many
        # have piled up.
        may_end = self.stop_words.words or self.takes_one_call
        groups = [[t] for t in tokens] if may_end else [tokens]
        for group in groups:
            delta.tokens += group
            delta.finish_reason = group[-1].finish_reason
            for token in group:
                # The token that stops the answer is not part of it.
                if token.finish_reason != "stop":
                    self.detokenizer.add_token(token.id)
            if delta.finish_reason is not None:
                self.detokenizer.finalize()
            self.split(self.detokenizer.last_segment, delta)
            if delta.finish_reason is not None:
                break
        if delta.finish_reason == "stop" and self.made_tool_call:
            delta.finish_reason = "tool_calls"
        return delta

    def split(self, text: str, delta: Delta) -> None:
        """Sort text into answer, reasoning and tool calls."""
        last = delta.finish_reason is not None
        self.state, segments = TextStateMachine.split(self.state, text)
        if last:
            self.state, rest, name = TextStateMachine.flush(self.state)
            segments.append((name, rest))
        for name, piece in segments:
            if name == "tool":
                self.tool_text += piece
                continue
            self.end_tool_call(delta)
            if name == "reasoning":
                delta.reasoning += piece
            elif name == "normal":
                self.add_text(piece, delta)
        if last:
            self.end_tool_call(delta)
            delta.text += self.stop_words.flush()

    def add_text(self, text: str, delta: Delta) -> None:
        """Add to the answer, up to the first stop word."""
        # What follows the stop word is not part of the answer.
        if not self.stop_words.found:
            delta.text += self.stop_words.split(text)
            if self.stop_words.found:
                delta.finish_reason = "stop"

    def end_tool_call(self, delta: Delta) -> None:
        """Parse the tool text, if there is any. What is no call stays text."""
        text, self.tool_text = self.tool_text, ""
        if not text or (self.takes_one_call and self.made_tool_call):
            return
        try:
            check_tool_text(text)
            calls = self.format_tool_calls([text])
        except Exception as e:
            # Upstream's parsers raise more than the ValueError that it expects.
            logging.warning(f"A tool call cannot be parsed: {type(e).__name__}: {e}")
            calls = []
        if calls:
            self.made_tool_call = True
            if self.takes_one_call:
                calls, delta.finish_reason = calls[:1], "stop"
                delta.text += self.stop_words.flush()
                # Nothing that follows is part of the answer.
                self.stop_words.found = True
            delta.tool_calls += calls
        else:
            self.add_text(text, delta)


def check_tool_text(text: str) -> None:
    """Raise a ``ValueError`` for a text that is too much for a tool parser."""
    n_marks = len(TOOL_MARK.findall(text))
    if "<atem:" in text:
        n_marks += text.count('name="')
    if len(text) > MAX_TOOL_TEXT or n_marks > MAX_TOOL_MARKS:
        raise ValueError(f"it has {len(text)} characters and {n_marks} marks")


def in_json(logprob: float) -> float:
    """The log probability, and ``LEAST_LOGPROB`` for -inf and NaN, which JSON lacks."""
    # In this order: of NaN as the second argument, ``max`` gives the first.
    return max(LEAST_LOGPROB, logprob)


def chat_logprobs(tokens: List[Token], decode: Callable) -> Dict[str, Any]:
    """OpenAI's ``logprobs`` of a chat choice."""

    def entry(token_id, logprob):
        text = decode([token_id])
        # Part of a character has no text, and its bytes are lost in decoding.
        raw = None if "\ufffd" in text else list(text.encode())
        return {
            "id": token_id,
            "token": text,
            "bytes": raw,
            "logprob": in_json(logprob),
        }

    return {
        "content": [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(*top) for top in t.top]}
            for t in tokens
        ]
    }


def text_logprobs(tokens: List[Token], decode: Callable) -> Dict[str, Any]:
    """OpenAI's ``logprobs`` of a text completion choice."""
    return {
        "tokens": [decode([t.id]) for t in tokens],
        "token_logprobs": [in_json(t.logprob) for t in tokens],
        "top_logprobs": [{decode([i]): in_json(p) for i, p in t.top} for t in tokens],
    }

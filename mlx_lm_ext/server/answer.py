"""From token ids to what a client reads: text, reasoning and tool calls.

Rules:
1. Runs on a handler thread, and takes all tokens that have piled up at once.
2. Streamed or not, the deltas add up to the same answer.
3. Stop words are found in the text, however it was tokenized.
4. Only an answer to a request with tools has tool calls. Otherwise a call stays text.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from ..request.detokenizing import Detokenizer
from ..request.request import Request, Token
from .harmony import with_channels
from .logprobs import ChosenToken, ChosenTokens
from .presented import Presented
from .stop_words import StopWords
from .tool_calls import ToolCallParser
from .tool_formats import Unfinished

logger = logging.getLogger(__name__)

# How often the mark of the end of a tool call may stand in the values of one.
MAX_ENDS_IN_VALUE = 16


@dataclass
class Delta:
    """What some tokens add to an answer.

    Args:
        text (str): Text of the answer itself.
        reasoning (str): Text of the reasoning before the answer.
        tool_calls (List[Dict]): Complete tool calls in OpenAI's shape.
        tokens (List[Token]): The tokens that it was made from.
        logprobs (List[ChosenToken]): The tokens of its text, if the request asked for log
          probabilities.
        finish_reason (Optional[str]): "stop", "length" or "tool_calls" in the last delta
          of an answer.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: List[Dict[str, Any]] = field(default_factory=list)
    tokens: List[Token] = field(default_factory=list)
    logprobs: List[ChosenToken] = field(default_factory=list)
    finish_reason: Optional[str] = None

    def chunks(self) -> Iterator["Delta"]:
        """The chunks of a stream that it makes. The finish reason has one of its own: some
        clients read nothing else of a chunk that has one."""
        is_last = self.finish_reason is not None
        if self.text or self.reasoning or self.tool_calls or self.logprobs:
            yield replace(self, finish_reason=None) if is_last else self
        if is_last:
            yield Delta(finish_reason=self.finish_reason)


class WithoutTools(Presented):
    """A tokenizer as that of a model that cannot call tools."""

    has_tool_calling = False

    @property
    def response_transitions(self) -> Dict[str, List[Tuple[str, str]]]:
        return {
            state: [(text, after) for text, after in edges if after != "tool"]
            for state, edges in self.tokenizer.response_transitions.items()
        }


class OpenCalls(Presented):
    """A tokenizer as that of a model whose tool calls have no end."""

    tool_call_end = ""


def marks_of(tokenizer: Any) -> List[str]:
    """The texts that tell reasoning and answer apart."""
    marks = [tokenizer.think_start, tokenizer.think_end]
    for edges in tokenizer.response_transitions.values():
        marks += [text for text, _ in edges]
    return [mark for mark in marks if mark]


class AnswerParser:
    """Makes text, reasoning and tool calls from the tokens of one answer as they arrive.

    Args:
        request (Request): The request. Its ``initial_state`` must be final, which it is
          once a token has arrived.
        stream (bool): Whether tool calls get an index, which streams need.
    """

    def __init__(self, request: Request, stream: bool):
        tokenizer = with_channels(request.model.tokenizer)
        self.detokenizer = Detokenizer(request.model.decoder)
        self.chosen: Optional[ChosenTokens] = None
        if request.args.logprobs:
            self.chosen = ChosenTokens(request.model.token_bytes)
        # Characters of all text, and where a stop word has cut it.
        self.n_characters, self.cut = 0, None
        self.tool_calls = ToolCallParser(
            tokenizer.tool_parser, request.completion.tools, stream
        )
        self.tokenizer = tokenizer
        # Only the text of a call tells its end from the same mark within a value.
        has_tools = bool(request.completion.tools)
        tokenizer = OpenCalls(tokenizer) if has_tools else WithoutTools(tokenizer)
        # A text completion has neither reasoning nor tool calls.
        is_chat = request.completion.request_type == "chat"
        self.machine = (
            make_text_state_machine(tokenizer) if is_chat else TextStateMachine()
        )
        self.state = self.machine.make_state(request.initial_state)
        includes = bool(request.body.get("include_stop_str_in_output"))
        self.stop_words = StopWords(request.args.stop_words, includes)
        # Tokens so far, and after how many of them a stop word counts.
        self.n_tokens, self.min_tokens = 0, request.body.get("min_tokens", 0)
        self.skipped: Set[int] = set()
        # The text of a tool call is made of special tokens, too.
        if request.body.get("skip_special_tokens") and not has_tools:
            marks = marks_of(tokenizer) if is_chat else []
            self.skipped = {
                token
                for token, text in request.model.special_tokens.items()
                if not any(text in mark for mark in marks)
            }
        # The text of a tool call, how much of it was searched for the mark of the end, where
        # this mark turned out to be part of a value, and the state around the call.
        self.tool_text, self.n_searched = "", 0
        self.ends_in_value: List[int] = []
        self.around = "normal"
        # Characters after those that are being added.
        self.n_rest = 0
        self.made_tool_call = False
        self.takes_one_call = request.body.get("parallel_tool_calls") is False

    def echo(self, request: Request) -> Delta:
        """The prompt of a text completion, as the first part of the answer."""
        prompt, ids = request.completion.prompt, request.prompt
        is_text = isinstance(prompt, str)
        if is_text:
            text = prompt
            self.detokenizer.skip(ids)
        else:
            # One after the other, because many at once are given out as they are.
            text = "".join(self.detokenizer.add([i]) for i in ids)
        self.n_characters = len(text)
        delta = Delta(text=text)
        if request.prompt_logprobs:
            bos = self.tokenizer.bos_token or ""
            self.chosen.add_prompt(
                request.prompt_logprobs, text if is_text else None, bos
            )
            delta.logprobs = self.chosen.take(self.n_characters)
        return delta

    def feed(self, tokens: List[Token]) -> Delta:
        """Parse the next tokens.

        Args:
            tokens (List[Token]): At least one.

        Returns:
            What they add to the answer. If its ``finish_reason`` is set, the answer has
            ended: at its last token, at a stop word, or at a tool call if only one is
            wanted. The tokens after that are dropped.
        """
        delta = Delta()
        # If a text may end the answer, one by one: the count of tokens must not depend on
        # how many have arrived together.
        may_end = self.stop_words.words or self.takes_one_call
        groups = [[t] for t in tokens] if may_end else [tokens]
        for group in groups:
            delta.finish_reason = group[-1].finish_reason
            group = [t for t in group if t.id >= 0]
            delta.tokens += group
            self.n_tokens += len(group)
            # An end-of-text token has no text.
            said = [t for t in group if t.finish_reason != "stop"]
            said = [t for t in said if t.id not in self.skipped]
            text = self.detokenizer.add([t.id for t in said])
            if delta.finish_reason is not None:
                text += self.detokenizer.end()
            self.n_characters += len(text)
            self.split(text, delta)
            if self.chosen is not None:
                self.chosen.add(said)
                delta.logprobs += self.take_chosen(delta.finish_reason is not None)
            if delta.finish_reason is not None:
                break
        if delta.finish_reason == "stop" and self.made_tool_call:
            delta.finish_reason = "tool_calls"
        return delta

    def split(self, text: str, delta: Delta) -> None:
        """Split text into answer, reasoning and tool calls, and add them to ``delta``."""
        is_last = delta.finish_reason is not None
        rest: Optional[str] = text
        while rest is not None:
            *_, held = self.state
            self.n_rest = len(held) + len(rest)
            self.state, (*segments, (name, last)) = TextStateMachine.split(
                self.state, rest
            )
            for before, piece in segments:
                self.n_rest -= len(piece)
                self.add(before, piece, delta)
            *_, held = self.state
            self.n_rest = len(held)
            self.add(name, last, delta)
            rest = self.end_tool_call(delta)
            if rest is None and is_last:
                self.n_rest = 0
                self.state, held, name = TextStateMachine.flush(self.state)
                self.add(name, held, delta)
                rest = self.end_last_tool_call(delta)
        if is_last:
            delta.text += self.stop_words.flush()

    def add(self, name: str, text: str, delta: Delta) -> None:
        """Add the text of a state."""
        if name == "reasoning":
            delta.reasoning += text
        elif name == "tool":
            self.tool_text += text
        elif name == "normal":
            self.add_text(text, delta)
        if name in ("reasoning", "normal"):
            self.around = name

    def add_text(self, text: str, delta: Delta) -> None:
        """Add text to the answer, up to the first stop word."""
        if not self.stop_words.found:
            n = len(self.stop_words.held) + len(text)
            counts = self.n_tokens > self.min_tokens
            settled = self.stop_words.split(text, counts)
            delta.text += settled
            if self.stop_words.found:
                delta.finish_reason = "stop"
                self.cut = self.n_characters - self.n_rest - (n - len(settled))

    def take_chosen(self, last: bool) -> List[ChosenToken]:
        """The tokens of the text that was given out."""
        if last:
            return self.chosen.end(self.cut)
        name, *_, held = self.state
        n = len(held) + len(self.stop_words.held)
        if name == "tool":
            # It may yet turn out to be text.
            n += len(self.tokenizer.tool_call_start) + len(self.tool_text)
        return self.chosen.take(self.n_characters - n)

    def end_tool_call(self, delta: Delta) -> Optional[str]:
        """Add the tool call whose end has come, if it has; gives the text after it."""
        end = self.tokenizer.tool_call_end
        if self.state[0] != "tool" or not end:
            return None
        while (at := self.tool_text.find(end, self.n_searched)) >= 0:
            self.n_searched = at + len(end)
            try:
                calls = self.parse_tool_call(self.tool_text[:at])
            except Unfinished:
                if len(self.ends_in_value) < MAX_ENDS_IN_VALUE:
                    self.ends_in_value.append(at)
                    continue
                calls = []
            return self.leave_tool_call(calls, at, delta)
        self.n_searched = max(self.n_searched, len(self.tool_text) - len(end) + 1)
        return None

    def end_last_tool_call(self, delta: Delta) -> Optional[str]:
        """Add the tool call that ends with the answer or was cut off, if there is one; gives
        the text after it."""
        if self.state[0] != "tool":
            return None
        is_cut = delta.finish_reason == "length"
        try:
            calls = self.parse_tool_call(self.tool_text, is_cut)
        except Unfinished:
            calls = []
        return self.leave_tool_call(calls, len(self.tool_text), delta)

    def parse_tool_call(self, text: str, is_cut: bool = False) -> List[Dict[str, Any]]:
        """The tool calls of a text; none if it cannot be parsed.

        Raises:
            Unfinished: If it ends within a value.
        """
        try:
            return self.tool_calls.parse(text, is_cut) if text else []
        except Unfinished:
            raise
        except Exception as e:
            # Upstream's parsers raise other errors than the ValueError that they should.
            logger.warning(f"A tool call cannot be parsed: {type(e).__name__}: {e}")
            return []

    def leave_tool_call(
        self, calls: List[Dict[str, Any]], at: int, delta: Delta
    ) -> Optional[str]:
        """Go on after a tool call.

        Args:
            calls (List[Dict]): The calls; without any, the text stays text, marks included.
            at (int): Where its text has ended.
            delta (Delta): What is added to.

        Returns:
            The text after it; None if the answer has ended.
        """
        end = self.tokenizer.tool_call_end or ""
        if not calls and self.ends_in_value:
            # It was broken, and has ended there.
            at = self.ends_in_value[0]
        text, rest = self.tool_text[:at], self.tool_text[at + len(end) :]
        if at < len(self.tool_text):
            text += end
        self.tool_text, self.n_searched, self.ends_in_value = "", 0, []
        self.state = self.machine.make_state(self.around)
        if self.takes_one_call and self.made_tool_call:
            return rest
        if not calls:
            self.n_rest = len(rest)
            self.add(self.around, self.tokenizer.tool_call_start + text, delta)
            return rest
        self.made_tool_call = True
        if self.takes_one_call:
            calls, delta.finish_reason = calls[:1], "stop"
            delta.text += self.stop_words.flush()
            # As after a stop word: no more text is added.
            self.stop_words.found = True
        delta.tool_calls += calls
        return None if self.takes_one_call else rest

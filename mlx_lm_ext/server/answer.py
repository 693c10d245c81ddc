"""From token ids to what a client reads: text, reasoning and tool calls.

Rules:
1. Runs on a handler thread, and takes all tokens that have piled up at once.
2. Streamed or not, the deltas add up to the same answer.
3. Stop words are found in the text, however it was tokenized.
4. Only an answer to a request with tools has tool calls. Otherwise a call stays text.
5. An answer with a format is text from its first character on: a value may have any mark in it.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from ..request.detokenizing import Detokenizer
from ..request.fields import ToolChoice, parse_answer_format, parse_tool_choice
from ..request.request import Request, Token
from .bare_calls import BareCalls
from .harmony import with_channels
from .logprobs import ChosenToken, ChosenTokens
from .presented import Presented
from .stop_words import StopWords
from .streamed_calls import CallSection
from .tool_calls import ToolCallParser


@dataclass
class Delta:
    """What some tokens add to an answer.

    Args:
        text (str): Text of the answer itself.
        reasoning (str): Text of the reasoning before the answer.
        tool_calls (List[Dict]): Parts of tool calls, as OpenAI's streams have them: the first
          of a call has an empty text of arguments, and those that follow have pieces of it.
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
        chunks = [Delta(tool_calls=[part]) for part in self.tool_calls]
        if self.text or self.reasoning or (self.logprobs and not chunks):
            chunks.insert(0, Delta(self.text, self.reasoning))
        if chunks:
            chunks[0].logprobs = self.logprobs
        yield from chunks
        if self.finish_reason is not None:
            yield Delta(finish_reason=self.finish_reason)

    def add(self, following: "Delta") -> None:
        """Join what follows; the parts of each tool call become one without an index."""
        self.text += following.text
        self.reasoning += following.reasoning
        self.logprobs += following.logprobs
        self.tokens += following.tokens
        self.finish_reason = following.finish_reason
        for part in following.tool_calls:
            if "id" in part:
                call = {key: part[key] for key in ("id", "type", "function")}
                self.tool_calls.append(call | {"function": dict(part["function"])})
            else:
                function = self.tool_calls[-1]["function"]
                function["arguments"] += part["function"]["arguments"]


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


def begins_answer(segment: Tuple[str, str]) -> bool:
    """Whether the text of a state is that of the answer itself. Blanks may be before calls."""
    name, text = segment
    return name == "normal" and bool(text.strip())


class AnswerParser:
    """Makes text, reasoning and tool calls from the tokens of one answer as they arrive.

    Args:
        request (Request): The request. Its ``initial_state`` must be final, which it is
          once a token has arrived.
    """

    def __init__(self, request: Request):
        tokenizer = with_channels(request.model.tokenizer)
        has_tools = bool(request.completion.tools)
        choice = parse_tool_choice(request.body) if has_tools else ToolChoice("none")
        if choice.mode == "required" and not tokenizer.has_tool_calling:
            tokenizer = BareCalls(tokenizer)
        # As OpenAI has it: the reason is no news to who has named the function.
        self.says_calls = not choice.is_named
        self.detokenizer = Detokenizer(request.model.decoder)
        self.chosen: Optional[ChosenTokens] = None
        if request.args.logprobs:
            self.chosen = ChosenTokens(request.model.token_bytes)
        # Characters of all text, and where a stop word has cut it.
        self.n_characters, self.cut = 0, None
        self.tool_calls = ToolCallParser(
            tokenizer.tool_parser, request.completion.tools
        )
        self.tokenizer = tokenizer
        # Only the text of a call tells its end from the same mark within a value.
        tokenizer = OpenCalls(tokenizer) if has_tools else WithoutTools(tokenizer)
        # A text completion has neither reasoning nor tool calls.
        is_chat = request.completion.request_type == "chat"
        self.machine = (
            make_text_state_machine(tokenizer) if is_chat else TextStateMachine()
        )
        self.state = self.machine.make_state(request.initial_state)
        # Whether an answer with a format has not begun.
        self.awaits_format = is_chat and parse_answer_format(request.body) is not None
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
        self.takes_one_call = request.body.get("parallel_tool_calls") is False
        # The next tool calls, and the state around them.
        self.section = self.make_section()
        self.around = "normal"
        # Characters after those that are being added.
        self.n_rest = 0

    def make_section(self) -> CallSection:
        start, end = self.tokenizer.tool_call_start, self.tokenizer.tool_call_end
        one = self.takes_one_call
        return CallSection(self.tool_calls, start or "", end or "", one)

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
        is_call = self.tool_calls.n_calls and self.says_calls
        if delta.finish_reason == "stop" and is_call:
            delta.finish_reason = "tool_calls"
        return delta

    def split(self, text: str, delta: Delta) -> None:
        """Split text into answer, reasoning and tool calls, and add them to ``delta``."""
        is_last = delta.finish_reason is not None
        rest: Optional[str] = text
        while rest is not None:
            *_, held = self.state
            self.n_rest = len(held) + len(rest)
            (*segments, (name, last)), following = self.split_state(rest)
            for before, piece in segments:
                self.n_rest -= len(piece)
                self.add(before, piece, delta)
            *_, held = self.state
            self.n_rest = len(held) + len(following)
            self.add(name, last, delta)
            rest = following or self.end_tool_calls(delta, None)
            if rest is None and is_last:
                self.n_rest = 0
                self.state, held, name = TextStateMachine.flush(self.state)
                self.add(name, held, delta)
                rest = self.end_tool_calls(delta, delta.finish_reason)
        if is_last:
            delta.text += self.stop_words.flush()

    def split_state(self, text: str) -> Tuple[List[Tuple[str, str]], str]:
        """Split text at the marks in it, up to where an answer with a format has begun.

        Returns:
            The states that were passed with their texts, and the text after them.
        """
        start = self.state
        self.state, segments = TextStateMachine.split(start, text)
        if not (self.awaits_format and any(map(begins_answer, segments))):
            return segments, ""
        self.awaits_format = False
        passed, n = [], 0
        while not (passed and begins_answer(passed[-1])):
            start, found = TextStateMachine.split(start, text[n])
            passed += found
            n += 1
        *_, held = start
        self.state = TextStateMachine().make_state()
        return passed, held + text[n:]

    def add(self, name: str, text: str, delta: Delta) -> None:
        """Add the text of a state."""
        if name == "reasoning":
            delta.reasoning += text
        elif name == "tool":
            self.section.text += text
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
            n += self.section.n_waiting
        return self.chosen.take(self.n_characters - n)

    def end_tool_calls(self, delta: Delta, reason: Optional[str]) -> Optional[str]:
        """Add what the text of tool calls gives.

        Args:
            delta (Delta): What is added to.
            reason (Optional[str]): The finish reason, if no more text comes.

        Returns:
            The text after the calls; None if they, or the answer, have not ended.
        """
        if self.state[0] != "tool":
            return None
        ended = self.section.read(delta.tool_calls, reason)
        if ended is None:
            return None
        self.section = self.make_section()
        self.state = self.machine.make_state(self.around)
        if self.takes_one_call and self.tool_calls.n_calls:
            delta.finish_reason = reason or "stop"
            delta.text += self.stop_words.flush()
            # As after a stop word: no more text is added.
            self.stop_words.found = True
            return None
        if ended.text:
            self.n_rest = ended.n_after
            self.add(self.around, ended.text, delta)
        return ended.rest

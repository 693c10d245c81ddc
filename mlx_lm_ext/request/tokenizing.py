"""Tokenizes prompts, and refuses those that cannot fit before they take time and memory.

Rules:
1. A text that can never fit into the model's context is refused before it is tokenized.
2. A chat template is ended as soon as it has written more than that.
3. The exact number of tokens is compared with the context in ``Request.fit_to_context``.
4. A prompt begins with one beginning-of-text token at most.
"""

import re
from contextvars import ContextVar
from os.path import commonprefix
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Set, Union

from jinja2 import TemplateSyntaxError

from ..errors import RequestError, too_long
from .history import Message
from .preparation import Preparation
from .template_shape import TOOLS, TemplateShape, tool_forms
from .upstream import compile_chat_template, writes_text

# Characters of a prompt to a model whose context has no limit.
MAX_CHARACTERS = 1 << 26
# A text with more characters than this for each token of the context is first tokenized
# in slices.
USUAL_CHARACTERS = 4
# Characters of a slice, and how many tokens the cuts at its two ends may add.
SLICE, CUT = 1 << 16, 16

# What Python says of an argument that a function does not have.
UNKNOWN = re.compile("unexpected keyword argument '(\\w+)'")

# Stands for what follows a content.
MARK = "probemark"

# The tokenizer for which this thread runs a chat template.
current: ContextVar[Optional["BoundedTokenizer"]] = ContextVar("current", default=None)


def join_bounded(pieces: Iterable[str]) -> str:
    """Join the pieces that a template writes, in place of ``"".join`` in Jinja.

    Raises:
        RequestError: If they have more characters than the prompt may have.
    """
    tokenizer = current.get()
    if tokenizer is None:
        return "".join(pieces)
    kept, n = [], 0
    for piece in pieces:
        kept.append(piece)
        n += len(piece)
        tokenizer.check_characters(n)
    return "".join(kept)


def bound_chat_templates(tokenizer: Any) -> Optional[str]:
    """Let the chat templates of a tokenizer join their pieces with ``join_bounded``.

    Transformers keeps one compiled template for each text, so this also affects other
    tokenizers with the same template.

    Returns:
        What is wrong with one of them, if anything is.
    """
    wrong = None
    templates = tokenizer.chat_template
    templates = templates.values() if isinstance(templates, dict) else [templates]
    for template in templates:
        if isinstance(template, str):
            try:
                compile_chat_template(template).environment.concat = join_bounded
            except TemplateSyntaxError as e:
                wrong = wrong or explain(e)
        elif template is not None:
            wrong = wrong or "the chat template is not a text"
    return wrong


def explain(error: TemplateSyntaxError) -> str:
    """What is wrong with a chat template."""
    return f"the chat template is wrong in line {error.lineno}: {error.message}"


def most_characters(tokenizer: Any, context_length: Optional[int]) -> int:
    """The most characters that a prompt can have and still fit into the context: those of
    a prompt that repeats the longest token."""
    if context_length is None:
        return MAX_CHARACTERS
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return min(MAX_CHARACTERS, context_length * longest)


def after_common(whole: Any, start: Any) -> Any:
    """What a text, or tokens, have after the start that they share with others."""
    if whole[: len(start)] == start:
        return whole[len(start) :]
    return whole[len(commonprefix([whole, start])) :]


def mark(message: Message) -> Message:
    """A message with a mark at the end of its content."""
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": MARK}]}
    # What is not a text is the content of a message with calls that a template wants null.
    return {**message, "content": content + MARK if isinstance(content, str) else MARK}


def spare(variables: Dict[str, Any]) -> Set[str]:
    """The variables without which a template does what the request asks for as far as it
    can: it may do without an effort, and know but one of two names."""
    names = {"enable_thinking", "thinking"}
    both = names if names <= variables.keys() else set()
    return both | ({"reasoning_effort"} & variables.keys())


class Rendered(NamedTuple):
    """What a chat template has written: a text, or tokens if the tokenizer writes those.

    Args:
        messages (List[Message]): The messages in the shape of the template.
        variables (Dict[str, Any]): The variables of the template.
        prompt (Union[str, List[int]]): The prompt.
    """

    messages: List[Message]
    variables: Dict[str, Any]
    prompt: Union[str, List[int]]


class BoundedTokenizer:
    """The tokenizer of a model, for one request. It refuses texts that cannot fit, and gives
    messages to the chat template in the shape that it can take.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        context_length (Optional[int]): Tokens that the model can take.
        limit (int): Characters that a prompt may have, see ``most_characters``.
        field (str): The field of the request that the prompt is made of, for errors.
        preparation (Preparation): Says when to give up.
        facts (Optional[Dict]): What is known of the chat template, kept with the model.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: Optional[int],
        limit: int,
        field: str,
        preparation: Preparation,
        facts: Optional[Dict[Any, Any]] = None,
    ):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.limit = limit
        self.field = field
        self.preparation = preparation
        self.facts: Dict[Any, Any] = {} if facts is None else facts
        # Whether the prompt ends with the start of an answer.
        self.adds_generation_prompt = True
        # The first prompt, which is the whole one.
        self.rendered: Optional[Rendered] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def check_characters(self, n: int) -> None:
        """Raise a ``RequestError`` for more characters than can fit."""
        if n > self.limit:
            reason = f"more than {self.limit} characters never fit"
            raise too_long(self.context_length, reason, self.field)

    def check_slices(self, text: str) -> None:
        """Refuse a long text as soon as a part of it has more tokens than fit. The
        tokenizer cannot be interrupted, and takes memory for the whole text.

        Raises:
            ConnectionError: If the client has left.
            RequestError: If the text does not fit, or its preparation has to end.
        """
        length = self.context_length
        if length is None or len(text) <= max(SLICE, USUAL_CHARACTERS * length):
            return
        n_tokens = 0
        for start in range(0, len(text), SLICE):
            self.preparation.check()
            tokens = self.tokenizer.encode(
                text[start : start + SLICE], add_special_tokens=False
            )
            # A cut can split a token into several.
            n_tokens += max(0, len(tokens) - CUT)
            if n_tokens >= length:
                reason = f"the prompt has more than {n_tokens}"
                raise too_long(length, reason, self.field)

    def run_template(self, messages: List[Message], **kwargs: Any) -> Any:
        """The tokenizer's ``apply_chat_template``, bounded and interruptible."""
        token = current.set(self)
        try:
            while True:
                try:
                    return self.preparation.run(
                        lambda: self.tokenizer.apply_chat_template(messages, **kwargs)
                    )
                except TypeError as e:
                    # A template that is a function may refuse what others do not read.
                    unknown = UNKNOWN.search(str(e))
                    if unknown is None or unknown[1] not in spare(kwargs):
                        raise
                    del kwargs[unknown[1]]
        finally:
            current.reset(token)

    def try_template(self, messages: List[Message], **kwargs: Any) -> Any:
        """What ``run_template`` gives; None if the template cannot take the messages.

        Raises:
            ConnectionError: If the client has left.
            RequestError: If the preparation has to end.
        """
        try:
            return self.run_template(messages, **kwargs)
        except (ConnectionError, RequestError):
            self.preparation.check()
        except Exception:
            pass  # templates are code, and can raise anything
        return None

    def check_tools(self) -> None:
        """Refuse tools of which the model would not hear: it would answer as without them. One
        that writes calls in a format that mlx-lm knows may hear of them from the system.

        Raises:
            RequestError: If that is so.
        """
        if self.tokenizer.has_tool_calling:
            return
        if self.tokenizer.has_chat_template:
            shape = self.shape(True)
            if shape.offers_tools or not shape.is_known:
                return
        raise RequestError(
            400,
            "tools cannot be used: the model's chat template does not offer them to it; "
            'send none, or a tool_choice of "none" (--chat-template gives another one)',
            "tools",
        )

    def shape(self, has_tools: bool) -> TemplateShape:
        """What the template can take if there are tools, or none."""

        def render(messages: List[Message]) -> Optional[str]:
            prompt = self.try_template(
                messages,
                tools=TOOLS if has_tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
            # Some tokenizers write tokens at once.
            is_tokens = isinstance(prompt, list)
            text: Optional[str] = self.decode(prompt) if is_tokens else prompt
            return text

        facts = self.facts.setdefault(has_tools, {})
        return TemplateShape(str(self.tokenizer.chat_template), facts, render)

    def apply_chat_template(
        self, messages: List[Message], tokenize: bool = True, **kwargs: Any
    ) -> Union[str, List[int]]:
        """The tokenizer's method, for messages in the shape that the template can take."""
        # Some tokenizers write no text that could be tokenized here.
        as_text = writes_text(self.tokenizer)
        if kwargs.get("continue_final_message") or not self.adds_generation_prompt:
            kwargs["add_generation_prompt"] = False
        tools = kwargs.pop("tools", None)
        error: Optional[Exception] = None
        for shaped, form in (
            (shaped, form)
            for shaped in self.shape(bool(tools)).attempts(messages)
            for form in tool_forms(tools)
        ):
            variables = {**kwargs, "tools": form}
            try:
                prompt: Union[str, List[int]] = self.run_template(
                    shaped, tokenize=tokenize and not as_text, **variables
                )
                break
            except (ConnectionError, RequestError):
                raise
            except Exception as e:
                error = error or e
        else:
            assert error is not None  # there is at least one attempt
            raise error
        self.rendered = self.rendered or Rendered(shaped, variables, prompt)
        if tokenize and isinstance(prompt, str):
            return self.encode(prompt, add_special_tokens=False)
        return prompt

    def added_by_template(self) -> List[int]:
        """The tokens that follow what was said: those that the template has written after the
        last message, or, if that is to be continued, after the one before it."""
        assert self.rendered is not None
        messages, variables, prompt = self.rendered
        is_text = isinstance(prompt, str)
        n_said = len(messages)
        added: Any = prompt[:0]
        if variables.get("continue_final_message"):
            n_said -= 1
        else:
            others = {**variables, "add_generation_prompt": False}
            start = self.try_template(messages, tokenize=not is_text, **others)
            added = added if start is None else after_common(prompt, start)
        if n_said == 0:
            added = prompt
        elif is_text and not added:
            # The template adds it in any case, or cannot do without.
            marked = list(messages)
            marked[n_said - 1] = mark(marked[n_said - 1])
            text = self.try_template(marked, tokenize=False, **variables) or ""
            added = text.rpartition(MARK)[2] if MARK in text else ""
        if is_text:
            added = self.tokenizer.encode(added, add_special_tokens=False)
        tokens: List[int] = added
        return tokens

    def encode(self, text: str, **kwargs: Any) -> List[int]:
        """The tokenizer's method, for a text that may fit."""
        self.check_characters(len(text))
        self.check_slices(text)
        self.preparation.check()
        tokens: List[int] = self.tokenizer.encode(text, **kwargs)
        self.preparation.check()
        # A text may begin with the token that the tokenizer adds, or that a template writes.
        bos = self.tokenizer.bos_token_id
        n = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
        return tokens[max(0, n - 1) :]

"""Tokenizes prompts, and refuses those that cannot fit before they take time and memory.

Rules:
1. A text that can never fit into the model's context is refused before it is tokenized.
2. A chat template is ended as soon as it has written more than that.
3. The exact number of tokens is compared with the context in ``Request.fit_to_context``.
"""

from contextvars import ContextVar
from typing import Any, Iterable, List, Optional, Union

from jinja2 import TemplateSyntaxError

from ..errors import too_long
from .preparation import Preparation
from .upstream import compile_chat_template, writes_text

# Characters of a prompt to a model whose context has no limit.
MAX_CHARACTERS = 1 << 26
# A text with more characters than this for each token of the context is first tokenized
# in slices.
USUAL_CHARACTERS = 4
# Characters of a slice, and how many tokens the cuts at its two ends may add.
SLICE, CUT = 1 << 16, 16

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


class BoundedTokenizer:
    """The tokenizer of a model, for one request. It refuses texts that cannot fit.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
        context_length (Optional[int]): Tokens that the model can take.
        limit (int): Characters that a prompt may have, see ``most_characters``.
        field (str): The field of the request that the prompt is made of, for errors.
        preparation (Preparation): Says when to give up.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: Optional[int],
        limit: int,
        field: str,
        preparation: Preparation,
    ):
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.limit = limit
        self.field = field
        self.preparation = preparation

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

    def apply_chat_template(
        self, *args: Any, tokenize: bool = True, **kwargs: Any
    ) -> Union[str, List[int]]:
        """The tokenizer's method, with a bounded and interruptible template."""
        # Some tokenizers write tokens at once, and no text that could be tokenized here.
        as_text = writes_text(self.tokenizer)

        def render() -> Any:
            return self.tokenizer.apply_chat_template(
                *args, tokenize=tokenize and not as_text, **kwargs
            )

        token = current.set(self)
        try:
            prompt: Union[str, List[int]] = self.preparation.run(render)
        finally:
            current.reset(token)
        if tokenize and isinstance(prompt, str):
            return self.encode(prompt, add_special_tokens=False)
        return prompt

    def encode(self, text: str, **kwargs: Any) -> List[int]:
        """The tokenizer's method, for a text that may fit."""
        self.check_characters(len(text))
        self.check_slices(text)
        self.preparation.check()
        tokens: List[int] = self.tokenizer.encode(text, **kwargs)
        self.preparation.check()
        return tokens

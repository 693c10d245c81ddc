"""Prompts from messages and texts, within bounds.

Rules:
1. What can never fit into the model's context is refused before it is tokenised.
2. A chat template writes no more than that, and is cut off while it runs.
"""

from contextvars import ContextVar
from typing import Any, Iterable, List, Optional, Union

from jinja2 import TemplateError

from ..errors import too_long
from .preparation import Preparation
from .upstream import compile_chat_template, writes_text

# Characters of a prompt to a model whose context has no limit.
MAX_CHARACTERS = 1 << 26
# A text with more characters than this for each token of the context is first tokenised
# in slices.
USUAL_CHARACTERS = 4
# Characters of a slice, and how many tokens the cuts at its ends may add.
SLICE, CUT = 1 << 16, 16

# That for which a chat template is run on this thread.
current: ContextVar[Optional["BoundedTokenizer"]] = ContextVar("current", default=None)


def join_bounded(pieces: Iterable[str]) -> str:
    """What Jinja joins the pieces with that a template writes, up to the limit.

    Raises:
        RequestError: If there are more.
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


def bound_chat_templates(tokenizer: Any) -> None:
    """Join what the chat templates of a tokenizer write with ``join_bounded``.

    Transformers compiles each text of a template once, so this holds for all tokenizers
    that have the same one.
    """
    templates = tokenizer.chat_template
    templates = templates.values() if isinstance(templates, dict) else [templates]
    for template in templates:
        if isinstance(template, str):
            try:
                compile_chat_template(template).environment.concat = join_bounded
            except TemplateError:
                pass  # requests are told, when they need it


def most_characters(tokenizer: Any, context_length: Optional[int]) -> int:
    """The characters of a prompt of which all tokens are the longest ones."""
    if context_length is None:
        return MAX_CHARACTERS
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return min(MAX_CHARACTERS, context_length * longest)


class BoundedTokenizer:
    """The tokenizer of a model, for one request.

    Args:
        tokenizer (TokenizerWrapper): The model's.
        context_length (Optional[int]): Tokens that the model can take.
        limit (int): Characters that can be so many tokens.
        field (str): What in the request the prompt is made of.
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
        """Refuse more characters than can fit."""
        if n > self.limit:
            reason = f"more than {self.limit} characters never fit"
            raise too_long(self.context_length, reason, self.field)

    def check_slices(self, text: str) -> None:
        """Refuse a text of which a part has more tokens than fit: the tokenizer takes
        memory for all of it, and cannot be interrupted."""
        length = self.context_length
        if length is None or len(text) <= max(SLICE, USUAL_CHARACTERS * length):
            return
        n_tokens = 0
        for start in range(0, len(text), SLICE):
            self.preparation.check()
            tokens = self.tokenizer.encode(
                text[start : start + SLICE], add_special_tokens=False
            )
            # A cut makes some tokens more of a few characters.
            n_tokens += max(0, len(tokens) - CUT)
            if n_tokens >= length:
                reason = f"the prompt has more than {n_tokens}"
                raise too_long(length, reason, self.field)

    def apply_chat_template(
        self, *args: Any, tokenize: bool = True, **kwargs: Any
    ) -> Union[str, List[int]]:
        """As that of the tokenizer."""
        # Some write no text that could be tokenised later.
        as_text = writes_text(self.tokenizer)

        def render():
            return self.tokenizer.apply_chat_template(
                *args, tokenize=tokenize and not as_text, **kwargs
            )

        token = current.set(self)
        try:
            prompt = self.preparation.run(render)
        finally:
            current.reset(token)
        if tokenize and as_text:
            return self.encode(prompt, add_special_tokens=False)
        return prompt

    def encode(self, text: str, **kwargs: Any) -> List[int]:
        """As that of the tokenizer."""
        self.check_characters(len(text))
        self.check_slices(text)
        self.preparation.check()
        tokens = self.tokenizer.encode(text, **kwargs)
        self.preparation.check()
        if self.context_length is not None and len(tokens) >= self.context_length:
            reason = f"the prompt has {len(tokens)}"
            raise too_long(self.context_length, reason, self.field)
        return tokens

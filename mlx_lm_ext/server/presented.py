"""A tokenizer that is presented as that of another model. Subclasses say what differs."""

from typing import Any


class Presented:
    """Has all that a tokenizer has.

    Args:
        tokenizer (TokenizerWrapper): The model's tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

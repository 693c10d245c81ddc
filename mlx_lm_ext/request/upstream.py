"""Public names for the private parts of mlx-lm and transformers that making a prompt uses."""

from typing import Any

from mlx_lm.server import _image_url
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

compile_chat_template = _compile_jinja_template
image_url = _image_url


def writes_text(tokenizer: Any) -> bool:
    """Whether ``apply_chat_template`` of a ``TokenizerWrapper`` only renders a text and encodes
    it. Tokenizers with code of their own may do more."""
    cls = type(tokenizer._tokenizer)
    return (
        tokenizer._chat_template is not None
        or cls.apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    )

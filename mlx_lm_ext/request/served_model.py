"""What a handler knows of a model. It has no arrays."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict, Optional, Tuple

from mlx_lm.generate import StopSequences

from .detokenizing import Decoder
from .fill_in import find_form
from .preparation import Preparation
from .token_bytes import TokenBytes
from .tokenizing import BoundedTokenizer

# The paths of a model, an adapter and a draft model.
ModelKey = Tuple[str, Optional[str], Optional[str]]


@dataclass(frozen=True)
class ServedModel:
    """What a handler thread needs of a model; no arrays.

    Args:
        key (ModelKey): The paths of model, adapter and draft model.
        tokenizer (TokenizerWrapper): Shared by all threads, never changed.
        vocabulary_size (int): Rows of the embedding; token ids are below it.
        context_length (Optional[int]): The most tokens of prompt and answer together. None
          if not known.
        most_characters (int): A prompt with more characters cannot fit into the context.
        takes_images (bool): Whether prompts may have images, by its configuration.
        end_of_text (StopSequences): The end-of-text tokens.
        sampling (Dict[str, Any]): What it samples with if neither a request nor the
          command line says so, by fields of a request.
        template_facts (Dict): What is known of its chat template, see ``TemplateShape``.
    """

    key: ModelKey
    tokenizer: Any
    vocabulary_size: int
    context_length: Optional[int]
    most_characters: int
    takes_images: bool
    end_of_text: StopSequences
    sampling: Dict[str, Any] = field(default_factory=dict)
    template_facts: Dict[Any, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def decoder(self) -> Decoder:
        """Makes text of token ids."""
        return Decoder(self.tokenizer)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of each token."""
        return TokenBytes(self.decoder)

    @cached_property
    def special_tokens(self) -> Dict[int, str]:
        """The texts of the special tokens."""
        ids = self.tokenizer.all_special_ids
        return {token: self.decoder.decode([token]) for token in ids}

    @cached_property
    def fill_in_form(self) -> Optional[Tuple[Optional[str], ...]]:
        """How it writes a prompt with a suffix, if it can."""
        return find_form(self.tokenizer.get_vocab())

    def bounded_tokenizer(
        self, field: str, preparation: Preparation
    ) -> BoundedTokenizer:
        """Make its tokenizer for one request.

        Args:
            field (str): The field of the request that the prompt is made of.
            preparation (Preparation): Says when to give up.
        """
        return BoundedTokenizer(
            self.tokenizer,
            self.context_length,
            self.most_characters,
            field,
            preparation,
            self.template_facts,
        )

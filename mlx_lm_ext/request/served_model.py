"""What a handler knows of a model. It has no arrays."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Dict, Optional, Tuple

from mlx_lm.generate import StopSequences

from .detokenizing import Decoder
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
        template_facts (Dict): What is known of its chat template, see ``TemplateShape``.
        sampling (Dict[str, Any]): What it samples with if neither a request nor the
          command line says so, by fields of a request.
    """

    key: ModelKey
    tokenizer: Any
    vocabulary_size: int
    context_length: Optional[int]
    most_characters: int
    takes_images: bool
    end_of_text: StopSequences
    template_facts: Dict[Any, Any] = field(default_factory=dict, compare=False)
    sampling: Dict[str, Any] = field(default_factory=dict)

    @cached_property
    def decoder(self) -> Decoder:
        """Makes text of token ids."""
        return Decoder(self.tokenizer)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of each token."""
        return TokenBytes(self.decoder)

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

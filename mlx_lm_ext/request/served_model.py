"""What a handler knows of a model. It has no arrays."""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from mlx_lm.generate import StopSequences
from mlx_lm.server import CompletionRequest

from .preparation import Preparation
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
    """

    key: ModelKey
    tokenizer: Any
    vocabulary_size: int
    context_length: Optional[int]
    most_characters: int
    takes_images: bool
    end_of_text: StopSequences
    sampling: Dict[str, Any] = field(default_factory=dict)

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
        )

    def replace_developer_role(self, request: CompletionRequest) -> None:
        """Change the role developer to system, in place, if the chat template does not know
        it: the template might leave out such messages."""
        template = self.tokenizer.chat_template or request.role_mapping
        if "developer" in str(template):
            return
        for message in request.messages:
            if message["role"] == "developer":
                message["role"] = "system"

"""Models by name: what a handler thread may know of them, and loading.

Rules:
1. Weights are loaded on the generation thread only, by upstream's ``load``.
2. A wrong name is found out before that, so it never costs the running model.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from mlx_lm.generate import StopSequences, make_stop_sequences
from mlx_lm.server import CompletionRequest, ModelDescription
from mlx_lm.utils import load_config, load_tokenizer

from ._upstream import ModelKey, ModelProviderBase, download
from .errors import RequestError


@dataclass(frozen=True)
class ServedModel:
    """What a handler thread needs of a model; no arrays.

    Args:
        key (ModelKey): The paths of model, adapter and draft model.
        tokenizer (TokenizerWrapper): Shared by all threads, never changed.
        vocabulary_size (int): Rows of the embedding; token ids are below it.
        context_length (Optional[int]): Tokens of prompt and answer together.
        end_of_text (StopSequences): The end-of-text tokens.
    """

    key: ModelKey
    tokenizer: Any
    vocabulary_size: int
    context_length: Optional[int]
    end_of_text: StopSequences

    def name_roles(self, request: CompletionRequest) -> None:
        """Let developers be of the role system, in place, if the chat template does not
        know them: it might leave out what they say."""
        template = self.tokenizer.chat_template or request.role_mapping
        if "developer" in str(template):
            return
        for message in request.messages:
            if message["role"] == "developer":
                message["role"] = "system"


class BatchModelProvider(ModelProviderBase):
    """Upstream's ``ModelProvider`` that also answers handler threads."""

    def __init__(self, cli_args):
        super().__init__(cli_args)
        self._served = {}

    @property
    def default_key(self) -> ModelKey:
        """The model of the command line."""
        name = "default_model"
        return self.resolve(ModelDescription(model=name, draft=name, adapter=None))

    def describe(self, model: ModelDescription) -> ServedModel:
        """Find a request's model without loading its weights (any thread).

        Raises:
            RequestError: If the model, its adapter or its draft model is not found.
        """
        key = self.resolve(model)
        if key not in self._served:
            self._served[key] = self._describe(key, self._locate(key))
        return self._served[key]

    def _describe(
        self, key: ModelKey, path: Path, tokenizer: Any = None
    ) -> ServedModel:
        try:
            config = load_config(path)
            eos_token_ids = config.get("eos_token_id")
            if tokenizer is None:
                tokenizer = load_tokenizer(path, self.tokenizer_config, eos_token_ids)
        except Exception as e:
            raise self.not_found("model", key[0], e)
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        text_config = config.get("text_config") or config
        return ServedModel(
            key=key,
            tokenizer=tokenizer,
            vocabulary_size=text_config.get("vocab_size", len(tokenizer)),
            context_length=text_config.get("max_position_embeddings"),
            end_of_text=make_stop_sequences(tokenizer),
        )

    def _locate(self, key: ModelKey) -> Path:
        """Find the files of a model, its adapter and its draft model."""
        paths = {}
        for param, name in zip(("model", "adapters", "draft_model"), key):
            if name is None:
                continue
            is_adapter = param == "adapters"
            config = "adapter_config.json" if is_adapter else "config.json"
            # So are names that no repository has.
            is_path = (
                is_adapter or name.startswith(("/", ".", "~")) or name.count("/") > 1
            )
            try:
                path = paths[param] = Path(name) if is_path else download(name)
                if not path.is_dir():
                    raise FileNotFoundError("there is no such folder")
                if not (path / config).is_file():
                    raise FileNotFoundError(f"it has no {config}")
            except Exception as e:
                raise self.not_found(param, name, e)
        return paths["model"]

    def switch_to(self, key: ModelKey) -> None:
        """Load the weights of ``key`` unless they are (generation thread)."""
        if key == self.model_key:
            return
        path = self._locate(key)
        logging.info(f"Loading {key[0]}")
        try:
            _, tokenizer = self.load(*key)
        except Exception as e:
            raise self.not_found("model", key[0], e)
        self._served[key] = self._describe(key, path, tokenizer)

    def not_found(self, param: str, name: str, reason: Any) -> RequestError:
        """The 404 for a model, adapter or draft model that is not there or not whole."""
        reason = (str(reason).splitlines() or [type(reason).__name__])[0].rstrip(".")
        message = f"{param} {name!r} cannot be loaded: {reason}"
        if param == "model" and name != self.default_key[0]:
            message += "; 'default_model' is the one that is served"
        return RequestError(404, message, param, "model_not_found")

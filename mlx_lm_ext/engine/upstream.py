"""Public names for the private parts of mlx-lm that the engine uses.

What upstream makes public (see ``patches/``) is deleted here.
"""

from typing import Any, Dict, List, Tuple

import mlx.core as mx
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    ModelDescription,
    ModelProvider,
    ResponseGenerator,
)
from mlx_lm.utils import _download

from ..request.served_model import ModelKey

download = _download


class ModelProviderBase(ModelProvider):
    """``ModelProvider`` with its name maps and load arguments as public members."""

    def resolve(self, model: ModelDescription) -> ModelKey:
        """The names of a request's model, adapter and draft model, the defaults filled
        in."""
        return (
            self._model_map.get(model.model, model.model),
            # Upstream ignores an adapter asked for on the default model.
            model.adapter or self._adapter_map.get(model.model),
            self._draft_model_map.get(model.draft, model.draft),
        )

    @property
    def tokenizer_config(self) -> Dict[str, Any]:
        return self._tokenizer_config


class SingleGenerator(ResponseGenerator):
    """``ResponseGenerator`` without its thread: its tokenizing, and its way to serve one
    request at a time.

    Args:
        model_provider (ModelProvider): Holds the model.
        prompt_cache (Any): Where ``serve_single`` looks for KV and stores it.
    """

    def __init__(self, model_provider: ModelProvider, prompt_cache: Any = None):
        # Not that of upstream, which starts the thread.
        self.model_provider = model_provider
        self.prompt_cache = prompt_cache
        self._state_machine_cache: Dict[Any, Any] = {}
        self._is_distributed = False

    def tokenize(
        self, tokenizer: Any, request: CompletionRequest, args: GenerationArguments
    ) -> Tuple[List[int], List[List[int]], List[str], str]:
        """The prompt, its segments, their cache types, and the initial text state."""
        prompt, segments, types, state, _ = self._tokenize(tokenizer, request, args)
        if request.messages and len(segments) == 1 and tokenizer.has_thinking:
            # Upstream cuts before the reasoning only after a message of the user's.
            start = tokenizer.rfind_think_start(prompt, start=max(0, len(prompt) - 11))
            if start > 0:
                segments = [prompt[:start], prompt[start:]]
                types = ["user", "assistant"]
        return prompt, segments, types, state

    def _tokenize(self, tokenizer, request, args):
        # Upstream takes no prompt that is token ids already.
        if isinstance(request.prompt, list):
            return request.prompt, [request.prompt], ["assistant"], "normal", None
        return super()._tokenize(tokenizer, request, args)

    def serve_single(
        self,
        queue: Any,
        request: CompletionRequest,
        args: GenerationArguments,
        stream: mx.Stream,
    ) -> None:
        """Serve a request on the calling thread. ``queue.put`` gets what upstream puts
        into the queue of the response."""
        self._serve_single((queue, request, args), stream)

"""Public names for the private parts of mlx-lm that the engine uses.

What upstream makes public (see ``patches/``) is deleted here.
"""

from copy import copy
from dataclasses import replace
from typing import Any, Dict, List, Optional, Set, Tuple

import mlx.core as mx
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    ModelDescription,
    ModelProvider,
    ResponseGenerator,
)
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import _download

from ..request.preparation import Preparations
from ..request.request import Request
from ..request.served_model import ModelKey
from ..request.template_shape import without_template
from ..request.tokenizing import BoundedTokenizer
from .constrained_model import ConstrainedModel

download = _download


# Tokens at the end of a prompt in which upstream looks for the start of a reasoning.
TAIL = 11


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


class NoText(StreamingDetokenizer):
    """Makes no text."""

    text = ""

    def reset(self) -> None:
        self.offset = 0

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


class WithoutText(TokenizerWrapper):
    """A tokenizer that does not look at the tokens of an answer: upstream's fails for those
    that only the model has, and its text is not used.

    Args:
        tokenizer (TokenizerWrapper): The tokenizer.
        end_tokens (Set[int]): The tokens that end the answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, end_tokens: Set[int]):
        self.__dict__.update(tokenizer.__dict__)
        self.eos_token_ids = end_tokens

    @property
    def detokenizer(self) -> NoText:
        detokenizer = NoText()
        detokenizer.reset()
        return detokenizer

    def convert_ids_to_tokens(self, ids: List[int]) -> List[int]:
        return ids


class SingleGenerator(ResponseGenerator):
    """``ResponseGenerator`` without its thread: its tokenizing, and its way to serve one
    request at a time.

    Args:
        model_provider (ModelProvider): Holds the model.
        prompt_cache (Any): Where ``serve_single`` looks for KV and stores it. For requests with
          a constraint, its ``n_to_run`` is how many tokens of the prompt had none.
        request (Optional[Request]): What ``serve_single`` serves.
    """

    def __init__(
        self,
        model_provider: ModelProvider,
        prompt_cache: Any = None,
        request: Optional[Request] = None,
    ):
        # Not that of upstream, which starts the thread.
        self.model_provider = model_provider
        self.prompt_cache = prompt_cache
        self.request = request
        self._state_machine_cache: Dict[Any, Any] = {}
        self._is_distributed, self._rank = False, 0

    def tokenize(
        self,
        tokenizer: BoundedTokenizer,
        request: CompletionRequest,
        args: GenerationArguments,
    ) -> Tuple[List[int], List[List[int]], List[str], str]:
        """The prompt, its segments, their cache types, and the initial text state."""
        return self._tokenize(tokenizer, request, args)[:4]

    def _tokenize(self, tokenizer, request, args):
        served = self.request
        if served is not None:
            if served.prompt:
                prompt, types = list(served.prompt), served.segment_types
                return prompt, served.segments, types, served.initial_state, None
            # Upstream has the model's own.
            tokenizer = served.model.bounded_tokenizer(
                served.prompt_field, Preparations().begin()
            )
        # Upstream takes no prompt that is token ids already.
        if isinstance(request.prompt, list):
            return request.prompt, [request.prompt], ["assistant"], "normal", None
        if not request.messages:
            return super()._tokenize(tokenizer, request, args)
        kwargs = dict(args.chat_template_kwargs or {})
        if not tokenizer.has_chat_template:
            if kwargs.get("continue_final_message"):
                raise ValueError("continue_final_message needs a chat template")
            messages = without_template(request.messages, request.role_mapping)
            request = replace(request, messages=messages)
            return super()._tokenize(tokenizer, request, args)
        # It looks for the end of what the system says.
        shape = tokenizer.shape(bool(request.tools))
        messages = shape.with_known_roles(request.messages)
        request = replace(request, messages=messages)
        # It gives this argument by itself.
        tokenizer.adds_generation_prompt = kwargs.pop("add_generation_prompt", True)
        args = replace(args, chat_template_kwargs=kwargs)
        prompt, segments, types, state, vision = super()._tokenize(
            tokenizer, request, args
        )
        if tokenizer.has_thinking:
            segments, types, state = cut_before_reasoning(
                tokenizer, prompt, segments, types, state
            )
        return prompt, segments, types, state, vision

    def serve_single(
        self,
        queue: Any,
        request: CompletionRequest,
        args: GenerationArguments,
        stream: mx.Stream,
    ) -> None:
        """Serve a request on the calling thread. ``queue.put`` gets what upstream puts
        into the queue of the response, without its text."""
        self.model_provider = copy(self.model_provider)
        self.model_provider.tokenizer = WithoutText(
            self.model_provider.tokenizer, self.request.end_tokens
        )
        if self.request.constraint is not None:
            self.model_provider.model = ConstrainedModel(
                self.model_provider.model,
                self.request.constraint.copy(),
                lambda: self.prompt_cache.n_to_run,
            )
        self._serve_single((queue, request, args), stream)


def cut_before_reasoning(
    tokenizer: BoundedTokenizer,
    prompt: List[int],
    segments: List[List[int]],
    types: List[str],
    state: str,
) -> Tuple[List[List[int]], List[str], str]:
    """Correct what upstream makes of all starts of a reasoning in a prompt, which may stand
    in what was said: only the one that the template adds at the end counts.

    Args:
        tokenizer (BoundedTokenizer): What has made the prompt.
        prompt (List[int]): The tokens of the prompt.
        segments (List[List[int]]): Its segments.
        types (List[str]): Their cache types.
        state (str): The initial text state.

    Returns:
        Tuple: The segments, their cache types, and the initial text state. The reasoning that
        the template starts is a segment of its own, whoever has spoken last.
    """
    near = max(0, len(prompt) - TAIL)
    if state == "normal" and tokenizer.rfind_think_start(prompt, start=near) < 0:
        return segments, types, state
    added = tokenizer.added_by_template()
    start = tokenizer.rfind_think_start(added)
    if tokenizer.response_initial_state is None:
        is_reasoning = start > tokenizer.rfind_think_end(added)
        state = "reasoning" if is_reasoning else "normal"
    n_system = len(segments[0]) if types[0] == "system" else 0
    tail = -1
    if start >= 0:
        # With others before it, the first token may be another one.
        near = max(0, len(prompt) - len(added) - 1)
        tail = tokenizer.rfind_think_start(prompt, start=near)
    if tail <= n_system:
        rest, kinds = [prompt[n_system:]], types[-1:] if len(types) == 1 else ["user"]
    else:
        rest, kinds = [prompt[n_system:tail], prompt[tail:]], ["user", "assistant"]
    if n_system:
        rest, kinds = [prompt[:n_system], *rest], ["system", *kinds]
    return rest, kinds, state

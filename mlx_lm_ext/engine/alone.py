"""Serves requests that mlx-lm cannot batch one at a time, between batches: requests with
images, and all requests with a draft model, with ``--kv-bits``, or to a model whose caches
cannot be merged or whose batches are wrong."""

import secrets
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import GenerationArguments, GenerationContext, Response

from ..errors import RequestError
from ..request.request import NO_TIME, Request, Token
from ..sampling.penalties import PenaltyParameters
from .models import BatchModelProvider
from .upstream import SingleGenerator


class Alone:
    """Serves one request at a time, in upstream's way.

    Args:
        model_provider (BatchModelProvider): Holds the model.
        prompt_cache (Optional[LRUPromptCache]): Where KV is kept between requests.
        is_stopping (Callable): Whether the server stops.
        fail (Callable): Ends a request with an error.
    """

    def __init__(
        self,
        model_provider: BatchModelProvider,
        prompt_cache: Optional[LRUPromptCache],
        is_stopping: Callable[[], bool],
        fail: Callable[[Request, BaseException], None],
    ):
        self.model_provider = model_provider
        if prompt_cache is None:
            prompt_cache = LRUPromptCache(max_size=0)
        self.prompt_cache = prompt_cache
        self.is_stopping = is_stopping
        self.fail = fail

    def serve(self, request: Request) -> None:
        """Serve a request to its end."""
        seed = request.args.seed
        if seed is None:
            # Without one, upstream goes on where the last request has ended.
            seed = secrets.randbits(64)
        # Stop words are found in the text, on the handler's thread.
        args = replace(request.args, stop_words=[], seed=seed)
        generator = SingleGenerator(
            self.model_provider, SaltedCache(request, self.prompt_cache), request
        )
        queue = ResponseQueue(request, args, self.is_stopping, self.fail)
        stream = mx.default_stream(mx.default_device())
        generator.serve_single(queue, request.completion, args, stream)


class ResponseQueue:
    """Takes what upstream puts into the queue of a response, and gives it to a request.

    Args:
        request (Request): The request.
        args (GenerationArguments): The arguments with which upstream runs it.
        is_stopping (Callable): Whether the server stops.
        fail (Callable): Ends a request with an error.
    """

    def __init__(
        self,
        request: Request,
        args: GenerationArguments,
        is_stopping: Callable[[], bool],
        fail: Callable[[Request, BaseException], None],
    ):
        self.request = request
        self.args = args
        self.is_stopping = is_stopping
        self.fail = fail
        self.context: Optional[GenerationContext] = None

    def put(self, item: Any) -> None:
        request = self.request
        if isinstance(item, Exception):
            has_images = not request.prompt
            if has_images and isinstance(item, (OSError, ValueError)):
                message = f"the images cannot be used: {item}"
                item = RequestError(400, message, "messages")
            self.fail(request, item)
        elif isinstance(item, GenerationContext):
            self.context = item
            request.prompt = item.prompt
            request.n_prompt = len(item.prompt)
            request.initial_state = item.initial_state
            # Before, it was not known how many tokens the images take.
            request.fit_to_context()
            self.args.max_tokens = request.args.max_tokens
        elif isinstance(item, Response):
            request.n_matched = max(0, self.context.prompt_cache_count)
            top = tuple((t["id"], t["logprob"]) for t in item.top_tokens)
            request.put(Token(item.token, item.logprob, top, item.finish_reason))
            try:
                self.check_goes_on()
            except RequestError as e:
                self.context.stop()
                self.fail(request, e)
        elif item is not None:
            # The progress of the prompt. What is raised here, upstream puts into this queue.
            self.check_goes_on()

    def check_goes_on(self) -> None:
        """End the request if it has to end.

        Raises:
            RequestError: If it does; upstream then ends it too.
        """
        request, reason = self.request, ""
        if request.is_late:
            reason = "the request has taken too long"
            request.put(NO_TIME)
        elif self.is_stopping():
            reason = "the server is stopping"
            request.stop(reason)
        elif request.cancelled:
            reason = "the request was cancelled"
        if reason:
            raise RequestError(503, reason)


class SaltedCache:
    """A prompt cache for one request of upstream's.

    Upstream knows no ``cache_salt``. Its penalties see only the tokens that it runs, so that
    fewer tokens than there are may come from the cache.

    Args:
        request (Request): The request.
        cache (LRUPromptCache): The prompt cache.
    """

    def __init__(self, request: Request, cache: LRUPromptCache):
        self.key = request.cache_key
        self.cache = cache
        # Tokens of the prompt that the last lookup has left to run.
        self.n_to_run = 0
        self.contexts = PenaltyParameters.from_arguments(request.args.logits).contexts
        if request.model.key[2] is not None:
            # With a draft model the penalties see no prompt in any case.
            self.contexts = []

    def fetch_nearest_cache(
        self, model: Any, tokens: List[int]
    ) -> Tuple[Any, List[int]]:
        # A lookup leaves one of the tokens to run.
        n_seen = max((n or len(tokens) for n in self.contexts), default=1)
        n = max(0, len(tokens) - n_seen + 1)
        # An image, whose tokens have negative keys here, has to run as a whole.
        while 0 < n < len(tokens) and tokens[n] < 0 and tokens[n - 1] < 0:
            n -= 1
        caches, rest = self.cache.fetch_nearest_cache(self.key, tokens[:n])
        rest = rest + tokens[n:]
        self.n_to_run = len(rest)
        return caches, rest

    def insert_cache(self, model: Any, tokens: List[int], prompt_cache: Any) -> None:
        self.cache.insert_cache(self.key, tokens, prompt_cache)

    # Upstream logs these.

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def stats_by_type(self) -> Dict[str, Dict[str, int]]:
        return self.cache.stats_by_type()

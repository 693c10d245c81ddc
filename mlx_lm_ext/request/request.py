"""What crosses between a handler thread and the generation thread.

Rules:
1. Plain Python only: no arrays, nothing that owns one.
2. A request's events end with a token that has a finish reason, or a RequestError.
"""

import time
from dataclasses import dataclass, field
from math import inf
from queue import SimpleQueue
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
)

from ..errors import RequestError, too_long
from ..interfaces import Clock, RequestInfo, RequestStats
from ..sampling.penalties import PenaltyParameters
from .mailbox import Mailbox, Turnstile
from .served_model import ServedModel

# After how many tokens a handler is woken that sends its answer in one piece.
TOKENS_OF_WHOLE = 32


class Token(NamedTuple):
    """One generated token, as it is handed to a handler thread.

    Args:
        id (int): The token.
        logprob (Optional[float]): Its log probability, if the request asked.
        top (Tuple): ``(id, logprob)`` of the most likely tokens, if it asked.
        finish_reason (Optional[str]): "stop" or "length" on the last token.
    """

    id: int
    logprob: Optional[float] = None
    top: Tuple[Tuple[int, float], ...] = ()
    finish_reason: Optional[str] = None


@dataclass(eq=False)
class Request(RequestInfo):
    """A request on its way through the engine.

    Args:
        model (ServedModel): The model that serves it.
        completion (CompletionRequest): The request as upstream knows it.
        prompt (List[int]): The prompt's tokens. With images only upstream can make
          them: they are known from the first token on.
        segments (List[List[int]]): The prompt cut where its KV is worth keeping.
        segment_types (List[str]): The cache type of each segment.
        to_store (Dict[int, str]): After how many tokens of its prompt its KV is to be
          kept, and as what.
        initial_state (str): Where the text state machine starts.
        sampler (str): The name of its sampler.
        clock (Clock): What tells when it started and got its first token.
        timeout (Optional[float]): Seconds from its arrival to when it ends unfinished.
        cancellations (SimpleQueue): Where the engine looks for those that are cancelled.
        n_run (int): Tokens of its prompt whose KV it has.
        leader (Optional[Request]): Who runs a prefix of its prompt, for which it waits.
        n_shared (int): The tokens of that prefix.
        shared_by (Optional[Request]): Who runs it, or has run it, until this one starts.
        has_followers (bool): Whether others wait for what it runs.
        shares (bool): False once it has waited in vain.
        mailbox (Mailbox): Takes its events to the handler.
        reads_each (bool): Whether the handler wants each token when it is made.
        error (Optional[RequestError]): What ended it, and is yet to be raised in the
          handler.
    """

    model: Optional[ServedModel] = None
    completion: Optional[CompletionRequest] = None
    prompt: List[int] = field(default_factory=list)
    segments: List[List[int]] = field(default_factory=list)
    segment_types: List[str] = field(default_factory=list)
    to_store: Dict[int, str] = field(default_factory=dict)
    initial_state: str = "normal"
    sampler: str = "default"
    clock: Clock = time.monotonic
    timeout: Optional[float] = None
    cancellations: SimpleQueue = field(default_factory=SimpleQueue)
    n_run: int = 0
    leader: Optional["Request"] = None
    n_shared: int = 0
    shared_by: Optional["Request"] = None
    has_followers: bool = False
    shares: bool = True
    started: Optional[float] = None
    first_token: Optional[float] = None
    generated: List[int] = field(default_factory=list)
    cancelled: bool = False
    finished: bool = False
    forgotten: bool = False
    mailbox: Mailbox = field(default_factory=lambda: Mailbox(Turnstile()))
    reads_each: bool = True
    error: Optional[RequestError] = None

    @property
    def cache_key(self) -> Tuple:
        """What its KV in the prompt cache belongs to: nobody else finds it."""
        salt = self.body.get("cache_salt")
        return self.model.key if salt is None else (*self.model.key, salt)

    @property
    def prompt_field(self) -> str:
        """The field of the body that its prompt is made of."""
        return "messages" if self.completion.messages else "prompt"

    def check_tokens(self) -> None:
        """Refuse a client's token ids that the model lacks.

        MLX would read or write beyond its arrays.
        """
        n = self.model.vocabulary_size
        prompt = self.completion.prompt
        fields = {
            "prompt": prompt if isinstance(prompt, list) else (),
            "logit_bias": self.args.logits.logit_bias or (),
        }
        for name, ids in fields.items():
            if any(not 0 <= i < n for i in ids):
                raise RequestError(
                    400, f"token ids of {name} must be from 0 to {n - 1}", name
                )
        # Upstream's top-k takes no more than there are.
        if self.args.sampling.top_k >= n:
            self.args.sampling.top_k = 0

    def fit_to_context(self) -> None:
        """Refuse a prompt or a ``max_tokens`` for which the model has no room.

        A ``max_tokens`` that nobody asked for shrinks instead.
        """
        prompt_field = self.prompt_field
        n_prompt, limit = len(self.prompt), self.model.context_length
        if not n_prompt:
            raise RequestError(400, f"{prompt_field} gives no tokens", prompt_field)
        if limit is None:
            return
        room = limit - n_prompt
        if room < 1:
            raise too_long(limit, f"the prompt has {n_prompt}", prompt_field)
        if self.args.max_tokens <= room:
            return
        for field in ("max_completion_tokens", "max_tokens"):
            if field in self.body:
                asked = f"the prompt has {n_prompt}, and {field} may be {room} at most"
                raise too_long(limit, asked, field)
        self.args.max_tokens = room

    def cancel(self) -> None:
        """Leave the waiting list or the batch at the next step (any thread)."""
        self.cancelled = True
        self.cancellations.put(self)

    @property
    def deadline(self) -> float:
        """When it ends unfinished, on its clock."""
        return inf if self.timeout is None else self.arrival + self.timeout

    def check_time(self) -> None:
        """Raise a 408 ``RequestError`` if it has taken too long."""
        if self.clock() >= self.deadline:
            raise RequestError(
                408,
                f"the request took longer than {self.timeout:g} seconds, the server's "
                "--request-timeout",
            )

    def start(self) -> None:
        """Note when it first began to run."""
        if self.started is None:
            self.started = self.clock()

    def stats(self, finish_reason: str) -> RequestStats:
        """How it went (any thread)."""

        def since_arrival(when: Optional[float]) -> Optional[float]:
            return None if when is None else when - self.arrival

        return RequestStats(
            finish_reason,
            since_arrival(self.started),
            since_arrival(self.first_token),
            self.clock() - self.arrival,
        )

    def put(self, event: Union[Token, RequestError]) -> None:
        """Hand an event to the handler thread; an error is the last one."""
        self.mailbox.turnstile.put([self.note(event)])

    def note(self, event: Union[Token, RequestError]) -> Tuple[Mailbox, Any, bool]:
        """Note an event; gives what the turnstile takes to hand it over."""
        wakes = self.reads_each
        if isinstance(event, Token):
            if self.first_token is None:
                self.first_token = self.clock()
            self.generated.append(event.id)
            self.n_generated += 1
            self.finished = event.finish_reason is not None
            wakes = wakes or self.n_generated % TOKENS_OF_WHOLE == 0
        else:
            self.finished = True
        return self.mailbox, event, wakes or self.finished

    def receive(self, timeout: float) -> List[Token]:
        """All tokens that have piled up, at least one unless the time runs out.

        Raises:
            RequestError: What ended the request on the generation thread, once all tokens
              that came before it are taken.
        """
        if self.error is None:
            events = self.mailbox.take(timeout)
            if not events or not isinstance(events[-1], Exception):
                return events
            *events, self.error = events
            if events:
                return events
        raise self.error


class SingleQueue:
    """What upstream's single path takes for its response queue."""

    def __init__(
        self,
        request: Request,
        args: GenerationArguments,
        is_stopping: Callable[[], bool],
        fail: Callable[[Request, Exception], None],
    ):
        self.request = request
        self.args = args
        self.is_stopping = is_stopping
        self.fail = fail
        self.context = None

    def put(self, item: Any) -> None:
        request = self.request
        if isinstance(item, Exception):
            if self.context is None and isinstance(item, (OSError, ValueError)):
                message = f"the images cannot be used: {item}"
                item = RequestError(400, message, "messages")
            self.fail(request, item)
        elif isinstance(item, GenerationContext):
            self.context = item
            request.prompt = item.prompt
            request.n_prompt = len(item.prompt)
            request.initial_state = item.initial_state
            # Nobody could know before how many tokens there are with images.
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
                if not request.finished:
                    self.fail(request, e)
        elif item is not None:
            # Progress of the prompt: upstream puts what is raised back, and ends.
            self.check_goes_on()

    def check_goes_on(self) -> None:
        self.request.check_time()
        if self.request.cancelled or self.is_stopping():
            raise RequestError(503, "the server is stopping")


class SingleCache:
    """What upstream's single path takes for its prompt cache: it knows no salt, and its
    penalties see no tokens but those that are run."""

    def __init__(self, request: Request, cache: LRUPromptCache):
        self.key = request.cache_key
        self.cache = cache
        self.contexts = PenaltyParameters.from_arguments(request.args.logits).contexts
        if request.model.key[2] is not None:
            # With a draft model they see no prompt at all.
            self.contexts = []

    def fetch_nearest_cache(self, model: Any, tokens: List[int]) -> Tuple:
        # One token is left to run of what is looked for.
        n_seen = max((n or len(tokens) for n in self.contexts), default=1)
        n = max(0, len(tokens) - n_seen + 1)
        # An image, whose keys are negative, is run as a whole.
        while 0 < n < len(tokens) and tokens[n] < 0 and tokens[n - 1] < 0:
            n -= 1
        caches, rest = self.cache.fetch_nearest_cache(self.key, tokens[:n])
        return caches, rest + tokens[n:]

    def insert_cache(self, model: Any, tokens: List[int], prompt_cache: Any) -> None:
        self.cache.insert_cache(self.key, tokens, prompt_cache)

    # For upstream's log.

    def __len__(self):
        return len(self.cache)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def stats_by_type(self) -> Dict[str, Dict[str, int]]:
        return self.cache.stats_by_type()


class ResumedStopSequences(StopSequences):
    """Stop sequences of a request that goes on after ``generated``."""

    def __init__(self, sequences: StopSequences, generated: List[int]):
        self.sequences = sequences
        self.generated = generated

    def matcher(self) -> StopSequences.Matcher:
        matcher = self.sequences.matcher()
        for token in self.generated:
            matcher.advance(token)
        return matcher

"""A request, and the tokens of its answer: what goes between a handler and the generation
thread.

Rules:
1. Plain Python only: no arrays, and nothing that owns one.
2. The events of a request end with a token that has a finish reason, or with a
   ``RequestError``.
"""

import time
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from mlx_lm.generate import StopSequences
from mlx_lm.server import CompletionRequest

from ..errors import RequestError, too_long
from ..interfaces import Clock, RequestInfo, RequestStats
from .mailbox import Mailbox, Turnstile
from .served_model import ServedModel

# A handler that sends its answer in one piece is woken after so many tokens, and not after
# each of them.
TOKENS_PER_WAKE = 32


class Token(NamedTuple):
    """One generated token.

    Args:
        id (int): Its id; negative if it is none, and only ends the answer.
        logprob (Optional[float]): Its log probability, if the request asked for it.
        top (Tuple): ``(id, logprob)`` of the most likely tokens, if the request asked.
        finish_reason (Optional[str]): "stop" or "length" if it is the last token, or
          "timeout" if there was no time for more, also because the server ends.
    """

    id: int
    logprob: Optional[float] = None
    top: Tuple[Tuple[int, float], ...] = ()
    finish_reason: Optional[str] = None


# Ends an answer that is to have no tokens, and one for which there is no time.
NO_TOKEN = Token(-1, finish_reason="length")
NO_TIME = Token(-1, finish_reason="timeout")


class PromptLogprobs(List[Token]):
    """The tokens of a prompt with their log probabilities: one list for all answers to it.

    Attributes:
        number (Optional[int]): What it is called among several ranks: as the first of these
          requests.
    """

    number: Optional[int] = None


class Answers:
    """The answers to one HTTP request: one for each of its prompts and of ``n``. Brings their
    tokens to the handler, which waits for them at one place.

    Args:
        mailbox (Mailbox): Takes the events of all of them, each as ``(request, event)``.
    """

    def __init__(self, mailbox: Mailbox):
        self.mailbox = mailbox
        # What has ended some of them, once the handler has taken it from the mailbox.
        self.errors: Dict["Request", RequestError] = {}
        # Whether one of them has a token.
        self.has_begun = False
        # Those that have ended for the handler.
        self.ended: Set["Request"] = set()

    def receive(self, timeout: float) -> Dict["Request", List[Token]]:
        """Take all tokens that wait for the handler. Blocks until it is to be woken, or until the
        timeout; there may be no token then.

        Args:
            timeout (float): Seconds.

        Raises:
            RequestError: What ended one of the requests on the generation thread, once all
              tokens that came before it were taken. Not if its answer had ended before.
        """
        tokens: Dict["Request", List[Token]] = {}
        if not self.errors:
            for request, event in self.mailbox.take(timeout):
                if not isinstance(event, RequestError):
                    tokens.setdefault(request, []).append(event)
                elif request not in self.ended:
                    self.errors[request] = event
        if self.errors and not tokens:
            raise next(iter(self.errors.values()))
        return tokens

    def end(self, request: "Request") -> None:
        """An answer has ended for the handler, at a stop word for example: what ends its
        request later ends none of the others."""
        self.ended.add(request)
        self.errors.pop(request, None)


@dataclass(eq=False, kw_only=True)
class Request(RequestInfo):
    """A request on its way through the engine.

    Args:
        model (ServedModel): The model that serves it.
        completion (CompletionRequest): The request as upstream's functions take it.
        initial_state (str): The state in which upstream's text state machine starts.
        sampler (str): The name of its sampler.
        constraint (Any): What restricts its tokens, if anything does: a
          ``sampling.constraints.RowConstraint`` in its first state.
        prompt_logprobs (Optional[PromptLogprobs]): The tokens of its prompt with their log
          probabilities, if it asks for them. One list for all answers to a prompt, which is
          empty until they are computed.
        clock (Clock): The clock of ``arrival``, ``started`` and ``first_token``.
        timeout (Optional[float]): Seconds after its arrival at which it is ended.
        shares_cache (bool): Whether its KV may be used for requests with other API keys.
        started (Optional[float]): When it first started to run.
        first_token (Optional[float]): When it got its first token.
        is_suspect (bool): Whether a step has failed in which it took part.
        cancelled (bool): Whether nobody waits for its answer any more.
        finished (bool): Whether its last event was made.
        forgotten (bool): Whether the scheduler policy was told that it has ended.
        index (int): Its place among the answers to one HTTP request.
        answers (Answers): Takes its events to the handler.
        number (Optional[int]): What it is called among several ranks, from when the generation
          thread has it.
        reads_each (bool): Whether the handler wants each token as soon as it is made.
    """

    model: ServedModel
    completion: CompletionRequest
    initial_state: str = "normal"
    sampler: str = "default"
    constraint: Any = None
    prompt_logprobs: Optional[PromptLogprobs] = None
    clock: Clock = time.monotonic
    timeout: Optional[float] = None
    shares_cache: bool = False
    started: Optional[float] = None
    first_token: Optional[float] = None
    is_suspect: bool = False
    cancelled: bool = False
    finished: bool = False
    forgotten: bool = False
    index: int = 0
    answers: Answers = field(default_factory=lambda: Answers(Mailbox(Turnstile())))
    number: Optional[int] = None
    reads_each: bool = True

    @property
    def vocabulary_size(self) -> int:
        return self.model.vocabulary_size

    @property
    def begins_in_reasoning(self) -> bool:
        return self.initial_state == "reasoning"

    @property
    def cache_key(self) -> Tuple[Any, ...]:
        owner = None if self.shares_cache else self.key_name
        salt = self.body.get("cache_salt")
        if owner is None and salt is None:
            return self.model.key
        return (*self.model.key, owner, salt)

    @property
    def tokens(self) -> List[int]:
        """The tokens of its prompt and of its answer so far."""
        return self.prompt + self.generated

    @property
    def awaits_logprobs(self) -> bool:
        """Whether the log probabilities of its prompt have to be computed first."""
        return self.prompt_logprobs == []

    @property
    def prompt_field(self) -> str:
        """The field of the body that the prompt is made of."""
        return "messages" if self.completion.messages else "prompt"

    @cached_property
    def end_tokens(self) -> Set[int]:
        """The tokens that end its answer, and have no place in its text."""
        ids = set(self.body.get("stop_token_ids", ()))
        if not self.body.get("ignore_eos"):
            ids |= self.model.tokenizer.eos_token_ids
        return ids

    @property
    def stop_sequences(self) -> StopSequences:
        """Its end tokens, as upstream looks for them."""
        if self.end_tokens == self.model.tokenizer.eos_token_ids:
            return self.model.end_of_text
        return StopSequences([(token,) for token in self.end_tokens])

    @property
    def min_tokens(self) -> int:
        """Before its answer has so many tokens, no end token and no stop word ends it."""
        return int(self.body.get("min_tokens", 0))

    def check_tokens(self) -> None:
        """Refuse token ids that the model does not have: MLX would read or write beyond its
        arrays.

        Raises:
            RequestError: A 400 that names the field.
        """
        n = self.model.vocabulary_size
        prompt = self.completion.prompt
        fields = {
            "prompt": prompt if isinstance(prompt, list) else (),
            "logit_bias": self.args.logits.logit_bias or (),
            "stop_token_ids": self.body.get("stop_token_ids", ()),
        }
        for name, ids in fields.items():
            if any(not 0 <= i < n for i in ids):
                raise RequestError(
                    400, f"token ids of {name} must be from 0 to {n - 1}", name
                )
        # Upstream's top-k filter cannot keep as many tokens as there are.
        if self.args.sampling.top_k >= n:
            self.args.sampling.top_k = 0

    def fit_to_context(self) -> None:
        """Check that the prompt fits into the model's context. ``max_tokens`` is lowered until
        the answer fits too: it is the most that the client takes, not what it asks for.

        Raises:
            RequestError: If the prompt is empty or too long.
        """
        prompt_field = self.prompt_field
        n_prompt, limit = len(self.prompt), self.model.context_length
        if not n_prompt:
            raise RequestError(400, f"{prompt_field} gives no tokens", prompt_field)
        if limit is None:
            return
        if n_prompt + min(1, self.args.max_tokens) > limit:
            raise too_long(limit, f"the prompt has {n_prompt}", prompt_field)
        self.args.max_tokens = min(self.args.max_tokens, limit - n_prompt)

    @property
    def deadline(self) -> float:
        """When it is ended if it is not finished, in seconds of its clock."""
        return inf if self.timeout is None else self.arrival + self.timeout

    @property
    def is_late(self) -> bool:
        """Whether it has taken longer than its timeout."""
        return self.clock() >= self.deadline

    def stop(self, reason: str) -> None:
        """End it before it is finished, because no request is served any more. A stream ends
        with an error. Answers in one piece end with what there is: an error would lose it.

        Args:
            reason (str): What the client is told.
        """
        if self.answers.has_begun and not self.stream:
            self.put(NO_TIME)
        else:
            self.put(RequestError(503, reason))

    def stats(
        self,
        finish_reason: str,
        n_tokens: int,
        gaps: Sequence[float] = (),
        ended: Optional[float] = None,
    ) -> RequestStats:
        """How it went (any thread).

        Args:
            finish_reason (str): How its answer has ended.
            n_tokens (int): Tokens of its answer, as in ``usage``.
            gaps (Sequence[float]): Seconds between each two of them, if they were streamed.
            ended (Optional[float]): When it has ended; if not given, now.
        """

        def since_arrival(when: Optional[float]) -> Optional[float]:
            return None if when is None else when - self.arrival

        return RequestStats(
            finish_reason,
            since_arrival(self.started),
            since_arrival(self.first_token),
            since_arrival(self.clock() if ended is None else ended) or 0.0,
            len(self.prompt),
            self.n_matched,
            n_tokens,
            gaps,
        )

    def put(self, event: Union[Token, RequestError]) -> None:
        """Give an event to the handler. An error is the last event, and nothing follows the
        last one."""
        if not self.finished:
            self.answers.mailbox.turnstile.put([self.note(event)])

    def note(self, event: Union[Token, RequestError]) -> Tuple[Mailbox, Any, bool]:
        """Take an event into account.

        Returns:
            Tuple: What ``Turnstile.put`` takes: the mailbox, the event, and whether it is
            worth waking the handler.
        """
        wakes = self.reads_each
        if isinstance(event, Token):
            if event.id >= 0:
                if self.first_token is None:
                    self.first_token = self.clock()
                self.generated.append(event.id)
                self.answers.has_begun = True
                self.n_generated += 1
            self.finished = event.finish_reason is not None
            wakes = wakes or self.n_generated % TOKENS_PER_WAKE == 0
        else:
            self.finished = True
        return self.answers.mailbox, (self, event), wakes or self.finished

    def receive(self, timeout: float) -> List[Token]:
        """Take all tokens that wait for the handler, if it is the only answer; see
        ``Answers.receive``."""
        return self.answers.receive(timeout).get(self, [])

    def sibling(self, i: int, index: int) -> "Request":
        """The ``i``-th answer to the same prompt. None of them has started.

        Args:
            i (int): Added to its seed, if it has one.
            index (int): Its place among the answers to one HTTP request.
        """
        args = copy(self.args)
        if args.seed is not None:
            args.seed = (args.seed + i) % 2**64
        return replace(self, args=args, index=index, generated=[])

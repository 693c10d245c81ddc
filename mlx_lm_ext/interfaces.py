"""What policies see, and what they must provide.

Rules:
1. A policy proposes, the core decides: it returns an order, a number or tokens, and
   changes nothing that it is given but ``Entry.data``.
2. All methods run on the generation thread, between the steps of everyone: they must
   return in microseconds.
3. A policy that raises, or returns what it may not, is named in the log and replaced
   by the built-in one for the rest of the process; the requests go on.
"""

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Optional, Tuple

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx_lm.server import GenerationArguments

Clock = Callable[[], float]


@dataclass(eq=False)
class Entry:
    """KV that the prompt cache holds: of a run of tokens, and not of those before it.

    Args:
        n_tokens (int): Tokens of the run.
        nbytes (int): Bytes that its removal frees; 0 if it only leads to others. It
          changes when the state of a recurrent layer is stored, or leaves.
        depth (int): Tokens from the start of the prompt to its end.
        cache_type (str): "system", "user" or "assistant": what it ends, or was cut from.
          KV that can be cut anywhere is "system", or "assistant" for all that follows.
        model_key (Any): The model, the adapter and the draft model that made it, and
          the request's ``cache_salt`` if it had one.
        created (float): When it was stored, in seconds of the clock.
        last_hit (float): When a request last took it, or left something after it; at
          first, ``created``.
        hits (int): How many requests have used it.
        recompute_cost (float): Tokens to prefill to make it again.
        data (Any): The policy's own; the core never reads it.
    """

    n_tokens: int
    nbytes: int
    depth: int
    cache_type: str
    model_key: Any
    created: float
    last_hit: float
    recompute_cost: float
    hits: int = 0
    data: Any = None

    def become(self, cache_type: str) -> None:
        """Take another type, except that a system prompt stays one (the core's)."""
        if self.cache_type != "system":
            self.cache_type = cache_type


class EvictionPolicy(ABC):
    """Decides which entry leaves the prompt cache when it is full.

    Args:
        args (argparse.Namespace): The command line, with the plugins' own flags.
        clock (Clock): Seconds that never go back. Use it, and not ``time``, so that
          tests need not wait.
    """

    name: str

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.clock = clock

    def on_insert(self, entry: Entry) -> None:
        """An entry was stored."""

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        """A request takes the first ``n_tokens`` tokens from this entry."""

    def on_split(self, parent: Entry, child: Entry) -> None:
        """An entry was cut in two. ``child`` keeps the history and ``data`` of the
        whole; ``parent``, the tokens before it, is new and has a copy of both."""

    def on_remove(self, entry: Entry, reason: str) -> None:
        """An entry has left: "evicted" or "expired"."""

    def evictable(self, entry: Entry) -> bool:
        """False pins an entry that nothing follows; others cannot be evicted. When only
        pinned ones are left and the cache is still too large, they leave too."""
        return True

    @abstractmethod
    def priority(self, entry: Entry) -> Any:
        """Of the entries that nothing follows, the one with the lowest value leaves
        first. Any values that compare will do. Changes nothing, and takes the same time
        however full the cache is."""

    def expired(self, now: float) -> Iterable[Entry]:
        """Entries to drop although there is room, with what follows them. Asked every
        few seconds."""
        return ()


@dataclass(eq=False)
class RequestInfo:
    """What plugins see of a request.

    Args:
        id (str): The id of its answer.
        args (GenerationArguments): mlx-lm's sampling parameters and limits, with the
          defaults filled in: ``args.sampling.temperature``, ``args.max_tokens``, ...
        body (Dict[str, Any]): The JSON that the client sent. Fields that the server
          does not know are left to plugins.
        arrival (float): When it came, in seconds of the clock.
        n_prompt (int): Tokens of its prompt.
        n_matched (int): Those of them that came from the prompt cache; 0 until it runs,
          unless the scheduler policy wants to know what it would find.
        n_generated (int): Tokens of its answer so far.
    """

    id: str
    args: "GenerationArguments"
    body: Dict[str, Any] = field(default_factory=dict)
    arrival: float = 0.0
    n_prompt: int = 0
    n_matched: int = 0
    n_generated: int = 0

    @property
    def max_tokens(self) -> int:
        """The most tokens that its answer may have."""
        return self.args.max_tokens

    @property
    def stream(self) -> bool:
        """Whether the client reads the answer as it is made."""
        return self.body.get("stream", False)

    @property
    def priority(self) -> int:
        """What the client asked for; lower is earlier, 0 unless it said."""
        return self.body.get("priority", 0)

    @property
    def user(self) -> Optional[str]:
        """Who the client says it is for."""
        return self.body.get("user")


@dataclass(frozen=True)
class RequestStats:
    """How a request went.

    Args:
        finish_reason (str): "stop", "length", "tool_calls", "cancelled" when the client
          left, or "error".
        queue_seconds (Optional[float]): From its arrival until it began to run.
        ttft (Optional[float]): Seconds from its arrival to its first token.
        seconds (float): From its arrival to its end.
    """

    finish_reason: str
    queue_seconds: Optional[float]
    ttft: Optional[float]
    seconds: float


@dataclass(frozen=True)
class SchedulerView:
    """What a scheduler policy sees of the server.

    Args:
        now (float): Seconds of the clock.
        running (Tuple[RequestInfo, ...]): The requests in the batch.
        batch_size (int): How many can run.
    """

    now: float
    running: Tuple[RequestInfo, ...]
    batch_size: int


class SchedulerPolicy(ABC):
    """Decides which request starts next, and how much prefill a step may do.

    Args:
        args (argparse.Namespace): The command line, with the plugins' own flags.
        clock (Clock): Seconds that never go back.
    """

    name: str

    # Up to how many waiting requests ``n_matched`` is looked up for ``order``.
    most_matched = 0

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.clock = clock

    def order(
        self, waiting: List[RequestInfo], view: SchedulerView
    ) -> Optional[List[RequestInfo]]:
        """Who starts first. Asked when there is room and someone came or left.

        Args:
            waiting (List[RequestInfo]): In order of arrival.

        Returns:
            The same requests in another order; those left out follow in order of
            arrival. ``None`` keeps that order.
        """
        return None

    def prefill_tokens(self, view: SchedulerView) -> Optional[int]:
        """How many tokens of prompts the next step may process beside decoding. Asked
        in each step that has prompts to process.

        Returns:
            ``None`` for no limit but ``--prefill-step-size``. The padding of short
            prompts beside long ones counts. At least one token of each prompt is
            processed, and a prompt starts when those before it have fewer tokens left
            than this.
        """
        return None

    def on_tokens(self, counts: List[Tuple[RequestInfo, int]]) -> None:
        """A step generated so many tokens for each of these requests."""

    def on_finish(self, request: RequestInfo) -> None:
        """A request has ended in any way, or left before it ran."""


class BatchSampler(ABC):
    """Chooses the next tokens of those rows of the batch that use it.

    One object is made for each request. If others use the sampler already, its row joins
    theirs before it is ever called: ``extend`` gives it to the object that has them.
    A sampler without state for each row needs ``__call__`` only.

    Args:
        args (argparse.Namespace): The command line, with the plugins' own flags.
        request (RequestInfo): The row's request.
        tokenizer (TokenizerWrapper): The model's tokenizer.
    """

    name: str

    # False if the order of the logits is enough for its rows, as for the most likely
    # token: log probabilities are not computed when no row needs them.
    needs_logprobs = True

    def __init__(
        self, args: argparse.Namespace, request: RequestInfo, tokenizer: Any
    ) -> None:
        pass

    def extend(self, other: "BatchSampler") -> None:
        """Take over the rows of ``other``; they come after its own."""

    def filter(self, keep: List[int]) -> None:
        """Keep only these of its rows, in this order."""

    @abstractmethod
    def __call__(self, logprobs: "mx.array") -> "mx.array":
        """Sample.

        Args:
            logprobs (mx.array): Log probabilities of shape (rows, vocabulary).

        Returns:
            Token ids of shape (rows,), not evaluated.
        """

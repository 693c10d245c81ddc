"""The classes that plugins derive from, and what their methods are given.

``hookspecs.py`` says how a plugin registers them. This file says what each method is for,
when the server calls it, and what it may return.

Rules:
1. A policy proposes and the server decides: a method returns an order, a number or
   tokens. It changes nothing that it is given, but for ``Entry.data``.
2. Methods of policies and samplers run on the generation thread, where every request waits
   for them: they must return in microseconds.
3. A policy that raises, or returns what it may not, is named in the log once. The built-in
   one replaces it until the server ends, and the requests go on. Nothing can replace a
   constraint: its request fails.
4. ``testing`` checks that a policy or a sampler keeps this contract, without a server.
"""

import argparse
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Optional,
    Sequence,
    Tuple,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.server import GenerationArguments

# Gives seconds that never go back.
Clock = Callable[[], float]


@dataclass(eq=False)
class Entry:
    """A part of the prompt cache: the KV of a run of tokens.

    The prompt cache is a radix tree. The run of an entry follows the run of its parent,
    and a prompt is the runs on the way from the root to its last entry. An entry holds the
    KV of its own run only, and never that of the tokens before it. Where two prompts
    differ, an entry is cut in two.

    Args:
        n_tokens (int): Tokens of the run.
        nbytes (int): Bytes that its removal frees. 0 if the entry only leads to others. It
          changes when the state of a recurrent layer is stored or dropped.
        depth (int): Tokens from the start of the prompt to the end of the run.
        cache_type (str): Which part of a prompt ends here: "system", "user" or
          "assistant". For models whose KV can be cut after any token, it is "system" for
          a system prompt and "assistant" for all that follows.
        model_key (Any): The model, the adapter and the draft model that made the KV, the
          ``cache_salt`` of the request if it had one, and, without ``--share-cache``, the name of
          its API key. Entries with different keys are in different trees.
        created (float): When it was stored, in seconds of the clock.
        last_hit (float): When a request last used it, or stored something after it. At
          first it equals ``created``.
        hits (int): How many requests have used it.
        recompute_cost (float): Tokens that have to be prefilled to make the entry again,
          its parents being there: those of its own run. For ordinary KV it is proportional
          to ``nbytes``, so that the cost of a byte is the same for all entries. It differs
          where an entry also holds the state of recurrent or sliding-window layers.
        data (Any): For the policy's own use, None at first. The server never reads it.
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


class EvictionPolicy(ABC):
    """Decides what leaves the prompt cache when it is full.

    Used only with ``--use-prompt-cache``. Entries can be keys of a dictionary. To know all
    entries, keep those of ``on_insert`` and the parents of ``on_split`` until their
    ``on_remove``, which is called for each entry that leaves.

    Args:
        args (argparse.Namespace): The command line, with the flags that plugins added.
        clock (Clock): Seconds that never go back.
    """

    name: str

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.clock = clock

    def on_insert(self, entry: Entry) -> None:
        """An entry was stored."""

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        """A request took ``n_tokens`` of an entry's tokens from the cache. Called for each
        entry on the way, those of the first tokens first."""

    def on_split(self, parent: Entry, child: Entry) -> None:
        """An entry was cut in two. ``child`` is the entry that was known, with its history
        and fewer tokens. ``parent`` is new: it has the first tokens and the same history,
        and its ``data`` is None."""

    def on_remove(self, entry: Entry, reason: str) -> None:
        """An entry has left. ``reason`` is "evicted" or "expired"."""

    def evictable(self, entry: Entry) -> bool:
        """Whether an entry that nothing follows may be evicted. Entries for which this is
        False are pinned: they leave only if the cache is too large without the others.
        """
        return True

    @abstractmethod
    def priority(self, entry: Entry) -> Any:
        """The entry with the lowest priority is evicted first.

        Called only for entries that nothing follows, which are the only ones that can be
        evicted: what many prompts begin with leaves last. May return any values of one kind
        that can be compared with each other: numbers, tuples of numbers, or objects of a
        class. It must change nothing, give the same as long as nothing happens, and take the
        same time however full the cache is.
        """

    def rank(self, entries: List[Entry]) -> List[Tuple[Any, ...]]:
        """The keys by which entries are evicted, the lowest first. The server calls this,
        and this calls ``evictable`` and ``priority``. Replace it only to compute the keys
        of many entries at once.

        Returns:
            A tuple for each entry: whether it is pinned, and its priority. Which other
            entries are ranked with it must not matter.
        """
        return [(not self.evictable(e), self.priority(e)) for e in entries]

    def expired(self, now: float) -> Iterable[Entry]:
        """Entries to drop although there is room, with all that follows them.

        Asked every ten seconds or so, also when the server is idle. Entries that are not
        ``evictable`` are dropped too if they are named here.
        """
        return ()


@dataclass(eq=False)
class RequestInfo:
    """What plugins see of a request.

    Args:
        id (str): The id of its answer.
        args (GenerationArguments): mlx-lm's sampling parameters and limits, with the
          defaults filled in: ``args.sampling.temperature``, ``args.max_tokens``, ...
        body (Dict[str, Any]): The JSON that the client sent, after it was checked: without
          null fields, with one value for none (a ``top_k`` of -1 is 0 here), with the
          arguments of tool calls parsed and images as data URLs.
          Fields that the server does not know are not checked and reach plugins here.
        arrival (float): When it came, in seconds of the clock.
        n_prompt (int): Tokens of its prompt.
        n_known (int): Tokens of its prompt that the prompt cache had when the scheduler
          policy last asked; see ``SchedulerPolicy.most_known``. 0 if it did not ask.
        n_matched (int): Tokens of its prompt that were taken from the prompt cache when it
          started; 0 before that. The answer calls them ``cached_tokens``.
        n_generated (int): Tokens of its answer so far. It may go on to count while the
          tokens after a stop word are dropped: for final counts see ``RequestStats``.
        key_name (Optional[str]): The name of the API key that it came with. None if the
          server asks for none.
        prompt (List[int]): The tokens of its prompt. Those of a prompt with images are not
          known before it starts, and are empty until then.
        segments (List[List[int]]): The prompt, cut where its KV is worth keeping.
        segment_types (List[str]): The cache type of each segment: "system", "user" or
          "assistant".
        generated (List[int]): The tokens of its answer so far.
    """

    id: str
    args: "GenerationArguments"
    body: Dict[str, Any] = field(default_factory=dict)
    arrival: float = 0.0
    n_prompt: int = 0
    n_known: int = 0
    n_matched: int = 0
    n_generated: int = 0
    key_name: Optional[str] = None
    prompt: List[int] = field(default_factory=list)
    segments: List[List[int]] = field(default_factory=list)
    segment_types: List[str] = field(default_factory=list)
    generated: List[int] = field(default_factory=list)

    @property
    def cache_key(self) -> Tuple[Any, ...]:
        """Requests with different keys share no KV. It names the model, the ``cache_salt``
        if there is one, and, without ``--share-cache``, the API key."""
        raise NotImplementedError

    @property
    def vocabulary_size(self) -> int:
        """How many token ids the model has: the width of its logits."""
        raise NotImplementedError

    @property
    def begins_in_reasoning(self) -> bool:
        """Whether the prompt ends within the model's reasoning, so that the answer begins
        with more of it. Not known before the prompt is tokenized."""
        return False

    @property
    def max_tokens(self) -> int:
        """The most tokens that its answer may have."""
        return int(self.args.max_tokens)

    @property
    def stream(self) -> bool:
        """Whether the client reads the answer while it is made."""
        return bool(self.body.get("stream", False))

    @property
    def priority(self) -> int:
        """The field ``priority`` of the request: a lower one starts earlier. 0 if the
        request does not say."""
        return int(self.body.get("priority", 0))

    @property
    def user(self) -> Optional[str]:
        """The field ``user`` of the request: whom the client says that it is for. Without
        one, the name of its API key."""
        return self.body.get("user", self.key_name)


@dataclass(frozen=True)
class RequestStats:
    """How a request went. The counts are final, and those of the answer's ``usage``.

    Args:
        finish_reason (str): "stop", "length", "tool_calls", "timeout" if there was no time for
          more (``--request-timeout``, or the end of the server), "cancelled" if the client left, or "error".
        queue_seconds (Optional[float]): From its arrival until it started; None if it did
          not start.
        ttft (Optional[float]): Seconds from its arrival to its first token; None if it got
          none.
        seconds (float): From its arrival to its end.
        prompt_tokens (int): Tokens of its prompt.
        cached_tokens (int): Tokens of its prompt that were taken from the prompt cache.
        completion_tokens (int): Tokens of its answer, up to what ended it.
        gaps (Sequence[float]): Seconds between each two tokens of a stream, as they came to
          the thread of its connection; none if the answer was not streamed. Of tokens that came together, each has its share
          of the time since those before them.
    """

    finish_reason: str
    queue_seconds: Optional[float]
    ttft: Optional[float]
    seconds: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    gaps: Sequence[float] = ()


@dataclass(frozen=True)
class ServerStatistics:
    """What the server has done since its start, and what it holds.

    Args:
        model (str): The name of the served model.
        status (str): "ok", "loading", "stopping" or "unavailable".
        seconds (float): Since the start.
        n_running (int): Requests in the batch.
        n_waiting (int): Requests that have not started.
        batch_size (int): How many requests can run at a time.
        n_connections (int): Connections that are open.
        prompt_tokens (int): Tokens of the prompts of answers that have started and ended.
        cached_tokens (int): Those of them that were taken from the prompt cache.
        generated_tokens (int): Tokens of all answers.
        n_steps (int): Steps of the batch.
        step_seconds (float): The time that they have taken.
        batch_bytes (int): Bytes of the batch's KV, as of the last second.
        batch_limit (int): The most that it may take; 0 as long as there is no batch.
        cache_bytes (int): Bytes of the prompt cache, as of the last second.
        cache_limit (int): The most that it and the batch may take; 0 without a cache.
        evictions (Dict[str, int]): Entries that have left the prompt cache, by the reason:
          "evicted", "expired" or "superseded".
        policy_seconds (Dict[str, float]): The time that each policy has taken, by its kind and
          its name.
        warm_up_left (int): Pieces of the warm-up that have not run.
    """

    model: str
    status: str
    seconds: float
    n_running: int
    n_waiting: int
    batch_size: int
    n_connections: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    n_steps: int
    step_seconds: float
    batch_bytes: int
    batch_limit: int
    cache_bytes: int
    cache_limit: int
    evictions: Dict[str, int]
    policy_seconds: Dict[str, float]
    warm_up_left: int


@dataclass(frozen=True)
class SchedulerView:
    """What a scheduler policy sees of the server.

    Args:
        now (float): Seconds of the clock.
        running (Tuple[RequestInfo, ...]): The requests in the batch.
        batch_size (int): How many requests can run at a time.
        gap_tokens (Optional[int]): How many tokens of prompts the next step can process
          beside its decoding without a longer gap than ``--max-gap`` between two tokens of a
          stream. It follows from the times of the last steps. None before the first.
    """

    now: float
    running: Tuple[RequestInfo, ...]
    batch_size: int
    gap_tokens: Optional[int] = None


class SchedulerPolicy(ABC):
    """Decides which request starts next, and how many tokens of prompts a step processes.

    Each request is reported once at most: ``on_start`` when it first starts, ``on_finish``
    when it has ended or left before that.

    Args:
        args (argparse.Namespace): The command line, with the flags that plugins added.
        clock (Clock): Seconds that never go back.
    """

    name: str

    # For ``order``, the server looks up ``n_known`` of each waiting request if there are
    # no more of them than this. A lookup takes a time in proportion to the prompt.
    most_known = 0

    def __init__(self, args: argparse.Namespace, clock: Clock):
        self.clock = clock

    def order(
        self, waiting: Sequence[RequestInfo], view: SchedulerView
    ) -> Optional[Sequence[RequestInfo]]:
        """Who starts first.

        Called before a step if there is room in the batch and, since the last call, a
        request came, ended or left. The server starts the requests in this order, as many
        as fit. A request whose turn it is may have to wait for another one that runs the
        same prefix; those after it then go first.

        Args:
            waiting (Sequence[RequestInfo]): The requests that wait, in order of arrival.
              Some may have run before and have ``n_generated`` tokens: there was no memory
              for their KV, or a step has failed.
            view (SchedulerView): The server.

        Returns:
            The same requests in another order. Those that are left out follow in order of
            arrival. ``None`` keeps the order of arrival.
        """
        return None

    def prefill_tokens(self, view: SchedulerView) -> Optional[int]:
        """How many tokens of prompts the next step may process beside the decoding.

        Called before each step that has prompts to process, but for the few that process
        none, to see how long the decoding takes. A request starts only if the prompts that
        started before it have fewer tokens left than this. The padding of short prompts
        beside others counts, and at least one token of one of them is processed.
        ``view.gap_tokens`` keeps the gaps of running streams within ``--max-gap``.

        Returns:
            At least 1, or ``None`` for ``--prefill-step-size``.
        """
        return None

    def on_start(self, request: RequestInfo) -> None:
        """A request has left the waiting list and runs for the first time."""

    def on_tokens(self, counts: Sequence[Tuple[RequestInfo, int]]) -> None:
        """A step has generated so many tokens for each of these requests. Called before
        their ``n_generated`` counts them."""

    def on_finish(self, request: RequestInfo) -> None:
        """A request has ended in any way, or left before it started."""


class BatchSampler(ABC):
    """Chooses the next tokens of those rows of the batch that use it.

    One object is made for each request. If other rows use the same sampler already, the
    new object is given to theirs with ``extend`` before it is ever called. A sampler that
    keeps nothing for each row needs ``name`` and ``__call__`` only. A request that goes on
    after a failed step, or after a wait for memory, gets another object: its
    ``n_generated`` is not 0 then.

    Rows of very different lengths run in batches of their own. The object of the rows that
    are parted is copied with ``copy.deepcopy`` (not the arguments of its constructor), and
    each of the two gets ``filter``. If it cannot be copied, new objects are made.

    What it draws at random comes from ``request.args.seed``, or from ``mx.random``, so that it
    can be drawn again.

    Args:
        args (argparse.Namespace): The command line, with the flags that plugins added.
        request (RequestInfo): The request of the row.
        tokenizer (TokenizerWrapper): The model's tokenizer. A word has several spellings in
          tokens: ``tokenizer.encode("yes")`` and ``tokenizer.encode(" yes")`` differ for
          most models, and a word may be more than one token.
    """

    name: str

    # False if the sampler needs only the order of the values, as for the most likely
    # token. It is then given logits, which saves their normalization.
    needs_logprobs = True

    def __init__(
        self, args: argparse.Namespace, request: RequestInfo, tokenizer: Any
    ) -> None:
        pass

    def extend(self, other: "BatchSampler") -> None:
        """Take over the rows of ``other``, which come after its own."""

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""

    @abstractmethod
    def __call__(self, logprobs: "mx.array") -> "mx.array":
        """Choose a token for each row.

        Args:
            logprobs (mx.array): Log probabilities of shape (rows, vocabulary), after the
              penalties and the logits processors of the rows.

        Returns:
            Token ids of shape (rows,). Do not evaluate them: the server does, once for the
            whole step. A token whose value is minus infinity is forbidden.
        """


class Constraint(ABC):
    """Says which tokens one answer may have next: those of a grammar, for instance.

    The server calls its methods on a thread of their own while the model runs, one
    constraint after the other. A step of the batch waits until all masks are filled.

    What a row is not allowed gets a log probability of minus infinity, after the penalties
    and the logits processors, and before its token is chosen.
    """

    @abstractmethod
    def advance(self, token: int) -> None:
        """The answer has got this token. Its last one may be a token that ends it.

        A request that goes on after a failed step, or after a wait for memory, gets a new
        copy of its constraint, and all its tokens again.
        """

    @abstractmethod
    def fill(self, mask: "np.ndarray") -> None:
        """Say which tokens are allowed next.

        Args:
            mask (np.ndarray): Of type uint32 and shape (ceil(vocabulary / 32),). Bit ``i % 32`` of
              word ``i // 32`` stands for token ``i``, and all are set. Clear those that are
              not allowed, in place. An answer that may end here may have the tokens that
              end it, ``tokenizer.eos_token_ids``. At least one must be left.
        """

    def copy(self) -> "Constraint":
        """One in the same state, which goes on by itself. A class that keeps the request or the
        tokenizer needs a method of its own, because they cannot be copied."""
        return deepcopy(self)

    @classmethod
    def fill_all(cls, constraints: Sequence["Constraint"], masks: "np.ndarray") -> None:
        """Fill the masks of several rows. A class that can do it faster at once than one by
        one has this method of its own.

        Args:
            constraints (Sequence[Constraint]): Of this class, one for each row.
            masks (np.ndarray): Of shape (rows, ceil(vocabulary / 32)).
        """
        for constraint, mask in zip(constraints, masks):
            constraint.fill(mask)

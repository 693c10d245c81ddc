"""The eviction and the scheduler policy in use: each call is timed, and a policy that raises is
replaced by the built-in one.

Rules:
1. Within a ``try`` that blames a policy are only calls of its methods, and checks of what
   they return. What the server itself does there would be blamed on the policy.
2. Whatever is raised counts as a failure: ``sys.exit()`` in a plugin ends no thread.
"""

import argparse
import logging
import time
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

from ..errors import RequestError
from ..interfaces import (
    Clock,
    Constraint,
    Entry,
    EvictionPolicy,
    RequestInfo,
    RequestStats,
    SchedulerPolicy,
    SchedulerView,
)
from .guarded_constraint import GuardedConstraint
from .guarded_sampler import GuardedSampler
from .loading import (
    EVICTION,
    SAMPLER,
    SCHEDULER,
    PluginError,
    Plugins,
    PolicyKind,
    one_line,
)
from .policy_class import PolicyClass

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Guarded:
    """The one object of a policy class. Subclasses have the methods of its interface.

    Args:
        policy_class (PolicyClass): The class.
        args (Any): What the class takes.
    """

    def __init__(self, policy_class: PolicyClass, *args: Any):
        self.policy_class = policy_class
        self.args = args
        self.policy = policy_class.cls(*args)

    def ask(self, question: Callable[[Any], T]) -> T:
        """The result of ``question(policy)``, which calls methods of the policy and checks
        what they return. It does nothing else: if it raises, the built-in policy replaces
        the policy and is asked again."""
        start = time.perf_counter()
        try:
            return question(self.policy)
        except BaseException as e:
            self.replace(self.policy, e)
            return question(self.policy)
        finally:
            self.policy_class.seconds += time.perf_counter() - start

    def replace(self, policy: Any, error: BaseException) -> None:
        """Put the built-in policy in the place of ``policy``, which has raised ``error``."""
        if policy is self.policy:
            self.policy_class.fail(type(policy), error)
            self.policy = self.policy_class.cls(*self.args)

    def overrides(self, method: str) -> bool:
        """Whether the policy has an optional method of its own."""
        interface = self.policy_class.kind.interface
        return getattr(type(self.policy), method) is not getattr(interface, method)


NUMBERS = (int, float, bool)


def kind_of_priority(value: Any) -> str:
    """Priorities of the kinds "number" and "numbers" can be compared with all of their
    kind. Those of the kind "other" may raise when they are compared."""
    if type(value) in NUMBERS:
        return "number"
    if type(value) is tuple and all(type(v) in NUMBERS for v in value):
        return "numbers"
    return "other"


class GuardedPriority:
    """A priority that is compared without raising.

    Args:
        value (Any): What a policy has given.
        fail (Callable): Is told what a comparison raises.
    """

    def __init__(self, value: Any, fail: Callable[[BaseException], None]):
        self.value = value
        self.fail = fail

    def __lt__(self, other: "GuardedPriority") -> bool:
        try:
            return bool(self.value < other.value)
        except BaseException as e:
            self.fail(e)
            return False


class GuardedEviction(Guarded, EvictionPolicy):
    """An eviction policy whose methods do not raise."""

    # The policy that has ranked entries last, the kind of its priorities, and how many
    # policies have ranked entries.
    ranker: Any = None
    kind: Optional[str] = None
    n_rankers = 0

    def on_insert(self, entry: Entry) -> None:
        self.ask(lambda policy: policy.on_insert(entry))

    def on_hit(self, entry: Entry, n_tokens: int) -> None:
        self.ask(lambda policy: policy.on_hit(entry, n_tokens))

    def on_split(self, parent: Entry, child: Entry) -> None:
        self.ask(lambda policy: policy.on_split(parent, child))

    def on_remove(self, entry: Entry, reason: str) -> None:
        self.ask(lambda policy: policy.on_remove(entry, reason))

    def evictable(self, entry: Entry) -> bool:
        return self.ask(lambda policy: bool(policy.evictable(entry)))

    def priority(self, entry: Entry) -> Any:
        return self.rank([entry])[0]

    def rank(self, entries: List[Entry]) -> List[Tuple[Any, ...]]:
        """Keys that can be compared with each other and with those of other calls, also
        when the policy was replaced in the meantime."""

        def rank(policy: EvictionPolicy) -> List[Tuple[bool, Any]]:
            ranks = [(bool(p), value) for p, value in policy.rank(list(entries))]
            if len(ranks) != len(entries):
                raise ValueError(f"it ranked {len(ranks)} of {len(entries)} entries")
            if policy is not self.ranker:
                self.ranker, self.kind = policy, None
                self.n_rankers += 1
            kinds = {kind_of_priority(value) for _, value in ranks}
            if self.kind is not None:
                kinds.add(self.kind)
            if len(kinds) > 1:
                raise TypeError("its priorities cannot be compared with each other")
            self.kind = next(iter(kinds), None)
            if self.kind == "other":
                fail = partial(self.replace, policy)
                ranks = [(p, GuardedPriority(value, fail)) for p, value in ranks]
            return ranks

        ranks = self.ask(rank)
        return [(pinned, self.n_rankers, value) for pinned, value in ranks]

    def expired(self, now: float) -> Iterable[Entry]:
        def expired(policy: EvictionPolicy) -> List[Entry]:
            entries = list(policy.expired(now))
            if not all(type(entry) is Entry for entry in entries):
                raise TypeError("what it calls expired is not all entries")
            return entries

        return self.ask(expired)


class GuardedScheduler(Guarded, SchedulerPolicy):
    """A scheduler policy whose methods do not raise."""

    @property
    def most_known(self) -> int:  # type: ignore[override]
        return self.ask(lambda policy: int(policy.most_known))

    def order(
        self, waiting: Sequence[RequestInfo], view: SchedulerView
    ) -> Sequence[RequestInfo]:
        """All waiting requests, in the order in which they start."""

        def order(policy: SchedulerPolicy) -> Sequence[RequestInfo]:
            answer = policy.order(list(waiting), view)
            if answer is None:
                return waiting
            first = list(answer)
            ids = {id(request) for request in first}
            if len(ids) < len(first) or not ids <= set(map(id, waiting)):
                raise ValueError(
                    "it ordered a request twice, or one that does not wait"
                )
            return [*first, *(r for r in waiting if id(r) not in ids)]

        return self.ask(order)

    def prefill_tokens(self, view: SchedulerView) -> Optional[int]:
        """At least 1, or ``None`` for no limit."""

        def prefill_tokens(policy: SchedulerPolicy) -> Optional[int]:
            n = policy.prefill_tokens(view)
            return None if n is None else max(1, int(n))

        return self.ask(prefill_tokens)

    def on_start(self, request: RequestInfo) -> None:
        self.ask(lambda policy: policy.on_start(request))

    def on_tokens(self, counts: Sequence[Tuple[RequestInfo, int]]) -> None:
        self.ask(lambda policy: policy.on_tokens(counts))

    def on_finish(self, request: RequestInfo) -> None:
        self.ask(lambda policy: policy.on_finish(request))


class Policies:
    """All policies in use, and the hooks that are called for a request.

    Args:
        plugins (Plugins): The plugins of this process.
        args (argparse.Namespace): The command line, which names the policies.
        clock (Clock): Seconds that never go back.

    Raises:
        PluginError: If no policy has a name that the command line gives, or a policy
          cannot be made.
    """

    def __init__(
        self, plugins: Plugins, args: argparse.Namespace, clock: Clock = time.monotonic
    ):
        self.plugins = plugins
        self.args = args
        self.clock = clock
        self.eviction = self.make(GuardedEviction, EVICTION, args.eviction_policy)
        self.scheduler = self.make(GuardedScheduler, SCHEDULER, args.scheduler)
        self.samplers = self.classes(SAMPLER, args.sampler)

    def classes(self, kind: PolicyKind, name: str) -> Dict[str, PolicyClass]:
        """The classes of a kind by name. ``name`` has to be one of them."""
        found = self.plugins.registered(kind)
        if kind.default not in found:
            raise PluginError("-p no:builtin: the built-in policies are needed")
        if name not in found:
            names = ", ".join(found)
            raise PluginError(
                f"{kind.flag} must be one of {names}, not {name!r}"
                f"{self.plugins.hint(kind, name)}"
            )
        default = found[kind.default].cls
        return {n: PolicyClass(kind, n, *found[n], default) for n in found}

    def make(
        self, guarded: Callable[[PolicyClass, Any, Any], T], kind: PolicyKind, name: str
    ) -> T:
        """The guarded object of the class with a name."""
        policy_class = self.classes(kind, name)[name]
        try:
            return guarded(policy_class, self.args, self.clock)
        except (Exception, SystemExit) as e:
            raise PluginError(
                f"{policy_class.plugin}: the {kind.title} {name!r} cannot be made: "
                f"{one_line(e)}"
            )

    def make_sampler(
        self, name: str, request: RequestInfo, tokenizer: Any
    ) -> GuardedSampler:
        """The sampler of a request, guarded."""
        return GuardedSampler(self.samplers[name], self.args, request, tokenizer)

    def make_logits_processors(
        self, request: RequestInfo, tokenizer: Any
    ) -> List[Callable[[Any, Any], Any]]:
        """The logits processors of all plugins for a request.

        Raises:
            RequestError: If a plugin refuses the request.
            RuntimeError: If a plugin fails.
        """
        processors: List[Callable[[Any, Any], Any]] = []
        hook = "mlx_lm_make_logits_processors"
        for label, call in self.plugins.each(
            hook, request=request, tokenizer=tokenizer, args=self.args
        ):
            try:
                processors += [
                    partial(run_logits_processor, label, p) for p in call() or ()
                ]
            except RequestError:
                raise
            except BaseException as e:
                raise RuntimeError(f"{label}: {hook} failed") from e
        return processors

    def make_constraint(
        self, request: RequestInfo, tokenizer: Any
    ) -> Optional[GuardedConstraint]:
        """The constraint of a request, guarded. None if no plugin gives one.

        Raises:
            RequestError: If a plugin refuses the request, or two give a constraint.
            RuntimeError: If a plugin fails.
        """
        found: Optional[GuardedConstraint] = None
        hook = "mlx_lm_make_constraint"
        for label, call in self.plugins.each(
            hook, request=request, tokenizer=tokenizer, args=self.args
        ):
            try:
                constraint = call()
                if constraint is None:
                    continue
                if not isinstance(constraint, Constraint):
                    raise TypeError(f"{constraint!r} is not an interfaces.Constraint")
            except RequestError:
                raise
            except BaseException as e:
                raise RuntimeError(f"{label}: {hook} failed") from e
            if found is not None:
                message = f"{found.label} and {label} both restrict the answer"
                raise RequestError(400, message)
            found = GuardedConstraint(label, constraint, request.vocabulary_size)
        return found

    def request_finished(self, request: RequestInfo, stats: RequestStats) -> None:
        """Tell all plugins that observe requests."""
        hook = "mlx_lm_request_finished"
        for label, call in self.plugins.each(
            hook, request=request, stats=stats, args=self.args
        ):
            try:
                call()
            except BaseException:
                logger.exception(f"{label}: {hook} failed")

    @property
    def seconds(self) -> Dict[str, float]:
        """How long each policy that was asked has taken, by its kind and name (any thread)."""
        used = [
            self.eviction.policy_class,
            self.scheduler.policy_class,
            *self.samplers.values(),
        ]
        return {f"{c.kind.title} {c.cls.name}": c.seconds for c in used if c.seconds}


def run_logits_processor(
    label: str, processor: Callable[[Any, Any], Any], tokens: Any, logits: Any
) -> Any:
    """Run a plugin's logits processor. What it raises names the plugin."""
    try:
        processed = processor(tokens, logits)
        if processed.shape != logits.shape:
            raise ValueError(f"it returned the shape {processed.shape}")
        return processed
    except BaseException as e:
        raise RuntimeError(f"{label}: a logits processor failed") from e

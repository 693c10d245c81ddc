"""The policies in use: timed, and replaced when one fails.

Rules:
1. Each call of a policy goes through here.
2. A policy that raises is named in the log once. From then on the built-in one of its
   kind does its work.
3. Whatever is raised counts: ``sys.exit()`` in a plugin ends no thread of the server.
"""

import argparse
import logging
import time
from functools import partial
from typing import Any, Callable, Dict, List, Type, TypeVar

from ..errors import RequestError
from ..interfaces import Clock, RequestInfo, RequestStats
from .loading import EVICTION, SAMPLER, SCHEDULER, Kind, PluginError, Plugins, one_line

T = TypeVar("T")


class Slot:
    """A class that was chosen by name, and what its objects have cost.

    Args:
        kind (Kind): What it is for.
        name (str): Its name.
        cls (Type): The class.
        plugin (str): Where it came from.
        default (Type): The built-in class that replaces it if it fails.
    """

    def __init__(self, kind: Kind, name: str, cls: Type, plugin: str, default: Type):
        self.kind = kind
        self.name = name
        self.cls = cls
        self.plugin = plugin
        self.default = default
        self.seconds = 0.0

    def make(self, *args: Any) -> Any:
        """An object of the class; a request that it refuses is no fault of it."""
        cls = self.cls
        try:
            return cls(*args)
        except RequestError:
            raise
        except BaseException as e:
            self.fail(cls, e)
            return self.cls(*args)

    def fail(self, cls: Type, error: BaseException) -> None:
        """Use the built-in class from now on, as ``cls`` has failed.

        Raises:
            BaseException: ``error`` itself, if that is what failed.
        """
        if cls is self.default:
            raise error
        # Several objects of one class can fail.
        if self.cls is cls:
            self.cls = self.default
            logging.error(
                f"The {self.kind.title} {self.name!r} of {self.plugin} failed; "
                f"{self.default.name!r} replaces it",
                exc_info=error,
            )


class Guard:
    """The object of a slot that there is one of.

    Args:
        slot (Slot): Its class.
        args: What the class takes.
    """

    def __init__(self, slot: Slot, *args: Any):
        self.slot = slot
        self.args = args
        self.policy = slot.cls(*args)

    def run(self, use: Callable[[Any], T]) -> T:
        """The result of ``use(policy)``; what that raises is the policy's fault."""
        start = time.perf_counter()
        try:
            return use(self.policy)
        except BaseException as e:
            self.slot.fail(type(self.policy), e)
            self.policy = self.slot.cls(*self.args)
            return use(self.policy)
        finally:
            self.slot.seconds += time.perf_counter() - start

    def has(self, method: str) -> bool:
        """Whether the policy does something in an optional method."""
        interface = self.slot.kind.interface
        return getattr(type(self.policy), method) is not getattr(interface, method)


class Policies:
    """All policies in use, and the hooks that fire for a request.

    Args:
        plugins (Plugins): The plugins of this process.
        args (argparse.Namespace): The command line, which names the policies.
        clock (Clock): Seconds that never go back.

    Raises:
        PluginError: If there is no policy of a name, or one cannot be made.
    """

    def __init__(
        self, plugins: Plugins, args: argparse.Namespace, clock: Clock = time.monotonic
    ):
        self.plugins = plugins
        self.args = args
        self.clock = clock
        self.eviction = self.guard(EVICTION, args.eviction_policy)
        self.scheduler = self.guard(SCHEDULER, args.scheduler)
        self.samplers = self.slots(SAMPLER, args.sampler)

    def slots(self, kind: Kind, name: str) -> Dict[str, Slot]:
        """The classes of a kind. ``name`` and the default have to be among them."""
        found = self.plugins.registered(kind)
        if kind.default not in found:
            raise PluginError("-p no:builtin: the built-in policies are needed")
        if name not in found:
            names = ", ".join(found)
            raise PluginError(f"{kind.flag} must be one of {names}, not {name!r}")
        default = found[kind.default].cls
        return {n: Slot(kind, n, *found[n], default) for n in found}

    def guard(self, kind: Kind, name: str) -> Guard:
        slot = self.slots(kind, name)[name]
        try:
            return Guard(slot, self.args, self.clock)
        except (Exception, SystemExit) as e:
            raise PluginError(
                f"{slot.plugin}: the {kind.title} {name!r} cannot be made: {one_line(e)}"
            )

    def make_logits_processors(
        self, request: RequestInfo, tokenizer: Any
    ) -> List[Callable]:
        """The logits processors of all plugins for a request.

        Raises:
            RequestError: If a plugin refuses the request.
            RuntimeError: If one fails.
        """
        processors = []
        hook = "mlx_lm_make_logits_processors"
        for label, call in self.plugins.each(
            hook, request=request, tokenizer=tokenizer, args=self.args
        ):
            try:
                processors += [partial(process, label, p) for p in call() or ()]
            except RequestError:
                raise
            except BaseException as e:
                raise RuntimeError(f"{label}: {hook} failed") from e
        return processors

    def request_finished(self, request: RequestInfo, stats: RequestStats) -> None:
        """Tell all observers."""
        hook = "mlx_lm_request_finished"
        for label, call in self.plugins.each(
            hook, request=request, stats=stats, args=self.args
        ):
            try:
                call()
            except BaseException:
                logging.exception(f"{label}: {hook} failed")

    def describe_times(self) -> str:
        """How long each policy has run, for the log."""
        slots = [self.eviction.slot, self.scheduler.slot, *self.samplers.values()]
        return ", ".join(
            f"{s.kind.title} {s.name} {s.seconds:.3f} s" for s in slots if s.seconds
        )


def process(label: str, processor: Callable, tokens: Any, logits: Any) -> Any:
    """Run a plugin's logits processor; what it raises names the plugin."""
    try:
        return processor(tokens, logits)
    except BaseException as e:
        raise RuntimeError(f"{label}: a logits processor failed") from e

"""Calls the methods of an object of a plugin, and says what is wrong with them.

Rules:
1. A message names the class, the method and what it was given, and ends with what is right.
2. Only what the plugin's own code raises is blamed on it.
"""

import argparse
import time
import warnings
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence

from ..arguments import parse_arguments
from ..errors import RequestError
from ..interfaces import Entry, RequestInfo, SchedulerView
from ..policies.loading import PolicyKind, objection, one_line

# Seconds of the processor that a call may take on average before it is warned about.
SLOW = 5e-3
# Values of these types cannot be changed in place.
PLAIN = (int, float, str, bool, type(None))


class ContractWarning(UserWarning):
    """Something about a plugin that breaks no contract, and that is seldom meant."""


class ManualClock:
    """Seconds that go on when the trace says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def command_line(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a server with this command line, as classes of plugins get them."""
    args, _ = parse_arguments(list(argv))
    return args


def described(value: Any) -> str:
    """What messages call an argument."""
    if isinstance(value, Entry):
        return f"entry to depth {value.depth}"
    if isinstance(value, RequestInfo):
        return f"request {value.id!r}"
    if isinstance(value, SchedulerView):
        return f"view with {len(value.running)} running"
    if isinstance(value, list) and value and isinstance(value[0], RequestInfo):
        return f"requests {', '.join(request.id for request in value)}"
    if isinstance(value, list) and value and isinstance(value[0], Entry):
        return f"{len(value)} entries"
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return f"{len(value)} counts"
    if hasattr(value, "shape"):
        return f"{str(value.dtype).split('.')[-1]} of shape {tuple(value.shape)}"
    if not isinstance(value, (*PLAIN, list, tuple)):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def contents(value: Any) -> Any:
    """What a method may not change of an argument, in a form that can be compared later."""
    if isinstance(value, Entry):
        return {k: v for k, v in vars(value).items() if k != "data"}
    if isinstance(value, RequestInfo):
        # A body and arguments can be changed in place.
        return {k: v if type(v) in PLAIN else repr(v) for k, v in vars(value).items()}
    if isinstance(value, SchedulerView):
        return contents(list(value.running))
    if isinstance(value, (list, tuple)):
        return [(x, contents(x)) for x in value]
    return None


def changes(value: Any, old: Any, new: Any) -> List[str]:
    """What differs between two ``contents`` of an argument."""
    if isinstance(old, dict):
        names = sorted(k for k in {**old, **new} if old.get(k) != new.get(k))
        return [f"{name} of {described(value)}" for name in names]
    if isinstance(old, list):
        if [x for x, _ in old] != [x for x, _ in new]:
            return ["the list"]
        each = [changes(x, a, b) for (x, a), (_, b) in zip(old, new)]
        return [name for names in each for name in names]
    return []


class Watched:
    """An object of a class that is checked.

    Args:
        kind (PolicyKind): What the class is for.
        cls (Any): The class.
        args (Any): What its constructor takes.

    Raises:
        AssertionError: If the class cannot be registered, or its constructor raises.
    """

    def __init__(self, kind: PolicyKind, cls: Any, *args: Any):
        wrong = objection(kind, cls)
        assert not wrong, wrong
        self.cls = cls
        self.seconds: Dict[str, List[float]] = {}
        self.object: Any = None
        self.object = self.run("__init__", args, lambda: cls(*args))

    def call(
        self, method: str, *args: Any, convert: Optional[Callable[[Any], Any]] = None
    ) -> Any:
        """What a method returns.

        Args:
            method (str): Its name.
            args (Any): What it is given, which it may not change.
            convert (Optional[Callable]): What the server makes of its result, such as a
              list: what that raises counts as raised by the method.
        """

        def use() -> Any:
            result = getattr(self.object, method)(*args)
            return result if convert is None else convert(result)

        return self.run(method, args, use)

    def run(self, method: str, args: Sequence[Any], use: Callable[[], Any]) -> Any:
        before = [contents(arg) for arg in args]
        start = time.thread_time()
        try:
            result = use()
        except (Exception, SystemExit) as e:
            call = self.described(method, args)
            right = "to raise nothing: the server would go on with the built-in one"
            if method == "__init__":
                right = "to raise nothing; for flags of a plugin, pass argv=['-p', its name]"
            if isinstance(e, RequestError):
                right = "to take this request, which has the fields that are in bodies"
            raise AssertionError(
                f"{call} raised {one_line(e)}; right is {right}"
            ) from e
        self.seconds.setdefault(method, []).append(time.thread_time() - start)
        for arg, old in zip(args, before):
            if names := changes(arg, old, contents(arg)):
                right = "to change nothing that it is given"
                if isinstance(arg, Entry):
                    right += " but entry.data"
                self.fail(method, args, f"changed {', '.join(names)}", right)
        return result

    def described(self, method: str, args: Sequence[Any]) -> str:
        return f"{self.cls.__name__}.{method}({', '.join(map(described, args))})"

    def fail(
        self, method: str, args: Sequence[Any], found: str, right: str
    ) -> NoReturn:
        """Raise an ``AssertionError``: what was found in a call, and what would be right."""
        call = self.described(method, args)
        raise AssertionError(f"{call} {found}; right is {right}")

    def is_own(self, method: str) -> bool:
        """Whether the class has a method of its own in the place of an optional one."""
        return any(
            method in vars(cls)
            for cls in self.cls.__mro__
            if cls.__module__ != "mlx_lm_ext.interfaces"
        )

    def warn_if_slow(self) -> None:
        """Warn about the methods that took long, measured without what others run meanwhile."""
        for method, seconds in self.seconds.items():
            mean = sum(seconds) / len(seconds)
            # A policy is made once, and ``rank`` of the interface calls others.
            if mean > SLOW and method != "__init__" and self.is_own(method):
                self.warn(
                    f"{self.cls.__name__}.{method} took {mean * 1e3:.1f} ms on average; every "
                    "request waits for it, so it should take microseconds"
                )

    def warn(self, message: str) -> None:
        warnings.warn(message, ContractWarning, stacklevel=4)

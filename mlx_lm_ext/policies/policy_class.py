"""A class that a plugin has registered, and the built-in class that takes its place after it
has failed.

Rule: a policy that raises is named in the log once. From then on the built-in policy of its
kind does its work.
"""

import logging
from typing import Any, Type

from ..errors import RequestError, one_line
from .loading import PolicyKind

logger = logging.getLogger(__name__)


class PolicyClass:
    """A class that a plugin has registered, and the seconds that its objects have taken.

    Args:
        kind (PolicyKind): What it is for.
        name (str): Its name.
        cls (Type): The class. The built-in one takes its place when it fails.
        plugin (str): The plugin that registered it.
        default (Any): The built-in class.
    """

    def __init__(
        self, kind: PolicyKind, name: str, cls: Type[Any], plugin: str, default: Any
    ):
        self.kind = kind
        self.name = name
        self.cls = cls
        self.plugin = plugin
        self.default = default
        self.seconds = 0.0
        # Whether the log says that its objects cannot be copied.
        self.is_said = False

    @property
    def label(self) -> str:
        return f"The {self.kind.title} {self.name!r} of {self.plugin}"

    def make(self, *args: Any) -> Any:
        """An object of the class. A class that raises ``RequestError`` refuses a request,
        which is no failure of the class."""
        cls = self.cls
        try:
            return cls(*args)
        except RequestError:
            raise
        except BaseException as e:
            self.fail(cls, e)
            return self.cls(*args)

    def fail(self, cls: Type[Any], error: BaseException) -> None:
        """Use the built-in class from now on, because ``cls`` has raised ``error``.

        Raises:
            BaseException: ``error`` itself, if the built-in class has raised it.
        """
        if cls is self.default:
            raise error
        # Several objects of one class may fail.
        if self.cls is cls:
            self.cls = self.default
            logger.error(
                f"{self.label} failed; {self.default.name!r} replaces it",
                exc_info=error,
            )

    def note_uncopied(self, error: BaseException) -> None:
        """Say once that an object of the class is made anew, because a copy of it has raised
        ``error``."""
        if not self.is_said:
            self.is_said = True
            logger.warning(
                f"{self.label} cannot be copied, and is made anew for rows that are parted: "
                + one_line(error)
            )

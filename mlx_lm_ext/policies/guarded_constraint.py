"""The constraint of one row of the batch, whose failure ends its request only.

Rule: only the plugin's own methods, and the checks of what they do, are blamed on it.
"""

from typing import Dict, List, Optional, Sequence, Type

import numpy as np

from ..errors import RequestError
from ..interfaces import Constraint

ALL = 0xFFFFFFFF


class GuardedConstraint:
    """A ``RowConstraint`` of ``sampling/constraints.py``.

    Args:
        label (str): What messages call the plugin that made the constraint.
        constraint (Constraint): The constraint.
        vocabulary_size (int): How many token ids the model has.
    """

    def __init__(self, label: str, constraint: Constraint, vocabulary_size: int):
        self.label = label
        self.constraint = constraint
        self.vocabulary_size = vocabulary_size
        # Why its request has to end.
        self.error: Optional[BaseException] = None
        # All tokens, and those that are allowed next, of shape (ceil(vocabulary / 32),).
        self.all = np.full(-(-vocabulary_size // 32), ALL, np.uint32)
        self.all[-1] >>= -vocabulary_size % 32
        self.mask = self.all

    def copy(self) -> "GuardedConstraint":
        """One in the same state, for a row.

        Raises:
            RequestError: If the plugin refuses the request.
            RuntimeError: If the plugin fails.
        """
        try:
            constraint = self.constraint.copy()
        except BaseException as e:
            raise self.blame(e)
        return GuardedConstraint(self.label, constraint, self.vocabulary_size)

    def advance(self, token: int) -> None:
        """Tell it a token of its answer."""
        if self.error is None:
            try:
                self.constraint.advance(token)
            except BaseException as e:
                self.error = self.blame(e)

    def blame(self, error: BaseException) -> BaseException:
        """What the request ends with because the plugin has raised ``error``."""
        if isinstance(error, RequestError):
            return error
        blamed = RuntimeError(f"{self.label}: a constraint failed")
        blamed.__cause__ = error
        return blamed

    @classmethod
    def fill_all(cls, constraints: Sequence["GuardedConstraint"]) -> None:
        """Fill the masks of all of them."""
        groups: Dict[Type[Constraint], List[GuardedConstraint]] = {}
        for c in constraints:
            if c.error is None:
                groups.setdefault(type(c.constraint), []).append(c)
        for group, members in groups.items():
            try:
                fill(group, members)
            except BaseException:
                # One by one, to find those that fail.
                for c in members:
                    try:
                        fill(group, [c])
                    except BaseException as e:
                        c.error = c.blame(e)


def fill(group: Type[Constraint], constraints: Sequence[GuardedConstraint]) -> None:
    """Fill the masks of constraints of one class.

    Raises:
        Exception: What a constraint raises, or that one allows nothing.
    """
    masks = np.stack([c.all for c in constraints])
    group.fill_all([c.constraint for c in constraints], masks)
    if not (masks & constraints[0].all).any(axis=1).all():
        raise ValueError("it allows no token")
    for c, mask in zip(constraints, masks):
        c.mask = mask

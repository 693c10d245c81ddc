"""The samplers of a batch, grouped by their class: one call for all rows of a group.

Rule: nothing is evaluated here.
"""

from typing import Any, Dict, Hashable, List, Protocol

import mlx.core as mx


class RowSampler(Protocol):
    """Chooses the next tokens of some rows of a batch."""

    @property
    def group(self) -> Hashable:
        """Samplers whose groups are equal can be joined with ``extend``."""

    def extend(self, other: Any) -> None:
        """Take over the rows of another sampler of the group, after its own. ``other`` is not
        used again."""

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""

    def copy(self) -> "RowSampler":
        """One with the same rows in the same state. ``filter`` is called on both next, and
        no row is left in both."""

    def __call__(self, logits: mx.array) -> mx.array:
        """Give token ids of shape (rows,) for logits of shape (rows, vocabulary)."""


class SamplerGroups:
    """The samplers of all rows of a batch, joined by group.

    Args:
        samplers (List[RowSampler]): One for each row, in the order of the rows.
    """

    def __init__(self, samplers: List[RowSampler]):
        self.samplers: Dict[Hashable, RowSampler] = {}
        # Which rows of the batch each sampler has, in ascending order.
        self.rows: Dict[Hashable, List[int]] = {}
        self.n_rows = 0
        for sampler in samplers:
            self.add(sampler, [self.n_rows])
            self.n_rows += 1

    def add(self, sampler: RowSampler, rows: List[int]) -> None:
        """Add a sampler of these rows of the batch."""
        group = sampler.group
        if group in self.samplers:
            self.samplers[group].extend(sampler)
        else:
            self.samplers[group], self.rows[group] = sampler, []
        self.rows[group] += rows

    def extend(self, other: "SamplerGroups") -> None:
        """Add the rows of another batch after these."""
        for group, sampler in other.samplers.items():
            self.add(sampler, [self.n_rows + row for row in other.rows[group]])
        self.n_rows += other.n_rows

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""
        new_rows = {row: i for i, row in enumerate(keep)}
        for group, rows in list(self.rows.items()):
            kept = [i for i, row in enumerate(rows) if row in new_rows]
            if not kept:
                del self.samplers[group], self.rows[group]
                continue
            kept.sort(key=lambda i: new_rows[rows[i]])
            if kept != [*range(len(rows))]:
                self.samplers[group].filter(kept)
            self.rows[group] = [new_rows[rows[i]] for i in kept]
        self.n_rows = len(keep)

    def copy(self) -> "SamplerGroups":
        """The same rows for another batch, as ``RowSampler.copy``."""
        other = SamplerGroups([])
        other.samplers = {group: s.copy() for group, s in self.samplers.items()}
        other.rows = {group: rows[:] for group, rows in self.rows.items()}
        other.n_rows = self.n_rows
        return other

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample all rows.

        Args:
            logits (mx.array): Of shape (rows, vocabulary).

        Returns:
            mx.array: Token ids of shape (rows,).
        """
        if len(self.samplers) == 1:
            # Its rows are those of the batch, in the same order.
            (sampler,) = self.samplers.values()
            return sampler(logits)
        tokens = [
            sampler(logits[mx.array(self.rows[group])])
            for group, sampler in self.samplers.items()
        ]
        rows = [row for rows in self.rows.values() for row in rows]
        order = sorted(range(self.n_rows), key=rows.__getitem__)
        return mx.concatenate(tokens)[mx.array(order)]

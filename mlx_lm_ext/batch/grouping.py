"""Decides which rows decode together.

Rows in one group cost a step as much as if all were as long as the longest. Each group more
costs it the time that a step takes whatever its rows: the weights are read again, and the
host hands over another graph.

Rules:
1. Lengths, places and seconds are all that is known here; nothing is measured or moved.
2. Rows stay where they are unless a step gets clearly faster, or the padding takes a good
   part of the memory. So they do not move back and forth.
"""

from itertools import pairwise
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from ..cache import growth
from .step_costs import StepCosts

# Shorter rows are never parted.
MIN_LENGTH = 1024
MAX_GROUPS = 4

# The share of the seconds of a step at which other groups are worth it.
GAIN = 0.85

# Rows have too much padding if they take so many times the places of their tokens, and the
# padding takes this share of the memory.
MAX_PLACES_PER_TOKEN = 1.5
MAX_PADDING = 1 / 8


class Shape(NamedTuple):
    """A group, or a part of one.

    Args:
        n_rows (int): Its rows.
        longest (int): Tokens of the longest.
        n_tokens (int): Tokens of all.
    """

    n_rows: int
    longest: int
    n_tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Shape":
        return cls(len(lengths), max(lengths), sum(lengths))

    @property
    def n_places(self) -> int:
        return self.n_rows * self.longest

    def join(self, other: "Shape") -> "Shape":
        return Shape(
            self.n_rows + other.n_rows,
            max(self.longest, other.longest),
            self.n_tokens + other.n_tokens,
        )


def cut(
    shapes: Sequence[Shape], max_groups: int, cost: Callable[[Shape], float]
) -> List[List[int]]:
    """The cheapest ways to cut a sequence into 1, 2, ... groups of neighbours.

    Args:
        shapes (Sequence[Shape]): What is never parted, from the shortest to the longest.
        max_groups (int): The most groups.
        cost (Callable): What a group costs.

    Returns:
        List[List[int]]: For each number of groups, where each of them ends.
    """
    n = len(shapes)
    costs = {}
    for i in range(n):
        group = None
        for j in range(i, n):
            group = shapes[j] if group is None else group.join(shapes[j])
            costs[i, j + 1] = cost(group)
    # The cheapest cut of the first j shapes.
    best = {j: (costs[0, j], [j]) for j in range(1, n + 1)}
    found = [best[n][1]]
    for k in range(2, min(max_groups, n) + 1):
        best = {
            j: min(
                (best[i][0] + costs[i, j], [*best[i][1], j]) for i in range(k - 1, j)
            )
            for j in range(k, n + 1)
        }
        found.append(best[n][1])
    return found


def size_of(length: int) -> int:
    """Rows of one size are not parted: the longest has at most 1.4 times the tokens of the
    shortest."""
    return (length**2).bit_length()


class Grouping:
    """Decides which rows decode together.

    Args:
        costs (StepCosts): What a step costs.
        max_places (int): For how many tokens of one row there is memory.
        min_length (int): The least tokens of a row that is worth a look.
        max_groups (int): The most groups.
    """

    def __init__(
        self,
        costs: StepCosts,
        max_places: int,
        min_length: int = MIN_LENGTH,
        max_groups: int = MAX_GROUPS,
    ):
        self.costs = costs
        self.max_places = max_places
        self.min_length = min_length
        self.max_groups = max_groups

    def place(
        self, groups: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> List[int]:
        """Where new rows belong.

        Args:
            groups (Sequence[Sequence[int]]): The lengths of the rows of each group.
            lengths (Sequence[int]): Those of the new rows.

        Returns:
            List[int]: The group of each new row. Those after the last one are new groups.
        """
        shapes = [Shape.of(group) for group in groups]
        longest = max([*lengths, *(shape.longest for shape in shapes)], default=0)
        places = [0] * len(lengths)
        if longest < self.min_length and len(shapes) < 2:
            return places
        everything = Shape.of([*lengths, *(n for group in groups for n in group)])
        if not self.matters(everything, shapes):
            return places
        if not shapes:
            for place, rows in enumerate(self.plan([lengths]) or []):
                for i in rows:
                    places[i] = place
            return places
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            new = Shape.of([lengths[i]])
            options = [
                [*shapes[:j], shape.join(new), *shapes[j + 1 :]]
                for j, shape in enumerate(shapes)
            ]
            apart = [*shapes, new]
            together = self.best(options)
            if len(apart) <= self.max_groups and self.is_better(apart, together):
                together = apart
            places[i] = len(shapes) if together is apart else options.index(together)
            shapes = together
        return places

    def plan(self, groups: Sequence[Sequence[int]]) -> Optional[List[List[int]]]:
        """Which groups would be better than these.

        Args:
            groups (Sequence[Sequence[int]]): The lengths of the rows of each group.

        Returns:
            Optional[List[List[int]]]: The rows of each group, numbered through all groups as
            they are; None if they should stay as they are.
        """
        now = [Shape.of(group) for group in groups]
        lengths = [length for group in groups for length in group]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        sizes = [size_of(lengths[i]) for i in order]
        starts = [0, *(i for i in range(1, len(order)) if sizes[i] != sizes[i - 1])]
        ends = [*starts[1:], len(order)]
        if len(now) == len(starts) == 1:
            return None
        shapes = [
            Shape.of([lengths[i] for i in order[a:b]]) for a, b in zip(starts, ends)
        ]

        def rows_of(stops: List[int]) -> List[List[int]]:
            return [order[starts[a] : ends[b - 1]] for a, b in pairwise([0, *stops])]

        cuts = cut(shapes, self.max_groups, lambda shape: shape.n_places)
        if self.costs.is_known and self.matters(Shape.of(lengths), now):
            cuts += cut(shapes, self.max_groups, lambda s: self.costs.of_step(*s[:2]))
        elif len(now) < 2:
            return None
        options = [
            [Shape.of([lengths[i] for i in rows]) for rows in parts]
            for parts in (rows_of(stops) for stops in cuts)
        ]
        best = self.best(options)
        return rows_of(cuts[options.index(best)]) if self.is_better(best, now) else None

    # Groups that are compared

    def matters(self, all_rows: Shape, now: Sequence[Shape]) -> bool:
        """Whether the places may decide about the groups."""
        return len(now) > 1 or all_rows.n_places > 1.25 * all_rows.n_tokens

    def best(self, options: Sequence[List[Shape]]) -> List[Shape]:
        """The best of several groupings of the same rows."""
        return min(options, key=self.rank)

    def is_better(self, new: Sequence[Shape], now: Sequence[Shape]) -> bool:
        """Whether a grouping is so much better than another that rows may move for it."""
        (*memory, cost), (*memory_now, cost_now) = self.rank(new), self.rank(now)
        if memory != memory_now:
            return memory < memory_now
        return cost < GAIN * cost_now

    def rank(self, groups: Sequence[Shape]) -> Tuple[bool, bool, float]:
        """What a grouping is judged by, the least being the best: whether it may outgrow the
        memory, whether much of this is padding, and seconds of a step, or places if one of
        these is so."""
        n_held = sum(
            growth.max_rows(group.n_rows) * growth.capacity(group.longest + growth.STEP)
            for group in groups
        )
        n_tokens = sum(group.n_tokens for group in groups)
        n_places = sum(group.n_places for group in groups)
        is_large = n_held > self.max_places
        is_wasteful = (
            n_places > MAX_PLACES_PER_TOKEN * n_tokens
            and n_places - n_tokens > MAX_PADDING * self.max_places
        )
        if is_large or is_wasteful:
            return is_large, is_wasteful, n_places
        if not self.costs.is_known:
            return False, False, len(groups)
        return False, False, sum(self.costs.of_step(*group[:2]) for group in groups)

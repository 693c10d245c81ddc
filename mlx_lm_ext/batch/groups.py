"""The rows that decode, in a few groups of like length: a row takes as many places of the KV
as the longest row of its group, and each step reads them all.

Rules:
1. ``BatchGenerator`` uses the groups as if they were one ``GenerationBatch``, whose rows are
   those of the first group, then those of the second, and so on.
2. Which rows make a group is decided in ``grouping.py``. Here they are moved and run.
3. As long as no row is long, a step compares two numbers for all of this.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mlx_lm.generate import GenerationBatch

from ..distributed.group import ONE_PROCESS, Agree
from .grouping import Grouping
from .prompts import segmented

# The groups beside the largest may add this share to the time of its steps, if they have few
# rows.
SIDE_SHARE = 0.3
# A group takes part in one of so many steps at least.
MAX_WAIT = 6
# After so many steps it is looked at again whether the groups are as they should be.
INTERVAL = 64


@dataclass(eq=False)
class Group:
    """Rows that decode together.

    Args:
        batch (LeanGenerationBatch): The rows.
        longest (int): Tokens that the longest row has, or had if it has just left.
        seconds (float): What its last step has taken; 0 if that is not known yet.
        n_waited (int): Steps since it last took part in one.
    """

    batch: Any
    longest: int = field(init=False)
    seconds: float = 0.0
    n_waited: int = 0

    def __post_init__(self) -> None:
        self.longest = longest_of(self.batch)

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def lengths(self) -> List[int]:
        """Tokens of each row."""
        return [len(tokens) for tokens in self.batch.tokens]


class GenerationGroups:
    """The groups of rows that decode.

    The group with the most rows runs in each step; of two that have equally many, the one
    whose steps are shorter. The others together may add ``SIDE_SHARE`` to its time, or, if
    they have more rows than this share of its rows, as much as their share of the rows is: of
    two users, one with a long conversation and one with a short one, each gets half of the
    time, and as many rows as the largest group has wait no more than these do. A group runs
    as soon as this time is enough for its step, after ``MAX_WAIT`` steps in any case, and at
    once if it has new rows, whose users wait for a first token.

    Args:
        grouping (Grouping): Decides which rows make a group.
        agree (Callable): Lets one of several processes decide, because the seconds of each are
          its own; see ``distributed.group``.
    """

    def __init__(self, grouping: Grouping, agree: Agree = ONE_PROCESS.agree):
        self.grouping = grouping
        self.agree = agree
        self.groups: List[Group] = []
        # Seconds that the others may take.
        self.credit = 0.0
        self.n_steps = 0
        # The step in which the rows are next looked at.
        self.plan_at = 0
        # Whether the device had to plan a part of the last step.
        self.has_planned = False

    # As one batch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @property
    def uids(self) -> List[int]:
        return [uid for group in self.groups for uid in group.batch.uids]

    @property
    def tokens(self) -> List[List[int]]:
        return [tokens for group in self.groups for tokens in group.batch.tokens]

    @property
    def prompt_cache(self) -> List[Any]:
        """The caches of all groups."""
        return [c for group in self.groups for c in group.batch.prompt_cache]

    @property
    def rows(self) -> Iterator[Tuple[Group, int]]:
        """The group of each row, and its index there."""
        for group in self.groups:
            for i in range(len(group)):
                yield group, i

    @property
    def must_plan(self) -> bool:
        """Whether the device has to plan the next step of a group."""
        return any(group.batch.must_plan for group in self.groups)

    def extract_cache(self, idx: int) -> List[Any]:
        group, i = [*self.rows][idx]
        return group.batch.extract_cache(i)

    def pending(self, uid: int) -> Optional[GenerationBatch.Response]:
        """See ``LeanGenerationBatch``."""
        (batch,) = (g.batch for g in self.groups if uid in g.batch.uids)
        return batch.pending(uid)

    def take_failed(self) -> Dict[int, BaseException]:
        """See ``LeanGenerationBatch``."""
        failed: Dict[int, BaseException] = {}
        for group in self.groups:
            failed |= group.batch.take_failed()
        return failed

    def filter(self, keep: List[int]) -> None:
        rows = [*self.rows]
        kept: Dict[Group, List[int]] = {group: [] for group in self.groups}
        for group, i in (rows[idx] for idx in keep):
            kept[group].append(i)
        for group, indices in kept.items():
            if 0 < len(indices) < len(group):
                group.batch.filter(indices)
        self.groups = [group for group in self.groups if kept[group]]
        self.plan_at = self.n_steps

    def next(self, is_timed: bool = True) -> List[GenerationBatch.Response]:
        """Run a step of the groups whose turn it is.

        Args:
            is_timed (bool): Whether the step does nothing else than other steps.
        """
        responses: List[GenerationBatch.Response] = []
        n_before = len(self)
        due = [*range(len(self.groups))]
        if len(due) > 1:
            due = self.agree("groups of a step", self.due)
        self.has_planned = False
        for group in [self.groups[i] for i in due]:
            n_rows, start = len(group), time.perf_counter()
            responses += group.batch.next()
            group.longest += 1
            self.has_planned |= group.batch.has_planned
            if is_timed and not group.batch.has_planned:
                group.seconds = time.perf_counter() - start
                self.grouping.costs.note(n_rows, group.longest, group.seconds)
        self.n_steps += 1
        if len(self) < n_before:
            self.groups = [group for group in self.groups if len(group)]
            self.plan_at = self.n_steps
        return responses

    def due(self) -> List[int]:
        """Which groups take part in the next step."""
        main = max(self.groups, key=lambda group: (len(group), -group.seconds))
        others = [group for group in self.groups if group is not main]
        others.sort(key=lambda group: -group.n_waited)
        gain = main.seconds * max(SIDE_SHARE, sum(map(len, others)) / len(main))
        # No more than they can use: the rest would go to a group that comes later.
        self.credit = min(self.credit + gain, sum(group.seconds for group in others))
        due = [main]
        for group in others:
            group.n_waited += 1
            is_paid = group.seconds <= self.credit
            if is_paid or group.n_waited >= MAX_WAIT or group.batch.joining:
                self.credit = max(0.0, self.credit - group.seconds)
                due.append(group)
        for group in due:
            group.n_waited = 0
        return [self.groups.index(group) for group in due]

    # Which rows make a group

    def places_for(self, lengths: List[int]) -> List[int]:
        """Which group new rows of these lengths would join; see ``Grouping.place``."""
        groups = [group.lengths for group in self.groups]
        return self.agree(
            "groups of rows", lambda: self.grouping.place(groups, lengths)
        )

    def join(self, batches: List[Any], n_to_come: List[int]) -> None:
        """Add the rows of some ``LeanGenerationBatch``, all of them new, to the groups where
        they belong. If they are all that a new group has, they keep their arrays.

        Args:
            batches (List[LeanGenerationBatch]): The rows.
            n_to_come (List[int]): How many rows, these among them, are about to join each
              group: arrays that grow get room for some of them.
        """
        if not batches:
            return
        self.plan_at = self.n_steps
        tokens = [tokens for batch in batches for tokens in batch.tokens]
        places = iter(self.places_for([*map(len, tokens)]))
        pieces: Dict[int, List[Any]] = {}
        for batch in batches:
            uids: Dict[int, List[int]] = {}
            for uid in batch.uids:
                uids.setdefault(next(places), []).append(uid)
            for place, rows in uids.items():
                pieces.setdefault(place, []).append(take(batch, rows))
        groups = self.groups[:]
        for place, news in sorted(pieces.items()):
            if place < len(groups):
                add(groups[place].batch, news, n_to_come[place])
            else:
                self.groups.append(Group(gather(news)))

    def arrange(self) -> bool:
        """Let the rows change their groups, if that is worth it. Called between two steps,
        when the tokens of the last one have been given to their requests.

        Returns:
            bool: Whether they have changed them.
        """
        if self.n_steps < self.plan_at:
            return False
        for group in self.groups:
            group.longest = longest_of(group.batch)
        longest = max((group.longest for group in self.groups), default=0)
        n_left = self.grouping.min_length - longest
        if len(self.groups) < 2 and n_left > 0:
            self.plan_at = self.n_steps + n_left
            self.credit = 0.0
            return False
        if not all(group.batch.is_settled for group in self.groups):
            return False
        self.plan_at = self.n_steps + INTERVAL
        groups = [group.lengths for group in self.groups]
        parts = self.agree("groups", lambda: self.grouping.plan(groups))
        if parts is None:
            return False
        self.move(parts)
        return True

    def move(self, parts: List[List[int]]) -> None:
        """Make these groups.

        Args:
            parts (List[List[int]]): The rows of each group. All rows are in one of them.
        """
        uids, rows = self.uids, [*self.rows]
        # A part stays in the arrays in which it has the most tokens.
        shared: Dict[Tuple[int, int], int] = {}
        for i, part in enumerate(parts):
            for group, row in (rows[idx] for idx in part):
                key = i, self.groups.index(group)
                shared[key] = shared.get(key, 0) + len(group.batch.tokens[row])
        homes: Dict[int, int] = {}
        for i, j in sorted(shared, key=lambda key: -shared[key]):
            if i not in homes and j not in homes.values():
                homes[i] = j
        pieces: Dict[int, List[Any]] = {i: [] for i in range(len(parts))}
        for i, j in shared:
            if homes.get(i) != j:
                wanted = {uids[idx] for idx in parts[i]}
                batch = self.groups[j].batch
                pieces[i].append(take(batch, [u for u in batch.uids if u in wanted]))
        batches = []
        for i, news in pieces.items():
            if i in homes:
                batches.append(self.groups[homes[i]].batch)
                add(batches[-1], news)
            else:
                batches.append(gather(news))
        # What was known of the groups is not true of these.
        self.groups = [*map(Group, batches)]


def take(batch: Any, uids: List[int]) -> Any:
    """Take these rows out of a batch. If they are all, they are the batch."""
    if len(uids) == len(batch):
        return batch
    return batch.split([batch.uids.index(uid) for uid in uids])


def gather(batches: List[Any]) -> Any:
    """One batch of the rows of several."""
    # The arrays of the longest rows need not grow for the others.
    first = max(batches, key=longest_of)
    add(first, [batch for batch in batches if batch is not first])
    return first


def add(batch: Any, others: List[Any], n_to_come: int = 0) -> None:
    """Add the rows of other batches to a batch, to which so many rows are about to come, these
    among them."""
    n_to_join = sum(map(len, others))
    for c in segmented(batch.prompt_cache):
        c.n_to_join, c.n_to_follow = n_to_join, max(0, n_to_come - n_to_join)
    # The longest first: its arrays have places for the others, and are copied once.
    for other in sorted(others, key=longest_of, reverse=True):
        batch.extend(other)


def longest_of(batch: Any) -> int:
    return max(map(len, batch.tokens))

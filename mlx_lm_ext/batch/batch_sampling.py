"""How the tokens of the rows of a batch are chosen, in one call for all rows.

Rules:
1. The order is that of mlx-lm: penalties, logits processors, sampler. Constraints come
   before the sampler. Log probabilities are those that the sampler has seen.
2. What no row asks for is not computed.
"""

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Callable, List, Optional, Sequence, Tuple

import mlx.core as mx

from ..sampling.constraints import Constraints, RowConstraint
from ..sampling.groups import RowSampler, SamplerGroups
from ..sampling.penalties import Penalties, PenaltyParameters
from .logprobs import Logprobs

# Runs the logits processors of the rows on their logits. Gives the new logits, and arrays to
# evaluate in the step.
LogitsProcessors = Callable[[mx.array], Tuple[mx.array, List[mx.array]]]


@dataclass
class RowSampling:
    """How the tokens of one row are chosen. ``BatchGenerator`` carries it as the row's
    sampler, and does not call it.

    Args:
        sampler (RowSampler): Chooses the tokens.
        penalties (Optional[PenaltyParameters]): Bias and penalties. None if the row has
          none, or has logits processors for them.
        n_top (Optional[int]): How many of the most likely tokens are given with each
          token and its log probability. None if no log probabilities are wanted.
        constraint (Optional[RowConstraint]): Which tokens it may have. None if all.
        generated (Sequence[int]): The tokens of its answer that it has already.
    """

    sampler: RowSampler
    penalties: Optional[PenaltyParameters] = None
    n_top: Optional[int] = None
    constraint: Optional[RowConstraint] = None
    generated: Sequence[int] = ()


class NoSampler:
    """Stands for the sampler of a row whose tokens another process chooses."""

    group = "none"

    def extend(self, other: "NoSampler") -> None:
        pass

    def filter(self, keep: List[int]) -> None:
        pass

    def copy(self) -> "NoSampler":
        return self

    def __call__(self, logits: mx.array) -> mx.array:
        raise NotImplementedError


class BatchSampling:
    """How the tokens of the rows of a batch are chosen.

    Args:
        rows (List[RowSampling]): One for each row, in the order of the rows.
    """

    def __init__(self, rows: List[RowSampling]):
        self.samplers = SamplerGroups([row.sampler for row in rows])
        self.penalties = Penalties([row.penalties for row in rows])
        self.constraints = Constraints(
            [row.constraint for row in rows], [row.generated for row in rows]
        )
        self.n_top = [row.n_top for row in rows]

    def __len__(self) -> int:
        return len(self.n_top)

    def extend(self, other: "BatchSampling") -> None:
        """Add the rows of another batch after these."""
        self.samplers.extend(other.samplers)
        self.penalties.extend(other.penalties)
        self.constraints.extend(other.constraints)
        self.n_top += other.n_top

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""
        self.samplers.filter(keep)
        self.penalties.filter(keep)
        self.constraints.filter(keep)
        self.n_top = [self.n_top[i] for i in keep]

    def copy(self) -> "BatchSampling":
        """The same rows for another batch. Each of them then goes on in one of the two:
        ``filter`` is called on both."""
        other = copy(self)
        other.samplers = self.samplers.copy()
        other.penalties = self.penalties.copy()
        other.constraints = self.constraints.copy()
        return other

    def __call__(
        self, logits: mx.array, tokens: List[List[int]], process: LogitsProcessors
    ) -> Tuple[mx.array, List[Optional[Callable]], List[mx.array]]:
        """Choose a token for each row.

        Args:
            logits (mx.array): Of shape (rows, vocabulary). They may be changed in place.
            tokens (List[List[int]]): The tokens of each row that gave its logits.
            process (LogitsProcessors): Runs the logits processors.

        Returns:
            Tuple: The tokens, of shape (rows,). For each row a function that gives what
            ``Logprobs.row`` does, or None if it did not ask. Arrays to evaluate in the step.
        """
        logits = self.penalties(tokens, logits)
        logits, to_evaluate = process(logits)
        logits = self.constraints(logits)
        chosen = self.samplers(logits)
        logprobs: List[Optional[Callable]] = [None] * len(self)
        rows = [i for i, n in enumerate(self.n_top) if n is not None]
        if rows:
            n_top = [self.n_top[i] for i in rows]
            asked = mx.array(rows)
            found = Logprobs(logits[asked], chosen[asked], max(n_top))
            for i, row in enumerate(rows):
                logprobs[row] = partial(found.row, i, n_top[i])
            to_evaluate += found.arrays
        return chosen, logprobs, to_evaluate

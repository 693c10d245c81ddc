"""Logit bias and penalties of the rows of a batch, in one call for all rows.

Rules:
1. A row gets what mlx-lm's ``make_logits_processors`` gives it, in the same order: logit
   bias, then the repetition, presence and frequency penalty.
2. Penalties over more than ``MAX_CONTEXT`` tokens are not computed here: such rows use
   mlx-lm's logits processors.
"""

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, List, Optional, Tuple

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    # The processes that compile kernels need not wait for this import.
    from mlx_lm.server import LogitsProcessorArguments

# Each token of a context is compared with each other one.
MAX_CONTEXT = 64


@dataclass
class PenaltyParameters:
    """Bias and penalties of one row.

    Args:
        bias (Tuple[np.ndarray, np.ndarray]): Token ids, and what is added to the logit of
          each.
        penalties (List[Tuple[float, int]]): The strength of the repetition, presence and
          frequency penalty, and how many of the last tokens each of them sees; 0 is all.
    """

    bias: Tuple[np.ndarray, np.ndarray]
    penalties: List[Tuple[float, int]]

    @classmethod
    def from_arguments(cls, args: "LogitsProcessorArguments") -> "PenaltyParameters":
        """The parameters of a request."""
        bias = args.logit_bias or {}
        return cls(
            (np.array([*bias], np.int32), np.array([*bias.values()], np.float32)),
            [
                # A repetition penalty of 0 is none, as in mlx-lm.
                (args.repetition_penalty or 1.0, args.repetition_context_size),
                (args.presence_penalty or 0.0, args.presence_context_size),
                (args.frequency_penalty or 0.0, args.frequency_context_size),
            ],
        )

    @property
    def contexts(self) -> List[int]:
        """The context sizes of the penalties that change something; 0 is all tokens."""
        return [n for (p, n), none in zip(self.penalties, (1.0, 0.0, 0.0)) if p != none]

    @property
    def is_short(self) -> bool:
        """Whether all contexts are short enough for ``Penalties``."""
        return all(0 < n <= MAX_CONTEXT for n in self.contexts)


class Penalties:
    """The bias and the penalties of the rows of a batch.

    Args:
        rows (List[Optional[PenaltyParameters]]): One for each row; None for a row that
          has none or has mlx-lm's logits processors for them.
    """

    def __init__(self, rows: List[Optional[PenaltyParameters]]):
        self.rows = rows
        self.make_arrays()

    def make_arrays(self) -> None:
        """Put the parameters of the rows into arrays. Called when the rows change."""
        rows = [(i, row) for i, row in enumerate(self.rows) if row]
        biased = [i for i, row in rows if len(row.bias[0])]
        self.bias = ()
        if biased:
            ids, values = zip(*(self.rows[i].bias for i in biased))
            places = np.repeat(biased, [len(i) for i in ids])
            columns = places, np.concatenate(ids), np.concatenate(values)
            self.bias = tuple(map(mx.array, columns))
        self.penalized = [i for i, row in rows if row.contexts]
        if self.penalized:
            chosen = [self.rows[i] for i in self.penalized]
            self.n_last = max(max(row.contexts) for row in chosen)
            table = np.array([row.penalties for row in chosen], np.float32)
            # Of shape (penalties, rows, 1).
            strengths, self.contexts = (table[:, :, i].T[:, :, None] for i in (0, 1))
            self.strengths = mx.array(strengths)

    def extend(self, other: "Penalties") -> None:
        """Add the rows of another batch after these."""
        self.rows += other.rows
        self.make_arrays()

    def filter(self, keep: List[int]) -> None:
        """Keep only the rows of these indices, in this order."""
        self.rows = [self.rows[i] for i in keep]
        self.make_arrays()

    def copy(self) -> "Penalties":
        """The same rows for another batch."""
        other = copy(self)
        other.rows = self.rows[:]
        return other

    def __call__(self, tokens: List[List[int]], logits: mx.array) -> mx.array:
        """Apply bias and penalties.

        Args:
            tokens (List[List[int]]): The tokens of each row that gave its logits.
            logits (mx.array): Of shape (rows, vocabulary). They may be changed in place.

        Returns:
            mx.array: The new logits.
        """
        if self.bias:
            rows, ids, values = self.bias
            logits = logits.at[rows, ids].add(values.astype(logits.dtype))
        if not self.penalized:
            return logits
        table = np.full((len(self.penalized), self.n_last), -1, np.int32)
        for i, row in enumerate(self.penalized):
            last = tokens[row][-self.n_last :]
            table[i, self.n_last - len(last) :] = last
        # Shorter rows are filled up with their last token, which is not counted again.
        ids, is_there = mx.array(np.where(table < 0, table[:, -1:], table)), table >= 0
        age = np.arange(self.n_last - 1, -1, -1)
        equal = ids[:, :, None] == ids[:, None, :]
        repetitions, presences, counts = (
            (equal & mx.array(is_there & (age < context))[:, None, :]).sum(axis=-1)
            for context in self.contexts
        )
        repetition, presence, frequency = self.strengths
        # A token that occurs twice is written twice, with the same value.
        places = mx.array(self.penalized)[:, None], ids
        seen = logits[places].astype(mx.float32)
        weaker = mx.where(seen < 0, seen * repetition, seen / repetition)
        seen = mx.where(repetitions > 0, weaker, seen)
        seen = mx.where(presences > 0, seen - presence, seen)
        logits[places] = (seen - frequency * counts).astype(logits.dtype)
        return logits

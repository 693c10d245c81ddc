"""Bias and penalties of the rows of a batch, in one call for all rows.

Rules:
1. A row gets what mlx-lm's ``make_logits_processors`` gives it, in the same order: logit
   bias, then the repetition, presence and frequency penalty.
2. Penalties over long contexts are not made here: a row of those is not ``is_short``.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import mlx.core as mx
import numpy as np
from mlx_lm.server import LogitsProcessorArguments

# Tokens of context, each of which is compared with each other.
MAX_CONTEXT = 64


@dataclass
class Row:
    """What is done to one row.

    Args:
        bias (Tuple[np.ndarray, np.ndarray]): Token ids, and what is added to each.
        penalties (List[Tuple[float, int]]): Each penalty and its tokens of context.
    """

    bias: Tuple[np.ndarray, np.ndarray]
    penalties: List[Tuple[float, int]]

    @classmethod
    def make(cls, args: LogitsProcessorArguments) -> "Row":
        """The row of a request."""
        bias = args.logit_bias or {}
        return cls(
            (np.array([*bias], np.int32), np.array([*bias.values()], np.float32)),
            [
                # Upstream's 0 is none. It would divide by it.
                (args.repetition_penalty or 1.0, args.repetition_context_size),
                (args.presence_penalty or 0.0, args.presence_context_size),
                (args.frequency_penalty or 0.0, args.frequency_context_size),
            ],
        )

    @property
    def contexts(self) -> List[int]:
        """The contexts of the penalties that change something; 0 is all tokens."""
        return [n for (p, n), none in zip(self.penalties, (1.0, 0.0, 0.0)) if p != none]

    @property
    def is_short(self) -> bool:
        """Whether ``Penalties`` can make it. If not, upstream's processors have to."""
        return all(0 < n <= MAX_CONTEXT for n in self.contexts)


class Penalties:
    """The bias and the penalties of the rows of a batch.

    Args:
        rows (List[Optional[Row]]): One of each row.
    """

    def __init__(self, rows: List[Optional[Row]]):
        self.rows = rows
        self.columns()

    def columns(self) -> None:
        """Put what the rows have into arrays."""
        rows = [(i, row) for i, row in enumerate(self.rows) if row]
        biased = [i for i, row in rows if len(row.bias[0])]
        self.bias = ()
        if biased:
            ids, values = zip(*(self.rows[i].bias for i in biased))
            places = np.repeat(biased, [len(i) for i in ids])
            columns = places, np.concatenate(ids), np.concatenate(values)
            self.bias = tuple(map(mx.array, columns))
        self.penalised = [i for i, row in rows if row.contexts]
        if self.penalised:
            chosen = [self.rows[i] for i in self.penalised]
            # The input is one of the tokens of each context.
            self.n_before = max(max(row.contexts) for row in chosen) - 1
            table = np.array([row.penalties for row in chosen], np.float32)
            # Of shape (penalties, rows, 1).
            self.strengths, self.contexts = (
                mx.array(table[:, :, i].T[:, :, None]) for i in (0, 1)
            )

    def extend(self, other: "Penalties") -> None:
        self.rows += other.rows
        self.columns()

    def filter(self, keep: List[int]) -> None:
        self.rows = [self.rows[i] for i in keep]
        self.columns()

    def __call__(
        self, tokens: List[List[int]], inputs: mx.array, logits: mx.array
    ) -> mx.array:
        """
        Args:
            tokens (List[List[int]]): What each row ran before its input.
            inputs (mx.array): The tokens that gave the logits, of shape (rows,).
            logits (mx.array): Of shape (rows, vocabulary).

        Returns:
            mx.array: The new logits.
        """
        if self.bias:
            rows, ids, values = self.bias
            logits = logits.at[rows, ids].add(values.astype(logits.dtype))
        if not self.penalised:
            return logits
        before = np.full((len(self.penalised), self.n_before), -1, np.int32)
        for i, row in enumerate(self.penalised):
            last = tokens[row][-self.n_before :] if self.n_before else []
            before[i, self.n_before - len(last) :] = last
        rows = mx.array(self.penalised)
        latest = inputs[rows][:, None].astype(mx.int32)
        ids = mx.concatenate([mx.array(before), latest], axis=1)
        is_there = ids >= 0
        ids = mx.where(is_there, ids, latest)
        age = mx.arange(self.n_before, -1, -1)
        equal = ids[:, :, None] == ids[:, None, :]
        repetitions, presences, counts = (
            (equal & (is_there & (age < context))[:, None, :]).sum(axis=-1)
            for context in self.contexts
        )
        repetition, presence, frequency = self.strengths
        # A token that is there twice gets the same value twice.
        places = rows[:, None], ids
        x = logits[places].astype(mx.float32)
        weaker = mx.where(x < 0, x * repetition, x / repetition)
        x = mx.where(repetitions > 0, weaker, x)
        x = mx.where(presences > 0, x - presence, x)
        logits[places] = (x - frequency * counts).astype(logits.dtype)
        return logits

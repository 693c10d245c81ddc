"""Draws the tokens of all rows with MLX, in calls that the host does not wait for."""

from typing import TYPE_CHECKING, List

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from .sampling import Row

# Tokens whose probabilities are added up before a block is drawn.
BLOCK = 128


def nucleus_thresholds(x: mx.array, top_p: mx.array) -> mx.array:
    """The smallest logit of each row's nucleus; -inf for a ``top_p`` outside (0, 1).

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        top_p (mx.array): Of shape (rows, 1).

    Returns:
        mx.array: Of shape (rows, 1).
    """
    ascending = mx.sort(x, axis=-1)
    masses = mx.exp(ascending - ascending[:, -1:])
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    goal = top_p * (above[:, :1] + masses[:, :1])
    n_dropped = (above >= goal).sum(axis=-1, keepdims=True)
    thresholds = mx.take_along_axis(ascending, n_dropped, axis=-1)
    return mx.where((top_p > 0) & (top_p < 1), thresholds, -mx.inf)


def keep_top_k(x: mx.array, top_k: mx.array) -> mx.array:
    """Drop all but the ``k`` largest of each row; 0 keeps all."""
    order = mx.argsort(-x, axis=-1)
    ranked = mx.take_along_axis(x, order, axis=-1)
    kept = (mx.arange(x.shape[-1]) < top_k) | (top_k == 0)
    return mx.put_along_axis(x, order, mx.where(kept, ranked, -mx.inf), axis=-1)


def apply_xtc(
    x: mx.array,
    probability: mx.array,
    threshold: mx.array,
    exempt: List[int],
    uniform: mx.array,
) -> mx.array:
    """Drop the tokens above a threshold but the least likely of them, now and then.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        probability (mx.array): How often, of shape (rows, 1).
        threshold (mx.array): Of shape (rows, 1).
        exempt (List[int]): Tokens that stay.
        uniform (mx.array): What decides, of shape (rows, 1).
    """
    p = mx.softmax(x, axis=-1)
    least = mx.where(p > threshold, p, mx.inf).min(axis=-1, keepdims=True)
    drop = (p > least) & (uniform < probability)
    drop[:, mx.array(exempt)] = False
    return mx.where(drop, -mx.inf, x)


def draw(x: mx.array, uniform: mx.array) -> mx.array:
    """Tokens of ``softmax(x)`` by its inverse distribution, found in blocks.

    A sum over the whole vocabulary would round small probabilities away.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        uniform (mx.array): One number in [0, 1) a row, of shape (rows, 1).

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    n_rows, size = x.shape
    p = mx.exp(x - x.max(axis=-1, keepdims=True))
    if size % BLOCK:
        p = mx.pad(p, [(0, 0), (0, BLOCK - size % BLOCK)])
    p = p.reshape(n_rows, -1, BLOCK)
    ends = mx.cumsum(p.sum(axis=-1), axis=-1)
    # Rounded up to the sum, it would be beyond the last token.
    goal = uniform * ends[:, -1:] * (1 - 1e-6)
    block = mx.argmax(ends > goal, axis=-1, keepdims=True)
    start = mx.take_along_axis(mx.pad(ends, [(0, 0), (1, 0)]), block, axis=-1)
    p = mx.take_along_axis(p, block[:, :, None], axis=1)[:, 0]
    inside = mx.cumsum(p, axis=-1)
    goal = mx.minimum(goal - start, inside[:, -1:] * (1 - 1e-6))
    return block[:, 0] * BLOCK + mx.argmax(inside > goal, axis=-1)


class Columns:
    """The parameters of rows as arrays of shape (rows, 1)."""

    def __init__(self, rows: List["Row"]):
        def column(values):
            return mx.array(np.array(values, np.float32)[:, None])

        self.temperature = column([row.temperature for row in rows])
        self.top_p = column([row.top_p for row in rows])
        self.has_top_p = any(0 < row.top_p < 1 for row in rows)
        self.top_k = column([row.top_k for row in rows])
        self.has_top_k = any(row.top_k for row in rows)
        # log(0) drops nothing.
        with np.errstate(divide="ignore"):
            self.log_min_p = column(np.log([row.min_p for row in rows]))
        self.has_min_p = any(row.min_p for row in rows)
        self.xtc_probability = column([row.xtc_probability for row in rows])
        self.xtc_threshold = column([row.xtc_threshold for row in rows])
        self.has_xtc = any(row.xtc_probability > 0 for row in rows)


def apply_filters(
    x: mx.array, columns: Columns, uniform: mx.array, exempt: List[int]
) -> mx.array:
    """The logits, and -inf for the tokens that the parameters of their rows drop."""
    limits = []
    if columns.has_top_p:
        limits.append(nucleus_thresholds(x, columns.top_p))
    if columns.has_min_p:
        limits.append(x.max(axis=-1, keepdims=True) + columns.log_min_p)
    for limit in limits:
        x = mx.where(x < limit, -mx.inf, x)
    if columns.has_xtc:
        probability, threshold = columns.xtc_probability, columns.xtc_threshold
        x = apply_xtc(x, probability, threshold, exempt, uniform)
    if columns.has_top_k:
        x = keep_top_k(x, columns.top_k)
    return x


def sample(
    x: mx.array, columns: Columns, uniform: mx.array, exempt: List[int]
) -> mx.array:
    """Draw a token of each row.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        columns (Columns): The parameters of the rows.
        uniform (mx.array): Of shape (rows, 2), each in [0, 1): what a token is drawn
          with, and what decides on XTC.
        exempt (List[int]): Tokens that XTC leaves in.

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    x = apply_filters(x, columns, uniform[:, 1:], exempt)
    return draw(x / columns.temperature, uniform[:, :1])

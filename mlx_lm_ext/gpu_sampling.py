"""Draws the tokens of all rows with MLX, in calls that the host does not wait for."""

from typing import Dict, List

import mlx.core as mx
import numpy as np

from .sampling_row import Row


def below_highest(x: mx.array) -> mx.array:
    """See ``cpu_sampling.below_highest``; of shape (rows, vocabulary), in float32."""
    highest = x.max(axis=-1, keepdims=True)
    x = x.astype(mx.float32) - highest.astype(mx.float32)
    return mx.where(mx.isnan(x), 0.0, x)


def nucleus_thresholds(x: mx.array, top_p: mx.array) -> mx.array:
    """The smallest logit of each row's nucleus; -inf for a ``top_p`` outside (0, 1).

    All are sorted: to look among the k largest first would gain nothing, for MLX sorts all
    to find those on a GPU.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary), of which the highest of a row is 0.
        top_p (mx.array): Of shape (rows, 1).

    Returns:
        mx.array: Of shape (rows, 1).
    """
    ascending = mx.sort(x, axis=-1)
    masses = mx.exp(ascending)
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    goal = top_p * (above[:, :1] + masses[:, :1])
    kept = mx.where(above < goal, ascending, mx.inf)
    thresholds = kept.min(axis=-1, keepdims=True)
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


def draw(x: mx.array, keys: mx.array) -> mx.array:
    """Tokens of ``softmax(x)`` by an exponential race (the Gumbel-max trick).

    The winners' times are near zero, where floats are finest, so that tokens of small
    probabilities are drawn as rarely as they should be.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        keys (mx.array): Of shape (rows, 2).

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=x.shape[1:], key=key))(keys)
    # A multiple of 2**-32 below 1; at 0, a dropped token would come at once.
    uniform = mx.maximum(uniform, 2**-33)
    return mx.argmax(x - mx.log(-mx.log1p(-uniform)), axis=-1)


def collect(rows: List[Row]) -> Dict[str, mx.array]:
    """The parameters that some of the rows use, each of shape (rows, 1)."""
    columns = {"temperature": [row.temperature for row in rows]}
    if any(0 < row.top_p < 1 for row in rows):
        columns["top_p"] = [row.top_p for row in rows]
    if any(row.min_p for row in rows):
        # log(0) drops nothing.
        with np.errstate(divide="ignore"):
            columns["log_min_p"] = np.log([row.min_p for row in rows])
    if any(row.xtc_probability > 0 for row in rows):
        columns["xtc_probability"] = [row.xtc_probability for row in rows]
        columns["xtc_threshold"] = [row.xtc_threshold for row in rows]
    if any(row.top_k for row in rows):
        columns["top_k"] = [row.top_k for row in rows]
    return {
        name: mx.array(np.array(values, np.float32)[:, None])
        for name, values in columns.items()
    }


def apply_filters(
    x: mx.array, columns: Dict[str, mx.array], keys: mx.array, exempt: List[int]
) -> mx.array:
    """The logits, of which the highest of a row is 0, and -inf for the tokens that the
    parameters of their rows drop."""
    limits = []
    if "top_p" in columns:
        limits.append(nucleus_thresholds(x, columns["top_p"]))
    if "log_min_p" in columns:
        limits.append(columns["log_min_p"])
    for limit in limits:
        x = mx.where(x < limit, -mx.inf, x)
    if "xtc_probability" in columns:
        uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(~keys)
        probability, threshold = columns["xtc_probability"], columns["xtc_threshold"]
        x = apply_xtc(x, probability, threshold, exempt, uniform)
    if "top_k" in columns:
        x = keep_top_k(x, columns["top_k"])
    return x


@mx.compile
def sample(
    x: mx.array, columns: Dict[str, mx.array], keys: mx.array, exempt: List[int]
) -> mx.array:
    """Draw a token of each row.

    Compiled once for each number of rows and each set of columns.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        columns (Dict[str, mx.array]): The parameters of the rows.
        keys (mx.array): What a token is drawn with, of shape (rows, 2) and type
          uint32. XTC is decided with their complements.
        exempt (List[int]): Tokens that XTC leaves in.

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    x = below_highest(x)
    x = apply_filters(x, columns, keys, exempt)
    return draw(x / columns["temperature"], keys)

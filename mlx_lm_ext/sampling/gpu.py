"""Draws the tokens of all rows with MLX, in calls that the host does not wait for.

Rules:
1. Each filter is compiled by itself. Compiled as one, the filters of a batch would need
   kernels for each set of parameters, and with CUDA a kernel takes seconds to make.
"""

from typing import Dict, List

import mlx.core as mx
import numpy as np

from .parameters import Row


@mx.compile
def below_highest(x: mx.array) -> mx.array:
    """See ``cpu_sampling.below_highest``; of shape (rows, vocabulary), in float32."""
    highest = x.max(axis=-1, keepdims=True)
    x = x.astype(mx.float32) - highest.astype(mx.float32)
    return mx.where(mx.isnan(x), 0.0, x)


@mx.compile
def keep_nucleus(x: mx.array, top_p: mx.array) -> mx.array:
    """Drop what is not in the nucleus of its row; a ``top_p`` outside (0, 1) keeps all.

    All are sorted: to look among the k largest first would gain nothing, for MLX sorts all
    to find those on a GPU.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary), of which the highest of a row is 0.
        top_p (mx.array): Of shape (rows, 1).
    """
    ascending = mx.sort(x, axis=-1)
    masses = mx.exp(ascending)
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    goal = top_p * (above[:, :1] + masses[:, :1])
    kept = mx.where(above < goal, ascending, mx.inf)
    least = kept.min(axis=-1, keepdims=True)
    least = mx.where((top_p > 0) & (top_p < 1), least, -mx.inf)
    return mx.where(x < least, -mx.inf, x)


@mx.compile
def keep_min_p(x: mx.array, log_min_p: mx.array) -> mx.array:
    """Drop the logits below those of shape (rows, 1); the highest of a row is 0."""
    return mx.where(x < log_min_p, -mx.inf, x)


@mx.compile
def keep_top_k(x: mx.array, top_k: mx.array) -> mx.array:
    """Drop all but the ``k`` largest of each row; 0 keeps all."""
    order = mx.argsort(-x, axis=-1)
    ranked = mx.take_along_axis(x, order, axis=-1)
    kept = (mx.arange(x.shape[-1]) < top_k) | (top_k == 0)
    return mx.put_along_axis(x, order, mx.where(kept, ranked, -mx.inf), axis=-1)


@mx.compile
def apply_xtc(
    x: mx.array,
    probability: mx.array,
    threshold: mx.array,
    exempt: List[int],
    keys: mx.array,
) -> mx.array:
    """Drop the tokens above a threshold but the least likely of them, now and then.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        probability (mx.array): How often, of shape (rows, 1).
        threshold (mx.array): Of shape (rows, 1).
        exempt (List[int]): Tokens that stay.
        keys (mx.array): What decides, of shape (rows, 2).
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)
    p = mx.softmax(x, axis=-1)
    least = mx.where(p > threshold, p, mx.inf).min(axis=-1, keepdims=True)
    drop = (p > least) & (uniform < probability)
    drop[:, mx.array(exempt)] = False
    return mx.where(drop, -mx.inf, x)


@mx.compile
def draw(x: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """Tokens of ``softmax(x / temperature)`` by an exponential race (the Gumbel-max trick).

    The winners' times are near zero, where floats are finest, so that tokens of small
    probabilities are drawn as rarely as they should be.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        temperature (mx.array): Of shape (rows, 1).
        keys (mx.array): Of shape (rows, 2).

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=x.shape[1:], key=key))(keys)
    # A multiple of 2**-32 below 1; at 0, a dropped token would come at once.
    uniform = mx.maximum(uniform, 2**-33)
    return mx.argmax(x / temperature - mx.log(-mx.log1p(-uniform)), axis=-1)


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
    """The logits less the highest of their row, and -inf for the tokens that the parameters
    of their rows drop."""
    x = below_highest(x)
    if "top_p" in columns:
        x = keep_nucleus(x, columns["top_p"])
    if "log_min_p" in columns:
        x = keep_min_p(x, columns["log_min_p"])
    if "xtc_probability" in columns:
        probability, threshold = columns["xtc_probability"], columns["xtc_threshold"]
        x = apply_xtc(x, probability, threshold, exempt, ~keys)
    if "top_k" in columns:
        x = keep_top_k(x, columns["top_k"])
    return x


def sample(
    x: mx.array, columns: Dict[str, mx.array], keys: mx.array, exempt: List[int]
) -> mx.array:
    """Draw a token of each row.

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).
        columns (Dict[str, mx.array]): The parameters of the rows.
        keys (mx.array): What a token is drawn with, of shape (rows, 2) and type
          uint32. XTC is decided with their complements.
        exempt (List[int]): Tokens that XTC leaves in.

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    x = apply_filters(x, columns, keys, exempt)
    return draw(x, columns["temperature"], keys)

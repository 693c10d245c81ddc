"""Draws the tokens of all rows with MLX, in calls for which the host does not wait.

The backend of GPUs; ``default.py`` says what a backend is.

Rule: each filter is compiled by itself. Compiled together they would need kernels for each
combination of filters, and with CUDA a kernel takes seconds to make.
"""

from typing import Dict, List

import mlx.core as mx
import numpy as np

from .parameters import SamplingParameters


@mx.compile
def below_highest(logits: mx.array) -> mx.array:
    """The logits less the highest of their row, in float32. Infinite ones become 0, and so
    do all logits of a row of which nothing else can be told: with NaN, or of -inf only.

    Args:
        logits (mx.array): Of shape (rows, vocabulary).
    """
    highest = logits.max(axis=-1, keepdims=True)
    logits = logits.astype(mx.float32) - highest.astype(mx.float32)
    return mx.where(mx.isnan(logits), 0.0, logits)


@mx.compile
def keep_top_p(logits: mx.array, top_p: mx.array) -> mx.array:
    """Drop what is not in the nucleus of its row. A ``top_p`` outside (0, 1) keeps all.

    The whole row is sorted. A search among the k largest first would gain nothing: on a
    GPU, MLX sorts the row to find those, too. Holtzman et al., "The Curious Case of Neural
    Text Degeneration", 2020.

    Args:
        logits (mx.array): Of shape (rows, vocabulary); the highest of each row is 0.
        top_p (mx.array): Of shape (rows, 1).
    """
    ascending = mx.sort(logits, axis=-1)
    masses = mx.exp(ascending)
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    goal = top_p * (above[:, :1] + masses[:, :1])
    kept = mx.where(above < goal, ascending, mx.inf)
    least = kept.min(axis=-1, keepdims=True)
    least = mx.where((top_p > 0) & (top_p < 1), least, -mx.inf)
    return mx.where(logits < least, -mx.inf, logits)


@mx.compile
def keep_min_p(logits: mx.array, log_min_p: mx.array) -> mx.array:
    """Drop the logits below ``log_min_p`` of their row.

    Args:
        logits (mx.array): Of shape (rows, vocabulary); the highest of each row is 0.
        log_min_p (mx.array): Of shape (rows, 1).
    """
    return mx.where(logits < log_min_p, -mx.inf, logits)


@mx.compile
def apply_xtc(
    logits: mx.array,
    probability: mx.array,
    threshold: mx.array,
    exempt: List[int],
    keys: mx.array,
) -> mx.array:
    """Drop the tokens above a threshold except the least likely of them, in a share of the
    calls ("exclude top choices").

    Args:
        logits (mx.array): Of shape (rows, vocabulary).
        probability (mx.array): That share, of shape (rows, 1).
        threshold (mx.array): A probability, of shape (rows, 1).
        exempt (List[int]): Token ids that are not dropped.
        keys (mx.array): The keys that decide, of shape (rows, 2).
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)
    p = mx.softmax(logits, axis=-1)
    least = mx.where(p > threshold, p, mx.inf).min(axis=-1, keepdims=True)
    drop = (p > least) & (uniform < probability)
    # Compared, because to write to these places would need two more kernels.
    tokens = mx.arange(logits.shape[-1])[:, None]
    drop = drop & ~(tokens == mx.array(exempt)).any(axis=-1)
    return mx.where(drop, -mx.inf, logits)


@mx.compile
def keep_top_k(logits: mx.array, top_k: mx.array) -> mx.array:
    """Drop all but the ``top_k`` largest logits of each row; 0 keeps all.

    Args:
        logits (mx.array): Of shape (rows, vocabulary).
        top_k (mx.array): Of shape (rows, 1).
    """
    order = mx.argsort(-logits, axis=-1)
    ranked = mx.take_along_axis(logits, order, axis=-1)
    kept = (mx.arange(logits.shape[-1]) < top_k) | (top_k == 0)
    return mx.put_along_axis(logits, order, mx.where(kept, ranked, -mx.inf), axis=-1)


@mx.compile
def draw(logits: mx.array, temperature: mx.array, keys: mx.array) -> mx.array:
    """Draw tokens of ``softmax(logits / temperature)`` by an exponential race (the
    Gumbel-max trick).

    The times of the winners are near zero, where floats are finest. So tokens of small
    probability are drawn as rarely as they should be.

    Args:
        logits (mx.array): Of shape (rows, vocabulary).
        temperature (mx.array): Of shape (rows, 1).
        keys (mx.array): Of shape (rows, 2).

    Returns:
        mx.array: Token ids of shape (rows,).
    """
    n_tokens = logits.shape[1:]
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=n_tokens, key=key))(keys)
    # Multiples of 2**-32 below 1. With 0, a token that was dropped would win the race.
    uniform = mx.maximum(uniform, 2**-33)
    return mx.argmax(logits / temperature - mx.log(-mx.log1p(-uniform)), axis=-1)


def prepare(rows: List[SamplingParameters]) -> Dict[str, mx.array]:
    """The parameters that at least one of the rows uses, each of shape (rows, 1)."""
    columns = {"temperature": [row.temperature for row in rows]}
    if any(row.has_top_p for row in rows):
        columns["top_p"] = [row.top_p for row in rows]
    if any(row.min_p for row in rows):
        # A min_p of 0 becomes -inf, which drops nothing.
        with np.errstate(divide="ignore"):
            columns["log_min_p"] = np.log([row.min_p for row in rows]).tolist()
    if any(row.has_xtc for row in rows):
        columns["xtc_probability"] = [row.xtc_probability for row in rows]
        columns["xtc_threshold"] = [row.xtc_threshold for row in rows]
    if any(row.top_k for row in rows):
        columns["top_k"] = [row.top_k for row in rows]
    return {
        name: mx.array(np.array(values, np.float32)[:, None])
        for name, values in columns.items()
    }


def apply_filters(
    logits: mx.array, parameters: Dict[str, mx.array], keys: mx.array, exempt: List[int]
) -> mx.array:
    """Subtract the highest logit of each row, and set the logits of the tokens that the
    parameters of the row drop to -inf. XTC is decided with the complements of the keys.
    """
    logits = below_highest(logits)
    if "top_p" in parameters:
        logits = keep_top_p(logits, parameters["top_p"])
    if "log_min_p" in parameters:
        logits = keep_min_p(logits, parameters["log_min_p"])
    if "xtc_probability" in parameters:
        logits = apply_xtc(
            logits,
            parameters["xtc_probability"],
            parameters["xtc_threshold"],
            exempt,
            ~keys,
        )
    if "top_k" in parameters:
        logits = keep_top_k(logits, parameters["top_k"])
    return logits


def sample(
    logits: mx.array, parameters: Dict[str, mx.array], keys: mx.array, exempt: List[int]
) -> mx.array:
    logits = apply_filters(logits, parameters, keys, exempt)
    return draw(logits, parameters["temperature"], keys)

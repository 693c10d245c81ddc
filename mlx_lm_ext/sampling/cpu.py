"""Draws tokens with NumPy, row by row, where MLX runs on the CPU.

The backend of CPUs; ``default.py`` says what a backend is. On a CPU, MLX takes 20 times as
long as NumPy for an exponential, and 35 times as long for a sort.

Here ``relative`` are the probabilities of a row at temperature 1, as multiples of the
highest. They need no division by their sum.
"""

from typing import List, Literal

import mlx.core as mx
import numpy as np

from .parameters import SamplingParameters

# The nucleus is first looked for among this many of the most likely tokens of a row.
NUCLEUS_GUESS = 64
# Values that ``find`` adds up before it looks for one among them.
BLOCK = 128


def below_highest(logits: np.ndarray) -> np.ndarray:
    """The logits of a row less the highest. Infinite ones become 0, and so do all logits of
    a row of which nothing else can be told: with NaN, or of -inf only."""
    highest = logits.max()
    logits = logits - highest
    if np.isfinite(highest):
        return logits
    return np.nan_to_num(logits, nan=0.0, neginf=-np.inf)


def find(values: np.ndarray, share: float, side: Literal["left", "right"]) -> int:
    """Where the running sum of values reaches a share of the total.

    Args:
        values (np.ndarray): None of them negative.
        share (float): From 0 to 1.
        side (str): As in ``numpy.searchsorted``: "left" for the first sum that is equal to
          the share or above it, "right" for the first one above it.
    """
    blocks = np.add.reduceat(values, np.arange(0, len(values), BLOCK))
    ends = blocks.cumsum(dtype=np.float64)
    goal = share * ends[-1]
    block = min(int(np.searchsorted(ends, goal, side)), len(ends) - 1)
    start = ends[block - 1] if block else 0.0
    sums = values[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    # Rounding can put the goal beyond the last sum of the block.
    goal = min(goal - start, sums[-1] * (1 - 1e-6))
    return block * BLOCK + int(np.searchsorted(sums, goal, side))


def nucleus_limit(relative: np.ndarray, top_p: float) -> float:
    """The smallest relative probability in the nucleus of a row.

    A token belongs to the nucleus if those above it have less than ``top_p`` of the total.
    The whole row is sorted only if the nucleus is larger than ``NUCLEUS_GUESS``.
    """
    goal = top_p * relative.sum()
    n = min(NUCLEUS_GUESS, len(relative))
    if goal < n:
        highest = np.sort(np.partition(relative, -n)[-n:])[::-1]
        sums = highest.cumsum()
        # The last one has to be outside: tokens beyond the guess may be equal to it.
        if n > 1 and sums[-2] >= goal:
            return highest[np.searchsorted(sums, goal)]
    descending = np.sort(relative)[::-1]
    return descending[find(descending, top_p, "left")]


def kept_ids(
    relative: np.ndarray,
    logits: np.ndarray,
    row: SamplingParameters,
    uniform: float,
    exempt: List[int],
) -> np.ndarray:
    """The token ids that the filters of a row leave, in ascending order.

    Args:
        relative (np.ndarray): The relative probabilities.
        logits (np.ndarray): The logits, of which the highest is 0.
        row (SamplingParameters): The parameters.
        uniform (float): The random number that decides whether XTC is applied.
        exempt (List[int]): Token ids that XTC does not drop.
    """
    limit = row.min_p
    if row.has_top_p:
        limit = max(limit, nucleus_limit(relative, row.top_p))
    ids = np.flatnonzero(relative >= limit)
    if uniform < row.xtc_probability:
        p = relative[ids] / relative[ids].sum()
        least = p[p > row.xtc_threshold].min(initial=np.inf)
        ids = ids[(p <= least) | np.isin(ids, exempt)]
    if 0 < row.top_k < len(ids):
        ids = np.sort(ids[np.argpartition(logits[ids], -row.top_k)[-row.top_k :]])
    return ids


def is_kept(token: int, relative: np.ndarray, row: SamplingParameters) -> bool:
    """Whether top-p and min-p leave a token, without a search for the whole nucleus."""
    above = np.dot(relative, relative > relative[token])
    return relative[token] >= row.min_p and above < row.top_p * relative.sum()


def sample_row(
    logits: np.ndarray,
    row: SamplingParameters,
    uniforms: np.ndarray,
    exempt: List[int],
) -> int:
    """Draw a token of one row.

    Most tokens of a nucleus are found by rejection sampling: a token is drawn from the
    whole row, and is taken if it belongs to the nucleus. Otherwise one is drawn from the
    tokens that do.

    Args:
        logits (np.ndarray): Of shape (vocabulary,).
        row (SamplingParameters): The parameters.
        uniforms (np.ndarray): Random numbers for the first draw, XTC and the second draw.
        exempt (List[int]): Token ids that XTC does not drop.
    """
    first, for_xtc, second = uniforms
    logits = below_highest(logits)
    if not row.has_filters:
        return find(np.exp(logits / row.temperature), float(first), "right")
    relative = np.exp(logits)
    if row.has_top_p and not (row.top_k or row.has_xtc):
        is_one = row.temperature == 1
        weights = relative if is_one else np.exp(logits / row.temperature)
        token = find(weights, float(first), "right")
        if is_kept(token, relative, row):
            return token
    ids = kept_ids(relative, logits, row, for_xtc, exempt)
    return ids[find(np.exp(logits[ids] / row.temperature), float(second), "right")]


def prepare(rows: List[SamplingParameters]) -> List[SamplingParameters]:
    return rows


def sample(
    logits: mx.array,
    parameters: List[SamplingParameters],
    keys: mx.array,
    exempt: List[int],
) -> mx.array:
    uniforms = mx.vmap(lambda key: mx.random.uniform(shape=(3,), key=key))(keys)
    rows = zip(np.array(logits.astype(mx.float32)), parameters, np.array(uniforms))
    # Overflow and NaN are expected where logits are infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        tokens = [
            sample_row(row, row_parameters, row_uniforms, exempt)
            for row, row_parameters, row_uniforms in rows
        ]
    return mx.array(np.array(tokens, np.uint32))

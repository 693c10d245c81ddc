"""Draws tokens with NumPy, row by row, where MLX runs on the CPU.

MLX's CPU backend takes 20 times longer for an exponential, and 35 times for a sort.
"""

from typing import List

import mlx.core as mx
import numpy as np

from .parameters import Row

# Of how many of a row's most likely tokens a nucleus is looked for first.
NUCLEUS_GUESS = 64
# Values that are added up before one of them is looked for.
BLOCK = 128

collect = list


def below_highest(x: np.ndarray) -> np.ndarray:
    """The logits of a row, less the highest. Those that are infinite become equal, and all
    do in a row that says nothing: with NaN, or of -inf only."""
    highest = x.max()
    x = x - highest
    return x if np.isfinite(highest) else np.nan_to_num(x, nan=0.0, neginf=-np.inf)


def find(values: np.ndarray, share: float, side: str) -> int:
    """Where the sum of the values, none of them negative, reaches a share of all."""
    blocks = np.add.reduceat(values, np.arange(0, len(values), BLOCK))
    ends = blocks.cumsum(dtype=np.float64)
    goal = share * ends[-1]
    block = min(int(np.searchsorted(ends, goal, side)), len(ends) - 1)
    start = ends[block - 1] if block else 0.0
    sums = values[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    # The sums of a block end where those of all blocks do, but for rounding.
    goal = min(goal - start, sums[-1] * (1 - 1e-6))
    return block * BLOCK + int(np.searchsorted(sums, goal, side))


def nucleus(p: np.ndarray, top_p: float) -> float:
    """The smallest value of the nucleus of a row.

    The whole row is sorted only if the nucleus is larger than a guess.

    Args:
        p (np.ndarray): Probabilities, as multiples of the highest.
    """
    goal = top_p * p.sum()
    # A token belongs to it if those above have not reached the goal.
    n = min(NUCLEUS_GUESS, len(p))
    if goal < n:
        highest = np.sort(np.partition(p, -n)[-n:])[::-1]
        sums = highest.cumsum()
        # The last one has to be outside: there may be others like it.
        if n > 1 and sums[-2] >= goal:
            return highest[np.searchsorted(sums, goal)]
    falling = np.sort(p)[::-1]
    return falling[find(falling, top_p, "left")]


def possible(
    p: np.ndarray, x: np.ndarray, row: Row, u: float, exempt: List[int]
) -> np.ndarray:
    """The tokens of a row that its parameters leave.

    Args:
        p (np.ndarray): Its probabilities, as multiples of the highest.
        x (np.ndarray): Its logits, of which the highest is 0.
        row (Row): Its parameters.
        u (float): What decides on XTC.
        exempt (List[int]): Tokens that XTC leaves in.
    """
    limit = row.min_p
    if 0 < row.top_p < 1:
        limit = max(limit, nucleus(p, row.top_p))
    ids = np.flatnonzero(p >= limit)
    if u < row.xtc_probability:
        share = p[ids] / p[ids].sum()
        least = share[share > row.xtc_threshold].min(initial=np.inf)
        ids = ids[(share <= least) | np.isin(ids, exempt)]
    if 0 < row.top_k < len(ids):
        ids = np.sort(ids[np.argpartition(x[ids], -row.top_k)[-row.top_k :]])
    return ids


def can_be_drawn(token: int, p: np.ndarray, row: Row) -> bool:
    """Whether top-p and min-p leave a token of a row in, told without a search for the
    nucleus: it belongs to it if those above have not reached the goal."""
    above = np.dot(p, p > p[token])
    return p[token] >= row.min_p and above < row.top_p * p.sum()


def sample_row(x: np.ndarray, row: Row, u: np.ndarray, exempt: List[int]) -> int:
    """Draw a token of one row.

    Most tokens of a nucleus are found by rejection sampling: one of all is drawn, and it
    stands if it belongs to the nucleus. If not, one is drawn of those that do.
    """
    x = below_highest(x)
    if not row.filters:
        return find(np.exp(x / row.temperature), float(u[0]), "right")
    p = np.exp(x)
    if row.has_only_nucleus:
        weights = p if row.temperature == 1 else np.exp(x / row.temperature)
        token = find(weights, float(u[0]), "right")
        if can_be_drawn(token, p, row):
            return token
    ids = possible(p, x, row, u[1], exempt)
    return ids[find(np.exp(x[ids] / row.temperature), float(u[2]), "right")]


def sample(x: mx.array, rows: List[Row], keys: mx.array, exempt: List[int]) -> mx.array:
    """Draw a token of each row: see ``gpu_sampling.sample``."""
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(3,), key=key))(keys)
    tokens = map(
        sample_row,
        np.array(x.astype(mx.float32)),
        rows,
        np.array(uniform),
        [exempt] * len(rows),
    )
    # Logits that are infinite, or next to it, are nothing to warn of.
    with np.errstate(over="ignore", invalid="ignore"):
        return mx.array(np.fromiter(tokens, np.uint32, len(rows)))

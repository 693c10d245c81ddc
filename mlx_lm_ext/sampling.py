"""The built-in sampler: the parameters of each row, in one call for all rows.

Rules:
1. A row has the distribution that mlx-lm's ``make_sampler`` defines for its parameters,
   in the same order: top-p, min-p, XTC, top-k, temperature.
2. What a row draws depends on its logits, its seed and how many tokens it has: never on
   the other rows, on streaming or on what was cached.

A row's n-th token, counted from 0, is drawn with MLX's generator (threefry) and the key
``(a, b + n)``, modulo 2**32. For a ``seed``, a and b are the first two little-endian words
of the BLAKE2b hash of its decimal digits; without one, they are random.
"""

import secrets
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import List, Optional, Tuple

import mlx.core as mx
import numpy as np

from .interfaces import BatchSampler

# Of how many of a row's most likely tokens a nucleus is looked for first.
NUCLEUS_GUESS = 64
# Tokens whose probabilities are added up before a block is drawn.
BLOCK = 128


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def make_key(seed: Optional[int]) -> Tuple[int, int]:
    """The two words that a row's keys start from."""
    if seed is None:
        raw = secrets.token_bytes(8)
    else:
        raw = blake2b(str(seed).encode(), digest_size=8).digest()
    return struct.unpack("<2I", raw)


def nucleus(row: np.ndarray, top_p: float) -> float:
    """The smallest logit of a row's nucleus, on the CPU.

    The whole row is sorted only if the nucleus is larger than a guess. NumPy sorts many
    times faster than MLX's CPU backend.
    """
    peak = row.max()
    n = min(NUCLEUS_GUESS, len(row))
    highest = np.sort(np.partition(row, -n)[-n:])[::-1]
    above = np.cumsum(np.exp(highest - peak))
    goal = top_p * np.exp(row - peak).sum()
    # The last one has to be outside: there may be others like it.
    if n > 1 and above[-2] < goal:
        highest = np.sort(row)[::-1]
        above = np.cumsum(np.exp(highest - peak))
        goal = top_p * above[-1]
    # A token belongs to it if those above have not reached the goal.
    return highest[min(np.searchsorted(above, goal), len(highest) - 1)]


def nucleus_thresholds(x: mx.array, top_p: List[float]) -> mx.array:
    """The smallest logit of each row's nucleus; -inf for a ``top_p`` outside (0, 1).

    Args:
        x (mx.array): Logits of shape (rows, vocabulary).

    Returns:
        mx.array: Of shape (rows, 1).
    """
    off = [not 0 < p < 1 for p in top_p]
    if on_cpu():
        rows = np.array(x)
        found = [-np.inf if o else nucleus(*row) for o, *row in zip(off, rows, top_p)]
        return mx.array(np.array(found, np.float32)[:, None])
    # A GPU sorts faster than the host could hear whether it has to.
    ascending = mx.sort(x, axis=-1)
    masses = mx.exp(ascending - ascending[:, -1:])
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    goal = mx.array(top_p)[:, None] * (above[:, :1] + masses[:, :1])
    n_dropped = (above >= goal).sum(axis=-1, keepdims=True)
    thresholds = mx.take_along_axis(ascending, n_dropped, axis=-1)
    return mx.where(mx.array(off)[:, None], -mx.inf, thresholds)


def keep_top_k(x: mx.array, top_k: List[int]) -> mx.array:
    """Drop all but the ``k`` largest of each row; 0 keeps all."""
    if on_cpu():
        rows = np.array(x)
        kept = np.full_like(rows, -np.inf)
        for row, new, k in zip(rows, kept, top_k):
            places = np.argpartition(row, -k)[-k:] if k else slice(None)
            new[places] = row[places]
        return mx.array(kept)
    order = mx.argsort(-x, axis=-1)
    k = mx.array([k or x.shape[-1] for k in top_k])[:, None]
    ranked = mx.take_along_axis(x, order, axis=-1)
    ranked = mx.where(mx.arange(x.shape[-1]) < k, ranked, -mx.inf)
    return mx.put_along_axis(x, order, ranked, axis=-1)


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


@dataclass
class Row:
    """The parameters of one row, and the key of its first token."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    xtc_probability: float
    xtc_threshold: float
    key: Tuple[int, int]


class DefaultSampler(BatchSampler):
    """Temperature, top-p, min-p, XTC and top-k, seeded or not."""

    name = "default"
    needs_logprobs = False

    def __init__(self, args, request, tokenizer):
        s = request.args.sampling
        a, b = make_key(request.args.seed)
        row = Row(
            s.temperature,
            s.top_p,
            s.min_p,
            s.top_k,
            s.xtc_probability,
            s.xtc_threshold,
            (a, b + request.n_generated),
        )
        self.rows = [row]
        # Tokens that all rows have had since their keys were set.
        self.n_calls = 0
        self.exempt: List[int] = []
        if s.xtc_probability > 0:
            self.exempt = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
        self.columns()

    def columns(self) -> None:
        """Put the parameters of the rows that are not greedy into arrays."""
        self.sampled = [i for i, row in enumerate(self.rows) if row.temperature]
        rows = [self.rows[i] for i in self.sampled]
        self.top_p = [row.top_p for row in rows]
        self.top_k = [row.top_k for row in rows]
        self.has_top_p = any(0 < p < 1 for p in self.top_p)
        self.has_top_k = any(self.top_k)
        self.has_min_p = any(row.min_p for row in rows)
        self.has_xtc = any(row.xtc_probability > 0 for row in rows)
        # log(0) drops nothing.
        with np.errstate(divide="ignore"):
            min_p = np.log(np.array([row.min_p for row in rows], np.float32))

        def column(values):
            return mx.array(np.array(values, np.float32)[:, None])

        self.log_min_p = column(min_p)
        self.temperature = column([row.temperature for row in rows])
        self.xtc_probability = column([row.xtc_probability for row in rows])
        self.xtc_threshold = column([row.xtc_threshold for row in rows])
        keys = [(a, (b - self.n_calls) % 2**32) for a, b in (r.key for r in rows)]
        self.keys = mx.array(np.array(keys, np.uint32).reshape(-1, 2))

    def catch_up(self) -> None:
        """Let the keys of the rows be those of their next tokens."""
        for row in self.rows:
            a, b = row.key
            row.key = a, b + self.n_calls
        self.n_calls = 0

    def extend(self, other):
        self.catch_up()
        other.catch_up()
        self.rows += other.rows
        self.exempt = self.exempt or other.exempt
        self.columns()

    def filter(self, keep):
        self.catch_up()
        self.rows = [self.rows[i] for i in keep]
        self.columns()

    def __call__(self, logprobs):
        if not self.sampled:
            return mx.argmax(logprobs, axis=-1)
        if len(self.sampled) == len(self.rows):
            return self.sample(logprobs)
        rows = mx.array(self.sampled)
        tokens = mx.argmax(logprobs, axis=-1)
        tokens[rows] = self.sample(logprobs[rows])
        return tokens

    def sample(self, x: mx.array) -> mx.array:
        """Tokens of the rows that are not greedy."""
        x = x.astype(mx.float32)
        keys = self.keys + mx.array([0, self.n_calls], mx.uint32)
        self.n_calls += 1
        uniform = mx.vmap(lambda key: mx.random.uniform(shape=(2,), key=key))(keys)
        limits = []
        if self.has_top_p:
            limits.append(nucleus_thresholds(x, self.top_p))
        if self.has_min_p:
            limits.append(x.max(axis=-1, keepdims=True) + self.log_min_p)
        for limit in limits:
            x = mx.where(x < limit, -mx.inf, x)
        if self.has_xtc:
            x = apply_xtc(
                x,
                self.xtc_probability,
                self.xtc_threshold,
                self.exempt,
                uniform[:, 1:],
            )
        if self.has_top_k:
            x = keep_top_k(x, self.top_k)
        return draw(x / self.temperature, uniform[:, :1])

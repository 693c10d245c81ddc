"""The built-in sampler: the parameters of each row, in one call for all rows.

Rules:
1. A row has the distribution that mlx-lm's ``make_sampler`` defines for its parameters,
   in the same order: top-p, min-p, XTC, top-k, temperature.
2. What a row draws depends on its logits, its seed and how many tokens it has: never on
   the other rows, on streaming or on what was cached.
"""

from typing import List

import mlx.core as mx
import numpy as np

from ..device import on_cpu
from ..interfaces import BatchSampler
from . import cpu, gpu
from .parameters import Row, make_key


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
        # Whether the columns are those of the rows: they are made when they are used.
        self.is_current = False

    def columns(self) -> None:
        """Put the parameters of the rows that are not greedy into arrays."""
        self.is_current = True
        self.sampled = [i for i, row in enumerate(self.rows) if row.temperature]
        rows = [self.rows[i] for i in self.sampled]
        self.backend = cpu if on_cpu() else gpu
        self.parameters = self.backend.collect(rows)
        keys = [(row.key[0], row.key[1] % 2**32) for row in rows]
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
        self.is_current = False

    def filter(self, keep):
        self.rows = [self.rows[i] for i in keep]
        self.is_current = False

    def __call__(self, logprobs):
        if not self.is_current:
            self.columns()
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
        keys = self.keys + mx.array([0, self.n_calls], mx.uint32)
        self.n_calls += 1
        return self.backend.sample(x, self.parameters, keys, self.exempt)

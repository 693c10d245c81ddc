"""The built-in sampler: all rows in one call, each with its own parameters.

Rules:
1. A row has the distribution that mlx-lm's ``make_sampler`` defines for its parameters.
   They are applied in the same order: top-p, min-p, XTC, top-k, temperature.
2. What a row draws depends only on its logits, its seed and the number of its tokens: not
   on other rows, on streaming, or on the prompt cache.
"""

import argparse
from copy import copy
from typing import Any, Dict, List, Protocol

import mlx.core as mx
import numpy as np

from ..device import on_cpu
from ..interfaces import BatchSampler, RequestInfo
from . import cpu, gpu
from .parameters import SamplingParameters, make_key


class Backend(Protocol):
    """What the modules ``cpu`` and ``gpu`` do with their functions: draw the tokens of rows
    whose temperature is not 0."""

    def prepare(self, rows: List[SamplingParameters]) -> Any:
        """Put the parameters of the rows into the form that ``sample`` takes. Called once
        after the rows of the batch have changed."""

    def sample(
        self, logits: mx.array, parameters: Any, keys: mx.array, exempt: List[int]
    ) -> mx.array:
        """Draw a token for each row.

        Infinite logits are equally likely. So are all tokens of a row in which a logit is
        NaN or all are -inf.

        Args:
            logits (mx.array): Of shape (rows, vocabulary).
            parameters (Any): What ``prepare`` gave for the rows.
            keys (mx.array): The keys of the tokens, of shape (rows, 2) and type uint32.
            exempt (List[int]): Token ids that XTC does not drop.

        Returns:
            mx.array: Token ids of shape (rows,).
        """


class DefaultSampler(BatchSampler):
    """Temperature, top-p, min-p, XTC and top-k, seeded or not."""

    name = "default"
    needs_logprobs = False

    def __init__(self, args: argparse.Namespace, request: RequestInfo, tokenizer: Any):
        sampling = request.args.sampling
        a, b = make_key(request.args.seed)
        self.rows = [
            SamplingParameters(
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.top_k,
                sampling.xtc_probability,
                sampling.xtc_threshold,
                key=(a, b + request.n_generated),
            )
        ]
        # How many tokens the rows have had since their keys were last advanced.
        self.n_calls = 0
        self.exempt: List[int] = []
        if sampling.xtc_probability > 0:
            self.exempt = tokenizer.encode("\n") + list(tokenizer.eos_token_ids)
        # Whether the rows have changed since ``prepare``.
        self.is_stale = True

    def prepare(self) -> None:
        """Make the arrays of the rows that are not greedy."""
        self.is_stale = False
        self.sampled = [i for i, row in enumerate(self.rows) if row.temperature]
        rows = [self.rows[i] for i in self.sampled]
        self.backend: Backend = cpu if on_cpu() else gpu
        self.parameters = self.backend.prepare(rows)
        keys = [(row.key[0], row.key[1] % 2**32) for row in rows]
        self.keys = mx.array(np.array(keys, np.uint32).reshape(-1, 2))

    def advance_keys(self) -> None:
        """Set the key of each row to that of its next token."""
        for row in self.rows:
            a, b = row.key
            row.key = a, b + self.n_calls
        self.n_calls = 0

    def extend(self, other: "DefaultSampler") -> None:  # type: ignore[override]
        self.advance_keys()
        other.advance_keys()
        self.rows += other.rows
        self.exempt = self.exempt or other.exempt
        self.is_stale = True

    def filter(self, keep: List[int]) -> None:
        self.rows = [self.rows[i] for i in keep]
        self.is_stale = True

    def __deepcopy__(self, memo: Dict[int, Any]) -> "DefaultSampler":
        other = copy(self)
        other.rows = [copy(row) for row in self.rows]
        return other

    def __call__(self, logits: mx.array) -> mx.array:
        if self.is_stale:
            self.prepare()
        if not self.sampled:
            return mx.argmax(logits, axis=-1)
        if len(self.sampled) == len(self.rows):
            return self.sample(logits)
        rows = mx.array(self.sampled)
        tokens = mx.argmax(logits, axis=-1)
        tokens[rows] = self.sample(logits[rows])
        return tokens

    def sample(self, logits: mx.array) -> mx.array:
        """Draw the tokens of the rows that are not greedy."""
        keys = self.keys + mx.array([0, self.n_calls], mx.uint32)
        self.n_calls += 1
        return self.backend.sample(logits, self.parameters, keys, self.exempt)

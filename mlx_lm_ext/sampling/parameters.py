"""What a row of a batch is sampled with: its parameters, and its keys.

A row's n-th token, counted from 0, is drawn with MLX's generator (threefry) and the key
``(a, b + n)``, modulo 2**32. For a ``seed``, a and b are the first two little-endian words
of the BLAKE2b hash of its decimal digits; without one, they are random.
"""

import secrets
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Optional, Tuple


def make_key(seed: Optional[int]) -> Tuple[int, int]:
    """The two words that a row's keys start from."""
    if seed is None:
        raw = secrets.token_bytes(8)
    else:
        raw = blake2b(str(seed).encode(), digest_size=8).digest()
    return struct.unpack("<2I", raw)


# What is smaller would divide by 0 in float32, and is one with it as far as logits tell.
MIN_TEMPERATURE = 1e-6
MIN_TOP_P = 1e-30


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

    def __post_init__(self):
        if self.temperature:
            self.temperature = max(self.temperature, MIN_TEMPERATURE)
        if self.top_p:
            self.top_p = max(self.top_p, MIN_TOP_P)
        # Whether some tokens cannot be drawn.
        self.filters = (
            0 < self.top_p < 1 or self.min_p or self.top_k or self.xtc_probability > 0
        )
        # Whether those that cannot are the ones outside of a nucleus, or of min-p.
        self.has_only_nucleus = 0 < self.top_p < 1 and not (
            self.top_k or self.xtc_probability > 0
        )

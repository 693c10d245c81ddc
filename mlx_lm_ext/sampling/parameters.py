"""The sampling parameters of a row of the batch, and the random keys that its tokens are drawn
with.

The n-th token of a row, counted from 0, is drawn with MLX's generator (threefry) and the
key ``(a, b + n)``, modulo 2**32. With a ``seed``, a and b are the first two little-endian
words of the BLAKE2b hash of its decimal digits. Without one they are random.
"""

import secrets
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Optional, Tuple


def make_key(seed: Optional[int]) -> Tuple[int, int]:
    """The two words of the key of a row's first token."""
    if seed is None:
        raw = secrets.token_bytes(8)
    else:
        raw = blake2b(str(seed).encode(), digest_size=8).digest()
    return struct.unpack("<2I", raw)


# Smaller positive values are raised to these. They choose the same tokens, and float32 can
# divide by them.
MIN_TEMPERATURE = 1e-6
MIN_TOP_P = 1e-30


@dataclass
class SamplingParameters:
    """The parameters of one row; a value of 0 turns each of them off.

    Args:
        temperature (float): 0 is greedy.
        top_p (float): Share of the probability that the nucleus has; 1 turns it off, too.
        min_p (float): Least probability, as a share of the highest.
        top_k (int): How many of the most likely tokens stay.
        xtc_probability (float): How often XTC is applied.
        xtc_threshold (float): Least probability of the tokens that XTC drops.
        key (Tuple[int, int]): The key of the next token, whose second word may be beyond
          2**32.
    """

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
        # Read in each step: as attributes they are faster than as properties.
        self.has_top_p = 0 < self.top_p < 1
        self.has_xtc = self.xtc_probability > 0
        self.has_filters = bool(
            self.has_top_p or self.min_p or self.top_k or self.has_xtc
        )

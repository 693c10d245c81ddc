"""How much of the prompts is run in a step."""

from itertools import accumulate
from typing import List

import mlx.core as mx

from ..device import on_cpu

# Tokens of padding in a step that cost less than another step.
FREE_PADDING = 64


def step_size(wanted: int) -> int:
    """How many tokens to run in a step at most.

    On a CPU, a long prompt takes a third longer in chunks of 2,048 than of 256 tokens.
    """
    return min(wanted, 256) if on_cpu() else wanted


def default_budget() -> int:
    """Tokens between two decode steps: an NVIDIA GPU takes hardly longer for more."""
    return 2048 if mx.cuda.is_available() else 256


def chunk_width(lengths: List[int], n_tokens: int) -> int:
    """How much of each prompt to run next: as much as fits into ``n_tokens``, if no more
    than a quarter of it is padding.

    Args:
        lengths (List[int]): Tokens left to run of each prompt, at least one prompt.
        n_tokens (int): At most so many in all, with the padding; one of each at least.

    Returns:
        int: Tokens of each prompt, or all it has left if those are fewer.
    """
    n = len(lengths)
    widest = min(max(lengths), max(1, n_tokens // n))
    # Where padding begins, and where the n shortest would fill the free padding.
    sums = enumerate(accumulate(sorted(lengths)), 1)
    widths = [*lengths, *((FREE_PADDING + total) // n for n, total in sums)]
    for width in sorted({min(width, widest) for width in widths}, reverse=True):
        padding = sum(max(0, width - length) for length in lengths)
        if padding <= max(FREE_PADDING, width * n // 4):
            return width

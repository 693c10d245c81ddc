"""How much of the prompts is run in a step."""

from itertools import accumulate
from typing import List

import mlx.core as mx

# Whether chunks have a power of two of tokens, padding included, and attention takes all
# of the KV's arrays. With CUDA, cuDNN prepares for 60 ms and more for attention of a new
# shape, as long as ten steps take.
ROUNDED = mx.cuda.is_available()
# Tokens of padding in a step that cost less than another step.
FREE_PADDING = 512 if ROUNDED else 64


def step_size(wanted: int) -> int:
    """How many tokens to run in a step at most.

    On a CPU, a long prompt takes a third longer in chunks of 2,048 than of 256 tokens.
    """
    return min(wanted, 256) if mx.default_device() == mx.cpu else wanted


def padded_width(n: int) -> int:
    """The width at which a chunk runs whose longest row has ``n`` tokens."""
    return 1 << (n - 1).bit_length() if ROUNDED else n


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
    room = max(1, n_tokens // n)
    if ROUNDED:
        longest = min(padded_width(max(lengths)), room)
        widths = {1 << i for i in range(longest.bit_length())}
    else:
        # Where padding begins, and where the n shortest would fill the free padding.
        sums = enumerate(accumulate(sorted(lengths)), 1)
        widths = {*lengths, *((FREE_PADDING + total) // n for n, total in sums)}
        widths = {min(width, room, max(lengths)) for width in widths}
    for width in sorted(widths, reverse=True):
        padding = sum(max(0, width - length) for length in lengths)
        if padding <= max(FREE_PADDING, width * n // 4):
            return width
    return min(widths)

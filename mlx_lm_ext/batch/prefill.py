"""Decides how many tokens of each prompt the next step runs."""

from itertools import accumulate
from typing import List

from ..device import device_kind, on_cpu

# So many tokens of padding cost less than another step.
FREE_PADDING = 64


def max_prefill_tokens(step_size: int) -> int:
    """The most tokens of prompts that one step runs.

    On a CPU, a long prompt takes a third longer in chunks of 2,048 tokens than in chunks
    of 256.

    Args:
        step_size (int): ``--prefill-step-size``.
    """
    return min(step_size, 256) if on_cpu() else step_size


def padded_end(end: int) -> int:
    """Where a chunk of prompts ends that would end at the place ``end``, with padding.

    With CUDA, cuDNN plans the attention of each new shape, which takes 50 to 120 ms, more
    than to run a short prompt. With padding there are few shapes. Where the arrays have
    room for ``end`` they have room for the padding.
    """
    if device_kind() != "cuda":
        return end
    size = 32 if end <= 256 else 128
    return -(-end // size) * size


def chunk_width(lengths: List[int], budget: int) -> int:
    """How many tokens of each prompt the next step runs.

    The prompts run side by side, and the shorter ones are padded. The chunk keeps within
    the budget, and its padding within ``FREE_PADDING`` tokens or a quarter of the chunk.
    Of the widths where the padding of one more prompt begins, or fills ``FREE_PADDING``,
    the largest is taken that does so.

    Args:
        lengths (List[int]): Tokens left of each prompt; at least one prompt.
        budget (int): The most tokens of the chunk, padding included. If there are more
          prompts than that, one token of each is run.

    Returns:
        int: Tokens of each prompt. Of shorter prompts all tokens are run.
    """
    n = len(lengths)
    widest = min(max(lengths), max(1, budget // n))
    # Padded to a width, the k shortest prompts have k * width - total tokens of padding.
    totals = enumerate(accumulate(sorted(lengths)), 1)
    widths = [*lengths, *((FREE_PADDING + total) // k for k, total in totals)]

    def fits(width: int) -> bool:
        padding = sum(max(0, width - length) for length in lengths)
        return padding <= max(FREE_PADDING, width * n // 4)

    # At least the shortest length, which needs no padding.
    return max(width for width in {min(w, widest) for w in widths} if fits(width))

"""Decides how many tokens of each prompt the next step runs."""

from itertools import accumulate
from typing import List, Set, Tuple

from ..device import device_kind, on_cpu

# So many tokens of padding cost less than another step.
FREE_PADDING = 64
# Tokens of the smallest chunk with CUDA. A larger one of up to 4 times as many takes as long.
MIN_WIDTH = 32
# With CUDA, the shapes of chunks that were run with the loaded model: rows, tokens of each, and
# where they end.
SHAPES: Set[Tuple[int, int, int]] = set()


def max_prefill_tokens(step_size: int) -> int:
    """The most tokens of prompts that the device is given at a time.

    On a CPU, a long prompt takes a third longer in chunks of 2,048 tokens than in chunks
    of 256.

    Args:
        step_size (int): ``--prefill-step-size``.
    """
    return min(step_size, 256) if on_cpu() else step_size


def least_chunk() -> int:
    """How many tokens of prompts a step runs at least, because fewer take hardly less time.
    With CUDA, a prompt in small chunks also meets more shapes, see ``padded_width``."""
    return 256 if device_kind() == "cuda" else 16


def note_shape(n_rows: int, width: int, end: int) -> bool:
    """Note the shape of a chunk. Whether it is a new one, which the device has to plan first.

    Args:
        n_rows (int): Prompts that run side by side.
        width (int): Tokens of each, with the padding.
        end (int): Places that the longest of them has then.
    """
    if device_kind() != "cuda" or (n_rows, width, end) in SHAPES:
        return False
    SHAPES.add((n_rows, width, end))
    return True


def runs_alone(n_left: int, n_known: int) -> bool:
    """Whether a prompt runs without others beside it.

    To read the weights for one prompt costs as much as some tokens more of it, and padding
    costs, too. With CUDA, rows with padding need a mask, with which the attention is slow and
    its shapes are many.

    Args:
        n_left (int): Tokens of it that are left to run.
        n_known (int): Tokens before them, whose KV is there.
    """
    if device_kind() == "cuda":
        return n_left + n_known > 512
    return n_left > 128


def padded_width(width: int) -> int:
    """How many tokens a chunk of ``width`` tokens of each prompt runs, with the padding after
    them.

    With CUDA, cuDNN plans the attention of each new shape, which takes 50 to 120 ms, more than
    to run a short prompt. A shape is known by the tokens of the chunk and by the place where it
    ends. So chunks have few sizes, and begin where ``aligned`` says.
    """
    if device_kind() != "cuda":
        return width
    return max(MIN_WIDTH, 1 << (width - 1).bit_length())


def aligned(n_known: int, n_tokens: int) -> int:
    """How many tokens of a known prefix are taken from the prompt cache, so that the first chunk
    begins at one of few places, see ``padded_width``. The rest of the prefix is run again, which
    takes less time than to plan the attention of a new shape.

    Args:
        n_known (int): Tokens whose KV is there.
        n_tokens (int): Tokens of the prompt.
    """
    if device_kind() != "cuda":
        return n_known
    size = MIN_WIDTH if n_tokens <= 256 else 128
    return n_known // size * size


def whole_budget(n_tokens: int) -> int:
    """A budget for the prompts of a step, raised to the next power of two if that is at most a
    quarter more. Only with CUDA: chunks have a power of two of tokens there, and of a budget
    just below one, half would not be used.

    Args:
        n_tokens (int): Tokens that a step has time for.
    """
    size = 1 << (n_tokens - 1).bit_length()
    is_near = size <= n_tokens * 5 // 4
    return size if is_near and device_kind() == "cuda" else n_tokens


def chunk_budget(left: int, whole: int) -> int:
    """The most tokens of another chunk in a step.

    With CUDA, it gets the width that it would get in a step of its own, or has to wait for the
    next step. In the rest of a budget it would have another shape, and so would all the chunks
    after it.

    Args:
        left (int): Tokens that are left of the budget of the step.
        whole (int): The budget.
    """
    return whole if device_kind() == "cuda" else left


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
    if n == 1 and device_kind() == "cuda":
        return whole_width(lengths[0], budget)
    widest = min(max(lengths), max(1, budget // n))
    # Padded to a width, the k shortest prompts have k * width - total tokens of padding.
    totals = enumerate(accumulate(sorted(lengths)), 1)
    widths = [*lengths, *((FREE_PADDING + total) // k for k, total in totals)]

    def fits(width: int) -> bool:
        padding = sum(max(0, width - length) for length in lengths)
        return padding <= max(FREE_PADDING, width * n // 4)

    # At least the shortest length, which needs no padding.
    return max(width for width in {min(w, widest) for w in widths} if fits(width))


def whole_width(n_left: int, budget: int) -> int:
    """How many tokens of a prompt that runs alone the next step runs, with CUDA: a power of two,
    or what is left if that is nearly one.

    Args:
        n_left (int): Tokens that are left of it.
        budget (int): The most tokens of the chunk.
    """
    size = padded_width(n_left)
    padding = size - n_left
    if size <= budget and (size <= 4 * MIN_WIDTH or padding <= size // 4):
        return n_left
    return 1 << (min(n_left, budget).bit_length() - 1)

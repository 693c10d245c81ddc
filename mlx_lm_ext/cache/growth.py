"""The sizes of the KV arrays of a batch: the rules by which they grow and shrink.

Rules:
1. The batch caches call these functions when they change their arrays, and ``KVMemory``
   calls them to predict the memory of a batch. The rules are written nowhere else.
2. A larger array is a copy of all that is in it. So there is room for more than is needed
   now, and what is no longer needed is given up only when that is a good part of the
   array.
"""

from mlx_lm.models.cache import KVCache

# Arrays that grow get room for a multiple of so many tokens.
STEP = KVCache.step

# Places of arrays of which a copy takes so long that another one should not be needed soon.
LONG = 4 * STEP

# The least padding that is worth a copy of the rows without it.
MIN_PADDING = 32


def capacity(n_tokens: int) -> int:
    """How many tokens the arrays have room for once they have grown to ``n_tokens``."""
    return -(-n_tokens // STEP) * STEP


def grown_columns(n_columns: int, end: int) -> int:
    """How many tokens arrays of ``n_columns`` have room for once they hold ``end``."""
    return n_columns if end <= n_columns else capacity(end)


def roomy_columns(n_columns: int, end: int) -> int:
    """How many tokens arrays of ``n_columns``, of which ``end`` are in use, have room for after
    they were copied because of new rows."""
    n_free = STEP // 2 if n_columns >= LONG else 0
    return grown_columns(n_columns, end + n_free)


def merged_capacity(n_tokens: int, n_to_come: int) -> int:
    """How many tokens the arrays of merged rows have room for.

    Args:
        n_tokens (int): Tokens of the longest row.
        n_to_come (int): Tokens that are known to follow. There is room for at least one
          more, as the first step would copy full arrays.
    """
    return capacity(n_tokens + n_to_come + 1)


def grown_rows(n_rows: int, n_more: int, n_to_follow: int = 0) -> int:
    """How many rows the arrays have once they have grown from ``n_rows`` that are in use
    for ``n_more``: spare ones as well, so that the next rows join without a copy.

    Args:
        n_rows (int): Rows in use.
        n_more (int): Rows that join now.
        n_to_follow (int): Rows that are known to join later. The arrays get no more than twice
          as large for them.
    """
    n_spare = min(n_to_follow, n_rows - n_more) if n_to_follow else n_rows // 4
    return n_rows + n_more + max(0, n_spare)


def max_rows(n_rows: int) -> int:
    """The most rows that ``grown_rows`` gives for ``n_rows`` in all."""
    return grown_rows(n_rows, 0)


def are_few(n_left: int, n_rows: int) -> bool:
    """Whether arrays of ``n_rows`` are too large for the rows that are left."""
    return 2 * n_left < n_rows


def is_excess(padding: int, width: int) -> bool:
    """Whether so much padding, which all rows have, is too much for arrays in which
    ``width`` places are in use."""
    return padding >= max(MIN_PADDING, width // 4)


def dropped(padding: int, width: int) -> int:
    """How much of the padding that all rows have a copy of them goes without. Long arrays go on
    having room for a multiple of ``STEP`` tokens: with CUDA, attention is planned for each
    size."""
    return padding if width - padding < LONG else padding // STEP * STEP


def max_width(n_tokens: int) -> int:
    """The most places that are in use, with the padding that ``is_excess`` allows, if the
    longest row has ``n_tokens``."""
    return max(n_tokens * 4 // 3, n_tokens + MIN_PADDING)


def window_slack(max_size: int) -> int:
    """How many tokens may stay that have left a window of ``max_size`` tokens: dropping
    them is a copy, and keeping them is more for the attention to read."""
    return max_size // 8


def window_capacity(max_size: int) -> int:
    """How many tokens the arrays of a window have room for after tokens were dropped: as
    many as there are when tokens are dropped again."""
    return max_size + window_slack(max_size) + 1

"""Time rows that join and leave a batch, in comparison with mlx-lm's BatchKVCache.

python -m mlx_lm_ext.bench.join_and_leave
"""

import argparse
import time
from typing import Any, List, Type

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache

from mlx_lm_ext.arguments import ArgumentParser, number
from mlx_lm_ext.bench import timings
from mlx_lm_ext.cache.segmented import BatchSegmentedKVCache

HEADS, HEAD_DIM = 4, 64


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="join_and_leave",
        description="Time rows that join and leave the KV of a batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=number(int, 2), default=32, help="of the batch")
    add("--tokens", type=number(int, 1), default=4000, help="of each row")
    add("--layers", type=number(int, 1), default=4, help="of the model")
    add("--rounds", type=number(int, 1), default=5, help="joins and leaves of each")
    return parser


def evaluate(caches: List[Any]) -> None:
    mx.eval([cache.state for cache in caches])


def decode(caches: List[Any], n_rows: int) -> None:
    x = mx.zeros((n_rows, HEADS, 1, HEAD_DIM))
    for cache in caches:
        cache.update_and_fetch(x, x)
    evaluate(caches)


def make(cls: Type, n_rows: int, args: argparse.Namespace) -> List[Any]:
    """A batch's caches, one for each layer."""
    caches = [cls([0] * n_rows) for _ in range(args.layers)]
    x = mx.random.normal((n_rows, HEADS, args.tokens, HEAD_DIM))
    for cache in caches:
        cache.update_and_fetch(x, x)
    evaluate(caches)
    return caches


def join(caches: List[Any], row: List[Any]) -> float:
    """Milliseconds in which a row joins."""
    start = time.perf_counter()
    for cache, other in zip(caches, row):
        cache.extend(other)
    evaluate(caches)
    return 1e3 * (time.perf_counter() - start)


def leave(caches: List[Any], n_rows: int) -> float:
    """Milliseconds in which the first row leaves and the last takes its place."""
    start = time.perf_counter()
    for cache in caches:
        cache.filter([n_rows - 1, *range(1, n_rows - 1)])
    evaluate(caches)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print the times and their ratios."""
    args = make_parser().parse_args()
    times = {}
    for _ in range(args.rounds):
        for cls in (BatchKVCache, BatchSegmentedKVCache):
            caches = make(cls, args.rows - 1, args)
            # For the first row that joins the arrays grow, and get spare rows.
            join(caches, make(cls, 1, args))
            decode(caches, args.rows)
            ms = leave(caches, args.rows)
            times.setdefault(("leave", cls.__name__), []).append(ms)
            decode(caches, args.rows - 1)
            ms = join(caches, make(cls, 1, args))
            times.setdefault(("join", cls.__name__), []).append(ms)
            decode(caches, args.rows)
    for what in ("join", "leave"):
        theirs, ours = (
            timings.spread(times[what, cls.__name__])[0]
            for cls in (BatchKVCache, BatchSegmentedKVCache)
        )
        print(
            f"{what}: mlx-lm {theirs:.2f} ms, here {ours:.2f} ms: "
            f"{theirs / ours:.1f} times"
        )


if __name__ == "__main__":
    main()

"""Time lookups and insertions, in comparison with mlx-lm's LRUPromptCache.

    python -m mlx_lm_ext.bench.cache_lookup

The KV is tiny, so that only the work on the tree is timed.
"""

import argparse
import time
from random import Random
from typing import Callable, List

import mlx.core as mx
from mlx_lm.models.cache import KVCache, LRUPromptCache

from mlx_lm_ext.arguments import ArgumentParser, number
from mlx_lm_ext.bench import timings
from mlx_lm_ext.cache.prompt_cache import RadixPromptCache


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="cache_lookup",
        description="Time lookups in a prompt cache, and insertions into it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=number(int, 2), default=32_000, help="of the prompt looked up")
    add("--conversations", type=number(int, 1), default=1000, help="in the cache")
    add("--rounds", type=number(int, 1), default=20, help="lookups of each kind")
    return parser


def make_caches(n: int) -> List[KVCache]:
    x = mx.zeros((1, 1, n, 1))
    return [KVCache.from_state((x, x, n))]


def fill(
    cache: LRUPromptCache, prompt: List[int], n: int, where: Callable[[int], int]
) -> None:
    """Insert a prompt and ``n`` conversations. The i-th has the first ``where(i)`` tokens of
    the prompt, and others after them."""
    cache.insert_cache("model", prompt, make_caches(len(prompt)))
    for i in range(n):
        tokens = [*prompt[: where(i)], -i - 1, *prompt[:500]]
        cache.insert_cache("model", tokens, make_caches(len(tokens)))


def milliseconds(cache: LRUPromptCache, prompt: List[int], rounds: int) -> float:
    """The median time of a lookup."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        found, rest = cache.fetch_nearest_cache("model", prompt)
        times.append(1e3 * (time.perf_counter() - start))
        if found is None or len(rest) > 2:
            raise RuntimeError("the prompt was not found")
    return timings.spread(times)[0]


def main() -> None:
    """Print the times."""
    args = make_parser().parse_args()
    rng = Random(0)
    prompt = [rng.randrange(50_000) for _ in range(args.tokens)]
    places = {
        "after a common system prompt": lambda i: len(prompt) // 32,
        "all along the prompt": lambda i: len(prompt) * i // args.conversations,
    }
    asked = {
        "the same prompt": prompt,
        "one with another end": [*prompt[:-1], -1, -1],
        "its first half": prompt[: len(prompt) // 2],
    }
    print(f"{args.tokens} tokens, {args.conversations} conversations; milliseconds")
    for place, where in places.items():
        for cache in (LRUPromptCache(max_size=1 << 63), RadixPromptCache()):
            print(f"{type(cache).__name__}, conversations that part {place}")
            start = time.perf_counter()
            fill(cache, prompt, args.conversations, where)
            seconds = time.perf_counter() - start
            print(f"  insertion, on average: {1e3 * seconds / args.conversations:.2f}")
            for name, tokens in asked.items():
                ms = milliseconds(cache, tokens, args.rounds)
                print(f"  lookup of {name}: {ms:.2f}")


if __name__ == "__main__":
    main()

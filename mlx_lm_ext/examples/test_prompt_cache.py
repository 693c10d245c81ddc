"""Show whether an OpenAI-compatible server reuses the KV of shared prefixes.

    mlx_lm.batch_server --use-prompt-cache &
    python mlx_lm_ext/examples/test_prompt_cache.py

Each of ``--concurrency`` users sends a long prompt of its own, then the same prompt with a
suffix, then the same prompt with another suffix. This is a tool, which pytest does not run.
"""

import argparse
import asyncio
import random
from typing import List, Optional, Tuple

from mlx_lm_ext.arguments import ArgumentParser
from mlx_lm_ext.bench import timings, words
from mlx_lm_ext.bench.arguments import add_server_arguments
from mlx_lm_ext.bench.timings import Timing
from mlx_lm_ext.examples.benchmark_client import ask, connect

N_WORDS = 1270  # about 1,500 tokens with most tokenizers
MAX_TOKENS = 16
ROUNDS = {
    "1: a unique prompt": "",
    "2: with a suffix": " Who is the hero of this story?",
    "3: with another suffix": " Where does this story take place?",
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="test_prompt_cache.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_server_arguments(parser)
    return parser


async def run(args: argparse.Namespace) -> List[List[Timing]]:
    """The timings of each round. All users end a round before the next one begins."""
    # No fixed seed: a prompt that an earlier run has sent could be in the cache.
    rng = random.Random()
    prompts = [words.text(rng, N_WORDS) for _ in range(args.concurrency)]
    rounds = []
    async with connect(args) as client:
        for suffix in ROUNDS.values():
            asked = (
                ask(client, args.model, prompt + suffix, MAX_TOKENS, stream=True)
                for prompt in prompts
            )
            rounds.append(await asyncio.gather(*asked))
    return rounds


def report(rounds: List[List[Timing]]) -> str:
    """TTFT and cached tokens of each round as a table."""
    lines = [
        f"{'round':<26}{'median TTFT':>12}{'cached / prompt tokens':>26}{'gain':>9}"
    ]
    for name, done, speed_up in zip(ROUNDS, rounds, speed_ups(rounds)):
        cached, prompt = token_counts(done)
        ttft = timings.median_ttft(done)
        lines.append(
            f"{name:<26}{ttft:>10.2f} s{f'{cached} / {prompt}':>26}{speed_up:>8.2f}x"
        )
    return "\n".join(lines)


def token_counts(done: List[Timing]) -> Tuple[int, int]:
    """Cached tokens and prompt tokens of a round."""
    return sum(t.cached_tokens for t in done), sum(t.prompt_tokens for t in done)


def speed_ups(rounds: List[List[Timing]]) -> List[float]:
    """How many times shorter the median TTFT is than in the first round."""
    ttfts = [timings.median_ttft(done) for done in rounds]
    return [ttfts[0] / ttft for ttft in ttfts]


def main(argv: Optional[List[str]] = None) -> None:
    """Measure, and exit with 1 if a request failed or nothing was reused."""
    args = make_parser().parse_args(argv)
    try:
        rounds = asyncio.run(run(args))
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    for error in {t.error for done in rounds for t in done if t.error}:
        raise SystemExit(f"error: a request failed with {error}")
    print(report(rounds))
    # Prompts of one round that share their first words may have cached tokens without a
    # prompt cache too, so more than half of the tokens are asked for.
    counts = [token_counts(done) for done in rounds[1:]]
    reused = all(2 * cached > prompt for cached, prompt in counts)
    if not reused:
        raise SystemExit("the server does not reuse prefixes: see the cached tokens")
    if min(speed_ups(rounds)[1:]) <= 1:
        raise SystemExit("the server reuses prefixes, and is not faster for it")


if __name__ == "__main__":
    main()

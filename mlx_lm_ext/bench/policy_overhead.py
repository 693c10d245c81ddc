"""What the policies cost a decode step of a tiny model when no plugin is installed.

Two batches decode the same prompts in turns: one as the server runs it, and one without
guards, a scheduler policy and groups of samplers.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_lm_ext import blas

blas.load()

import mlx.core as mx

from mlx_lm_ext.arguments import ArgumentParser, make_parser, number
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.random_model import LLAMA, write_model
from mlx_lm_ext.bench.steps import seconds_of_step
from mlx_lm_ext.engine.models import BatchModelProvider
from mlx_lm_ext.engine.warm_up import make_request
from mlx_lm_ext.interfaces import SchedulerPolicy
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.mailbox import Turnstile


class Greedy:
    """Takes the place of ``SamplerGroups``: one function for all rows."""

    def extend(self, samplers):
        pass

    def filter(self, keep):
        pass

    def __call__(self, logits):
        return mx.argmax(logits, axis=-1)


def start_batch(args: argparse.Namespace, n_rows: int, n_tokens: int) -> Batch:
    """A batch of ``n_rows`` requests that decode."""
    provider = BatchModelProvider(args)
    provider.switch_to(provider.default_key)
    policies = Policies(Plugins(), args)
    model, tokenizer = provider.model, provider.tokenizer
    batch = Batch(model, tokenizer, args, policies, None, Turnstile())
    for i in range(n_rows):
        prompt = [i + 3, 4, 5]
        batch.add(make_request(provider, args, prompt, max_tokens=n_tokens))
    while batch.prefilling:
        batch.step()
    return batch


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--rows", type=number(int, 1), default=8, help="requests in the batch"
    )
    parser.add_argument(
        "--rounds", type=number(int, 1), default=40, help="turns of each batch"
    )
    parser.add_argument(
        "--steps", type=number(int, 1), default=50, help="steps of a turn"
    )
    options = parser.parse_args()
    n_tokens = options.rounds * options.steps + 10
    with tempfile.TemporaryDirectory() as folder:
        config = LLAMA | {"max_position_embeddings": 2 * n_tokens}
        model = write_model(Path(folder) / "model", "llama", config)
        args = make_parser().parse_args(["--model", str(model)])
        with_policies, without = (
            start_batch(args, options.rows, n_tokens) for _ in range(2)
        )
    # The interface itself: each method does nothing.
    policies: Any = without.policies
    policies.scheduler = SchedulerPolicy(args, time.monotonic)
    without.generator.generation_batch.groups[0].batch.sampling.samplers = Greedy()
    pairs = []
    for i in range(options.rounds):
        # The one that goes first is slower, so they take turns at that.
        sides = [with_policies, without][:: -1 if i % 2 else 1]
        times = {side: seconds_of_step(side, options.steps) for side in sides}
        pairs.append((times[with_policies], times[without]))
    first, second = (timings.spread(list(side))[0] * 1e6 for side in zip(*pairs))
    # One ratio for each two rounds, of which each side went first once.
    both = [(a + c) / (b + d) for (a, b), (c, d) in zip(pairs[::2], pairs[1::2])]
    ratio, low, high = timings.spread(both)
    print(
        f"{options.rows} rows: {first:.0f} us a step with policies, {second:.0f} without; "
        f"ratio {ratio:.4f} ({low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()

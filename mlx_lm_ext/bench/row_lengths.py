"""What a long row costs the short ones beside it: the time of their steps, and the memory of
the KV.

python -m mlx_lm_ext.bench.row_lengths

Three batches decode in turns: the short rows alone, with the long row, and with the long row
in one group with them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Dict, List

from mlx_lm_ext import blas

blas.load()

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_lm_ext.arguments import ArgumentParser, make_parser, number
from mlx_lm_ext.batch.batch import Batch
from mlx_lm_ext.batch.grouping import Grouping
from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.random_model import LLAMA, write_model
from mlx_lm_ext.bench.steps import seconds_of_step
from mlx_lm_ext.engine.models import BatchModelProvider
from mlx_lm_ext.engine.warm_up import make_request
from mlx_lm_ext.policies.guard import Policies
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.mailbox import Turnstile


class OneGroup(Grouping):
    """All rows are in one group."""

    def place(self, groups, lengths):
        return [0] * len(lengths)

    def plan(self, groups):
        return None


class Together(Batch):
    grouping_class = OneGroup


def start_batch(
    batch_class: type,
    provider: BatchModelProvider,
    args: argparse.Namespace,
    lengths: List[int],
    n_tokens: int,
) -> Batch:
    """A batch of rows of these lengths that decode. The KV of their prompts is zeros."""
    model, policies = provider.model, Policies(Plugins(), args)
    batch: Batch = batch_class(
        model, provider.tokenizer, args, policies, None, Turnstile()
    )
    for i, n in enumerate(lengths):
        prompt = [3 + i, *([4] * (n - 1))]
        request = make_request(provider, args, prompt, max_tokens=n_tokens)
        caches = make_prompt_cache(model)
        model(mx.array([[0]]), cache=caches)
        for c in caches:
            c.keys, c.values = (
                mx.zeros((*x.shape[:2], n - 1, x.shape[3]), x.dtype)
                for x in (c.keys, c.values)
            )
            c.offset = n - 1
        batch.prompt_cache.insert_cache(request.cache_key, prompt[:-1], caches)
        batch.add(request)
        batch.step()
    while batch.prefilling:
        batch.step()
    # Until the groups are as they will be.
    for _ in range(10):
        batch.step()
    return batch


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--short", type=number(int, 1), default=31, help="short rows")
    add("--tokens", type=number(int, 2), default=100, help="tokens of a short row")
    add("--long", type=number(int, 0), default=16000, help="tokens of the long row")
    add("--layers", type=number(int, 1), default=4, help="layers of the model")
    add("--hidden", type=number(int, 32), default=1024, help="hidden size of the model")
    add("--rounds", type=number(int, 1), default=12, help="turns of each batch")
    add("--steps", type=number(int, 1), default=12, help="steps of a turn")
    options = parser.parse_args()
    n_tokens = options.rounds * options.steps + 200
    short = [options.tokens] * options.short
    lengths = [*short, options.long] if options.long else short
    with tempfile.TemporaryDirectory() as folder:
        config = LLAMA | {
            "max_position_embeddings": 2 * n_tokens + 2 * options.long,
            "hidden_size": options.hidden,
            "intermediate_size": 4 * options.hidden,
            "num_hidden_layers": options.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        }
        model = write_model(Path(folder) / "model", "llama", config)
        args = make_parser().parse_args(["--model", str(model), "--batch-size", "99"])
        provider = BatchModelProvider(args)
        provider.switch_to(provider.default_key)
        batches = {
            "short rows": start_batch(Batch, provider, args, short, n_tokens),
            "with a long one": start_batch(Batch, provider, args, lengths, n_tokens),
            "in one group": start_batch(Together, provider, args, lengths, n_tokens),
        }
    times: Dict[str, List[float]] = {name: [] for name in batches}
    for i in range(options.rounds):
        for name, batch in [*batches.items()][:: -1 if i % 2 else 1]:
            # Its steps may take 20 times as long.
            n_steps = options.steps // (12 if name == "in one group" else 1)
            times[name].append(seconds_of_step(batch, max(1, n_steps)))
    for name, batch in batches.items():
        ratios = [a / b for a, b in zip(times[name], times["short rows"])]
        ratio, low, high = timings.spread(ratios)
        held = batch.generator.prompt_cache_nbytes
        there = sum(len(r.tokens) for r in batch.requests)
        there *= batch.kv_memory.nbytes(1, 256) // 256
        groups = [len(g) for g in batch.generator.generation_batch.groups]
        print(
            f"{name}, groups of {groups} rows: {timings.spread(times[name])[0] * 1e3:.2f} ms "
            f"a step, {ratio:.2f} times ({low:.2f} to {high:.2f}); KV {held / 1e6:.1f} MB, "
            f"{held / there:.2f} times that of the tokens"
        )


if __name__ == "__main__":
    main()

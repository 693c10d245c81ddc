"""Runs what the first requests will run, before they come.

Kernels are compiled, and memory is allocated, when they are first needed: some for each
size of the batch. A request that had to wait for that would wait for seconds.
"""

import argparse
import logging
import time
from dataclasses import replace
from typing import Any, Callable, List

from mlx_lm.generate import StopSequences

from .batching import Batch
from .model_provider import BatchModelProvider
from .plugins import Plugins
from .policies import Policies
from .prefill import default_budget
from .request import Request
from .turnstile import Turnstile
from .validation import parse_arguments

# One of each kind of row.
BODIES = [{}, {"temperature": 0.7, "top_p": 0.95}, {"logprobs": 1}]
# No policy of a plugin hears of it.
BUILT_IN = dict(eviction_policy="lru", scheduler="fcfs", sampler="default")


def make_request(
    provider: BatchModelProvider,
    args: argparse.Namespace,
    prompt: List[int],
    **body: Any,
) -> Request:
    """A request of nobody's, which only ``max_tokens`` ends."""
    generation_args = parse_arguments(body, args)
    model = provider.describe(generation_args.model)
    return Request(
        "",
        generation_args,
        model=replace(model, end_of_text=StopSequences()),
        prompt=prompt,
        n_prompt=len(prompt),
        segments=[prompt],
        segment_types=["assistant"],
    )


def warm_up(provider: BatchModelProvider, is_stopping: Callable[[], bool]) -> None:
    """Fill a batch step by step, and let half of it leave."""
    start = time.perf_counter()
    args = argparse.Namespace(**vars(provider.cli_args) | BUILT_IN)
    batch = Batch(provider, Policies(Plugins(), args), None, Turnstile())

    n_prompt = default_budget()
    size = 1
    while not is_stopping():
        for i in range(len(batch), size):
            body = BODIES[i % len(BODIES)] | {"max_tokens": 64 + args.batch_size}
            # Prompts of two lengths: padding has kernels of its own.
            prompt = [i % 64] * (n_prompt + i % 2)
            batch.add(make_request(provider, args, prompt, **body))
            n_prompt = 8
        while batch.prefilling:
            batch.step()
        for _ in range(2):
            batch.step()
        if size == args.batch_size:
            batch.remove(batch.requests[size // 2 :])
            batch.step()
            break
        size = min(2 * size, args.batch_size)
    batch.close()
    logging.info(f"Warmed up in {time.perf_counter() - start:.1f} seconds")

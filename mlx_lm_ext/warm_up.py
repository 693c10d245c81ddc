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

from . import prefill
from .batching import Batch
from .model_provider import BatchModelProvider
from .plugins import Plugins
from .policies import Policies
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
    """Fill a batch step by step, and let half of it leave. Where each shape of a chunk
    costs, run the likely ones."""
    start = time.perf_counter()
    args = argparse.Namespace(**vars(provider.cli_args) | BUILT_IN)
    batch = Batch(provider, Policies(Plugins(), args), None, Turnstile())

    def add(n: int, n_prompt: int, max_tokens: int) -> None:
        for i in range(n):
            body = BODIES[i % len(BODIES)] | {"max_tokens": max_tokens}
            batch.add(make_request(provider, args, [i] * n_prompt, **body))

    add(1, args.prefill_budget, 64 + args.batch_size)
    size = 1
    while not is_stopping():
        add(size - len(batch), 8, 64 + args.batch_size)
        while batch.prefilling:
            batch.step()
        for _ in range(2):
            batch.step()
        if size == args.batch_size:
            batch.remove(batch.requests[size // 2 :])
            batch.step()
            break
        size = min(2 * size, args.batch_size)
    batch.remove(batch.requests)
    for n in range(1, args.prompt_concurrency + 1 if prefill.ROUNDED else 1):
        width = 8
        while n * width <= args.prefill_budget and not is_stopping():
            add(n, width + 1, 1)
            while batch:
                batch.step()
            width *= 2
    batch.close()
    logging.info(f"Warmed up in {time.perf_counter() - start:.1f} seconds")

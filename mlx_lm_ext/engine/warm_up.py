"""Runs what the first requests will run, before they come.

MLX compiles kernels and allocates memory when they are first needed, some of them for each
size of the batch. Without a warm-up, the first requests would wait seconds for that.
"""

import argparse
import logging
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Tuple

from mlx_lm.generate import StopSequences
from mlx_lm.server import CompletionRequest

from ..batch.batch import Batch
from ..device import on_cpu
from ..policies.guard import Policies
from ..policies.loading import Plugins
from ..policies.scheduling import default_prefill_budget
from ..request.fields import make_generation_arguments
from ..request.mailbox import Turnstile
from ..request.request import Request
from ..sampling.penalties import MAX_CONTEXT
from .models import BatchModelProvider

logger = logging.getLogger(__name__)

# A greedy row, a sampled one, and one with log probabilities.
BODIES: List[Dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.95},
    {"logprobs": 1},
]
PENALTIES: Dict[str, Any] = dict(
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={"0": 1},
)
# With CUDA, each of these needs kernels of its own, which take seconds to compile.
GPU_BODIES: List[Dict[str, Any]] = [
    dict(
        temperature=0.7,
        top_p=0.95,
        min_p=0.01,
        top_k=40,
        xtc_probability=0.5,
        xtc_threshold=0.1,
    ),
    PENALTIES,
    PENALTIES | dict(repetition_context_size=MAX_CONTEXT + 1),
]
# The policies of plugins take no part in it.
BUILT_IN = dict(eviction_policy="lru", scheduler="fcfs", sampler="default")


def make_request(
    provider: BatchModelProvider,
    args: argparse.Namespace,
    prompt: List[int],
    **body: Any,
) -> Request:
    """A request that no client has sent, and that only ``max_tokens`` ends."""
    generation_args = make_generation_arguments(body, args)
    model = provider.describe(generation_args.model)
    return Request(
        "",
        generation_args,
        completion=CompletionRequest("text", "", [], None, None),
        model=replace(model, end_of_text=StopSequences()),
        prompt=prompt,
        n_prompt=len(prompt),
        segments=[prompt],
        segment_types=["assistant"],
    )


def warm_up(provider: BatchModelProvider, is_stopping: Callable[[], bool]) -> None:
    """Let rows join a batch, run some steps at each size, and let the rows leave.

    Raises:
        RequestError: If not even a short request fits into the memory for KV.
    """
    logger.info("Warming up")
    start = time.perf_counter()
    args = argparse.Namespace(**vars(provider.cli_args) | BUILT_IN)
    policies = Policies(Plugins(autoload=False), args)
    model, tokenizer = provider.model, provider.tokenizer
    batch = Batch(model, tokenizer, args, policies, None, Turnstile())

    def add(n_prompt: int, **body: Any) -> bool:
        i = len(batch)
        body = BODIES[i % len(BODIES)] | body
        # Prompts of two lengths, because padding needs kernels of its own.
        request = make_request(provider, args, [i % 64] * (n_prompt + i % 2), **body)
        fits = batch.fits(request)
        if fits:
            batch.add(request)
        return fits

    def run() -> None:
        while batch.prefilling:
            batch.step()
        for _ in range(2):
            batch.step()

    extras: List[Tuple[int, Dict[str, Any]]] = [(default_prefill_budget(), {})]
    if not on_cpu():
        extras += [(8, body) for body in GPU_BODIES]
    size, n_tokens = 1, 64 + 2 * args.batch_size
    while not is_stopping():
        # A batch of more rows may not fit into the memory for KV.
        fits = all(add(8, max_tokens=n_tokens) for _ in range(len(batch), size))
        run()
        if size == 1:
            for n_prompt, body in extras:
                if not is_stopping() and add(n_prompt, max_tokens=1, **body):
                    run()
        if size == args.batch_size or not fits:
            break
        size = min(2 * size, args.batch_size)
    # On a GPU, kernels are chosen for each size when it first runs.
    n = len(batch)
    for n_left in [n // 2] if on_cpu() else range(n - 1, 0, -1):
        if not is_stopping():
            batch.remove(batch.requests[n_left:])
            batch.step()
    batch.close()
    logger.info(f"Warmed up in {time.perf_counter() - start:.1f} seconds")

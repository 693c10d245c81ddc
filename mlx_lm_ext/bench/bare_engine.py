"""Measure mlx-lm's ``BatchGenerator`` on short chats, without a server.

Runs as a process of its own, which prints its result as JSON on standard output.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from random import Random
from typing import Any, Dict, List

from mlx_lm_ext import blas

BLAS = blas.load()

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_lm_ext.bench.workloads import SAMPLED, short_chats
from mlx_lm_ext.engine.context_length import find_context_length

SAMPLERS = {
    "greedy": None,
    "sampled": make_sampler(SAMPLED["temperature"], top_p=SAMPLED["top_p"]),
}


def throughput(
    model: Any, prompts: List[List[int]], max_tokens: int, sampler: Any
) -> float:
    """Tokens per second of all prompts together, with one sampler for the batch."""
    generator = BatchGenerator(
        model, sampler=sampler, completion_batch_size=len(prompts)
    )
    start = time.perf_counter()
    generator.insert(prompts, [max_tokens] * len(prompts))
    n_tokens = 0
    while responses := generator.next_generated():
        n_tokens += len(responses)
    seconds = time.perf_counter() - start
    generator.close()
    return n_tokens / seconds


def bytes_per_token(model: Any) -> float:
    """KV bytes that a token adds to the cache of a long prompt."""
    cache = make_prompt_cache(model)
    held = []
    # Caches allocate memory for 256 tokens at a time.
    for _ in range(2):
        model(mx.zeros((1, 256), mx.int32), cache=cache)
        mx.eval([c.state for c in cache])
        held.append(sum(c.nbytes for c in cache))
    return (held[1] - held[0]) / 256


def describe_device() -> str:
    """The processor that MLX computes on."""
    if mx.default_device() != mx.cpu:
        return str(mx.device_info().get("device_name", mx.default_device()))
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            found = [l.split(":")[1].strip() for l in f if l.startswith("model name")]
    except OSError:
        found = []
    return f"{found[0]}, {len(found)} cores" if found else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, nargs="*", default=[])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", default="")
    args = parser.parse_args()

    model, tokenizer, config = load(args.model, return_config=True)
    rng = Random(args.seed)
    speeds: Dict[str, float] = {}
    for n in args.clients:
        for kind, sampler in SAMPLERS.items():
            for max_tokens in (2, args.max_tokens):  # the first warms up
                prompts = [
                    tokenizer.apply_chat_template(chat, add_generation_prompt=True)
                    for chat in short_chats(rng, n)
                ]
                speed = throughput(model, prompts, max_tokens, sampler)
            speeds[f"{n} {kind}"] = speed
    result = {
        "throughput": speeds,
        "bytes_per_token": bytes_per_token(model),
        "context_length": find_context_length(config),
        "device": describe_device(),
        "blas": BLAS,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mlx", "mlx-lm", "mlx-lm-ext")},
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()

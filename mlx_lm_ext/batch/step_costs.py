"""What a step of the batch costs: a part that each step has, whatever the length of its rows,
and a part for each place of the KV that it reads.

Rules:
1. The first part is known from the steps that were run. To note one costs no more than to
   append to a list.
2. The second is measured once, when a row is so long that it matters.
"""

import time
from collections import deque
from functools import cached_property
from statistics import median
from typing import Any, Callable, Deque, Dict, Optional, Tuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..cache.kinds import flatten

# Steps of which the median is taken: others wait for something else now and then.
N_STEPS = 9

# The attention that is measured: rows, places of each, and how often.
N_ROWS, N_PLACES, N_TIMES = 8, 2048, 3


class StepCosts:
    """What a step of some rows costs.

    Args:
        measure (Callable): Gives the seconds that a place of the KV costs.
    """

    def __init__(self, measure: Callable[[], float]):
        self.measure = measure
        # Rows times the longest of them, and seconds, of the last steps, by the number of the
        # bits of the number of rows.
        self.steps: Dict[int, Deque[Tuple[int, float]]] = {}
        # The first part of the cost, of those of which it was asked for since the last step.
        self.medians: Dict[int, float] = {}

    def note(self, n_rows: int, longest: int, seconds: float) -> None:
        """A step was run.

        Args:
            n_rows (int): Its rows.
            longest (int): The tokens of the longest of them.
            seconds (float): What it has taken.
        """
        steps = self.steps.setdefault(n_rows.bit_length(), deque(maxlen=N_STEPS))
        steps.append((n_rows * longest, seconds))
        self.medians.clear()

    @property
    def is_known(self) -> bool:
        """Whether a step was run."""
        return bool(self.steps)

    @cached_property
    def of_place(self) -> float:
        """Seconds that a place of the KV costs a step."""
        return self.measure()

    def of_step(self, n_rows: int, longest: int) -> float:
        """Seconds that a step would take. One with fewer rows than were run so far takes no
        longer than these did, but for the places.

        Args:
            n_rows (int): Its rows.
            longest (int): The tokens of the longest of them.
        """
        return self.fixed(n_rows) + self.of_place * n_rows * longest

    def fixed(self, n_rows: int) -> float:
        """Seconds of a step of so many rows without those of the places."""
        size = n_rows.bit_length()
        if size not in self.medians:
            more = [n for n in self.steps if n >= size]
            steps = self.steps[min(more) if more else max(self.steps)]
            # If the places cost less than was measured, the rest is not negative.
            self.medians[size] = median(
                max(t - self.of_place * n, t / 10) for n, t in steps
            )
        return self.medians[size]


def measure_place(model: Any) -> float:
    """The seconds that a place of the KV of one row costs a step, in all layers that keep all
    tokens. It is the time of their attention, to arrays of zeros."""
    caches = make_prompt_cache(model)
    # Only for the shapes: nothing is evaluated.
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    layers = [c for c in flatten(caches) if type(c) is KVCache]
    if not layers:
        return 0.0
    keys, values = layers[0].keys, layers[0].values
    n_heads = n_query_heads(model) or keys.shape[1]

    def zeros(n_heads: int, n_places: int, like: mx.array) -> mx.array:
        return mx.zeros((N_ROWS, n_heads, n_places, like.shape[3]), like.dtype)

    k, v = (zeros(keys.shape[1], N_PLACES, like) for like in (keys, values))
    queries = zeros(n_heads, 1, keys)
    mask = mx.ones((N_ROWS, 1, 1, N_PLACES), dtype=mx.bool_)
    mx.eval(k, v, queries, mask)

    def seconds() -> float:
        start = time.perf_counter()
        mx.eval(
            mx.fast.scaled_dot_product_attention(queries, k, v, scale=1.0, mask=mask)
        )
        return time.perf_counter() - start

    seconds()  # makes the kernels
    fastest = min(seconds() for _ in range(N_TIMES))
    return fastest * len(layers) / (N_ROWS * N_PLACES)


def n_query_heads(model: Any) -> Optional[int]:
    """How many heads the queries of a model have; None if its arguments do not say."""
    arguments = getattr(model, "args", None)
    text = getattr(arguments, "text_config", None) or {}
    found = text.get("num_attention_heads") if isinstance(text, dict) else None
    return found or getattr(arguments, "num_attention_heads", None)

"""What is counted of requests that have ended: their finish reasons, and histograms of their
times and their lengths."""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from threading import Lock
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..interfaces import RequestStats

FINISH_REASONS = ("stop", "length", "tool_calls", "timeout", "cancelled", "error")

# The buckets are vLLM's. Those of lengths do not depend on the model's context length, as
# vLLM's do, so that different models can be compared.
# fmt: off
FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80, 160, 640, 2560,
)
BETWEEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
    40, 80,
)
WHOLE = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)
# fmt: on
LENGTHS = tuple(m * 10**n for n in range(6) for m in (1, 2, 5)) + (10**6,)


class Measure(NamedTuple):
    """Something that is measured of each request.

    Args:
        name (str): The name of its metric, without the prefix.
        help (str): What it is.
        bounds (Tuple[float, ...]): The upper bounds of the buckets of its histogram.
        values (Callable): Gives its values for a request.
    """

    name: str
    help: str
    bounds: Tuple[float, ...]
    values: Callable[[RequestStats], Sequence[float]]


def known(value: Optional[float]) -> Sequence[float]:
    return () if value is None else (value,)


def prefill_seconds(stats: RequestStats) -> Sequence[float]:
    if stats.ttft is None or stats.queue_seconds is None:
        return ()
    return (stats.ttft - stats.queue_seconds,)


def decode_seconds(stats: RequestStats) -> Sequence[float]:
    return () if stats.ttft is None else (stats.seconds - stats.ttft,)


MEASURES = (
    Measure(
        "e2e_request_latency_seconds",
        "From the arrival of a request to its end.",
        WHOLE,
        lambda stats: (stats.seconds,),
    ),
    Measure(
        "request_queue_time_seconds",
        "From the arrival of a request until it started.",
        WHOLE,
        lambda stats: known(stats.queue_seconds),
    ),
    Measure(
        "request_prefill_time_seconds",
        "From the start of a request to its first token.",
        WHOLE,
        prefill_seconds,
    ),
    Measure(
        "request_decode_time_seconds",
        "From the first token of a request to its end.",
        WHOLE,
        decode_seconds,
    ),
    Measure(
        "time_to_first_token_seconds",
        "From the arrival of a request to its first token.",
        FIRST,
        lambda stats: known(stats.ttft),
    ),
    Measure(
        "inter_token_latency_seconds",
        "Between each two tokens of an answer.",
        BETWEEN,
        lambda stats: stats.gaps,
    ),
    Measure(
        "request_prompt_tokens",
        "Tokens of the prompt of a request.",
        LENGTHS,
        lambda stats: (stats.prompt_tokens,),
    ),
    Measure(
        "request_generation_tokens",
        "Tokens of the answer to a request.",
        LENGTHS,
        lambda stats: (stats.completion_tokens,),
    ),
)


class Histogram:
    """How many values there were up to each bound, and their sum.

    Args:
        bounds (Tuple[float, ...]): The upper bounds of the buckets, in order. One without a
          bound comes after them.
    """

    def __init__(self, bounds: Tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += sum(values)

    @property
    def cumulative(self) -> List[int]:
        """How many values are at most each bound; last, how many there are."""
        return list(accumulate(self.counts))


class RequestMetrics:
    """What is counted of the requests of one server. All methods may be called on any thread."""

    def __init__(self) -> None:
        # All that there can be from the start on: the rate of a series does not have the
        # value with which it begins.
        self.finished = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.histograms = {m.name: Histogram(m.bounds) for m in MEASURES}
        self.lock = Lock()

    def add(self, stats: RequestStats) -> None:
        """Add a request that has ended."""
        with self.lock:
            self.finished[stats.finish_reason] += 1
            for measure in MEASURES:
                values = measure.values(stats)
                if len(values):
                    self.histograms[measure.name].add(values)

    def read(self) -> Tuple[Dict[str, int], Dict[str, Tuple[List[int], float]]]:
        """What there is at one moment.

        Returns:
            Tuple[Dict, Dict]: How many requests have ended by their finish reason, and the
            cumulative counts and the sum of each histogram by its name.
        """
        with self.lock:
            histograms = {n: (h.cumulative, h.sum) for n, h in self.histograms.items()}
            return dict(self.finished), histograms

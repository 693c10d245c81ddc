"""The outcome of a workload on one server, and the figures computed from it.

A gap is the time between two pieces of a stream, as its client sees it.
"""

from dataclasses import dataclass, field
from typing import Callable, List, Optional

from mlx_lm_ext.bench import timings
from mlx_lm_ext.bench.timings import Timing


@dataclass
class Outcome:
    """The outcome of a workload on one server.

    Args:
        timings (List[Timing]): Its measured requests.
        ideal_cached_tokens (int): Prompt tokens that an ideal cache would have had.
        distinct_tokens (int): Tokens that an ideal cache would hold at the end.
        cache_bytes (Optional[int]): Bytes in the server's prompt cache at the end.
        peak_memory (Optional[int]): The most bytes that the server had.
    """

    timings: List[Timing] = field(default_factory=list)
    ideal_cached_tokens: int = 0
    distinct_tokens: int = 0
    cache_bytes: Optional[int] = None
    peak_memory: Optional[int] = None

    def part(self, *labels: str) -> List[Timing]:
        return [t for t in self.timings if t.label in labels]

    def throughput(self, label: str) -> float:
        return timings.throughput(self.part(label))

    @property
    def cache_megabytes(self) -> Optional[float]:
        return None if self.cache_bytes is None else self.cache_bytes / 1e6

    @property
    def peak_megabytes(self) -> Optional[float]:
        return None if self.peak_memory is None else self.peak_memory / 1e6

    @property
    def cached_share(self) -> float:
        """Prompt tokens from the cache / those that an ideal cache would have had."""
        cached = sum(t.cached_tokens for t in timings.succeeded(self.timings))
        return cached / self.ideal_cached_tokens

    @property
    def median_ttft(self) -> float:
        return timings.median_ttft(self.timings)

    @property
    def ttft_gain(self) -> float:
        """The first turn's TTFT / the second's."""
        (first,), (second,) = self.part("first"), self.part("second")
        return first.ttft / second.ttft

    @property
    def stall(self) -> float:
        """The longest gap in a running stream after the late request was sent."""
        (late,) = self.part("late")
        return max(t.longest_gap(late.start) for t in self.part("stream"))

    @property
    def late_ttft(self) -> float:
        return self.part("late")[0].ttft


@dataclass(frozen=True)
class Figure:
    """One number of a workload's outcome.

    Args:
        of (Callable): Computes it, in ``unit``; ``None`` if it is not known.
        bare (Optional[str]): The run of the bare engine to compare it with.
    """

    name: str
    unit: str
    of: Callable[[Outcome], Optional[float]]
    higher_is_better: bool = True
    bare: Optional[str] = None


def in_milliseconds(seconds: Optional[float]) -> Optional[float]:
    return None if seconds is None else 1000 * seconds


def pace_figures(*labels: str, title: str = "") -> List[Figure]:
    """How soon and how evenly tokens come, in all requests or in those with ``labels``.

    Args:
        title (str): Begins the names of the figures.
    """

    def figure(name, unit, of, higher_is_better=False):
        def of_outcome(outcome):
            return of(outcome.part(*labels) if labels else outcome.timings)

        return Figure(title + name, unit, of_outcome, higher_is_better)

    def gap(percent):
        return lambda run: in_milliseconds(timings.gap_percentile(run, percent))

    def unevenness(run):
        p99, p50 = (timings.gap_percentile(run, percent) for percent in (99, 50))
        return timings.quotient(p99, p50)

    return [
        figure("throughput", "tok/s", timings.throughput, True),
        figure("median TTFT", "s", timings.median_ttft),
        figure("mean gap", "ms", lambda run: in_milliseconds(timings.mean_gap(run))),
        figure("median gap", "ms", gap(50)),
        figure("p99 gap", "ms", gap(99)),
        figure("longest gap", "ms", gap(100)),
        figure("p99 gap / median gap", "", unevenness),
    ]


PEAK_MEMORY = Figure("peak memory", "MB", lambda o: o.peak_megabytes, False)

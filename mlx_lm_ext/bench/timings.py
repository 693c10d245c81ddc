"""The timings of a client's requests, and the figures computed from them.

Rules:
1. Times are seconds on one clock that never goes back.
2. Tokens are those that the server counts in ``usage``, not pieces of a stream.
3. A request that failed is counted as a failure and is in no other figure.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np

TEXT_FIELDS = ("content", "text", "reasoning", "reasoning_content", "tool_calls")


@dataclass
class Timing:
    """One request.

    Args:
        label (str): The group of requests that it belongs to.
        streamed (bool): Whether the answer was streamed.
        start (float): When it was sent.
        arrivals (List[float]): When each piece of the answer arrived; one piece without
          streaming.
        end (float): When it ended.
        error (Optional[str]): Why it failed.
    """

    label: str = ""
    streamed: bool = False
    start: float = field(default_factory=time.perf_counter)
    arrivals: List[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: Optional[str] = None
    text: str = field(default="", repr=False)

    def read(self, event: Dict[str, Any]) -> None:
        """Record an answer, or an event of a streamed one, that has just arrived."""
        now = time.perf_counter()
        if event.get("error"):
            self.error = str(event["error"])
        if usage := event.get("usage"):
            self.prompt_tokens = usage["prompt_tokens"]
            self.completion_tokens = usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = details.get("cached_tokens") or 0
        for choice in event.get("choices", ()):
            piece = choice.get("delta") or choice.get("message") or choice
            is_end = choice.get("finish_reason") is not None
            # The end of an answer without text counts as a piece.
            if any(map(piece.get, TEXT_FIELDS)) or (is_end and not self.arrivals):
                self.arrivals.append(now)
                self.text += piece.get("content") or piece.get("text") or ""

    def close(self, error: Optional[str] = None) -> None:
        """Record the end of the request, which failed if there is an ``error``."""
        self.end = time.perf_counter()
        self.error = self.error or error
        if self.error is None and not self.completion_tokens:
            self.error = "the answer has no usage, so its tokens cannot be counted"
        if self.error is None and not self.arrivals:
            self.error = "the answer is empty"

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def ttft(self) -> Optional[float]:
        """Time to the first token, which is known of a stream only."""
        return self.arrivals[0] - self.start if self.streamed else None

    @property
    def itl(self) -> Optional[float]:
        """Inter-token latency: the mean time from one token to the next.

        Without streaming, the start of the answer is not known: this is then the latency
        divided by the tokens.
        """
        if not self.streamed:
            return self.latency / self.completion_tokens
        # An answer in one piece shows no time between tokens.
        if self.completion_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)

    def gaps(self, since: float = 0.0, until: float = math.inf) -> List[float]:
        """The times between the pieces that came from ``since`` to ``until``."""
        inside = [a for a in self.arrivals if since <= a <= until]
        return [b - a for a, b in zip(inside, inside[1:])]

    def longest_gap(self, since: float = 0.0) -> float:
        """The longest time between two pieces, of which the second came after ``since``."""
        gaps = zip(self.arrivals, self.arrivals[1:])
        return max((b - a for a, b in gaps if b > since), default=0.0)


def succeeded(timings: Iterable[Timing]) -> List[Timing]:
    return [t for t in timings if t.error is None]


def duration(timings: List[Timing]) -> float:
    """Seconds from the first request's start to the last one's end."""
    return max(t.end for t in timings) - min(t.start for t in timings)


def generated_tokens(timings: List[Timing]) -> int:
    return sum(t.completion_tokens for t in succeeded(timings))


def throughput(timings: List[Timing]) -> float:
    """Generated tokens per second of all requests together."""
    return generated_tokens(timings) / duration(timings)


def mean_gap(
    timings: Iterable[Timing], since: float = 0.0, until: float = math.inf
) -> Optional[float]:
    """The mean time between two tokens from ``since`` to ``until``; ``None`` if none came.

    The pieces of an answer share its tokens equally.
    """
    seconds = tokens = 0.0
    for t in succeeded(timings):
        gaps = t.gaps(since, until)
        seconds += sum(gaps)
        tokens += len(gaps) * t.completion_tokens / len(t.arrivals)
    return seconds / tokens if tokens else None


def mean_gap_together(
    timings: List[Timing], beside: Iterable[Timing] = ()
) -> Optional[float]:
    """The mean time between two tokens of ``timings`` while all of them, and those
    ``beside`` them, have begun and none has ended."""
    done = succeeded([*timings, *beside])
    since = max((t.arrivals[0] for t in done), default=0.0)
    until = min((t.arrivals[-1] for t in done), default=0.0)
    return mean_gap(timings, since, until)


def distribution(values: Iterable[Optional[float]]) -> Optional[Dict[str, float]]:
    """The mean and percentiles of the known values; ``None`` if there are none."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    p50, p95, p99 = np.percentile(known, [50, 95, 99]).tolist()
    return {"mean": float(np.mean(known)), "p50": p50, "p95": p95, "p99": p99}


def median_ttft(timings: Iterable[Timing]) -> float:
    return float(np.median([t.ttft for t in succeeded(timings)]))


def gap_percentile(timings: Iterable[Timing], percent: float) -> Optional[float]:
    """Of the gaps between the pieces of all streams; ``None`` if there are none."""
    gaps = [gap for t in succeeded(timings) for gap in t.gaps()]
    return float(np.percentile(gaps, percent)) if gaps else None


def summarize(timings: List[Timing]) -> Dict[str, Any]:
    """All figures of a run, in seconds and tokens."""
    done = succeeded(timings)
    return {
        "requests": len(timings),
        "successful_requests": len(done),
        "failures": dict(Counter(t.error for t in timings if t.error is not None)),
        "prompt_tokens": sum(t.prompt_tokens for t in done),
        "cached_tokens": sum(t.cached_tokens for t in done),
        "generated_tokens": generated_tokens(timings),
        "duration": duration(timings),
        "throughput": throughput(timings),
        "latency": distribution(t.latency for t in done),
        "ttft": distribution(t.ttft for t in done),
        "itl": distribution(t.itl for t in done),
    }


def running_over_time(timings: List[Timing]) -> Tuple[List[float], List[int]]:
    """The times at which the number of running requests changed, in seconds from the start,
    and the number from then on."""
    origin = min(t.start for t in timings)
    changes = [(t.start - origin, 1) for t in timings]
    changes += [(t.end - origin, -1) for t in timings]
    changes.sort()
    return [when for when, _ in changes], np.cumsum([n for _, n in changes]).tolist()


def throughput_over_time(
    timings: List[Timing], n_bins: int = 60
) -> Tuple[List[float], List[float]]:
    """The edges of ``n_bins`` equal parts of the run, and the tokens per second in each.

    The pieces of an answer share its tokens equally.
    """
    origin = min(t.start for t in timings)
    done = succeeded(timings)
    when = [a - origin for t in done for a in t.arrivals]
    tokens = [t.completion_tokens / len(t.arrivals) for t in done for _ in t.arrivals]
    counts, edges = np.histogram(
        when, bins=n_bins, range=(0, duration(timings)), weights=tokens
    )
    return edges.tolist(), (counts / np.diff(edges)).tolist()


def gain(
    ours: Optional[float], theirs: Optional[float], higher_is_better: bool
) -> Optional[float]:
    """How many times better ``ours`` is; below 1 it is worse; ``None`` as for a quotient."""
    return quotient(ours, theirs) if higher_is_better else quotient(theirs, ours)


def quotient(a: Optional[float], b: Optional[float]) -> Optional[float]:
    """``None`` if one of them is unknown, or the divisor is 0."""
    return None if a is None or not b else a / b


def spread(values: List[float]) -> Tuple[float, float, float]:
    """The median, the lowest and the highest."""
    return float(np.median(values)), min(values), max(values)

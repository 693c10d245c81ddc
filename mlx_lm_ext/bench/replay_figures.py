"""The figures of a replay."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from mlx_lm_ext.bench.arrivals import Outcome

# A generated token counts as much as so many of a prompt, as with ``--scheduler fair``.
GENERATED_WEIGHT = 2


class Figure(NamedTuple):
    """A figure of the requests of a replay.

    Args:
        name (str): Its name, with its unit.
        of (Callable): Gives it; None if it is not known.
    """

    name: str
    of: Callable[[Sequence[Outcome]], Optional[float]]


def hit_ratio(outcomes: Sequence[Outcome]) -> float:
    """The share of the tokens of all prompts that came from the prompt cache."""
    n_tokens = sum(o.stats.prompt_tokens for o in outcomes)
    return sum(o.stats.cached_tokens for o in outcomes) / n_tokens


def ttft(outcomes: Sequence[Outcome], percent: float) -> Optional[float]:
    known = [o.stats.ttft for o in outcomes if o.stats.ttft is not None]
    return float(np.percentile(known, percent)) if known else None


def throughput(outcomes: Sequence[Outcome]) -> float:
    """Generated tokens a second, from the first arrival to the last end."""
    end = max(o.arrival + o.stats.seconds for o in outcomes)
    seconds = end - min(o.arrival for o in outcomes)
    return sum(o.stats.completion_tokens for o in outcomes) / seconds


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 if all have the same, and 1 / n if one of n has all."""
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


def fairness(outcomes: Sequence[Outcome], window: float) -> Optional[float]:
    """Jain's index of the tokens that users get while they compete.

    Time is cut into windows. In each of them compete the users who have a request that waits
    for its start, all the time: who waits for nothing is not treated unfairly, however little
    they ask for. This is the mean over the windows in which two or more compete and one of
    them gets something. Of the tokens of a prompt, those from the prompt cache do not count.

    Args:
        outcomes (Sequence[Outcome]): How all requests went.
        window (float): Seconds of a window.

    Returns:
        Optional[float]: None if no two users compete in any window.
    """
    start = min(o.arrival for o in outcomes)
    end = max(o.arrival + o.stats.seconds for o in outcomes)
    edges = np.arange(start, end + window, window)
    of_user: Dict[Optional[str], List[Outcome]] = {}
    for o in outcomes:
        of_user.setdefault(o.user, []).append(o)
    served, waits = [], []
    for own in of_user.values():
        parts = [part for o in own for part in services(o)]
        served.append(sum((spread(*part, edges) for part in parts), 0 * edges[1:]))
        intervals = union([(o.arrival, started(o)) for o in own])
        seconds = sum((spread(a, b, b - a, edges) for a, b in intervals), 0 * edges[1:])
        waits.append(seconds > window * (1 - 1e-6))
    indices = []
    for tokens, is_there in zip(np.array(served).T, np.array(waits).T):
        shares = tokens[is_there].tolist()
        if len(shares) > 1 and any(shares):
            indices.append(jain(shares))
    return float(np.mean(indices)) if indices else None


def started(o: Outcome) -> float:
    """When a request has started. One that never did has waited to its end."""
    seconds = o.stats.queue_seconds
    return o.arrival + (o.stats.seconds if seconds is None else seconds)


def services(o: Outcome) -> List[Tuple[float, float, float]]:
    """When a request was served, and with how much: its prompt and its answer."""
    stats = o.stats
    if stats.ttft is None:
        return []
    first, end = o.arrival + stats.ttft, o.arrival + stats.seconds
    return [
        (started(o), first, stats.prompt_tokens - stats.cached_tokens),
        (first, end, GENERATED_WEIGHT * stats.completion_tokens),
    ]


def spread(start: float, end: float, amount: float, edges: Any) -> Any:
    """What of an amount that is spread evenly from ``start`` to ``end`` is between each two
    edges."""
    shares = np.clip((edges - start) / max(end - start, 1e-9), 0, 1)
    return amount * np.diff(shares)


def union(intervals: List[Tuple[float, float]]) -> List[Tuple[float, float]]:
    """Disjoint intervals that cover the same times."""
    found: List[Tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def figures(window: float) -> List[Figure]:
    """All figures.

    Args:
        window (float): Seconds of a window of the fairness.
    """
    return [
        Figure("hit ratio", hit_ratio),
        Figure("median TTFT (s)", lambda o: ttft(o, 50)),
        Figure("p99 TTFT (s)", lambda o: ttft(o, 99)),
        Figure("fairness", lambda o: fairness(o, window)),
        Figure("tokens per second", throughput),
    ]

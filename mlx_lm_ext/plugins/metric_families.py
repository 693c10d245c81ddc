"""The metrics of a server as prometheus_client's families.

vLLM's suffixes are used where the meaning is the same, so that its dashboards need another
prefix only.
"""

from typing import Any, Callable, Dict, Iterator, NamedTuple

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from ..interfaces import ServerStatistics
from .request_metrics import MEASURES, RequestMetrics

PREFIX = "mlx_lm:"


class Figure(NamedTuple):
    """A number that the server gives.

    Args:
        kind (Type[Metric]): ``CounterMetricFamily`` if it only grows, or
          ``GaugeMetricFamily``.
        name (str): The name of its metric, without the prefix.
        help (str): What it is.
        value (Callable): Gives it.
    """

    kind: Any
    name: str
    help: str
    value: Callable[[ServerStatistics], float]


def kv_usage(s: ServerStatistics) -> float:
    return s.batch_bytes / s.batch_limit if s.batch_limit else 0.0


FIGURES = (
    Figure(
        GaugeMetricFamily,
        "num_requests_running",
        "Requests in the batch.",
        lambda s: s.n_running,
    ),
    Figure(
        GaugeMetricFamily,
        "num_requests_waiting",
        "Requests that have not started.",
        lambda s: s.n_waiting,
    ),
    Figure(
        GaugeMetricFamily,
        "max_num_requests_running",
        "Requests that can be in the batch.",
        lambda s: s.batch_size,
    ),
    Figure(
        GaugeMetricFamily,
        "connections",
        "Connections that are open.",
        lambda s: s.n_connections,
    ),
    Figure(
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "The part of the memory for the KV of the batch that is used; 1 is all of it.",
        kv_usage,
    ),
    Figure(
        GaugeMetricFamily,
        "batch_bytes",
        "Bytes of the KV of the batch.",
        lambda s: s.batch_bytes,
    ),
    Figure(
        GaugeMetricFamily,
        "batch_limit_bytes",
        "Bytes that the KV of the batch may take; 0 before the first request.",
        lambda s: s.batch_limit,
    ),
    Figure(
        GaugeMetricFamily,
        "prompt_cache_bytes",
        "Bytes of the prompt cache.",
        lambda s: s.cache_bytes,
    ),
    Figure(
        GaugeMetricFamily,
        "prompt_cache_limit_bytes",
        "Bytes that the prompt cache and the batch may take; 0 without a prompt cache.",
        lambda s: s.cache_limit,
    ),
    Figure(
        GaugeMetricFamily,
        "warm_up_left",
        "Pieces of the warm-up that have not run.",
        lambda s: s.warm_up_left,
    ),
    Figure(
        CounterMetricFamily,
        "prompt_tokens_total",
        "Tokens of the prompts of requests that have ended.",
        lambda s: s.prompt_tokens,
    ),
    Figure(
        CounterMetricFamily,
        "generation_tokens_total",
        "Tokens that were generated.",
        lambda s: s.generated_tokens,
    ),
    Figure(
        CounterMetricFamily,
        "prefix_cache_queries",
        "Tokens that were looked for in the prompt cache.",
        lambda s: s.prompt_tokens,
    ),
    Figure(
        CounterMetricFamily,
        "prefix_cache_hits",
        "Tokens that were taken from the prompt cache.",
        lambda s: s.cached_tokens,
    ),
    Figure(
        CounterMetricFamily,
        "steps_total",
        "Steps of the batch.",
        lambda s: s.n_steps,
    ),
    Figure(
        CounterMetricFamily,
        "step_seconds_total",
        "Seconds that the steps of the batch have taken.",
        lambda s: s.step_seconds,
    ),
)


class MetricFamilies:
    """What prometheus_client asks for the metrics of a server.

    Args:
        requests (RequestMetrics): What was counted of requests.
        statistics (ServerStatistics): What the server says of itself.
    """

    def __init__(self, requests: RequestMetrics, statistics: ServerStatistics):
        self.requests = requests
        self.statistics = statistics

    def collect(self) -> Iterator[Metric]:
        model = self.statistics.model
        for kind, name, help, value in FIGURES:
            family = kind(PREFIX + name, help, labels=["model_name"])
            family.add_metric([model], value(self.statistics))
            yield family
        finished, histograms = self.requests.read()
        yield self.counters(
            "request_success_total",
            "Requests that have ended, by how they have.",
            "finished_reason",
            finished,
        )
        yield self.counters(
            "evictions_total",
            "Entries that have left the prompt cache, by the reason.",
            "reason",
            self.statistics.evictions,
        )
        yield self.counters(
            "policy_seconds_total",
            "Seconds that the methods of a policy have taken.",
            "policy",
            self.statistics.policy_seconds,
        )
        for measure in MEASURES:
            counts, total = histograms[measure.name]
            bounds = [*map(floatToGoString, measure.bounds), "+Inf"]
            histogram = HistogramMetricFamily(
                PREFIX + measure.name, measure.help, labels=["model_name"]
            )
            histogram.add_metric([model], list(zip(bounds, counts)), total)
            yield histogram

    def counters(
        self, name: str, help: str, label: str, values: Dict[str, Any]
    ) -> Metric:
        """A counter for each value of a label."""
        family = CounterMetricFamily(PREFIX + name, help, labels=["model_name", label])
        for value, count in values.items():
            family.add_metric([self.statistics.model, value], count)
        return family

"""Metrics for Prometheus at ``GET /metrics``, with vLLM's suffixes and buckets.

Rules:
1. What is known of a request is added when it has ended, on the thread of its connection.
   What is known of the engine is read when somebody asks.
2. Without prometheus_client, the route says how to install it.
"""

import argparse
from functools import partial
from typing import List

from .. import hookimpl
from ..errors import RequestError
from ..interfaces import RequestStats
from ..routes import Route, RouteRequest, RouteResponse
from .request_metrics import RequestMetrics

# Also for callers that would rather have OpenMetrics: there prometheus_client 0.26 writes
# mlx_lm_ for the mlx_lm: of a name (https://github.com/prometheus/client_python/issues/1177).
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    # The two hooks of a server share nothing but its arguments: this module is one object
    # for all servers of the process.
    args._request_metrics = RequestMetrics()
    return [Route("GET", "/metrics", partial(answer, args._request_metrics))]


@hookimpl
def mlx_lm_request_finished(stats: RequestStats, args: argparse.Namespace) -> None:
    # A server without HTTP, as in a test, has no routes.
    if metrics := getattr(args, "_request_metrics", None):
        metrics.add(stats)


def answer(requests: RequestMetrics, request: RouteRequest) -> RouteResponse:
    """All metrics as text."""
    try:
        from prometheus_client import generate_latest
    except ImportError:
        message = 'GET /metrics needs pip install "mlx-lm-ext[metrics]" on the server'
        raise RequestError(501, message)
    from .metric_families import MetricFamilies

    text = generate_latest(MetricFamilies(requests, request.statistics()))
    return RouteResponse(text, content_type=CONTENT_TYPE)

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


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    # The two hooks of a server share nothing but its arguments: this module is one object
    # for all servers of the process.
    args.request_metrics = RequestMetrics()
    return [Route("GET", "/metrics", partial(answer, args.request_metrics))]


@hookimpl
def mlx_lm_request_finished(stats: RequestStats, args: argparse.Namespace) -> None:
    args.request_metrics.add(stats)


def answer(requests: RequestMetrics, request: RouteRequest) -> RouteResponse:
    """All metrics, in the format that the caller accepts."""
    try:
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        message = 'GET /metrics needs pip install "mlx-lm-ext[metrics]" on the server'
        raise RequestError(501, message)
    from .metric_families import MetricFamilies

    accept = request.headers.get("Accept", "")
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):
        raise RequestError(400, f"Accept: {accept[:200]!r} has a version that is none")
    families = MetricFamilies(requests, request.statistics())
    return RouteResponse(encode(families), content_type=content_type)

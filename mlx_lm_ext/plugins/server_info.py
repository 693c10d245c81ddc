"""``GET /server_info``: what the server is and does, and ``GET /openapi.json``: its routes, for
programs that make clients or documentation of them."""

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Dict, List

from .. import __version__, hookimpl
from ..routes import Route, RouteRequest


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    description = read_description()
    return [
        Route("GET", "/server_info", server_info),
        # It says what everybody may read in the source.
        Route("GET", "/openapi.json", lambda request: description, needs_key=False),
    ]


def read_description() -> Dict[str, Any]:
    """The OpenAPI description of the server's routes."""
    text = files("mlx_lm_ext.server").joinpath("openapi.json").read_text("utf-8")
    description: Dict[str, Any] = json.loads(text)
    description["info"]["version"] = __version__
    return description


def server_info(request: RouteRequest) -> Dict[str, Any]:
    # Not the command line, which may have keys.
    return {
        "versions": {"mlx-lm-ext": __version__}
        | {name: version(name) for name in ("mlx-lm", "mlx")},
        "names": request.served_names(),
        "plugins": request.plugins(),
        "statistics": asdict(request.statistics()),
    }

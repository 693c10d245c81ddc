"""``GET /server_info``: what the server is and does, and ``GET /openapi.json``: its routes, for
programs that make clients or documentation of them."""

import argparse
import json
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Dict, List

from .. import __version__, hookimpl
from ..routes import Route, RouteRequest


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    description = read_description()
    versions = {"mlx-lm-ext": __version__}
    versions |= {name: version(name) for name in ("mlx-lm", "mlx")}
    return [
        Route("GET", "/server_info", partial(server_info, versions)),
        # It says what everybody may read in the source.
        Route("GET", "/openapi.json", lambda request: description, needs_key=False),
    ]


def read_description() -> Dict[str, Any]:
    """The OpenAPI description of the server's routes."""
    text = files("mlx_lm_ext.server").joinpath("openapi.json").read_text("utf-8")
    description: Dict[str, Any] = json.loads(text)
    description["info"]["version"] = __version__
    return description


def server_info(versions: Dict[str, str], request: RouteRequest) -> Dict[str, Any]:
    # Not the command line: flags of other plugins may be secret.
    return {
        "versions": versions,
        "names": request.served_names(),
        "plugins": request.plugins(),
        "statistics": asdict(request.statistics()),
    }

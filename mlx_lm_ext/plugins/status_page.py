"""``GET /``: a page that shows what the server does. The page reads ``/server_info``.

Rule: the page is one file, and its policy lets it run nothing else and ask nobody but its own
server.
"""

import argparse
import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import List

from .. import hookimpl
from ..routes import Route, RouteResponse


@hookimpl
def mlx_lm_register_routes(args: argparse.Namespace) -> List[Route]:
    page = files(__package__).joinpath("status.html").read_text("utf-8")
    response = RouteResponse(
        page,
        content_type="text/html; charset=utf-8",
        headers={
            "Content-Security-Policy": policy(page),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )
    # The page asks for the key by itself.
    return [Route("GET", "/", lambda request: response, needs_key=False)]


def policy(page: str) -> str:
    """The Content-Security-Policy of a page with one script and one style sheet."""
    hashes = []
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            *hashes,
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )

"""Which web pages may call the server, and by which host names it may be called.

A page of any site can make the user's browser send requests to this machine. The page
cannot choose two headers of these requests: ``Origin``, the site that the page came from,
and ``Host``, the name by which it calls the server.

Rules:
1. A request that is not allowed is refused before its body is read.
2. A request without ``Origin`` is allowed, because programs other than browsers send none.
"""

import re
from email.message import Message
from ipaddress import ip_address
from typing import List, Optional, Sequence
from urllib.parse import urlsplit

from ..errors import RequestError
from ..patterns import matches

# Among allowed origins and hosts: all names and addresses of this machine itself. Among
# hosts also the names without a dot, which only the own network has.
LOOPBACK = "loopback"
# An origin as browsers send it: a scheme, a name and perhaps a port, or "null".
ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#@\\\s]*", re.IGNORECASE)
# A name or an address, and perhaps a port.
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:/@\[\]\s]+)(?::\d*)?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means, on every machine, that machine itself."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(host: str) -> bool:
    """Whether a name or an address cannot be that of a site of the internet, whose owner
    could let it mean this machine. Their names have a dot."""
    return is_loopback(host) or not any(sign in host for sign in ".[")


def is_loopback_origin(origin: str) -> bool:
    """Whether an origin is a page that this machine itself serves."""
    try:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and is_loopback(parts.hostname or "")
    except ValueError:
        return False


class BrowserGuard:
    """Refuses requests that a browser sends for pages that are not allowed.

    Args:
        origins (Sequence[str]): Patterns of the origins that may call, or ``LOOPBACK``.
        hosts (Optional[List[str]]): Patterns of the names that the server may be called
          by, or ``LOOPBACK``. If not given: ``LOOPBACK`` and ``name`` if the server
          listens on a loopback address, else all names.
        address (str): The address on which the server listens.
        name (str): The name or address that ``--host`` gave.
    """

    def __init__(
        self,
        origins: Sequence[str],
        hosts: Optional[List[str]],
        address: str,
        name: str,
    ):
        if hosts is None:
            hosts = [LOOPBACK, name] if is_loopback(address) else ["*"]
        self.origins = [origin.lower() for origin in origins]
        self.hosts = [host.lower() for host in hosts]

    def allows_origin(self, origin: str) -> bool:
        # First its form: in other texts ``urlsplit`` may find another host than a browser.
        return ORIGIN.fullmatch(origin) is not None and (
            matches(origin.lower(), self.origins)
            or (LOOPBACK in self.origins and is_loopback_origin(origin))
        )

    def allows_host(self, host: str) -> bool:
        if self.hosts == ["*"]:
            return True
        match = HOST.fullmatch(host)
        return match is not None and (
            matches(match[1].lower(), self.hosts)
            or (LOOPBACK in self.hosts and is_local(match[1]))
        )

    def check(self, headers: Message) -> None:
        """Check the headers of a request.

        Raises:
            RequestError: A 403 that says which argument would allow it.
        """
        for kind, allows in (
            ("Host", self.allows_host),
            ("Origin", self.allows_origin),
        ):
            for value in headers.get_all(kind, []):
                if not allows(value):
                    raise RequestError(
                        403,
                        f"the {kind} {value[:200]!r} is not one of "
                        f"--allowed-{kind.lower()}s",
                    )

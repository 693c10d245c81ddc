"""Checks the images of a request, and fetches them if that is allowed.

A request with the URL of an image makes this machine connect there, from inside its
network.

Rules:
1. Images are data URLs. With ``--allow-image-urls`` they may also be fetched by HTTP from
   public addresses. The address of a host is looked up once, checked and connected to, and
   again for each redirect.
2. What a client is told of a failed fetch does not depend on what the other side answered.
3. Formats, pixels, bytes and seconds are bounded before an image is decoded.
"""

import base64
import binascii
import http.client
import io
import logging
import socket
import ssl
from ipaddress import ip_address, ip_network
from typing import Any, Dict, List
from urllib.parse import urljoin, urlsplit

from ..errors import RequestError
from .preparation import Preparation
from .upstream import image_url

logger = logging.getLogger(__name__)

# Images of a request.
MAX_IMAGES = 64
# Bytes of an image that is fetched, and of all images of a request.
MAX_BYTES = 20 << 20
MAX_ALL_BYTES = 64 << 20
# Pixels of all images of a request.
MAX_PIXELS = 40_000_000
# Addresses of a host that are tried.
MAX_ADDRESSES = 4
REDIRECTS, MAX_REDIRECTS = (301, 302, 303, 307, 308), 3
# Seconds to connect, and to wait for the next part of an answer.
TIMEOUT = 5.0
# Pillow knows more formats, and starts other programs for some of them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Networks that older versions of Python take for public ones: some of their addresses are
# translated to others, which may be private, and some are reserved.
NOT_PUBLIC = [
    ip_network(network)
    for network in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "::/96",
        "fec0::/10",
        "3fff::/20",
        "5f00::/16",
        "192.88.99.0/24",
    )
]


def image_parts(messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The parts of checked messages that are images."""
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return [part for parts in contents for part in parts if part["type"] != "text"]


def n_pixels(raw: bytes, param: str) -> int:
    """The number of pixels of an image.

    Args:
        raw (bytes): The file.
        param (str): The field that it is from.

    Raises:
        RequestError: If it is not an image in one of ``FORMATS``.
    """
    # If Pillow is missing, mlx-lm says what to install when it decodes the image.
    try:
        from PIL import Image
    except ImportError:
        return 0
    try:
        width, height = Image.open(io.BytesIO(raw), formats=FORMATS).size
    except Exception:
        # For a broken file, Pillow raises many kinds of errors.
        formats = ", ".join(FORMATS)
        message = f"an image is broken, or not in one of the formats {formats}"
        raise RequestError(400, message, param)
    return int(width * height)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ip_address(address.partition("%")[0])
    return (
        ip.is_global
        and not ip.is_multicast
        and not any(ip in network for network in NOT_PUBLIC)
    )


def connect(host: str, port: int, preparation: Preparation) -> socket.socket:
    """Connect to a public address of a host.

    Raises:
        ConnectionError: If the client has left.
        OSError: If one of its addresses is not public, or none answers.
        RequestError: If it takes too long, or the server stops.
    """
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [(str(info[4][0]), port) for info in infos]
    if not all(is_public(address) for address, _ in addresses):
        raise OSError("it is not on the public internet")
    for address in addresses[:MAX_ADDRESSES]:
        preparation.check()
        try:
            return socket.create_connection(address, timeout=TIMEOUT)
        except OSError:
            pass  # another one may answer
    raise OSError("none of its addresses answers")


def fetch(url: str, preparation: Preparation) -> bytes:
    """Fetch the content of a URL, following redirects.

    Raises:
        ConnectionError: If the client has left.
        OSError: If it cannot be fetched, or is too large.
        ValueError: If it is not an HTTP URL.
        http.client.HTTPException: If the answer is not HTTP.
        RequestError: If it takes too long, or the server stops.
    """
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is not an HTTP URL")
        connection = http.client.HTTPConnection(parts.netloc.rpartition("@")[2])
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        sock = connect(parts.hostname, port, preparation)
        if secure:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname)
        with sock, preparation.reading(sock):
            connection.sock = sock
            query = f"?{parts.query}" if parts.query else ""
            target = (parts.path or "/") + query
            connection.request("GET", target, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status in REDIRECTS:
                url = urljoin(url, response.getheader("Location", ""))
                continue
            if response.status != 200:
                raise OSError(f"it answers {response.status}")
            raw = bytearray()
            while part := response.read1(1 << 16):
                raw += part
                if len(raw) > MAX_BYTES:
                    raise OSError(f"it has more than {MAX_BYTES} bytes")
            # Incomplete if ``preparation.reading`` has shut the connection down.
            preparation.check()
            return bytes(raw)
    raise OSError("it has too many redirects")


def inline_images(
    parts: List[Dict[str, Any]], allow_urls: bool, preparation: Preparation
) -> None:
    """Check the images of a request, and replace URLs by data URLs of what they give.

    Args:
        parts (List[Dict]): The image parts of its messages, changed in place.
        allow_urls (bool): Whether images may be fetched.
        preparation (Preparation): Says when to give up.

    Raises:
        ConnectionError: If the client has left.
        RequestError: If an image cannot be fetched or used, or the images are too many or
          too large.
    """
    param = "messages"
    if len(parts) > MAX_IMAGES:
        raise RequestError(400, f"there may be {MAX_IMAGES} images at most", param)
    n_bytes = total_pixels = 0
    for part in parts:
        url = image_url(part)
        if not isinstance(url, str):
            raise RequestError(400, "an image must have a URL, a string", param)
        if url[:5].lower() == "data:":
            try:
                raw = base64.b64decode(url.partition(",")[2])
            except (binascii.Error, ValueError):
                raise RequestError(400, "an image is not in base64", param)
            # mlx-lm knows this scheme in small letters only.
            url = f"data:{url[5:]}"
        elif not allow_urls:
            message = "images must be data URLs (--allow-image-urls allows others)"
            raise RequestError(400, message, param)
        else:
            try:
                raw = fetch(url, preparation)
            except RequestError:
                raise
            except (OSError, ValueError, http.client.HTTPException) as e:
                preparation.check()
                logger.info(f"An image cannot be fetched: {ascii(str(e))[:300]}")
                raise RequestError(400, "an image cannot be fetched", param)
            url = "data:image;base64," + base64.b64encode(raw).decode()
        n_bytes += len(raw)
        total_pixels += n_pixels(raw, param)
        if n_bytes > MAX_ALL_BYTES or total_pixels > MAX_PIXELS:
            message = (
                f"all images together may have {MAX_PIXELS} pixels and "
                f"{MAX_ALL_BYTES} bytes at most"
            )
            raise RequestError(400, message, param)
        part.clear()
        part.update(type="image_url", image_url={"url": url})

"""API keys: who may call, and the names by which the server knows them.

Rules:
1. No key is kept, logged or compared as it is: only digests of keys are.
2. To look for a key takes the same time whether it is right, wrong, or right at its start.
"""

import re
from email.message import Message
from hashlib import sha256
from hmac import compare_digest
from typing import Dict, List, Optional

from ..errors import RequestError

# A key may have a name in front of it, with a colon between the two.
NAMED = re.compile(r"(?:([\w.@-]+):)?([!-~]+)", re.ASCII)
# The names of those that have none of their own.
PLACE = re.compile(r"key-\d+")


def digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "replace")).digest()


class Keys:
    """The API keys of a server. Without any, everybody may call.

    Args:
        keys (List[str]): The keys, each as ``KEY`` or ``NAME:KEY``. Several may have the same
          name; one without a name is called by its place, as ``key-1``.

    Raises:
        ValueError: If one is not like this, or two with different names are the same. The
          message does not have the key.
    """

    def __init__(self, keys: List[str]):
        # The names of the keys by their digests.
        self.names: Dict[bytes, str] = {}
        for i, text in enumerate(keys, start=1):
            match = NAMED.fullmatch(text)
            if match is None:
                raise ValueError(
                    f"key {i} must be KEY or NAME:KEY, of ASCII characters without blanks"
                )
            name = match[1] or f"key-{i}"
            if match[1] and PLACE.fullmatch(name):
                raise ValueError(f"{name} is the name of a key without a name")
            if self.names.setdefault(digest(match[2]), name) != name:
                raise ValueError(f"the keys of {name} and another name are the same")

    def __bool__(self) -> bool:
        return bool(self.names)

    def find(self, key: str) -> Optional[str]:
        """The name of a key; None if it is not one of them."""
        found, wanted = None, digest(key)
        for known, name in self.names.items():
            if compare_digest(known, wanted):
                found = name
        return found

    def check(self, headers: Message) -> Optional[str]:
        """The name of the key that a request came with. None if no keys are asked for.

        Args:
            headers (Message): Its headers: ``Authorization: Bearer KEY``, as OpenAI's clients
              send it, or ``X-Api-Key: KEY``, as Anthropic's do.

        Raises:
            RequestError: A 401 if it has no key, or a wrong one.
        """
        if not self:
            return None
        sent = [value.strip() for value in headers.get_all("X-Api-Key", [])]
        for value in headers.get_all("Authorization", []):
            scheme, _, key = value.strip().partition(" ")
            sent += [key.strip()] if scheme.lower() == "bearer" else []
        if not sent:
            raise unauthorized(
                "this server needs an API key: send Authorization: Bearer KEY"
            )
        names = {self.find(key) for key in sent}
        name = names.pop()
        if names or name is None:
            raise unauthorized("the API key is wrong")
        return name


def unauthorized(message: str) -> RequestError:
    """The 401 that OpenAI's clients raise as an ``AuthenticationError``."""
    headers = {"WWW-Authenticate": "Bearer"}
    return RequestError(401, message, code="invalid_api_key", headers=headers)

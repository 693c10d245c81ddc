"""Errors that reach an HTTP client, in OpenAI's shape."""

import re
from http import HTTPStatus
from typing import Any, Dict, Optional

# Characters of the text of another library's error that are passed on.
MAX_REASON = 400
# Lines of such texts that say less than the others.
LESS = re.compile(r"Got: |\d{3} (Client|Server) Error")


class RequestError(Exception):
    """A request that cannot be served, with what to tell its client.

    Args:
        status (int): The HTTP status.
        message (str): One sentence that says what is wrong and what would be right.
        param (Optional[str]): The field that is wrong.
        code (Optional[str]): OpenAI's error code, where it has one.
        headers (Optional[Dict[str, str]]): Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: Optional[str] = None,
        code: Optional[str] = None,
        headers: Optional[Dict[str, str]] = None,
    ):
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.param = param
        self.code = code
        self.headers = headers or {}

    def to_json(self) -> Dict[str, Any]:
        """The body of the error response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "requests"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def too_long(limit: Optional[int], reason: str, param: str) -> RequestError:
    """The 400 for more tokens than the model can take. Clients recognize OpenAI's words.

    Args:
        limit (Optional[int]): Tokens that the model can take, if that is known.
        reason (str): What is too long.
        param (str): The field that is too long.
    """
    message = reason
    if limit is not None:
        message = f"this model's maximum context length is {limit} tokens: {reason}"
    return RequestError(400, message, param, "context_length_exceeded")


def internal_error() -> RequestError:
    """The 500 for an error of the server. Its text may be confidential and is not sent."""
    return RequestError(500, "the server failed; its log says why")


def one_line(error: BaseException) -> str:
    """The text of another library's error in one line, what says most in front."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines.sort(key=lambda line: LESS.match(line) is not None)
    text = " ".join(lines).rstrip(".")
    # The texts of these are only names and values.
    if not text or isinstance(error, (LookupError, AttributeError, TypeError)):
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."

"""Routes of HTTP: those of the server itself, and what the functions of a plugin's routes
are given and may return. ``hookspecs.py`` says how a plugin registers them.

Rules:
1. The function of a route runs on the thread of its connection, several at a time. It may
   block, which delays only its own answer.
2. A route that raises fails its own request, with a 500 that tells the client nothing of
   what was raised, or with what a ``RequestError`` says: ``raise RequestError(400, "text must be
   a string", "text")`` (``mlx_lm_ext.errors``: a status, a message, the field at fault).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

from .interfaces import ServerStatistics

# The server's own. Each of them is also there with /v1 in front.
CHATS, TEXTS, MODELS, HEALTH = "/chat/completions", "/completions", "/models", "/health"
METHODS = {CHATS: "POST", TEXTS: "POST", MODELS: "GET, HEAD", HEALTH: "GET, HEAD"}


class ModelInfo(NamedTuple):
    """What a route may know of a model.

    Args:
        id (str): Its name, as the request says it.
        tokenizer (TokenizerWrapper): Its tokenizer, which may be used on any thread and must
          not be changed.
        vocabulary_size (int): How many token ids it has.
        context_length (Optional[int]): The most tokens of a prompt and its answer, if known.
        decode (Callable[[List[int]], str]): Makes text of token ids. Those that only the model
          has give nothing.
    """

    id: str
    tokenizer: Any
    vocabulary_size: int
    context_length: Optional[int]
    decode: Callable[[List[int]], str]


class RouteRequest(ABC):
    """A request to a route of a plugin.

    Args:
        method (str): "GET" or "POST". A HEAD request is a GET whose content is not sent.
        path (str): Its path, decoded, without a query and a slash at the end.
        query (Dict[str, str]): The parameters after "?". Of several with one name, the last.
        headers (Mapping[str, str]): Its headers; upper and lower case do not matter.
        body (bytes): Its body, which has the type ``application/json``; empty for GET.
        key_name (Optional[str]): The name of the API key that it came with, if any is asked
          for.
    """

    method: str
    path: str
    query: Dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    key_name: Optional[str]

    @abstractmethod
    def json(self) -> Dict[str, Any]:
        """The body as a JSON object.

        Raises:
            RequestError: A 400 if it is none.
        """

    @abstractmethod
    def answer(self, body: Dict[str, Any]) -> Dict[str, Any]:
        """Answer a chat or a text completion, as its own route does.

        Args:
            body (Dict[str, Any]): The body of a request to ``/v1/chat/completions``, or if it
              has a ``prompt``, to ``/v1/completions``.

        Returns:
            Dict[str, Any]: The JSON of the response.

        Raises:
            ConnectionError: If the client has left.
            RequestError: If it cannot be answered.
        """

    @abstractmethod
    def stream(self, body: Dict[str, Any]) -> Iterator[Optional[Dict[str, Any]]]:
        """The same in pieces, as they are made; ``body`` needs no ``stream``. An answer or a stream
        must have ended before the request asks for the next one. The route gives the chunks the
        form that its protocol has, as this one does for OpenAI's::

            def chat(request):
                for chunk in request.stream(request.json()):
                    yield None if chunk is None else f"data: {json.dumps(chunk)}\\n\\n"
                yield "data: [DONE]\\n\\n"

        Yields:
            Optional[Dict[str, Any]]: The JSON of each chunk, and None for each second without
            one. The last chunk has no ``choices`` if ``stream_options`` asks for the usage.
        """

    @abstractmethod
    def tokenize(self, body: Dict[str, Any]) -> List[int]:
        """The tokens of the prompt of a chat or a text completion. They may be more than fit
        into the model's context.

        Args:
            body (Dict[str, Any]): As for ``answer``.

        Raises:
            RequestError: If it has no prompt, or one that cannot be tokenized.
        """

    @abstractmethod
    def model(self, name: Optional[str] = None) -> ModelInfo:
        """A model that a request may name; the served one if no name is given.

        Raises:
            RequestError: A 404 if there is none.
        """

    @abstractmethod
    def served_names(self) -> List[str]:
        """What clients may call the served model."""

    @abstractmethod
    def plugins(self) -> Dict[str, str]:
        """The distributions of the plugins that are loaded, with their versions, by the names
        of the plugins."""

    @abstractmethod
    def statistics(self) -> ServerStatistics:
        """What the server has done and what it holds."""


@dataclass(frozen=True)
class RouteResponse:
    """What a route answers.

    Args:
        content (Any): A dictionary or a list, which is sent as JSON; a text; bytes; or an
          iterator of texts, each of which is sent as it comes; the headers are sent with the
          first. None among these is sent as a comment of server-sent events, so that nobody
          takes the connection for dead; streams of other types have no comments.
        status (int): The HTTP status.
        content_type (Optional[str]): The type of the content. If not given,
          ``application/json``, ``text/plain``, ``application/octet-stream`` or
          ``text/event-stream``.
        headers (Mapping[str, str]): Other headers.
    """

    content: Any
    status: int = 200
    content_type: Optional[str] = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """A route of HTTP.

    Args:
        method (str): "GET" or "POST".
        path (str): Its path, as ``/metrics``. Only this path, without ``/v1`` in front.
        function (Callable): Called with a ``RouteRequest``. Returns a ``RouteResponse``, or
          the content of one.
        needs_key (bool): Whether a caller has to send an API key, if the server asks for
          any.
    """

    method: str
    path: str
    function: Callable[[RouteRequest], Any]
    needs_key: bool = True

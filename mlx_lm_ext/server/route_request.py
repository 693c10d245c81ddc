"""A request to the route of a plugin, on the connection that it came on."""

import json
from typing import Any, Dict, Generator, Iterator, List, Optional
from urllib.parse import parse_qsl, urlsplit

from ..errors import RequestError
from ..interfaces import ServerStatistics
from ..request.fields import check_size, parse_object
from ..routes import CHATS, TEXTS, ModelInfo, RouteRequest


class HandlerRequest(RouteRequest):
    """What a route sees of its request.

    Args:
        handler (BatchAPIHandler): The handler of its connection.
        body (bytes): Its body.
    """

    def __init__(self, handler: Any, body: bytes):
        self.handler = handler
        self.method = "GET" if handler.command == "HEAD" else handler.command
        self.path = handler.route
        self.query = parse_query(handler.path)
        self.headers = handler.headers
        self.body = body
        self.key_name = handler.key_name
        self.streams: List[Generator[Optional[Dict[str, Any]], None, None]] = []

    def close(self) -> None:
        """End the streams that the route has left open."""
        for stream in self.streams:
            stream.close()

    def json(self) -> Dict[str, Any]:
        check_size(self.body, self.handler.response_generator.cli_args.max_body_bytes)
        return parse_object(self.body)

    def answer(self, body: Dict[str, Any]) -> Dict[str, Any]:
        with self.handler.submitted(*encode(body, stream=False)) as requests:
            return self.handler.whole(requests)

    def stream(self, body: Dict[str, Any]) -> Iterator[Optional[Dict[str, Any]]]:
        self.streams.append(self.chunks(body))
        return self.streams[-1]

    def chunks(
        self, body: Dict[str, Any]
    ) -> Generator[Optional[Dict[str, Any]], None, None]:
        with self.handler.submitted(*encode(body, stream=True)) as requests:
            yield from self.handler.chunks(requests)

    def tokenize(self, body: Dict[str, Any]) -> List[int]:
        return self.handler.tokenize(*encode(body))

    def model(self, name: Optional[str] = None) -> ModelInfo:
        engine = self.handler.response_generator
        self.handler.await_model(engine.policies.clock())
        return engine.model_info(name)

    def served_names(self) -> List[str]:
        return list(self.handler.response_generator.served_names)

    def plugins(self) -> Dict[str, str]:
        sources = self.handler.response_generator.policies.plugins.sources
        return {name: " ".join(source).strip() for name, source in sources.items()}

    def statistics(self) -> ServerStatistics:
        server = self.handler.server
        return self.handler.response_generator.statistics(len(server.connections))


def parse_query(target: str) -> Dict[str, str]:
    """The parameters of the target of a request."""
    try:
        return dict(parse_qsl(urlsplit(target).query, keep_blank_values=True))
    except ValueError as e:
        raise RequestError(400, f"the query cannot be read: {e}")


def encode(body: Dict[str, Any], **fields: Any) -> Any:
    """What a handler takes: the body of a chat or a text completion, and its endpoint."""
    endpoint = TEXTS if "prompt" in body else CHATS
    return json.dumps({**body, **fields}).encode(), endpoint

"""The HTTP side: routes, request bodies, answers, streams and errors.

Rules:
1. Every response but a stream has a length, and every error is OpenAI's JSON.
2. However an answer ends, its request is cancelled: no row outlives its client.
3. Nothing here touches MLX.
"""

import json
import logging
import select
import socket
import time
import uuid
from http.server import ThreadingHTTPServer
from typing import Any, Callable, Dict, Iterator, List, Optional
from urllib.parse import unquote, urlsplit

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from mlx_lm.server import CompletionRequest

from ._upstream import APIHandlerBase, image_parts
from .delivery import Delivery, Delta
from .errors import RequestError
from .request import Request, Token
from .validation import (
    parse_arguments,
    parse_body,
    parse_messages,
    parse_prompt,
    parse_tools,
)

# Bytes of a request body; images come inside it.
MAX_BODY = 64 << 20
# Seconds between two looks at a client whose answer has nothing new.
HEARTBEAT = 1.0

POST_ROUTES = ("/v1/chat/completions", "/chat/completions", "/v1/completions")
GET_ROUTES = ("/v1/models", "/health")


class BatchHTTPServer(ThreadingHTTPServer):
    """A thread for each connection, and room for bursts of new ones.

    Args:
        address (Tuple[str, int]): Host name or address, and port; 0 takes a free one.
        handler (Callable): Makes the handler of a connection.
    """

    request_queue_size = 512
    daemon_threads = False

    def __init__(self, address, handler):
        infos = socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, _, _, _, address = infos[0]
        self.connections = set()
        super().__init__(address, handler)

    def process_request_thread(self, request, client_address):
        self.connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)

    def server_close(self):
        """Let the open answers end, and idle connections close."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RD)
            except OSError:
                pass  # it has just ended
        super().server_close()

    def handle_error(self, request, client_address):
        logging.exception(f"A connection from {client_address[0]} failed")


class BatchAPIHandler(APIHandlerBase):
    """Upstream's handler on the batch engine, with strict bodies and HTTP/1.1."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # Seconds for a client to send its request, or to take what is sent to it.
    timeout = 60

    # Requests

    def do_POST(self):
        self.respond(self.post)

    def do_GET(self):
        self.respond(self.get)

    def respond(self, method: Callable[[], None]) -> None:
        """Answer one request; what is raised becomes an error response."""
        self.created = int(time.time())
        try:
            method()
        except RequestError as e:
            self.send_json(e.status, e.to_json())
        except ConnectionError:
            self.close_connection = True
        except Exception:
            logging.exception("A request failed")
            error = RequestError(500, "the server failed; its log says why")
            self.send_json(error.status, error.to_json())

    def get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            self.handle_health_check()
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            self.handle_models_request()
        else:
            raise self.wrong_route(path)

    def post(self) -> None:
        raw = self.read_body()
        path = urlsplit(self.path).path
        if path not in POST_ROUTES:
            raise self.wrong_route(path)
        self.body = parse_body(raw)
        self.stream = self.body.get("stream", False)
        self.requested_model = self.body.get("model", "default_model")
        if self.requested_model == self.model_id:
            self.body["model"] = "default_model"
        if path == "/v1/completions":
            request = self.handle_text_completions()
        else:
            request = self.handle_chat_completions()
        args = parse_arguments(self.body, self.response_generator.cli_args)
        asked = "max_tokens" in self.body or "max_completion_tokens" in self.body
        job = self.response_generator.generate(request, args, not asked)
        if self.stream:
            self.send_stream(job)
        else:
            self.send_answer(job)

    def wrong_route(self, path: str) -> RequestError:
        if path in POST_ROUTES + GET_ROUTES:
            right = "POST" if path in POST_ROUTES else "GET"
            return RequestError(405, f"{path} takes {right}, not {self.command}")
        return RequestError(404, f"there is no {path} here")

    def read_body(self) -> bytes:
        """Read the whole body, so that the connection can serve another request."""
        # Until it is read, nothing after it can be.
        self.close_connection = True
        length = self.headers.get("Content-Length")
        if length is None:
            raise RequestError(411, "the Content-Length header is required")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(400, "the Content-Length header must be a number")
        if int(length) > MAX_BODY:
            raise RequestError(413, f"the body may have {MAX_BODY} bytes at most")
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time")
        if len(raw) < int(length):
            message = f"the body was cut short after {len(raw)} of {length} bytes"
            raise RequestError(400, message)
        connection = self.headers.get("Connection", "").lower()
        self.close_connection = connection == "close" or (
            self.request_version == "HTTP/1.0" and connection != "keep-alive"
        )
        return raw

    def handle_chat_completions(self) -> CompletionRequest:
        messages = parse_messages(self.body)
        self.body["tools"] = parse_tools(self.body)
        processor = self.response_generator.model_provider.processor
        if self.body.get("model", "default_model") == "default_model":
            if processor is None and any(image_parts(messages)):
                raise RequestError(400, "the model takes no images", "messages")
        return super().handle_chat_completions()

    def handle_text_completions(self) -> CompletionRequest:
        self.body["prompt"] = parse_prompt(self.body)
        return super().handle_text_completions()

    # Answers

    def receive(self, job: Request) -> Iterator[Optional[Delta]]:
        """The pieces of an answer as they come, or None when a second brings none.

        Raises:
            ConnectionError: If the client is gone.
            Exception: What ended the request on the generation thread.
        """
        delivery = None
        try:
            while True:
                tokens = job.receive(timeout=HEARTBEAT)
                if self.client_is_gone():
                    raise ConnectionResetError("the client is gone")
                if not tokens:
                    self.response_generator.check_available()
                    yield None
                    continue
                delivery = delivery or Delivery(job, self.stream)
                delta = delivery.feed(tokens)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            job.cancel()

    def client_is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def send_answer(self, job: Request) -> None:
        """Answer in one piece."""
        answer = Delta()
        for delta in self.receive(job):
            if delta is not None:
                answer.text += delta.text
                answer.reasoning += delta.reasoning
                answer.tool_calls += delta.tool_calls
                answer.tokens += delta.tokens
                answer.finish_reason = delta.finish_reason
        self.send_json(200, self.make_response(job, answer, len(answer.tokens)))

    def send_stream(self, job: Request) -> None:
        """Answer in server-sent events."""
        # Headers at once: some clients give up on a silent server.
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.chunked = self.request_version == "HTTP/1.1"
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.send_cors_headers()
        self.end_headers()
        try:
            self.send_events(job)
        except TimeoutError:
            raise ConnectionResetError("the client takes nothing")
        except ConnectionError:
            raise
        except Exception as e:
            if not isinstance(e, RequestError):
                e = RequestError(500, "the server failed; its log says why")
            self.send_event(json.dumps(e.to_json()))
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def send_events(self, job: Request) -> None:
        n_tokens = 0
        for delta in self.receive(job):
            if delta is None:
                self.write(b": keepalive\n\n")
                continue
            n_tokens += len(delta.tokens)
            if (
                delta.text
                or delta.reasoning
                or delta.tool_calls
                or delta.finish_reason
                or job.args.logprobs
            ):
                self.send_event(json.dumps(self.make_response(job, delta)))
        if self.body.get("stream_options", {}).get("include_usage"):
            usage = self.completion_usage_response(
                len(job.prompt), n_tokens, job.n_cached
            )
            usage["object"] = self.object_type
            self.send_event(json.dumps(usage))
        self.send_event("[DONE]")

    def make_response(
        self, job: Request, delta: Delta, n_tokens: Optional[int] = None
    ) -> Dict[str, Any]:
        """The response, or the chunk of one, that carries ``delta``."""
        response = self.generate_response(
            delta.text,
            delta.finish_reason,
            len(job.prompt),
            n_tokens,
            job.n_cached,
            tool_calls=delta.tool_calls,
            reasoning_text=delta.reasoning,
        )
        if job.args.logprobs:
            is_chat = self.object_type.startswith("chat.")
            make = chat_logprobs if is_chat else text_logprobs
            decode = job.model.tokenizer.decode
            response["choices"][0]["logprobs"] = make(delta.tokens, decode)
        return response

    # Other routes

    def handle_health_check(self) -> None:
        engine = self.response_generator
        if engine.is_healthy:
            self.send_json(200, {"status": "ok"})
        else:
            status = "unavailable" if engine.loaded.is_set() else "loading"
            self.send_json(503, {"status": status})

    @property
    def model_id(self) -> str:
        return self.response_generator.cli_args.model_id

    def handle_models_request(self) -> None:
        """The served model first, then what the Hugging Face cache holds."""
        try:
            repos = scan_cache_dir().repos
        except CacheNotFound:
            repos = []
        ids = [self.model_id]
        ids += sorted(r.repo_id for r in repos if holds_mlx_model(r))
        models = [
            {"id": i, "object": "model", "created": self.created, "owned_by": "mlx_lm"}
            for i in dict.fromkeys(ids)
        ]
        wanted = unquote(urlsplit(self.path).path.removeprefix("/v1/models").strip("/"))
        if not wanted:
            self.send_json(200, {"object": "list", "data": models})
            return
        for model in models:
            if model["id"].strip("/") == wanted:
                self.send_json(200, model)
                return
        raise RequestError(
            404, f"there is no model {wanted!r} here", "model", "model_not_found"
        )

    # Writing

    def send_json(self, status: int, content: Dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_cors_headers()
        self.end_headers()
        self.wfile.write(raw)

    def send_event(self, data: str) -> None:
        self.write(f"data: {data}\n\n".encode())

    def write(self, raw: bytes) -> None:
        if self.chunked:
            raw = b"%x\r\n%b\r\n" % (len(raw), raw)
        self.wfile.write(raw)

    def send_error(self, code, message=None, explain=None):
        """What ``http.server`` refuses by itself, in OpenAI's shape."""
        if code == 501:
            code, message = 405, f"the method {self.command} is not supported"
        self.close_connection = True
        self.headers = getattr(self, "headers", None) or {}
        error = RequestError(code, message or explain or "the request is not HTTP")
        self.send_json(error.status, error.to_json())

    def log_message(self, format, *args):
        # Escaped, since a client chooses what it says.
        message = (format % args).encode("unicode_escape").decode()
        logging.info(f"{self.address_string()} {message}")


def holds_mlx_model(repo: Any) -> bool:
    """Whether a cached Hugging Face repository looks like a model for mlx-lm."""
    if repo.repo_type != "model" or "main" not in repo.refs:
        return False
    names = {f.file_path.name for f in repo.refs["main"].files}
    return {"config.json", "tokenizer_config.json"} <= names and any(
        name.endswith(".safetensors") for name in names
    )


def chat_logprobs(tokens: List[Token], decode: Callable) -> Dict[str, Any]:
    """OpenAI's ``logprobs`` of a chat choice."""

    def entry(token_id, logprob):
        text = decode([token_id])
        # Part of a character has no text, and its bytes are lost in decoding.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"id": token_id, "token": text, "bytes": raw, "logprob": logprob}

    return {
        "content": [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(*top) for top in t.top]}
            for t in tokens
        ]
    }


def text_logprobs(tokens: List[Token], decode: Callable) -> Dict[str, Any]:
    """OpenAI's ``logprobs`` of a text completion choice."""
    return {
        "tokens": [decode([t.id]) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{decode([i]): p for i, p in t.top} for t in tokens],
    }

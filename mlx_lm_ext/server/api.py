"""The API: routes, answers and streams in OpenAI's shape.

Rules:
1. However an answer ends, its request is cancelled, so that its row in the batch is free.
2. Streamed or not, an answer is made of the same deltas.
3. Nothing here touches MLX.
"""

import json
import logging
import re
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from mlx_lm.server import CompletionRequest

from ..errors import RequestError, internal_error
from ..request.fields import (
    FIELDS,
    check_field,
    check_size,
    make_generation_arguments,
    n_candidates,
    parse_body,
    parse_prompts,
    parse_tools,
)
from ..request.history import (
    count_characters,
    leave_out_past_images,
    parse_messages,
)
from ..request.images import MAX_ALL_BYTES, image_parts, inline_images
from ..request.other_fields import check_endpoint
from ..request.preparation import Preparation
from ..request.request import NO_TIME, NO_TOKEN, Request
from ..request.served_model import ServedModel
from ..routes import CHATS, HEALTH, METHODS, MODELS, RouteResponse
from .answer import AnswerParser, Delta
from .answer_record import AnswerRecord
from .connection import EVENTS, GONE, HTTPHandler, clean
from .logprobs import chat_logprobs, in_json, text_logprobs
from .model_list import cached_models
from .request_log import log_answer
from .route_request import HandlerRequest

logger = logging.getLogger(__name__)

# Seconds without a new token after which a stream gets a keep-alive comment, and after
# which it is checked that the client and the engine are still there.
HEARTBEAT = 1.0
# Seconds for the last events of answers to come after the engine has stopped.
LAST_EVENTS = 3.0

# What a header may have (RFC 9110, section 5), in Latin-1.
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\t -~\u00a0-\u00ff]*")
# The types of what a route gives, by its Python type.
CONTENT_TYPES = {str: "text/plain; charset=utf-8", bytes: "application/octet-stream"}


def rank(answer: Delta) -> Tuple[bool, bool, float]:
    """Sorts whole answers: the one with the highest mean log probability of its tokens first, and
    those for which there was no time last."""
    logprobs = [in_json(token.logprob) for token in answer.tokens]
    mean = sum(logprobs) / max(1, len(logprobs))
    return not logprobs, answer.finish_reason == "timeout", -mean


def check_head(response: RouteResponse) -> None:
    """Check what a route gives for the head of its response.

    Raises:
        ValueError: If it cannot be sent, or would be more than one header.
    """
    if not 200 <= response.status <= 599:
        raise ValueError(f"its status is {response.status}")
    for name, value in (
        ("Content-Type", response.content_type or ""),
        *response.headers.items(),
    ):
        if not (HEADER_NAME.fullmatch(name) and HEADER_VALUE.fullmatch(str(value))):
            raise ValueError(f"its header {name!r} cannot be sent")
        if name.lower() in ("content-length", "transfer-encoding", "connection"):
            raise ValueError(f"the server sends the header {name!r} itself")


class BatchAPIHandler(HTTPHandler):
    """Upstream's handler on the batch engine, with checked bodies."""

    # How each of the answers goes that are made.
    records: List[AnswerRecord] = []
    # Whether an answer is made.
    is_answering = False

    # Requests

    @property
    def endpoint(self) -> str:
        """The path of the request, without the version of the API."""
        return self.route.removeprefix("/v1")

    @property
    def plugin_route(self) -> Optional[Any]:
        """The route of a plugin that the request is for, with the plugin, if there is one."""
        method = "GET" if self.command == "HEAD" else self.command
        return self.server.routes.get((method, self.route))

    @property
    def needs_key(self) -> bool:
        found = self.plugin_route
        return found.route.needs_key if found else self.endpoint != HEALTH

    @property
    def is_stopping(self) -> bool:
        return self.response_generator.admission.is_closed

    def get(self) -> None:
        if self.endpoint == HEALTH:
            self.handle_health_check()
        elif self.endpoint == MODELS or self.endpoint.startswith(f"{MODELS}/"):
            self.handle_models_request()
        else:
            self.answer_route(b"")

    def post(self) -> None:
        raw = self.read_body()
        if METHODS.get(self.endpoint) != "POST":
            self.answer_route(raw)
            return
        submitted = self.submitted(raw, self.endpoint, self.keep_waiting)
        # It may be large, and is not needed while the answer is made.
        del raw
        with submitted as requests:
            if self.stream:
                self.send_stream(requests)
            else:
                self.send_json(200, self.whole(requests))

    @contextmanager
    def submitted(
        self, raw: bytes, endpoint: str, wait: Callable[[], None] = lambda: None
    ) -> Iterator[List[Request]]:
        """Submit the requests of a body to the engine while the block runs.

        Args:
            raw (bytes): The body.
            endpoint (str): ``CHATS`` or ``TEXTS``.
            wait (Callable): Called for each HEARTBEAT in which the model is loaded.

        Raises:
            ConnectionError: If the client is gone.
            RequestError: If they cannot be served.
        """
        if self.is_answering:
            raise RuntimeError("a request of a route has one answer at a time")
        self.is_answering = True
        try:
            with self.submitted_alone(raw, endpoint, wait) as requests:
                del raw
                yield requests
        finally:
            self.is_answering = False

    @contextmanager
    def submitted_alone(
        self, raw: bytes, endpoint: str, wait: Callable[[], None]
    ) -> Iterator[List[Request]]:
        """``submitted``, when no other answer is made."""
        engine = self.response_generator
        arrival = engine.policies.clock()
        preparation = self.check_body(raw, endpoint)
        del raw
        n_prompts = 1 if self.is_chat else len(self.body["prompt"])
        n = n_prompts * n_candidates(self.body)
        with engine.admission.admit(n, self.key_name) as ticket:
            self.await_model(arrival, wait)
            completions, model = self.take_prompts(preparation)
            with preparation.turn():
                requests = engine.generate(
                    completions,
                    self.args,
                    self.body,
                    model,
                    arrival,
                    self.request_id,
                    preparation,
                    self.key_name,
                )
            ticket.requests = requests
            self.is_submitted = True
            records = self.records = [
                AnswerRecord(engine.policies.clock) for _ in requests
            ]
            try:
                yield requests
            except (*GONE, GeneratorExit):
                for record in records:
                    record.end("cancelled")
                raise
            finally:
                self.records = []
                for request in requests:
                    engine.cancel(request)
                for request, record in zip(requests, records):
                    record.end("error")
                    self.finish_request(request, record)

    def finish_request(self, request: Request, record: AnswerRecord) -> None:
        """Tell the log and the plugins that an answer has ended."""
        stats = request.stats(
            record.finish_reason, record.n_tokens, record.gaps, record.ended
        )
        log_answer(self.x_request_id, request, stats)
        self.response_generator.request_finished(request, stats)

    def check_body(self, raw: bytes, endpoint: str) -> Preparation:
        """Parse a body and check what can be checked without the model.

        Returns:
            Preparation: Ends what takes too long of what follows.
        """
        self.response_generator.check_available()
        preparation = self.server.preparations.begin(self.client_is_gone)
        with preparation.turn():
            preparation.run(partial(self.parse, raw, endpoint))
        return preparation

    def take_prompts(
        self, preparation: Preparation
    ) -> Tuple[List[CompletionRequest], ServedModel]:
        """The prompts of a body that was checked, or its messages, and the model that it
        names."""
        # Not in a turn, because a model may have to be downloaded.
        model = self.response_generator.describe(self.args)
        if self.is_chat and not model.takes_images:
            leave_out_past_images(self.body["messages"])
        images = image_parts(self.body["messages"]) if self.is_chat else []
        if images:
            with preparation.turn(self.server.preparations.fetches):
                self.check_images(model, images, preparation)
        if self.is_chat:
            return [self.handle_chat_completions()], model
        completion = self.handle_text_completions()
        return [replace(completion, prompt=p) for p in self.body["prompt"]], model

    def tokenize(self, raw: bytes, endpoint: str) -> List[int]:
        """The tokens of the prompt of a body.

        Raises:
            ConnectionError: If the client is gone.
            RequestError: If there is not one prompt, or it cannot be tokenized.
        """
        engine = self.response_generator
        arrival = engine.policies.clock()
        preparation = self.check_body(raw, endpoint)
        self.await_model(arrival)
        (completion, *others), model = self.take_prompts(preparation)
        if others:
            raise RequestError(400, "prompt must be one prompt", "prompt")
        with preparation.turn():
            return engine.tokens_of(
                completion, self.args, self.body, model, preparation
            )

    def keep_waiting(self) -> None:
        """Begin a stream while the model is loaded: some clients give up on a server that
        sends nothing."""
        if self.stream:
            self.start_events()
            self.send_keepalive()

    def await_model(
        self, arrival: float, wait: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the served model is loaded.

        Args:
            arrival (float): When the request came, on the clock of the policies.
            wait (Callable): Called for each HEARTBEAT of it.

        Raises:
            ConnectionError: If the client is gone.
            RequestError: If the model cannot be loaded, or the request takes too long.
        """
        while not self.response_generator.wait_until_loaded(HEARTBEAT, arrival):
            self.prepared_since = time.monotonic()
            if self.client_is_gone():
                raise ConnectionResetError("the client is gone")
            wait()

    def parse(self, raw: bytes, endpoint: str) -> None:
        """Parse a body and check what can be checked without the model."""
        check_size(raw, self.response_generator.cli_args.max_body_bytes)
        self.body = parse_body(raw)
        self.set_cache_salt()
        self.stream = self.body.get("stream", False)
        self.requested_model = self.body.get("model", "default_model")
        if self.response_generator.is_served(self.requested_model):
            self.body["model"] = "default_model"
        self.is_chat = endpoint == CHATS
        check_endpoint(self.body, self.is_chat)
        if self.is_chat:
            self.body["messages"] = parse_messages(self.body)
            self.body["tools"] = parse_tools(self.body)
        else:
            self.body["prompt"] = parse_prompts(self.body)
        self.args = make_generation_arguments(
            self.body, self.response_generator.cli_args
        )

    def set_cache_salt(self) -> None:
        """Take the cache salt from the header, which a proxy may set, instead of the body.

        Raises:
            RequestError: If it is sent twice, is too long, or is required and missing.
        """
        name = "X-Cache-Salt"
        salts = self.headers.get_all(name, [])
        if len(salts) > 1:
            raise RequestError(400, f"{name} must be sent once", "cache_salt")
        if salts:
            check_field("cache_salt", salts[0], FIELDS["cache_salt"])
            self.body["cache_salt"] = salts[0]
        is_required = self.response_generator.cli_args.cache_salt_required
        if is_required and not self.body.get("cache_salt"):
            message = f"cache_salt is required, in the body or in the header {name}"
            raise RequestError(400, message, "cache_salt")

    def wrong_route(self) -> RequestError:
        right = METHODS.get(self.endpoint)
        if right is None:
            methods = [m for m, path in self.server.routes if path == self.route]
            right = ", ".join({"GET": "GET, HEAD"}.get(m, m) for m in methods) or None
        if right is not None:
            message = f"{self.route} takes {right}, not {self.command}"
            return RequestError(405, message, headers={"Allow": f"{right}, OPTIONS"})
        return RequestError(404, f"there is no {self.route[:200]} here")

    def check_images(
        self, model: ServedModel, images: List[Dict], preparation: Preparation
    ) -> None:
        """Check the images of a chat and fetch them, before upstream decodes them."""
        if not model.takes_images:
            raise RequestError(400, "the model takes no images", "messages")
        # This prompt is tokenized later, on the generation thread.
        tokenizer = model.bounded_tokenizer("messages", preparation)
        tokenizer.check_characters(count_characters(self.body["messages"]))
        allow_urls = self.response_generator.cli_args.allow_image_urls
        inline_images(images, allow_urls, preparation)

    @property
    def max_body(self) -> int:
        """Bytes that a body may have, the images in it included."""
        engine = self.response_generator
        limit = engine.cli_args.max_body_bytes
        takes_images = engine.model_provider.takes_images
        return limit + MAX_ALL_BYTES if takes_images else limit

    # Answers

    def receive(
        self, requests: List[Request]
    ) -> Iterator[Optional[Tuple[Request, Delta]]]:
        """The deltas of all answers as they come, and None for each HEARTBEAT without one.

        Raises:
            ConnectionError: If the client is gone.
            RequestError: What ended one of the requests on the generation thread.
        """
        parsers: Dict[Request, AnswerParser] = {}
        left = set(requests)
        while left:
            try:
                received = requests[0].answers.receive(timeout=HEARTBEAT)
                if not received:
                    self.response_generator.check_available(LAST_EVENTS)
            except RequestError as e:
                # An answer in one piece ends with what there is, as in ``Request.stop``: the
                # engine is in a long step.
                ends = e.status == 503 and self.is_stopping and not self.stream
                if ends := ends and any(record.n_tokens for record in self.records):
                    for request in left - parsers.keys():
                        parsers[request] = AnswerParser(request)
                # What was held back is sent before the error.
                for request in left & parsers.keys():
                    delta = parsers[request].feed([NO_TIME if ends else NO_TOKEN])
                    if ends:
                        self.records[request.index].end("timeout")
                    else:
                        delta.finish_reason = None
                    yield request, delta
                if ends:
                    return
                raise
            if self.client_is_gone():
                raise ConnectionResetError("the client is gone")
            if not received:
                yield None
            for request, tokens in received.items():
                if request not in left:
                    continue  # it goes on after a stop word, until it is cancelled
                # Its first state is known only when the prompt has been tokenized.
                if request not in parsers:
                    parsers[request] = AnswerParser(request)
                    if self.body.get("echo"):
                        yield request, parsers[request].echo(request)
                delta = parsers[request].feed(tokens)
                record = self.records[request.index]
                record.add(len(delta.tokens), is_timed=self.stream)
                if delta.finish_reason is not None:
                    record.end(delta.finish_reason)
                yield request, delta
                if delta.finish_reason is not None:
                    left.remove(request)
                    self.response_generator.cancel(request)

    def whole(self, requests: List[Request]) -> Dict[str, Any]:
        """The JSON of all answers in one piece."""
        answers = [Delta() for _ in requests]
        for received in self.receive(requests):
            if received is not None:
                request, delta = received
                answers[request.index].add(delta)
        response, *others = map(
            self.make_response, *zip(*self.choose(requests, answers))
        )
        for other in others:
            response["choices"] += other["choices"]
        for i, choice in enumerate(response["choices"]):
            choice["index"] = i
        response["usage"] = self.make_usage(requests)["usage"]
        return response

    def choose(
        self, requests: List[Request], answers: List[Delta]
    ) -> Iterator[Tuple[Request, Delta]]:
        """The best ``n`` answers to each prompt, if ``best_of`` asks for more, and otherwise
        all: those with the highest mean log probability, in the order of their quality.
        """
        n, n_made = self.body.get("n", 1), n_candidates(self.body)
        made = list(zip(requests, answers))
        for i in range(0, len(made), n_made):
            group = made[i : i + n_made]
            if n_made > n:
                group.sort(key=lambda pair: rank(pair[1]))
            yield from group[:n]

    def chunks(self, requests: List[Request]) -> Iterator[Optional[Dict[str, Any]]]:
        """The JSON of the chunks of a stream, and None for each HEARTBEAT without one."""
        begun = set()
        for received in self.receive(requests):
            if received is None:
                yield None
                continue
            request, delta = received
            for part in delta.chunks():
                yield self.make_response(request, part, request.index not in begun)
                begun.add(request.index)
        if self.body.get("stream_options", {}).get("include_usage"):
            usage = self.make_usage(requests)
            usage["object"] = self.object_type
            yield usage

    def send_stream(self, requests: List[Request]) -> None:
        """Send all answers in server-sent events."""
        for chunk in self.chunks(requests):
            # Not before there is something to send: until then an error has a status of its
            # own, and a proxy may ask another server.
            self.start_events()
            if chunk is None:
                self.send_keepalive()
            else:
                self.send_event(json.dumps(chunk))
        self.send_event("[DONE]")
        self.end_events()

    def make_usage(self, requests: List[Request]) -> Dict[str, Any]:
        """The JSON of the last chunk of a stream, which has the usage. Each prompt is counted
        once."""
        n = n_candidates(self.body)
        n_prompt = sum(len(request.prompt) for request in requests[::n])
        n_cached = sum(request.n_matched for request in requests[::n])
        n_generated = sum(record.n_tokens for record in self.records)
        return self.completion_usage_response(n_prompt, n_generated, n_cached)

    def make_response(
        self, request: Request, delta: Delta, is_first: bool = True
    ) -> Dict[str, Any]:
        """The JSON of a whole answer, or of a chunk of a stream, with one choice.

        Args:
            request (Request): The request.
            delta (Delta): What the response carries.
            is_first (bool): Whether it is the first chunk, which has the role.
        """
        is_late = delta.finish_reason == "timeout"
        response = self.generate_response(
            delta.text,
            "length" if is_late else delta.finish_reason,
            # The usage is that of all answers together: see ``make_usage``.
            0,
            0,
            tool_calls=delta.tool_calls,
            reasoning_text=delta.reasoning,
        )
        (choice,) = response["choices"]
        choice["index"] = request.index
        if is_late:
            choice["timeout"] = True
        message = choice.get("message") or choice.get("delta")
        if message and not is_first:
            # Clients concatenate the fields of the chunks.
            del message["role"]
        elif message and not delta.tool_calls:
            # Upstream omits an empty text, or makes it null. Clients expect a string.
            message["content"] = delta.text
        if self.args.logprobs:
            is_chat = self.object_type.startswith("chat.")
            make = chat_logprobs if is_chat else text_logprobs
            choice["logprobs"] = make(delta.logprobs, request.model.token_bytes)
        return response

    # Other routes

    def answer_route(self, raw: bytes) -> None:
        """Answer a request to the route of a plugin.

        Raises:
            RequestError: If there is no such route, or the plugin has failed.
        """
        found = self.plugin_route
        if found is None:
            raise self.wrong_route()
        request = HandlerRequest(self, raw)
        try:
            with self.response_generator.admission.track():
                content = found.route.function(request)
                if not isinstance(content, RouteResponse):
                    content = RouteResponse(content)
                self.send_route(content)
        except RequestError:
            raise
        except BaseException as e:
            # What a plugin raises may be of the same kind as what a client that leaves causes.
            if isinstance(e, GONE) and self.client_is_gone():
                raise
            logger.exception(
                f"{found.plugin}: the route {found.route.path} failed: {self.x_request_id}"
            )
            raise internal_error()
        finally:
            request.close()

    def send_route(self, response: RouteResponse) -> None:
        """Send what the route of a plugin has given."""
        content, kind = response.content, response.content_type
        check_head(response)
        if isinstance(content, (dict, list)):
            content = json.dumps(content, allow_nan=False).encode()
            kind = kind or "application/json"
        elif isinstance(content, (str, bytes)):
            kind = kind or CONTENT_TYPES[type(content)]
            content = content.encode() if isinstance(content, str) else content
        if isinstance(content, bytes):
            self.send_content(response.status, content, kind, response.headers)
            return
        if not isinstance(content, Iterator):
            raise TypeError(
                f"it gave a {type(content).__name__}, not a RouteResponse, a dict, a list, a "
                "str, bytes or an iterator"
            )
        pieces, kind = content, kind or EVENTS
        # What is wrong with a request gets its status if the first piece tells.
        first = None if self.command == "HEAD" else next(pieces, "")
        self.start_events(response.status, kind, response.headers)
        if self.command == "HEAD":
            return
        for piece in chain([first], pieces):
            if piece is None and kind == EVENTS:
                self.send_keepalive()
            elif piece:
                self.write(piece.encode())
        self.end_events()

    def handle_health_check(self) -> None:
        engine = self.response_generator
        health = {"status": engine.status}
        if engine.status == "unavailable":
            health["reason"] = str(engine.inbox.reason)
        self.send_json(200 if health["status"] == "ok" else 503, health)

    def model_entry(self, id: str) -> Dict[str, Any]:
        """A model as JSON. It is the same in each list: it has not the time of this request."""
        created = self.server.started
        return {"id": id, "object": "model", "created": created, "owned_by": "mlx_lm"}

    def handle_models_request(self) -> None:
        """List the served model first, then those of the Hugging Face cache that requests
        may name. One that is asked for may also be another that they may name."""
        provider = self.response_generator.model_provider
        served = self.response_generator.served_names
        ids = [*served, *sorted(filter(provider.allowed.lists, cached_models()))]
        wanted = self.endpoint.removeprefix(MODELS)
        if not wanted:
            models = list(map(self.model_entry, dict.fromkeys(ids)))
            self.send_json(200, {"object": "list", "data": models})
            return
        # An id may be a path.
        found = [i for i in ids if clean(i) == wanted]
        if wanted == "/default_model":
            found.append(served[0])
        found += [name for name in (wanted, wanted[1:]) if provider.has(name)]
        if found:
            self.send_json(200, self.model_entry(found[0]))
            return
        raise RequestError(
            404, f"there is no model {wanted[1:]!r} here", "model", "model_not_found"
        )

"""The API: routes, answers and streams in OpenAI's shape.

Rules:
1. However an answer ends, its request is cancelled: no row outlives its client.
2. Streamed or not, an answer is made of the same pieces.
3. Nothing here touches MLX.
"""

import json
import logging
from typing import Any, Dict, Iterator, List, Optional
from urllib.parse import unquote

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ..errors import RequestError, internal_error
from ..request.fields import (
    FIELDS,
    check_field,
    check_size,
    count_characters,
    parse_arguments,
    parse_body,
    parse_messages,
    parse_prompt,
    parse_tools,
)
from ..request.images import MAX_ALL_BYTES, image_parts, inline_images
from ..request.preparation import Preparation
from ..request.request import Request
from ..request.served_model import ServedModel
from .answer import Delivery, Delta, chat_logprobs, text_logprobs
from .connection import HTTPHandler

# Seconds between two looks at a client whose answer has nothing new.
HEARTBEAT = 1.0

POST_ROUTES = ("/v1/chat/completions", "/chat/completions", "/v1/completions")
GET_ROUTES = ("/v1/models", "/health")


class BatchAPIHandler(HTTPHandler):
    """Upstream's handler on the batch engine, with strict bodies."""

    # Requests

    def get(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self.handle_health_check()
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            self.handle_models_request()
        else:
            raise self.wrong_route()

    def post(self) -> None:
        raw = self.read_body()
        if self.path.partition("?")[0] not in POST_ROUTES:
            raise self.wrong_route()
        engine = self.response_generator
        engine.check_available()
        preparation = self.server.preparations.begin(self.client_is_gone)
        with preparation.turn():
            self.parse(raw)
        del raw
        # Not in a turn: it may have to be downloaded.
        model = engine.describe(self.args)
        images = image_parts(self.body["messages"]) if self.is_chat else []
        if images:
            with preparation.turn(self.server.preparations.fetches):
                self.check_images(model, images, preparation)
        if self.is_chat:
            request = self.handle_chat_completions()
        else:
            request = self.handle_text_completions()
        with preparation.turn():
            job = engine.generate(
                request, self.args, self.body, model, self.request_id, preparation
            )
        job.reads_each = self.stream or bool(self.args.stop_words)
        reason = "error"
        try:
            reason = self.send_stream(job) if self.stream else self.send_answer(job)
        except (ConnectionError, TimeoutError):
            reason = "cancelled"
            raise
        finally:
            engine.cancel(job)
            engine.finished(job, job.stats(reason))

    def parse(self, raw: bytes) -> None:
        """Check a body, as far as that needs no model."""
        check_size(raw, self.response_generator.cli_args.max_body_bytes)
        self.body = parse_body(raw)
        self.set_cache_salt()
        self.stream = self.body.get("stream", False)
        self.requested_model = self.body.get("model", "default_model")
        if self.requested_model == self.model_id:
            self.body["model"] = "default_model"
        self.args = parse_arguments(self.body, self.response_generator.cli_args)
        self.is_chat = not self.path.startswith("/v1/completions")
        if self.is_chat:
            self.body["messages"] = parse_messages(self.body)
            self.body["tools"] = parse_tools(self.body)
        else:
            self.body["prompt"] = parse_prompt(self.body)

    def set_cache_salt(self) -> None:
        """Take the salt that a proxy sets instead of the body's."""
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
        path = self.path.partition("?")[0]
        if path in POST_ROUTES + GET_ROUTES:
            right = "POST" if path in POST_ROUTES else "GET"
            message = f"{path} takes {right}, not {self.command}"
            return RequestError(405, message, headers={"Allow": f"{right}, OPTIONS"})
        return RequestError(404, f"there is no {path[:200]} here")

    def check_images(
        self, model: ServedModel, images: List[Dict], preparation: Preparation
    ) -> None:
        """Look at the images of a chat, and fetch them, before upstream does."""
        engine = self.response_generator
        if not engine.model_provider.takes_images(model):
            raise RequestError(400, "the model takes no images", "messages")
        # The generation thread makes tokens of it.
        tokenizer = model.bounded_tokenizer("messages", preparation)
        tokenizer.check_characters(count_characters(self.body["messages"]))
        inline_images(images, engine.cli_args.allow_image_urls, preparation)

    @property
    def max_body(self) -> int:
        """Bytes of a body; images come inside it."""
        engine = self.response_generator
        limit = engine.cli_args.max_body_bytes
        takes_images = engine.model_provider.processor is not None
        return limit + MAX_ALL_BYTES if takes_images else limit

    # Answers

    def receive(self, job: Request) -> Iterator[Optional[Delta]]:
        """The pieces of an answer as they come, or None when a second brings none.

        Raises:
            ConnectionError: If the client is gone.
            RequestError: What ended the request on the generation thread.
        """
        delivery = None
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

    def send_answer(self, job: Request) -> str:
        """Answer in one piece; gives the finish reason."""
        answer = Delta()
        for delta in self.receive(job):
            if delta is not None:
                answer.text += delta.text
                answer.reasoning += delta.reasoning
                answer.tool_calls += delta.tool_calls
                answer.tokens += delta.tokens
                answer.finish_reason = delta.finish_reason
        self.send_json(200, self.make_response(job, answer, len(answer.tokens)))
        return answer.finish_reason

    def send_stream(self, job: Request) -> str:
        """Answer in server-sent events; gives the finish reason."""
        # At once: some clients give up on a silent server.
        self.start_events()
        reason = "error"
        try:
            reason = self.send_events(job)
        except RequestError as e:
            self.send_event(json.dumps(e.to_json()))
        except (ConnectionError, TimeoutError):
            raise
        except BaseException:
            logging.exception("A stream failed")
            self.send_event(json.dumps(internal_error().to_json()))
        self.end_events()
        return reason

    def send_events(self, job: Request) -> str:
        n_tokens, is_first = 0, True
        for delta in self.receive(job):
            if delta is None:
                self.send_keepalive()
                continue
            n_tokens += len(delta.tokens)
            if (
                delta.text
                or delta.reasoning
                or delta.tool_calls
                or delta.finish_reason
                or job.args.logprobs
            ):
                chunk = self.make_response(job, delta, is_first=is_first)
                self.send_event(json.dumps(chunk))
                is_first = False
        if self.body.get("stream_options", {}).get("include_usage"):
            usage = self.completion_usage_response(
                len(job.prompt), n_tokens, job.n_matched
            )
            usage["object"] = self.object_type
            self.send_event(json.dumps(usage))
        self.send_event("[DONE]")
        return delta.finish_reason

    def make_response(
        self,
        job: Request,
        delta: Delta,
        n_tokens: Optional[int] = None,
        is_first: bool = True,
    ) -> Dict[str, Any]:
        """The response, or the chunk of one, that carries ``delta``."""
        response = self.generate_response(
            delta.text,
            delta.finish_reason,
            len(job.prompt),
            n_tokens,
            job.n_matched,
            tool_calls=delta.tool_calls,
            reasoning_text=delta.reasoning,
        )
        (choice,) = response["choices"]
        message = choice.get("message") or choice.get("delta")
        if message and not is_first:
            # Clients add up what the chunks hold.
            del message["role"]
        elif message and not delta.tool_calls:
            # Upstream leaves out an empty text, or makes null of it.
            message["content"] = delta.text
        if job.args.logprobs:
            is_chat = self.object_type.startswith("chat.")
            make = chat_logprobs if is_chat else text_logprobs
            choice["logprobs"] = make(delta.tokens, job.model.tokenizer.decode)
        return response

    # Other routes

    def handle_health_check(self) -> None:
        engine = self.response_generator
        if engine.is_healthy:
            self.send_json(200, {"status": "ok"})
        else:
            status = "loading" if engine.is_loading else "unavailable"
            self.send_json(503, {"status": status})

    @property
    def model_id(self) -> str:
        return self.response_generator.cli_args.model_id

    def handle_models_request(self) -> None:
        """The served model first, then what requests may name of the Hugging Face cache."""
        try:
            repos = scan_cache_dir().repos
        except CacheNotFound:
            repos = []
        ids = [self.model_id]
        provider = self.response_generator.model_provider
        repos = [r for r in repos if holds_mlx_model(r) and provider.lists(r.repo_id)]
        ids += sorted(r.repo_id for r in repos)
        models = [
            {"id": i, "object": "model", "created": self.created, "owned_by": "mlx_lm"}
            for i in dict.fromkeys(ids)
        ]
        wanted = unquote(
            self.path.partition("?")[0].removeprefix("/v1/models").strip("/")
        )
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


def holds_mlx_model(repo: Any) -> bool:
    """Whether a cached Hugging Face repository looks like a model for mlx-lm."""
    if repo.repo_type != "model" or "main" not in repo.refs:
        return False
    names = {f.file_path.name for f in repo.refs["main"].files}
    return {"config.json", "tokenizer_config.json"} <= names and any(
        name.endswith(".safetensors") for name in names
    )

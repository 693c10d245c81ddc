"""A plugin that implements every hook. Copy what you need."""

import json
from datetime import datetime, timezone
from threading import Lock

import mlx.core as mx
import numpy as np

from mlx_lm_ext import hookimpl
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import (
    BatchSampler,
    Constraint,
    EvictionPolicy,
    SchedulerPolicy,
)
from mlx_lm_ext.routes import Route, RouteResponse

log_lock = Lock()


@hookimpl
def mlx_lm_add_arguments(parser):
    group = parser.add_argument_group("sample plugin")
    group.add_argument(
        "--cost-weight",
        type=float,
        default=0.5,
        help="0 keeps entries that are used often, 1 also those that take long to prefill",
    )
    group.add_argument(
        "--request-log", help="file that gets a line of JSON for each request"
    )


@hookimpl
def mlx_lm_register_eviction_policies():
    return [CostAware]


@hookimpl
def mlx_lm_register_scheduler_policies():
    return [StreamsFirst]


@hookimpl
def mlx_lm_register_samplers():
    return [Mirostat]


class CostAware(EvictionPolicy):
    """Keeps entries that were used often and take long to compute again.

    As in GreedyDual (Young, 1994), the worth of new hits rises with each eviction. Otherwise
    an entry that was once used often would never leave.
    """

    name = "cost"

    def __init__(self, args, clock):
        super().__init__(args, clock)
        self.weight = args.cost_weight
        self.floor = 0.0

    def on_insert(self, entry):
        self.on_hit(entry, 0)

    def on_hit(self, entry, n_tokens):
        worth = (1 + entry.hits) * entry.recompute_cost**self.weight
        entry.data = self.floor + worth

    def on_split(self, parent, child):
        self.on_hit(parent, 0)

    def on_remove(self, entry, reason):
        if reason == "evicted":
            self.floor = max(self.floor, entry.data)

    def priority(self, entry):
        return entry.data


class StreamsFirst(SchedulerPolicy):
    """Starts streamed requests first, because somebody reads them as they are made."""

    name = "streams-first"
    max_wait = 30.0  # seconds after which a request counts as a stream

    def order(self, waiting, view):
        return sorted(
            waiting,
            key=lambda r: not (r.stream or view.now - r.arrival > self.max_wait),
        )


class Mirostat(BatchSampler):
    """Mirostat 2.0 (Basu et al., 2021): keeps the surprise of tokens near a target.

    A request sets the target, in bits, with ``"mirostat_tau"``.
    """

    name = "mirostat"
    rate = 0.1

    def __init__(self, args, request, tokenizer):
        tau = request.body.get("mirostat_tau", 5.0)
        if not isinstance(tau, (int, float)) or tau < 0:
            message = "mirostat_tau must be a number of at least 0"
            raise RequestError(400, message, "mirostat_tau")
        self.tau = mx.array([float(tau)])
        self.mu = 2 * self.tau

    def extend(self, other):
        self.tau = mx.concatenate([self.tau, other.tau])
        self.mu = mx.concatenate([self.mu, other.mu])

    def filter(self, keep):
        self.tau, self.mu = self.tau[mx.array(keep)], self.mu[mx.array(keep)]

    def __call__(self, logprobs):
        surprise = -logprobs / mx.log(mx.array(2.0))
        # The least surprising token can always be chosen.
        limit = mx.maximum(self.mu[:, None], surprise.min(axis=-1, keepdims=True))
        tokens = mx.random.categorical(
            mx.where(surprise > limit, -mx.inf, logprobs), axis=-1
        )
        seen = mx.take_along_axis(surprise, tokens[:, None], axis=-1)[:, 0]
        self.mu = self.mu - self.rate * (seen - self.tau)
        return tokens


@hookimpl
def mlx_lm_make_logits_processors(request, tokenizer):
    """Ban the words in ``"banned_words"`` of a request from its answer."""
    words = request.body.get("banned_words") or []
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        message = "banned_words must be an array of words"
        raise RequestError(400, message, "banned_words")
    sequences = [
        tokenizer.encode(spelling, add_special_tokens=False)
        for word in words
        for spelling in (word, f" {word}")
    ]

    def ban(tokens, logits):
        for *before, last in sequences:
            if len(before) <= len(tokens):
                start = mx.array(before, dtype=tokens.dtype)
                banned = (tokens[len(tokens) - len(before) :] == start).all()
                logits[:, last] = mx.where(banned, -mx.inf, logits[:, last])
        return logits

    return [ban] if sequences else None


@hookimpl
def mlx_lm_make_constraint(request, tokenizer):
    """Keep an answer to the characters in ``"allowed_characters"`` of a request."""
    characters = request.body.get("allowed_characters")
    if characters is None:
        return None
    if not isinstance(characters, str) or not characters:
        message = "allowed_characters must be a text"
        raise RequestError(400, message, "allowed_characters")
    return OnlyCharacters(characters, tokenizer, request.vocabulary_size)


class OnlyCharacters(Constraint):
    """Allows tokens of some characters, and those that end the answer."""

    def __init__(self, characters, tokenizer, vocabulary_size):
        bits = np.zeros(-(-vocabulary_size // 32) * 32, np.uint8)
        for token in range(vocabulary_size):
            text = tokenizer.decode([token])
            bits[token] = bool(text) and set(text) <= set(characters)
        bits[[*tokenizer.eos_token_ids]] = 1
        self.mask = np.packbits(bits, bitorder="little").view(np.uint32)

    def copy(self):
        return self  # each answer has the same mask at each place

    def advance(self, token):
        pass

    def fill(self, mask):
        mask[:] = self.mask


@hookimpl
def mlx_lm_register_routes():
    return [Route("POST", "/api/chat", chat)]


def chat(request):
    """Answer the texts of a chat as Ollama's route of this name does."""
    sent = request.json()
    body = {name: sent.get(name) for name in ("model", "messages")}

    def lines():
        for chunk in request.stream(body):
            if chunk is not None:
                yield json.dumps(in_ollamas_shape(chunk, "delta")) + "\n"

    if sent.get("stream", True):
        return RouteResponse(lines(), content_type="application/x-ndjson")
    return in_ollamas_shape(request.answer(body), "message")


def in_ollamas_shape(response, field):
    (choice,) = response["choices"]
    reason = choice["finish_reason"]
    time = datetime.fromtimestamp(response["created"], timezone.utc)
    return {
        "model": response["model"],
        "created_at": time.isoformat(),
        "message": {"role": "assistant", "content": choice[field].get("content", "")},
        "done": reason is not None,
        "done_reason": reason,
    }


@hookimpl
def mlx_lm_request_finished(request, stats, args):
    if args.request_log is None:
        return
    line = {
        "id": request.id,
        "prompt_tokens": request.n_prompt,
        "cached_tokens": request.n_matched,
        "completion_tokens": request.n_generated,
        "finish_reason": stats.finish_reason,
        "ttft": stats.ttft,
        "seconds": stats.seconds,
    }
    # Requests end on several threads.
    with log_lock, open(args.request_log, "a") as file:
        file.write(json.dumps(line) + "\n")

"""What several tests share: reference answers, plugins, requests and raw HTTP."""

import gc
import http.client
import json
import random
import threading
from importlib import import_module

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.server import CompletionRequest

from mlx_lm_ext import hookimpl
from mlx_lm_ext.interfaces import BatchSampler
from mlx_lm_ext.request.fields import make_generation_arguments, parse_body

# A server with these has upstream serve each request alone.
ALONE = ["--kv-bits", "8", "--quantized-kv-start", "100000"]

# With a User-Agent, without which the server waits a moment for the end of a script.
JSON = {"Content-Type": "application/json", "User-Agent": "tests"}

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.ABC012"


def texts(n, longest=120, seed=0):
    """``n`` random prompts of 1 to ``longest`` letters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(1, longest))) for _ in range(n)]


def active_memory():
    """Bytes that MLX's arrays have, without what other tests have left in cycles."""
    gc.collect()
    return mx.get_active_memory()


def peak_memory(run):
    """Bytes that MLX's arrays have at most while ``run`` is called, beyond those before."""
    before = active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


class Reference:
    """What ``mlx_lm.generate`` answers to one prompt at a time, greedily."""

    # The answers of models without adapters, and the most tokens that each was to have.
    known = {}

    def __init__(self, folder, adapter_path=None, **kwargs):
        self.model, self.tokenizer = load(str(folder), adapter_path=adapter_path)
        self.kwargs = kwargs
        self.folder = None if adapter_path or kwargs else str(folder)

    def responses(self, prompt, max_tokens):
        return list(
            stream_generate(
                self.model,
                self.tokenizer,
                prompt,
                max_tokens=max_tokens,
                **self.kwargs,
            )
        )

    def tokens(self, prompt, max_tokens):
        if self.folder is None:
            return [r.token for r in self.responses(prompt, max_tokens)]
        key = self.folder, str(prompt)
        tokens, n = self.known.get(key, ([], 0))
        if n < max_tokens:
            tokens = [r.token for r in self.responses(prompt, max_tokens)]
            self.known[key] = tokens, max_tokens
        return tokens[:max_tokens]

    def text(self, prompt, max_tokens):
        tokens = self.tokens(prompt, max_tokens)
        # Not the text of upstream's detokenizer, to which a NUL is another character.
        if tokens[-1] in self.tokenizer.eos_token_ids:
            tokens.pop()
        return self.tokenizer.decode(tokens)


def plugin(tryfirst=False, trylast=False, **functions):
    """A plugin with these hooks."""
    mark = hookimpl(tryfirst=tryfirst, trylast=trylast)
    marked = {name: staticmethod(mark(f)) for name, f in functions.items()}
    return type("Plugin", (), marked)()


def saying(answer):
    """A plugin with which each answer is this, and then the end of the text.

    Args:
        answer (Union[str, List[int], Callable]): The text, its ids, or a function that gives
          one of them for a request.
    """

    def processors(request, tokenizer, args):
        ids = answer(request) if callable(answer) else answer
        if isinstance(ids, str):
            ids = tokenizer.encode(ids, add_special_tokens=False)
        rest = iter([*ids, min(tokenizer.eos_token_ids)])

        def force(tokens, logits):
            wanted = mx.arange(logits.shape[-1]) == next(rest, 0)
            return mx.where(wanted, 0.0, -mx.inf)[None]

        return [force]

    return plugin(mlx_lm_make_logits_processors=processors)


def tool_marks(form):
    """What the tokenizer of a model says that writes tool calls in a format of mlx-lm."""
    parser = import_module(f"mlx_lm.tool_parsers.{form}")
    return dict(
        has_thinking=False,
        has_tool_calling=True,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
        structural_markers=(),
        response_transitions={},
    )


class Always(BatchSampler):
    """Chooses token 65 + the number of tokens that the row has had."""

    name = "always"

    def __init__(self, args, request, tokenizer):
        self.n = [0]

    def extend(self, other):
        self.n += other.n

    def filter(self, keep):
        self.n = [self.n[i] for i in keep]

    def __call__(self, logprobs):
        tokens = mx.array([65 + n for n in self.n])
        self.n = [n + 1 for n in self.n]
        return tokens


def only_error(caplog):
    """The message of the one error that was logged."""
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    return record.message


def submit(engine, prompt="", messages=(), stream=True, **body):
    """Put a text completion or a chat into the engine, as a handler thread does."""
    body = parse_body(json.dumps(dict(body, stream=stream)).encode())
    args = make_generation_arguments(body, engine.cli_args)
    kind = "chat" if messages else "text"
    request = CompletionRequest(kind, prompt, list(messages), None, None)
    model = engine.client.describe(args)
    (job,) = engine.client.generate([request], args, body, model)
    return job


def read(job):
    """The tokens of a submitted request; raises what ended it."""
    tokens = []
    while not tokens or tokens[-1].finish_reason is None:
        tokens += job.receive(timeout=60)
        assert tokens, "no token in a minute"
    return [t.id for t in tokens]


def wait_until_idle(engine):
    """Wait until the generation thread has nothing left to do."""
    idle, report = threading.Event(), engine.report

    def watched(is_idle):
        report(is_idle)
        if is_idle:
            idle.set()

    engine.report = watched
    engine.inbox.requests.put(None)
    assert idle.wait(60)
    engine.report = report


def call(port, method, path, body=None, **headers):
    """One HTTP request; gives (status, parsed JSON)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
        connection.request(method, path, raw, JSON | headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def complete(port, prompt, **body):
    """The text of a text completion."""
    body = dict(prompt=prompt, **body)
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["text"]


def stream(port, path, **body):
    """The parsed events of a streamed answer, without the last, [DONE]."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(dict(body, stream=True)), JSON)
        response = connection.getresponse()
        raw = response.read().decode()
        assert response.status == 200, raw
    finally:
        connection.close()
    events = [e.removeprefix("data: ") for e in raw.split("\n\n") if e[:1] == "d"]
    assert events.pop() == "[DONE]"
    return [json.loads(e) for e in events]


def streamed_text(port, prompt, **body):
    events = stream(port, "/v1/completions", prompt=prompt, **body)
    return "".join(e["choices"][0]["text"] for e in events)

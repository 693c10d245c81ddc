"""Structured output of a server: random models say only what a format allows."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jsonschema
import pytest
from helpers import ALONE, Reference, call, complete, stream
from processes import PATIENCE

from mlx_lm_ext.engine.client import check_constraint
from mlx_lm_ext.errors import RequestError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
# Nothing in it can go on for ever.
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", None]},
        "n": {"type": "integer", "minimum": -9, "maximum": 99},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["mood", "n", "list"],
    "additionalProperties": False,
}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
}
FUNCTION = {"name": "f", "strict": True, "parameters": {}}
TOOLS = [{"type": "function", "function": FUNCTION}]


def ask(port, path=CHAT, **body):
    """The texts of an answer, all of which ended by themselves."""
    body |= {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    status, answer = call(port, "POST", path, body)
    assert status == 200, answer
    assert {c["finish_reason"] for c in answer["choices"]} == {"stop"}
    return [
        c["message"]["content"] if path == CHAT else c["text"]
        for c in answer["choices"]
    ]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_all_answers_fit_the_schema(path, temperature, start_server):
    _, port = start_server()
    for text in ask(port, path, response_format=FORM, n=4, temperature=temperature):
        jsonschema.validate(json.loads(text), SCHEMA)


def test_streamed_answer_is_that_in_one_piece(start_server):
    _, port = start_server()
    body = dict(response_format=FORM, temperature=1.0, seed=3)
    events = stream(port, CHAT, messages=HELLO, **body)
    deltas = [e["choices"][0]["delta"].get("content") or "" for e in events]
    assert ["".join(deltas)] == ask(port, **body)


def test_answer_is_one_of_the_texts(start_server):
    _, port = start_server()
    for path in (CHAT, TEXT):
        for text in ask(port, path, guided_choice=["yes", "no"], n=4, temperature=2):
            assert text in ("yes", "no")


def test_other_rows_are_what_they_are_without_a_format(start_server):
    engine, port = start_server()
    reference = Reference(engine.cli_args.model)
    prompts = [f"prompt {i}" for i in range(6)]
    with ThreadPoolExecutor(12) as pool:
        formatted = [
            pool.submit(ask, port, TEXT, response_format=FORM, seed=i, temperature=1)
            for i in range(6)
        ]
        texts = pool.map(lambda p: complete(port, p, max_tokens=24), prompts)
        assert list(texts) == [reference.text(p, 24) for p in prompts]
    for future in formatted:
        jsonschema.validate(json.loads(future.result(PATIENCE)[0]), SCHEMA)


def test_answers_that_are_served_alone_fit_the_schema(start_server):
    _, port = start_server("llama", "--use-prompt-cache", *ALONE)
    whole = {"temperature": 1.0, "seed": 5, "response_format": FORM}
    first = ask(port, **whole, n=3)
    for text in first:
        jsonschema.validate(json.loads(text), SCHEMA)
    # Now the prompt comes from the cache.
    assert ask(port, **whole, n=3) == first
    assert ask(port, guided_choice=["yes", "no"], temperature=2)[0] in ("yes", "no")


def test_draft_model_is_refused(start_server):
    engine, port = start_server("llama", "--allow-models", "any")
    body = {"messages": HELLO, "response_format": FORM}
    body["draft_model"] = engine.cli_args.model
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (
        400,
        "response_format.json_schema.schema",
    )
    assert "draft model" in answer["error"]["message"]


@pytest.mark.parametrize(
    "fields, at_fault",
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        # A plugin restricts it.
        ({}, None),
    ],
)
def test_draft_model_of_the_server_is_no_field_at_fault(fields, at_fault):
    request = SimpleNamespace(
        body={"messages": HELLO, **fields},
        constraint="some",
        model=SimpleNamespace(key=("m", None, "draft")),
    )
    with pytest.raises(RequestError, match="a draft model cannot be") as error:
        check_constraint(request)
    assert (error.value.status, error.value.param) == (400, at_fault)

"""Streams have the shape that OpenAI's clients rely on."""

import pytest
from helpers import call, saying, stream
from openai import OpenAI

from mlx_lm_ext.bench.random_model import LLAMA, SPECIAL, write_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TEMPLATE = (
    "{# <tool_call> tool_call.name #}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
ANSWERS = {
    "text": "hello there \u4e16",
    "nothing": "",
    "reasoning": "<think>hm</think>so",
    "only reasoning": "<think>hm",
    "calls": CALL + CALL,
    "cut call": "so " + CALL[:-15],
    "broken call": CALL.replace("1", "one") + " and",
    "all": f"<think>hm</think>so {CALL} and",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model that thinks and calls tools."""
    special = [*SPECIAL, "<think>", "</think>"]
    folder = tmp_path_factory.mktemp("model") / "model"
    return write_model(folder, "llama", LLAMA, 0, special, TEMPLATE)


@pytest.fixture
def serve(start_server, folder):
    """Starts a server that answers with a text; gives its port."""

    def start(answer):
        return start_server("llama", "--model", str(folder), plugin=saying(answer))[1]

    return start


def choices_of(events):
    return [choice for e in events for choice in e["choices"]]


@pytest.mark.parametrize(
    "max_tokens, reason", [(1, "length"), (5, "length"), (50, "stop")]
)
def test_finish_reason_of_a_chat_comes_in_a_chunk_of_its_own(max_tokens, reason, serve):
    port = serve("abcdefgh")
    events = stream(port, CHAT, messages=HELLO, max_tokens=max_tokens)
    *others, last = choices_of(events)
    assert last == {"index": 0, "finish_reason": reason, "delta": {}}
    assert {c["finish_reason"] for c in others} == {None}
    text = "".join(c["delta"]["content"] for c in others)
    assert text == "abcdefgh"[:max_tokens]


@pytest.mark.parametrize("stop", [None, "fg", "h"])
def test_finish_reason_of_a_text_completion_comes_in_a_chunk_of_its_own(stop, serve):
    port = serve("abcdefgh")
    body = dict(prompt="x", max_tokens=50) | ({"stop": stop} if stop else {})
    *others, last = choices_of(stream(port, TEXT, **body))
    assert last == {"index": 0, "finish_reason": "stop", "text": ""}
    assert {c["finish_reason"] for c in others} == {None}
    assert "".join(c["text"] for c in others) == "abcdefgh".partition(stop or "!")[0]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_all_chunks_of_a_stream_belong_together(path, serve):
    port = serve("abcdefgh")
    body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    options = {"include_usage": True}
    *events, last = stream(port, path, max_tokens=50, stream_options=options, **body)
    for name in ("id", "object", "created", "model", "system_fingerprint"):
        assert all(e[name] == last[name] for e in events), name
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 9)
    assert all(e.get("usage") is None and len(e["choices"]) == 1 for e in events)


@pytest.mark.parametrize("logprobs", [False, True])
def test_client_makes_the_same_answer_of_a_stream(logprobs, serve):
    port = serve(lambda request: ANSWERS[request.body["user"]])
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    body = dict(messages=HELLO, max_tokens=200, tools=TOOLS, logprobs=logprobs)
    for name, answer in ANSWERS.items():
        body["user"] = name
        _, whole = call(port, "POST", CHAT, body)
        (expected,) = whole["choices"]
        message = expected["message"]
        with client.chat.completions.stream(model="default_model", **body) as events:
            types = [event.type for event in events]
            (choice,) = events.get_final_completion().choices
        assert choice.finish_reason == expected["finish_reason"]
        assert choice.message.role == "assistant"
        assert (choice.message.content or "") == (message["content"] or "")
        assert getattr(choice.message, "reasoning", None) == message.get("reasoning")
        calls = [c.function.arguments for c in choice.message.tool_calls or []]
        expected_calls = message.get("tool_calls", [])
        assert calls == [c["function"]["arguments"] for c in expected_calls]
        # The client ends a call at the next one, and at a finish reason that comes later.
        assert types.count("tool_calls.function.arguments.done") == len(calls)
        assert types.count("content.done") == bool(message["content"])
        if logprobs:
            tokens = [entry.token for entry in choice.logprobs.content]
            assert tokens == [e["token"] for e in expected["logprobs"]["content"]]
            assert "".join(tokens) == answer
    client.close()


def test_tool_calls_of_a_stream_come_in_numbered_parts(serve):
    port = serve(CALL + CALL)
    body = dict(messages=HELLO, max_tokens=200, tools=TOOLS, logprobs=True)
    *others, last = choices_of(stream(port, CHAT, **body))
    n_tokens = [len(choice["logprobs"]["content"]) for choice in others]
    assert sum(n_tokens) == 2 * len(CALL)
    # One part in a chunk, and nothing beside it.
    others = [c for c in others if "tool_calls" in c["delta"]]
    parts = [c["delta"]["tool_calls"] for c in others]
    assert {len(p) for p in parts} == {1}
    starts = [p for (p,) in parts if "id" in p]
    for i, start in enumerate(starts):
        assert start == {
            "index": i,
            "id": start["id"],
            "type": "function",
            "function": {"name": "f", "arguments": ""},
        }
    assert len({start["id"] for start in starts}) == 2
    more = [p for (p,) in parts if "id" not in p]
    pieces = [
        [p["function"].pop("arguments") for p in more if p["index"] == i]
        for i in (0, 1)
    ]
    assert ["".join(p) for p in pieces] == ['{"x": 1}'] * 2
    assert all(p == {"index": p["index"], "function": {}} for p in more)
    assert [p["index"] for (p,) in parts] == sorted(p["index"] for (p,) in parts)
    assert (last["finish_reason"], last["delta"]) == ("tool_calls", {})

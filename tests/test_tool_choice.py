"""Which calls a request wants: what is refused, what the model is told, and how answers end."""

import json
from types import SimpleNamespace

import pytest
from helpers import tool_marks
from mlx_lm.server import CompletionRequest
from mlx_lm.utils import load_tokenizer
from test_answer import ToolTokenizer

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.detokenizing import Decoder
from mlx_lm_ext.request.fields import parse_body, parse_tool_choice, parse_tools
from mlx_lm_ext.request.request import Token
from mlx_lm_ext.server.answer import AnswerParser, Delta

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("say", "count")]
SAY, COUNT = TOOLS


def allowed(mode="auto", tools=TOOLS, **fields):
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": tools} | fields,
    }


def parse(**body):
    """What the fields of a chat say."""
    body = parse_body(json.dumps({"messages": []} | body).encode())
    body["tools"] = parse_tools(body)
    return body["tools"], parse_tool_choice(body)


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("auto", ("auto", None, False)),
        (None, ("auto", None, False)),
        ("required", ("required", None, False)),
        (SAY, ("required", {"say"}, True)),
        (allowed(), ("auto", {"say", "count"}, False)),
        (allowed("required", [COUNT]), ("required", {"count"}, False)),
    ],
)
def test_all_tools_are_shown_to_the_model_whichever_may_be_called(choice, expected):
    tools, found = parse(tools=TOOLS, tool_choice=choice)
    assert (tools, tuple(found)) == (TOOLS, expected)


def test_no_tools_are_shown_if_none_may_be_called():
    tools, choice = parse(tools=TOOLS, tool_choice="none")
    assert (tools, choice.mode) == (None, "none")


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_choice_that_forces_nothing_needs_no_tools(choice):
    assert parse(tool_choice=choice)[0] is None
    assert parse(tool_choice=choice, tools=[])[0] is None


@pytest.mark.parametrize(
    "choice, field",
    [
        ("any", "tool_choice"),
        ("say", "tool_choice"),
        ("", "tool_choice"),
        (5, "tool_choice"),
        (True, "tool_choice"),
        ([SAY], "tool_choice"),
        ({}, "tool_choice.type"),
        ({"type": "custom", "custom": {"name": "say"}}, "tool_choice.type"),
        ({"type": ["function"]}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "function", "function": "say"}, "tool_choice.function"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": 5}}, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "shout"}}, "tool_choice"),
        (allowed("any"), "tool_choice.allowed_tools.mode"),
        (allowed("none"), "tool_choice.allowed_tools.mode"),
        (allowed(mode={}), "tool_choice.allowed_tools.mode"),
        (allowed(tools=[]), "tool_choice.allowed_tools.tools"),
        (allowed(tools=None), "tool_choice.allowed_tools.tools"),
        (allowed(tools=["say"]), "tool_choice.allowed_tools.tools[0]"),
        (
            allowed(tools=[SAY, {"type": "mcp"}]),
            "tool_choice.allowed_tools.tools[1].type",
        ),
        (
            allowed(tools=[{"type": "function", "function": {"name": "x"}}]),
            "tool_choice",
        ),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.allowed_tools"),
    ],
)
def test_choice_that_means_nothing_is_refused_by_name(choice, field):
    with pytest.raises(RequestError) as raised:
        parse(tools=TOOLS, tool_choice=choice)
    assert (raised.value.status, raised.value.param) == (400, field)
    assert field.split(".")[0] in str(raised.value)


@pytest.mark.parametrize("choice", ["required", SAY, allowed("required"), allowed()])
@pytest.mark.parametrize("tools", [None, []])
def test_choice_of_a_tool_needs_tools(choice, tools):
    with pytest.raises(RequestError) as raised:
        parse(tools=tools, tool_choice=choice)
    assert (raised.value.status, raised.value.param) == (400, "tool_choice")


def test_tools_of_one_name_are_the_same_tool():
    assert parse(tools=[SAY, COUNT, SAY])[0] == [SAY, COUNT, SAY]
    for other in ({"parameters": {"type": "object"}}, {"strict": True}):
        function = {"name": "say"} | other
        with pytest.raises(RequestError) as raised:
            parse(tools=[*TOOLS, {"type": "function", "function": function}])
        assert raised.value.status == 400
        assert raised.value.param == "tools[2].function.name"


@pytest.mark.parametrize("key", ["parameters", "description"])
def test_functions_that_are_nested_too_deeply_are_refused_by_name(key):
    def with_depth(n):
        value = {}
        for i in range(n - 1):
            value = {"items": value} if i % 2 else [value]
        return {"type": "function", "function": {"name": "f", key: {"x": value}}}

    assert parse(tools=[SAY, with_depth(99)])
    with pytest.raises(RequestError, match="100 objects") as raised:
        parse(tools=[SAY, with_depth(100)])
    assert raised.value.status == 400
    assert raised.value.param == f"tools[1].function.{key}"


@pytest.mark.parametrize("strict", ["yes", 1, {}])
def test_strict_must_be_a_boolean(strict):
    function = {"name": "say", "strict": strict}
    with pytest.raises(RequestError) as raised:
        parse(tools=[{"type": "function", "function": function}])
    assert raised.value.param == "tools[0].function.strict"


# Answers


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return load_tokenizer(model_folder())


@pytest.fixture
def answer(tokenizer):
    """Parses an answer to a chat with tools, some tokens at a time."""

    def parse(model, text, pile=10**6, end="stop", **body):
        request = SimpleNamespace(
            model=SimpleNamespace(tokenizer=model, decoder=Decoder(tokenizer)),
            completion=CompletionRequest("chat", "", [], TOOLS, None),
            body={"tools": TOOLS, **body},
            args=SimpleNamespace(stop_words=[], logprobs=False),
            initial_state="normal",
        )
        tokens = [*map(Token, tokenizer.encode(text)), Token(0, finish_reason="stop")]
        if end == "length":
            *tokens, last, _ = tokens
            tokens.append(Token(last.id, finish_reason=end))
        parser = AnswerParser(request)
        piles = range(0, len(tokens), pile)
        found = Delta()
        for i in piles:
            found.add(parser.feed(tokens[i : i + pile]))
        return SimpleNamespace(
            text=found.text,
            reasoning=found.reasoning,
            calls=[
                (c["function"]["name"], json.loads(c["function"]["arguments"]))
                for c in found.tool_calls
            ],
            end=found.finish_reason,
        )

    return parse


CALL = '<tool_call>{"name": "say", "arguments": {"v": 1}}</tool_call>'


@pytest.mark.parametrize(
    "choice, end",
    [
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        (allowed("auto"), "tool_calls"),
        (allowed("required", [SAY]), "tool_calls"),
        (SAY, "stop"),
    ],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_answer_with_calls_says_so_unless_the_request_has_named_the_function(
    choice, end, parallel, answer
):
    model = SimpleNamespace(**tool_marks("json_tools"))
    body = {"tool_choice": choice, "parallel_tool_calls": parallel}
    found = answer(model, CALL, **body)
    assert (found.calls, found.end) == ([("say", {"v": 1})], end)
    assert answer(model, "hi", **body).end == "stop"
    assert answer(model, CALL[:20], end="length", **body).end == "length"


class Thinking(ToolTokenizer):
    """A tokenizer whose model thinks, and has no format of calls."""

    has_tool_calling = False
    tool_call_start = tool_call_end = tool_parser = None


ARRAY = '[{"name": "say", "arguments": {"v": "]"}}, {"name": "count", "arguments": {}}]'


@pytest.mark.parametrize("pile", [1, 7, 10**6])
def test_forced_calls_of_a_model_without_a_format_are_an_array(pile, answer, tokenizer):
    model = Thinking(tokenizer)
    calls = [("say", {"v": "]"}), ("count", {})]
    thought = "<think>[1] or [2]?</think>\n"
    for choice, end in (("required", "tool_calls"), (SAY, "stop")):
        found = answer(model, thought + ARRAY, pile, tool_choice=choice)
        assert (found.calls, found.end) == (calls, end)
        assert (found.reasoning, found.text.strip()) == ("[1] or [2]?", "")


@pytest.mark.parametrize("pile", [1, 10**6])
@pytest.mark.parametrize("text", [ARRAY[:18], "[1, 2]", "It is [5].", "no", "[]", "["])
def test_forced_answer_that_is_no_array_of_calls_stays_text(
    pile, text, answer, tokenizer
):
    found = answer(Thinking(tokenizer), text, pile, "length", tool_choice="required")
    assert (found.calls, found.text, found.end) == ([], text, "length")


@pytest.mark.parametrize("pile", [1, 10**6])
def test_calls_that_have_ended_are_kept_if_the_array_is_cut_off(
    pile, answer, tokenizer
):
    model = Thinking(tokenizer)
    found = answer(model, ARRAY[:-5], pile, "length", tool_choice="required")
    assert found.calls == [("say", {"v": "]"})]


def test_array_in_an_answer_that_is_free_stays_text(answer, tokenizer):
    found = answer(Thinking(tokenizer), ARRAY, tool_choice="auto")
    assert (found.calls, found.text, found.end) == ([], ARRAY, "stop")

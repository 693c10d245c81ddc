"""Messages that clients send are brought into one form, and nothing in them ends a chat."""

import json

import pytest
from helpers import call
from test_api import CHAT, HELLO

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.fields import parse_body
from mlx_lm_ext.request.history import leave_out_past_images, parse_messages

USER = {"role": "user", "content": "run ls"}
ANSWER = {"role": "assistant", "content": "Done."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def parse(*messages):
    """The messages as they come out of a body."""
    body = parse_body(json.dumps({"messages": messages}).encode())
    return parse_messages(body)


def calling(*calls, **fields):
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def a_call(arguments="{}", id="call_x", name="exec"):
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


def parsed_call(call):
    """The parsed calls of a message with this call."""
    return parse(calling(call))[0].get("tool_calls")


@pytest.mark.parametrize(
    "calls",
    [
        [None, a_call()],
        a_call(),
        {"1": a_call()},
    ],
)
def test_calls_of_odd_shapes_are_calls(calls):
    (message,) = parse({"role": "assistant", "tool_calls": calls})
    (call_,) = message["tool_calls"]
    assert (call_["function"]["name"], call_["function"]["arguments"]) == ("exec", {})


# Arguments


@pytest.mark.parametrize(
    "sent, expected",
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ("null", {}),
        ("[]", {}),
        ([], {}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        (
            "{'a': 'it\\'s', 'b': [True, None, \"T\"]}",
            {"a": "it's", "b": [True, None, "T"]},
        ),
        ('{"a": "l', {"arguments": '{"a": "l'}),
        ('"ls"', {"arguments": "ls"}),
        ("ls -l", {"arguments": "ls -l"}),
        ("{'a': 'l", {"arguments": "{'a': 'l"}),
        ("{'a': '\\x'}", {"arguments": "{'a': '\\x'}"}),
        ("[1]", {"arguments": [1]}),
        ("7", {"arguments": 7}),
        (7, {"arguments": 7}),
        ("[" * 5000, {"arguments": "[" * 5000}),
        ("1" * 5000, {"arguments": "1" * 5000}),
        ('{"a": "\\ud800"}', {"a": "\ufffd"}),
    ],
)
def test_arguments_are_an_object(sent, expected):
    (call,) = parsed_call(a_call(sent))
    assert call["function"]["arguments"] == expected


@pytest.mark.parametrize(
    "sent, expected",
    [
        ('{"a":1}', '{"a":1}'),
        ({"a": 1}, '{"a": 1}'),
        ('"{\\"a\\":1}"', '{"a":1}'),
        ("{'a': 1}", '{"a": 1}'),
        ('{"a": "l', '{"a": "l'),
        ("", "{}"),
        ("[]", "{}"),
    ],
)
def test_text_of_arguments_is_the_one_that_was_sent_unless_that_was_no_json(
    sent, expected
):
    (call,) = parsed_call(a_call(sent))
    assert call["function"]["arguments"].text == expected


# Calls


@pytest.mark.parametrize(
    "call, name",
    [
        (a_call(), "exec"),
        ({"function": {"name": "exec"}}, "exec"),
        ({"id": "x", "name": "exec", "arguments": "{}"}, "exec"),
        (
            {"id": "x", "type": "custom", "custom": {"name": "exec", "input": "ls"}},
            "exec",
        ),
        ({"id": "", "type": "function"}, None),
        ({"id": "x", "function": {"arguments": "{}"}}, None),
        ({"id": "x", "function": {"name": ""}}, None),
        ({"id": "x", "function": {"name": ["exec"]}}, None),
        ({"id": "x", "function": "exec"}, None),
    ],
)
def test_call_without_a_name_is_left_out(call, name):
    calls = parsed_call(call)
    if name is None:
        assert calls is None
        return
    assert calls[0]["function"]["name"] == name
    assert calls[0]["id"] and calls[0]["type"] in ("function", "custom")


def test_call_of_the_legacy_api_is_a_call_and_its_result_answers_it():
    function = {"name": "exec", "arguments": '{"a": 1}'}
    asked, result = parse(
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "exec", "content": "file1"},
    )
    assert asked["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert "function_call" not in asked
    assert result["tool_call_id"] == asked["tool_calls"][0]["id"]


@pytest.mark.parametrize("id", [None, "", 0, "call_1"])
def test_results_without_an_id_answer_the_calls_in_their_order(id):
    asked, first, second = parse(
        calling(a_call(id=id, name="a"), a_call(id=None, name="b")),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2", "tool_call_id": ""},
    )
    ids = [call["id"] for call in asked["tool_calls"]]
    assert [first["tool_call_id"], second["tool_call_id"]] == ids
    assert len(set(ids)) == 2 and all(isinstance(id, str) for id in ids)


def test_results_out_of_order_answer_the_calls_of_their_names():
    asked, b, a = parse(
        calling(a_call(id=None, name="a"), a_call(id=None, name="b")),
        {"role": "tool", "content": "2", "name": "b"},
        {"role": "tool", "content": "1"},
    )
    ids = [call["id"] for call in asked["tool_calls"]]
    assert [a["tool_call_id"], b["tool_call_id"]] == ids


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_none(calls):
    (message,) = parse({"role": "assistant", "content": "x", "tool_calls": calls})
    assert "tool_calls" not in message


# Contents


@pytest.mark.parametrize(
    "role, content, expected",
    [
        ("user", None, ""),
        ("user", 7, "7"),
        ("user", True, "true"),
        ("user", {"type": "text", "text": "a"}, "a"),
        ("user", {"a": "ü"}, '{"a": "ü"}'),
        ("user", ["a", {"type": "text", "text": "b"}, None], "ab"),
        ("user", [{"text": "a"}, {"type": "input_text", "text": "b"}], "ab"),
        ("user", [{"type": "text"}], '{"type": "text"}'),
        ("user", [{"type": "text", "text": None}], ""),
        ("user", [{"type": "new", "text": "a"}], "a"),
        ("user", [{"type": "new", "x": 1}], '{"type": "new", "x": 1}'),
        ("user", [], ""),
        ("assistant", [{"type": "output_text", "text": "a"}], "a"),
        ("assistant", [{"type": "refusal", "refusal": "no"}], "no"),
        ("tool", None, ""),
        ("tool", 22, "22"),
        ("tool", {"t": 22}, '{"t": 22}'),
        ("tool", ["a", "b"], '["a", "b"]'),
        ("tool", [{"name": "a"}], '[{"name": "a"}]'),
        ("tool", [{"type": "file", "name": "a"}], '[{"type": "file", "name": "a"}]'),
        ("tool", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_content_is_a_text(role, content, expected):
    (message,) = parse({"role": role, "content": content})
    assert message["content"] == expected


def test_refusal_is_a_content():
    (message,) = parse({"role": "assistant", "content": None, "refusal": "I will not."})
    assert message["content"] == "I will not."


def test_reasoning_is_given_in_both_names():
    for message in (
        {"content": "a", "reasoning": "why"},
        {"content": "a", "reasoning": "", "reasoning_content": "why"},
        {"content": [{"type": "thinking", "thinking": "why"}, "a"]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]},
                {"type": "text", "text": "a"},
            ]
        },
    ):
        (made,) = parse({"role": "assistant", **message})
        assert made["content"] == "a"
        assert made["reasoning"] == made["reasoning_content"] == "why"


def test_name_is_a_text_or_not_there():
    first, second = parse({**USER, "name": 7}, {**USER, "name": ""})
    assert first["name"] == "7" and "name" not in second


def test_fields_that_are_not_known_are_left_to_the_template():
    (message,) = parse({**USER, "weight": 1, "prefix": None})
    assert message["weight"] == 1 and "prefix" not in message


AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def test_part_that_the_model_cannot_get_is_refused_only_if_it_is_to_answer_it():
    said = {"role": "user", "content": [AUDIO, {"type": "text", "text": " this"}]}
    with pytest.raises(RequestError) as error:
        parse(USER, ANSWER, said)
    assert error.value.param == "messages[2].content[0].type"
    assert parse(said, ANSWER, USER)[0]["content"] == "[input_audio] this"


def test_images_of_the_past_and_of_tools_are_left_out_for_a_model_that_takes_none():
    text = {"type": "text", "text": "see "}
    messages = parse(
        {"role": "user", "content": [text, IMAGE]},
        calling(a_call()),
        {"role": "tool", "content": [IMAGE]},
        {"role": "user", "content": [IMAGE]},
    )
    leave_out_past_images(messages)
    contents = [message["content"] for message in messages]
    assert contents == ["see [image]", "", "[image]", [IMAGE]]


# Whole bodies


@pytest.mark.parametrize(
    "message",
    [
        USER | {"content": "a\ud800b"},
        USER | {"content": [{"type": "text", "text": "\udc00"}]},
        {"role": "a\ud800", "content": "x"},
        calling(a_call('{"a": "\ud800"}', id="\ud800", name="\ud800")),
        calling(a_call('{"a": "\\ud800"}')),
        calling(a_call("{'a': '\\ud800'}")),
        USER | {"\ud800": "\ud800"},
    ],
)
def test_half_of_a_surrogate_pair_is_replaced(message):
    (made,) = parse(message)
    assert "\ufffd" in json.dumps(made, ensure_ascii=False)
    json.dumps(made, ensure_ascii=False).encode()


def test_whole_surrogate_pair_is_the_character_that_it_means():
    raw = b'{"messages": "\\ud83d\\ude00 \\\\ud800"}'
    assert parse_body(raw)["messages"] == "\U0001f600 \\ud800"
    assert (
        parse_body('{"a": "\ud800"}'.encode("utf-16", "surrogatepass"))["a"] == "\ufffd"
    )


def test_body_with_half_a_surrogate_pair_anywhere_is_answered(start_server):
    template = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    _, port = start_server("llama", "--chat-template", template)
    half = "x\ud800"
    tool = {"type": "function", "function": {"name": half, "description": half}}
    for fields in (
        {"stop": half},
        {"user": half, "cache_salt": half},
        {"tools": [tool]},
        {"chat_template_kwargs": {half: half}},
        {"metadata": {half: half}},
    ):
        body = {"messages": HELLO, "max_tokens": 2, **fields}
        assert call(port, "POST", CHAT, body)[0] == 200, fields
    body = {"prompt": half, "max_tokens": 2}
    assert call(port, "POST", "/v1/completions", body)[0] == 200
    body = {"messages": HELLO, "model": half}
    assert call(port, "POST", CHAT, body)[0] == 404


@pytest.mark.parametrize(
    "message, param",
    [
        ("x", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        (calling("exec"), "messages[0].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": "exec"}, "messages[0].tool_calls"),
    ],
)
def test_message_that_no_template_could_mean_is_refused(message, param):
    with pytest.raises(RequestError) as error:
        parse(message)
    assert (error.value.status, error.value.param) == (400, param)

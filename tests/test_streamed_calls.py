"""Arguments of tool calls come while the model writes them, and the same as in one piece."""

import json
import time
from functools import cache
from itertools import cycle
from types import SimpleNamespace

import pytest
from helpers import tool_marks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.server import CompletionRequest
from tiny_tokenizers import KINDS

from mlx_lm_ext.request.request import Token
from mlx_lm_ext.request.served_model import ServedModel
from mlx_lm_ext.server.answer import AnswerParser, Delta
from mlx_lm_ext.server.harmony import ANALYSIS, with_channels
from mlx_lm_ext.server.tool_calls import ToolCallParser

CHANNEL = "<|channel|>commentary json<|message|>"
# How models write calls whose arguments are a text of JSON, between the marks.
WRITERS = {
    "json_tools": '\n{{"name": "{}", "arguments": {}}}\n'.format,
    "mistral": "{}[ARGS]{}".format,
    "kimi_k2": (
        "<|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|>"
    ).format,
    "harmony": f"{{}}{CHANNEL}{{}}<|call|>".format,
}
FORMS = st.sampled_from(sorted(WRITERS))


@cache
def marks_of(form):
    """The tokenizer of a model of this format."""
    if form != "harmony":
        return SimpleNamespace(**tool_marks(form))
    channels = SimpleNamespace(
        **tool_marks("json_tools") | {"has_tool_calling": False},
        chat_template=ANALYSIS,
    )
    return with_channels(channels)


@cache
def model_of_bytes():
    return ServedModel(None, KINDS["byte level"](), 0, None, 0, False, None)


def tool(name="send", **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def deltas_of(form, text, sizes=(1,), end="stop", tools=(), logprobs=False, **body):
    """The deltas of an answer whose tokens, most of them bytes, come in groups."""
    model = model_of_bytes()
    request = SimpleNamespace(
        model=SimpleNamespace(
            tokenizer=marks_of(form),
            decoder=model.decoder,
            token_bytes=model.token_bytes,
        ),
        completion=CompletionRequest(
            "chat", "", [], tools or [tool(), tool("b")], None
        ),
        body=body,
        args=SimpleNamespace(stop_words=[], logprobs=logprobs),
        initial_state="normal",
    )
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    tokens = [Token(i, -0.5) for i in ids]
    if end == "length":
        tokens[-1] = tokens[-1]._replace(finish_reason=end)
    else:
        tokens.append(Token(2, finish_reason=end))
    parser, at = AnswerParser(request), 0
    for n in cycle(sizes):
        delta = parser.feed(tokens[at : at + n])
        yield delta
        at += n
        if delta.finish_reason is not None:
            return


def answer_of(*args, **kwargs):
    answer = Delta()
    for delta in deltas_of(*args, **kwargs):
        answer.add(delta)
    return answer


def content(answer):
    """All of an answer but the ids, which are random."""
    functions = [call["function"] for call in answer.tool_calls]
    calls = [(f["name"], f["arguments"]) for f in functions]
    return answer.text, calls, answer.finish_reason


def between_marks(form, text):
    marks = marks_of(form)
    return marks.tool_call_start + text + marks.tool_call_end


# With marks, escapes and halves of characters.
TEXT = st.lists(
    st.sampled_from(
        [*'ab5 "\\{}[]:,/<>u\n\t\x01é世😀\u2028', "\ud83d", "\ude00", "\\u12", "null"]
        + ["</tool_call>", "<tool_call>", "<|tool_call_end|>", "[TOOL_CALLS]", "</tool"]
    ),
    max_size=8,
).map("".join)
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    TEXT,
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["v", "w", "é", "a b"]) | TEXT, JSON, max_size=4
)
TYPES = st.sampled_from("string integer number boolean object array null".split())
SCHEMA = st.builds(lambda t: {"type": t}, TYPES) | st.just({})
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)
STYLE = st.fixed_dictionaries(
    {"ensure_ascii": st.booleans(), "indent": st.sampled_from([None, 1])}
)


@settings(max_examples=400, deadline=None)
@given(FORMS, ARGUMENTS, st.dictionaries(st.sampled_from("vw"), SCHEMA), STYLE, SIZES)
@example("kimi_k2", {"v": "\ud83d\ude00"}, {}, {"ensure_ascii": True}, [1])
@example(
    "mistral",
    {"v": "5", "w": [1]},
    {"v": {"type": "integer"}, "w": {"type": "string"}},
    {},
    [1],
)
def test_pieces_add_up_to_what_a_call_in_one_piece_has(
    form, arguments, properties, style, sizes
):
    tools = [tool(**properties), tool("b")]
    written = json.dumps(arguments, **style)
    # Not from bytes: they have no halves of characters.
    written = written.encode("utf-8", "replace").decode()
    text = WRITERS[form]("send", written)
    (whole,) = ToolCallParser(marks_of(form).tool_parser, tools).parse(text)
    first, *more = (
        part
        for delta in deltas_of(form, between_marks(form, text), sizes, tools=tools)
        for part in delta.tool_calls
    )
    function = {"name": "send", "arguments": ""}
    call = {"index": 0, "id": first["id"], "type": "function", "function": function}
    assert first == call
    assert all(part.keys() == {"index", "function"} for part in more)
    pieces = [part["function"]["arguments"] for part in more]
    assert "".join(pieces) == whole["function"]["arguments"]
    assert all(pieces)
    answer = answer_of(form, between_marks(form, text), sizes, tools=tools)
    assert content(answer) == ("", [("send", "".join(pieces))], "tool_calls")


DAMAGE = st.sampled_from(
    ["", '"', "{", "}", "\\", ",", "x", "</tool_call>", "<|call|>"]
)


@settings(max_examples=400, deadline=None)
@given(
    FORMS,
    st.lists(ARGUMENTS, min_size=1, max_size=2),
    st.data(),
    SIZES,
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
def test_broken_answer_does_not_depend_on_how_its_tokens_come(
    form, calls, data, sizes, end, takes_one
):
    texts = [WRITERS[form]("send", json.dumps(a)) for a in calls]
    text = between_marks(form, "".join(texts)) + " and"
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        n = data.draw(st.integers(0, 2))
        text = text[:at] + data.draw(DAMAGE) + text[at + n :]
    text = text[: data.draw(st.integers(1, len(text) + 20))]
    tools = [tool(v={"type": "string"}), tool("b")]
    options = dict(end=end, tools=tools)
    if takes_one:
        options["parallel_tool_calls"] = False
    one_by_one = answer_of(form, text or "x", [1], **options)
    assert content(answer_of(form, text or "x", sizes, **options)) == content(
        one_by_one
    )
    for call in one_by_one.tool_calls:
        assert set(call) == {"id", "type", "function"}
    assert not takes_one or len(one_by_one.tool_calls) < 2


@pytest.mark.parametrize("form", sorted(WRITERS))
def test_call_begins_with_its_arguments_and_grows_with_each_token(form):
    value = "a line of text\\n" * 50
    text = between_marks(form, WRITERS[form]("send", f'{{"v": "{value}"}}'))
    said, starts, n_pieces = "", [], 0
    for delta in deltas_of(form, text):
        said += model_of_bytes().tokenizer.decode([t.id for t in delta.tokens])
        for part in delta.tool_calls:
            if "id" in part:
                starts.append(said)
            else:
                n_pieces += 1
    before, _, _ = text.partition('{"v"')
    assert starts == [before + "{"]
    assert n_pieces > 500


@pytest.mark.parametrize("form", sorted(WRITERS))
def test_call_that_is_cut_off_within_its_arguments_has_their_start(form):
    arguments = json.dumps({"p": 'a "b"', "n": 5, "all": True, "list": [1, {"k": "x"}]})
    text = between_marks(form, WRITERS[form]("send", arguments))
    begins = text.index('{"p"')
    for n in range(1, len(text) + 1):
        said, calls, end = content(answer_of(form, text[:n], end="length"))
        assert end == "length"
        if n <= begins:
            assert (said, calls) == (text[:n], [])
        else:
            ((name, written),) = calls
            start = text[begins : min(n, begins + len(arguments))]
            assert (name, written.rstrip()) == ("send", start.rstrip())
            # A mark of a call's own end may be cut, too.
            assert text[begins + len(arguments) : n].endswith(said)
            assert said == "" or form in ("kimi_k2", "harmony")


def test_log_probabilities_of_a_piece_come_with_it():
    text = between_marks("json_tools", WRITERS["json_tools"]("send", '{"v": "abc"}'))
    deltas = list(deltas_of("json_tools", text, logprobs=True))
    for delta in deltas:
        if delta.tool_calls and "id" not in delta.tool_calls[0]:
            assert [c.text for c in delta.logprobs] == [text[delta.logprobs[0].offset]]
    assert "".join(c.text for d in deltas for c in d.logprobs) == text


# What a model has written between the marks, the arguments of its calls, and the text.
BROKEN = [
    ("json_tools", '{"name": "send", "arguments": {"v": 1}', ['{"v": 1}'], ""),
    ("json_tools", '{"name": "send", "arguments": {"v": 1}}}', ['{"v": 1}'], ""),
    ("json_tools", '{"name": "send", "arguments": {"v": True}}', ['{"v": True}}'], ""),
    ("json_tools", '{"name": "send", "arguments": {"v": 1,}}', ['{"v": 1, }}'], ""),
    ("json_tools", '{"name": "send", "arguments": {"v": "x}}', ['{"v": "x}}'], ""),
    ("json_tools", '{"name": "send", "arguments": {v: 1}}', ["{v: 1}}"], ""),
    ("json_tools", '{"name": "send", "arguments": {"v": 007}}', ['{"v": 007}}'], ""),
    ("json_tools", '{"name": "send", "arguments": {}} and so on', ["{}"], "and so on"),
    (
        "json_tools",
        '[{"name": "send", "arguments": {}}, {"arguments": {}}]',
        ["{}"],
        '{"arguments": {}}]',
    ),
    (
        "json_tools",
        '[{"name": "send", "arguments": {}}, {"name": "b"}]',
        ["{}", "{}"],
        "",
    ),
    (
        "json_tools",
        '{"name": "send", "arguments": {}, "id": "x", "type": "y"}',
        ["{}"],
        "",
    ),
    (
        "mistral",
        'send[ARGS]{"v": x}[TOOL_CALLS]b[ARGS]{"w": 1}',
        ['{"v": x}', '{"w": 1}'],
        "",
    ),
    ("mistral", 'send[ARGS]{"v": 1} and', ['{"v": 1}'], "and"),
    ("mistral", 'send[ARGS]{"v": 1}b[ARGS]5', ['{"v": 1}'], "b[ARGS]5"),
    (
        "kimi_k2",
        WRITERS["kimi_k2"]("send", '{"v": x}') + WRITERS["kimi_k2"]("b", '{"w": 1}'),
        ['{"v": x}', '{"w": 1}'],
        "",
    ),
    ("harmony", f'send{CHANNEL}{{"v": x}}<|call|>', ['{"v": x}'], ""),
]


@pytest.mark.parametrize("sizes", [[1], [1000]])
@pytest.mark.parametrize("form, text, arguments, rest", BROKEN)
def test_broken_arguments_are_what_the_model_wrote(form, text, arguments, rest, sizes):
    said, calls, end = content(answer_of(form, between_marks(form, text), sizes))
    assert [written for _, written in calls] == arguments
    assert [name for name, _ in calls] == ["send", "b"][: len(arguments)]
    assert (said, end) == (rest, "tool_calls")


@pytest.mark.parametrize("sizes", [[1], [1000]])
@pytest.mark.parametrize(
    "arguments, expected, text",
    [
        ('{"v": "a</tool_call>b", "w": 1}}', '{"v": "a</tool_call>b", "w": 1}', ""),
        # The model has forgotten the rest.
        ('{"v": "a', '{"v": "a', ""),
        ('{"v": "a\\', '{"v": "a\\', ""),
        ('{"v": "a</tool_call> so "it" is', '{"v": "a', ' so "it" is</tool_call>'),
        ('{"v": [5, "a', '{"v": [5, "a', ""),
    ],
)
def test_mark_of_the_end_in_a_string_is_a_part_of_it_if_the_call_goes_on(
    arguments, expected, text, sizes
):
    written = f'{{"name": "send", "arguments": {arguments}'
    tools = [tool(v={"type": "string"})]
    answer = answer_of(
        "json_tools", between_marks("json_tools", written), sizes, tools=tools
    )
    assert content(answer) == (text, [("send", expected)], "tool_calls")


@pytest.mark.parametrize("arguments", ['{"v": 1}', '{"v": x}', '{"v": "</tool_call>'])
def test_only_call_ends_the_answer_with_its_arguments(arguments):
    text = between_marks("json_tools", WRITERS["json_tools"]("send", arguments))
    options = dict(parallel_tool_calls=False)
    answer = answer_of("json_tools", f"so {text} and {text}", **options)
    said, ((_, written),), end = content(answer)
    assert (said, end) == ("so ", "tool_calls")
    assert arguments.startswith(written) or written.startswith(arguments)
    cut = text[: text.index('{"v"') + 5]
    answer = answer_of("json_tools", cut, end="length", **options)
    assert (len(answer.tool_calls), answer.finish_reason) == (1, "length")


def test_calls_of_an_answer_are_numbered_and_text_around_them_is_kept():
    streamed = WRITERS["json_tools"]("send", '{"v": 1}')
    listed = '[{"name": "send", "arguments": {}}, {"name": "b", "arguments": {}}]'
    whole = '{"arguments": {"v": 2}, "name": "b"}'
    texts = (between_marks("json_tools", t) for t in (streamed, listed, whole))
    text = "a {}b {}c {}d".format(*texts)
    parts = [p for d in deltas_of("json_tools", text) for p in d.tool_calls]
    starts = [p for p in parts if "id" in p]
    assert [p["index"] for p in starts] == [0, 1, 2, 3]
    assert [p["function"]["name"] for p in starts] == ["send", "send", "b", "b"]
    assert [p["index"] for p in parts] == sorted(p["index"] for p in parts)
    said, calls, _ = content(answer_of("json_tools", text, [7]))
    assert said == "a b c d"
    assert [written for _, written in calls] == ['{"v": 1}', "{}", "{}", '{"v": 2}']


@pytest.mark.parametrize(
    "form, text",
    [
        ("kimi_k2", WRITERS["kimi_k2"]("send", '{"v": 1}').replace("send:0", "send:7")),
        ("mistral", 'send[CALL_ID]functions.send:7[ARGS]{"v": 1}'),
        ("json_tools", '{"id": "functions.send:7", "name": "send", "arguments": {}}'),
        ("json_tools", '{"name": "send", "id": "functions.send:7", "arguments": {}}'),
    ],
)
def test_id_that_the_model_writes_before_the_arguments_is_that_of_the_call(form, text):
    (call,) = answer_of(form, between_marks(form, text)).tool_calls
    assert call["id"] == "functions.send:7"


@pytest.mark.parametrize(
    "head",
    [
        '{{"type": "function", "function": {{"name": "send", "arguments": {}}}}}',
        '{{"function": "send", "parameters": {}}}',
        '[{{"index": 0, "name": "send", "type": null, "args": {}}}]',
    ],
)
def test_other_keys_may_be_before_the_arguments(head):
    text = between_marks("json_tools", head.format('{"v": "a long text'))
    said, calls, _ = content(answer_of("json_tools", text, end="length"))
    assert (said, calls[0][0]) == ("", "send")


def test_calls_in_other_formats_have_two_parts():
    text = "\n<function=send>\n<parameter=v>\n1\n</parameter>\n</function>\n"
    parts = [
        p
        for d in deltas_of("qwen3_coder", between_marks("qwen3_coder", text))
        for p in d.tool_calls
    ]
    assert [p["function"] for p in parts] == [
        {"name": "send", "arguments": ""},
        {"arguments": '{"v": "1"}'},
    ]


@pytest.mark.parametrize(
    "start, more",
    [
        ('{"v": "', "a"),
        ('{"v": "', "\\u4e16"),
        ('{"v": "</tool_call>', "a"),
        ('{"v": ', "["),
        ('{"v": [', "1, "),
        ('{"v": ', "1"),
        ('{"v": ', " "),
        ('{"', "k"),
        ('{"v": x', "a"),
        ('{"v": "x"}', " "),
        ('{"v": "x"}}', '{"name": "b"'),
        ("", "{"),
    ],
)
def test_time_of_a_token_does_not_grow_with_the_call(start, more):
    text = (
        '<tool_call>{"name": "send", "arguments": '
        + start
        + more * (400_000 // len(more))
    )
    tools = [tool(v={"type": "array"})]
    # Other processes do not count.
    begin = time.process_time()
    for _ in deltas_of("json_tools", text, [16], tools=tools):
        pass
    assert time.process_time() - begin < 5

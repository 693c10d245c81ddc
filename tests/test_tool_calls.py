"""Tool calls keep what the model wrote and what the client's schema says, or stay text."""

import json
import random
import re
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tool_marks
from mlx_lm import tool_parsers
from mlx_lm.server import CompletionRequest
from mlx_lm.utils import load_tokenizer

from mlx_lm_ext.request.detokenizing import Decoder
from mlx_lm_ext.request.request import Token
from mlx_lm_ext.server.answer import AnswerParser, Delta
from mlx_lm_ext.server.tool_calls import ToolCallParser
from mlx_lm_ext.server.tool_values import allowed_for, value_of

FORMATS = sorted(p.stem for p in Path(tool_parsers.__path__[0]).glob("[a-z]*.py"))


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def as_text(value):
    """A value as it is between tags: only strings are not JSON."""
    return value if isinstance(value, str) else dumps(value)


def as_gemma(value, quote):
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, list):
        return "[" + ",".join(as_gemma(v, quote) for v in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{k}:{as_gemma(v, quote)}" for k, v in value.items())
        return "{" + ",".join(pairs) + "}"
    return dumps(value)


def tagged(start, argument, end=""):
    """Writes calls with tags around arguments."""

    def write(name, arguments):
        pairs = arguments.items()
        body = "".join(argument.format(k, as_text(v)) for k, v in pairs)
        return start.format(name) + body + end

    return write


def write_kimi_k3(name, arguments):
    text = f'<|open|>call tool="{name}" index="1"<|sep|>'
    for key, value in arguments.items():
        kind = "string" if isinstance(value, str) else "number"
        text += f'<|open|>argument key="{key}" type="{kind}"<|sep|>'
        text += as_text(value) + "<|close|>argument<|sep|>"
    return text + "<|close|>call<|sep|>"


GLM = "\n<{0}arg_key>{{}}</{0}arg_key>\n<{0}arg_value>{{}}</{0}arg_value>"

# How a model writes one call in each format, between the marks of upstream's parser.
WRITERS = {
    "json_tools": lambda n, a: f"\n{dumps({'name': n, 'arguments': a})}\n",
    "mistral": lambda n, a: f"{n}[ARGS]{dumps(a)}",
    "kimi_k2": lambda n, a: f"<|tool_call_begin|>functions.{n}:0"
    f"<|tool_call_argument_begin|>{dumps(a)}<|tool_call_end|>",
    "kimi_k3": write_kimi_k3,
    "pythonic": lambda n, a: (
        f"[{n}({', '.join(f'{k}={dumps(v)}' for k, v in a.items())})]"
    ),
    "gemma4": lambda n, a: f"call:{n}" + as_gemma(a, '<|"|>'),
    "function_gemma": lambda n, a: f"call:{n}" + as_gemma(a, "<escape>"),
    "qwen3_coder": tagged(
        "\n<function={}>", "\n<parameter={}>\n{}\n</parameter>", "\n</function>\n"
    ),
    "minimax_m2": tagged(
        '\n<invoke name="{}">',
        '\n<parameter name="{}">{}</parameter>',
        "\n</invoke>\n",
    ),
    "minicpm5": tagged('"{}">', '<param name="{}"><![CDATA[{}]]></param>'),
    "glm47": tagged("{}", GLM.format(""), "\n"),
    "laguna": tagged("{}", GLM.format(""), "\n"),
    "longcat": tagged("{}", GLM.format("longcat_"), "\n"),
    "muse_spark": tagged(
        '\n<atem:invoke name="{}">',
        '\n<atem:parameter name="{}">{}</atem:parameter>',
        "\n</atem:invoke>\n",
    ),
}
# Those in which only the schema tells a string from other values.
TAGGED = "qwen3_coder minimax_m2 minicpm5 glm47 laguna longcat muse_spark".split()
# Those whose calls are sent when they are whole.
WHOLE = sorted({*FORMATS} - {"json_tools", "mistral", "kimi_k2"})
# Those with several calls between the marks.
PARALLEL = (
    "mistral kimi_k2 kimi_k3 gemma4 function_gemma qwen3_coder minimax_m2 muse_spark"
).split()


def tool(name="send", **properties):
    """A tool, by the schemas of its arguments."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return load_tokenizer(model_folder())


@pytest.fixture(scope="session")
def answer(tokenizer):
    """Parses the text between the marks of a tool call, ``pile`` tokens at a time."""

    decoder = Decoder(tokenizer)

    def parse(form, text, tools=None, pile=10**6, is_cut=False):
        model = SimpleNamespace(**tool_marks(form))
        request = SimpleNamespace(
            model=SimpleNamespace(tokenizer=model, decoder=decoder),
            completion=CompletionRequest("chat", "", [], tools or [tool()], None),
            body={},
            args=SimpleNamespace(stop_words=[], logprobs=False),
            initial_state="normal",
        )
        text = model.tool_call_start + text + ("" if is_cut else model.tool_call_end)
        tokens = [Token(i) for i in tokenizer.encode(text)]
        if is_cut:
            tokens[-1] = Token(tokens[-1].id, finish_reason="length")
        else:
            tokens.append(Token(0, finish_reason="stop"))
        parser = AnswerParser(request)
        whole, parts = Delta(), []
        for i in range(0, len(tokens), pile):
            delta = parser.feed(tokens[i : i + pile])
            parts += delta.tool_calls
            whole.add(delta)
        said, calls = whole.text, whole.tool_calls
        # What is no call is there as the model wrote it, with the marks.
        assert calls or said == text
        said = said.removeprefix(model.tool_call_start)
        said = said.removesuffix("" if is_cut else model.tool_call_end)
        end = whole.finish_reason
        return SimpleNamespace(text=said, calls=calls, end=end, parts=parts)

    return parse


def no_json(word):
    raise AssertionError(f"{word} is no JSON")


def arguments_of(answer):
    """The arguments of the only call."""
    (call,) = answer.calls
    return json.loads(call["function"]["arguments"], parse_constant=no_json)


def functions(calls):
    return [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls
    ]


# What the model writes arrives


PIECES = (
    "a 5 , \" ' \\ \\n < > & &lt; [ ] { } : = ( ) null true \u00e9 \u4e16 \U0001f600 "
    "</parameter> call: </atem: arg_value // ``` \t"
).split(" ") + [" ", "\n", "  \n"]


def random_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randint(0, 8)))


def random_json(rng, depth=0):
    kinds = 6 if depth > 2 else 8
    kind = rng.randrange(kinds)
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 7:
        return {f"k{i}": random_json(rng, depth + 1) for i in range(rng.randint(0, 3))}
    big = rng.randint(-(10**25), 10**25)
    return (None, True, False, big, rng.uniform(-1e9, 1e9), random_text(rng))[kind]


def random_argument(rng):
    """A schema and a value that it allows."""
    value = random_json(rng)
    text = random_text(rng)
    return rng.choice(
        [
            ({"type": "string"}, text),
            ({"type": ["string", "null"]}, rng.choice([f"x{text}", "5", "True", None])),
            ({"enum": ["5", "null", "a b"]}, rng.choice(["5", "null", "a b"])),
            ({"type": "integer"}, rng.randint(-(10**25), 10**25)),
            ({"type": "number"}, rng.choice([2**53 + 1, -0.5, 1e-7, 5.0])),
            (
                {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                rng.choice([True, None]),
            ),
            ({"type": "array", "items": {}}, [value, text]),
            ({"$ref": "#/properties/as"}, {"k": value, "m": text}),
        ]
    )


def random_call(rng):
    """Properties of a tool, and arguments for it."""
    names = rng.sample(["v", "from", "my-key", "n0"], rng.randint(0, 4))
    pairs = {name: random_argument(rng) for name in names}
    properties = {name: schema for name, (schema, _) in pairs.items()}
    properties["as"] = {"type": "object"}
    return properties, {name: value for name, (_, value) in pairs.items()}


@pytest.mark.parametrize("form", FORMATS)
def test_arguments_arrive_as_they_were_written_streamed_or_not(form, answer):
    rng = random.Random(form)
    for i in range(150):
        properties, arguments = random_call(rng)
        text = WRITERS[form]("send-it", arguments)
        tools = [tool("other"), tool("send-it", **properties)]
        whole = answer(form, text, tools)
        ((name, found),) = functions(whole.calls)
        # The texts tell 1 from 1.0 and from true.
        assert (name, dumps(found)) == ("send-it", dumps(arguments)), text
        assert (whole.text.strip(), whole.end) == ("", "tool_calls")
        streamed = answer(form, text, tools, pile=1 + i % 9)
        (call,) = streamed.calls
        assert {part["index"] for part in streamed.parts} == {0}
        assert call["function"] == whole.calls[0]["function"]


LARGE = 1234567890123456789
POINT = {"$defs": {"n": {"type": ["integer", "null"]}}, "type": "object"}
POINT["properties"] = {"v": {"oneOf": [{"$ref": "#/$defs/n"}, {"const": "none"}]}}

# A schema, what the model writes between tags, and the value.
TEXTS = [
    ({"type": "integer"}, str(LARGE), LARGE),
    ({"type": "integer"}, "007", 7),
    ({"type": "integer"}, "5.0", 5),
    ({"type": "integer"}, f"{LARGE}.0", LARGE),
    ({"type": "integer"}, "1e3", 1000),
    ({"type": "integer"}, "2026-01-15", "2026-01-15"),
    ({"type": "integer"}, "5.5", "5.5"),
    ({"type": "integer"}, "", ""),
    ({"type": "integer"}, "9" * 5000, "9" * 5000),
    ({"type": "number"}, "9007199254740993", 9007199254740993),
    ({"type": "number"}, "5.0", 5.0),
    ({"type": "number"}, "+.5", 0.5),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "number"}, "1e999", "1e999"),
    ({"type": "NUMBER"}, "7", 7),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, "  a\n\n", "  a\n\n"),
    ({"type": "string"}, "007", "007"),
    ({"type": "string"}, "&lt;b&gt;", "&lt;b&gt;"),
    ({"type": "string"}, "", ""),
    ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
    ({"type": ["string", "null"]}, "2134", "2134"),
    ({"type": ["string", "null"]}, "True", "True"),
    ({"type": ["string", "null"]}, "NULL", "NULL"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": "integer"}, "null", None),
    ({"type": "integer"}, "none", "none"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["number", "string"]}, "5", 5),
    ({"type": ["integer", "string"]}, "05", "05"),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[1]", [1]),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
    ({"allOf": [{"$ref": "#/properties/v"}, {"type": "integer"}]}, "5", 5),
    ({"enum": ["1", "2"]}, "1", "1"),
    ({"enum": ["on", "off"]}, "\non\n", "on"),
    ({"enum": [1, 2, None]}, "1", 1),
    ({"const": 7}, "7", 7),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "no", False),
    ({"type": "boolean"}, "maybe", "maybe"),
    ({"type": "object"}, "{'a': None}", {"a": None}),
    ({"type": "object"}, '{"a": "b\nc"}', {"a": "b\nc"}),
    ({"properties": {}}, "{'a': 1}", {"a": 1}),
    ({"items": {}}, "['a']", ["a"]),
    ({"type": "array"}, "('a', True)", ["a", True]),
    ({"type": "array"}, "{1, 2}", "{1, 2}"),
    ({"type": "array"}, "[1, 2", "[1, 2"),
    ({"type": "array"}, "[" * 5000, "[" * 5000),
    ({}, '{"a": 1}', {"a": 1}),
]


@pytest.mark.parametrize("form", TAGGED)
def test_texts_become_what_the_schema_says(form, answer):
    for schema, text, value in TEXTS:
        text = WRITERS[form]("send", {"v": text})
        found = arguments_of(answer(form, text, [tool(v=schema)]))
        assert dumps(found) == dumps({"v": value}), (schema, text)


@pytest.mark.parametrize("form", TAGGED)
@pytest.mark.parametrize("text, value", [("12", 12), ("null", None), ("none", "none")])
def test_references_and_alternatives_of_a_schema_count(form, text, value, answer):
    function = {"name": "send", "parameters": POINT}
    text = WRITERS[form]("send", {"v": text})
    assert arguments_of(answer(form, text, [{"function": function}])) == {"v": value}


@pytest.mark.parametrize(
    "schema, written, value",
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "string"}, 90210, "90210"),
        ({"type": "string"}, {"a": [True]}, '{"a": [true]}'),
        ({"type": "string"}, None, None),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"type": "integer"}, "x", "x"),
        ({"type": "array"}, 5, 5),
        ({"type": "boolean"}, "true", True),
        ({}, "5", "5"),
    ],
)
@pytest.mark.parametrize("form", sorted({*FORMATS} - {*TAGGED}))
def test_value_of_another_type_than_the_schema_has_is_mended(
    form, schema, written, value, answer
):
    text = WRITERS[form]("send", {"v": written})
    assert arguments_of(answer(form, text, [tool(v=schema)])) == {"v": value}


# JSON


@pytest.mark.parametrize(
    "text, arguments",
    [
        ('{"name": "send", "arguments": "{\\"v\\": 1}"}', {"v": 1}),
        ('{"name": "send", "arguments": ""}', {}),
        ('{"name": "send", "arguments": null}', {}),
        ('{"name": "send", "arguments": "null"}', {}),
        ('{"name": "send"}', {}),
        ('{"name": "send", "parameters": {"v": 1}}', {"v": 1}),
        ('{"name": "send", "args": {"v": 1}}', {"v": 1}),
        ('{"name": "send", "input": {"v": 1}}', {"v": 1}),
        (r'{"name": "send", "arguments": {"v": "\d\\d\$\n"}}', {"v": "\\d\\d\\$\n"}),
        ('{"name": "send", "type": "function", "arguments": {}}', {}),
        ('{"type": "function", "function": {"name": "send"}}', {}),
        ('{"name": "send", "arguments": {"v": NaN}}', {"v": "NaN"}),
        ('{"name": "send", "arguments": {"v": [-Infinity]}}', {"v": ["-Infinity"]}),
        ('{"name": "send", "arguments": {"v": 1e999}}', {"v": "1e999"}),
        ('{"name": "send", "arguments": {"v": "a\nb"}}', {"v": "a\nb"}),
        ('{"name": "send", "arguments": {"v": "\\ud83d\\ude00"}}', {"v": "\U0001f600"}),
        ('{"name": "send", "arguments": {"v": "\\ud83d"}}', {"v": "\ufffd"}),
        ('{"name": "send", "arguments": {"v": 1, "v": 2}}', {"v": 2}),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_json_call_has_an_object_of_arguments(form, text, arguments, answer):
    found = answer(form, f"\n{text}\n")
    assert arguments_of(found) == arguments
    assert set(found.calls[0]) == {"id", "type", "function"}
    assert set(found.calls[0]["function"]) == {"name", "arguments"}


@pytest.mark.parametrize(
    "text",
    [
        '{"arguments": {}}',
        '{"name": null, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": {"a": 1}, "arguments": {}}',
        '{"name": "send", "arguments": [1]}',
        '{"name": "send", "arguments": "v=1"}',
        '{"name": "send", "arguments": 5}',
        '{"name": "send", "v": 5}',
        '{"name": "send", "options": {"v": 5}}',
        '[{"arguments": {}}, {"name": "send", "arguments": {}}]',
        '[{"name": "send"}, {"arguments": {}}]',
        '[{"name": "send"}, 5]',
        '{"name": "send"} and so on',
        '{"name": "send", "arguments": "{}"',
        '{"arguments": ' + '{"v": ' * 2000 + "}" * 2001,
        "[]",
        "5",
        "Sorry, I cannot do that.",
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_call_stays_text(form, text, answer):
    found = answer(form, text, [tool(), tool("other")])
    assert (found.text, found.calls, found.end) == (text, [], "stop")


@pytest.mark.parametrize(
    "text", ['{"arguments": {"v": 1}}', '{"parameters": {"v": 1}}']
)
@pytest.mark.parametrize("form", FORMATS)
def test_call_without_a_name_is_of_the_only_tool(form, text, answer):
    assert functions(answer(form, text).calls) == [("send", {"v": 1})]
    # Any object could be the arguments.
    for text in ('{"v": 1}', "{}", '{"name": "", "arguments": {}}'):
        assert answer(form, text).text == text


@pytest.mark.parametrize("between", ["\n", ", "])
def test_calls_of_json_may_follow_each_other_or_be_listed(between, answer):
    calls = [{"name": n, "arguments": {"v": n}} for n in ("a", "b")]
    text = between.join(map(dumps, calls))
    text = text if between == "\n" else f"[{text}]"
    found = answer("json_tools", text)
    assert functions(found.calls) == [("a", {"v": "a"}), ("b", {"v": "b"})]
    assert [part["index"] for part in found.parts] == [0, 0, 1, 1]


# Whole or not at all

NUMBER = {"type": "integer"}
ARGUMENTS = {"path": "a b", "n": 5, "all": True, "list": [1, {"k": "x"}]}
SCHEMAS = {"n": NUMBER, "all": {"type": "boolean"}, "list": {"type": "array"}}


@pytest.mark.parametrize("form", WHOLE)
def test_call_that_is_cut_off_is_never_passed_on_in_part(form, answer):
    calls = [("first", ARGUMENTS), ("second", {"path": "c"})]
    if form not in PARALLEL:
        del calls[1:]
    text = "".join(WRITERS[form](*call) for call in calls)
    for n in range(1, len(text)):
        found = answer(form, text[:n], [tool("first", **SCHEMAS)], is_cut=True)
        assert found.end == "length"
        got = functions(found.calls)
        assert got == calls[: len(got)]
        # What is not in a call is in the text.
        assert got or found.text.strip() == text[:n].strip()


# What is left out in each format to break a call.
BREAKS = [
    ("kimi_k3", "<|close|>argument"),
    ("kimi_k3", "<|close|>call"),
    ("gemma4", "5"),
    ("function_gemma", "5"),
    ("qwen3_coder", "</parameter>"),
    ("qwen3_coder", "</function>"),
    ("minimax_m2", "</parameter>"),
    ("minimax_m2", "</invoke>"),
    ("muse_spark", "</atem:parameter>"),
]


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("form, left_out", BREAKS)
def test_broken_call_beside_a_good_one_is_not_lost(form, left_out, broken, answer):
    arguments = {"v": 5, "w": "x"}
    texts = [WRITERS[form](name, arguments) for name in ("a", "b")]
    good = answer(form, "".join(texts), [tool("a", v=NUMBER), tool("b", v=NUMBER)])
    assert functions(good.calls) == [("a", arguments), ("b", arguments)]
    texts[broken] = texts[broken].replace(left_out, "", 1)
    text = "".join(texts)
    found = answer(form, text)
    assert (found.text, found.calls) == (text, [])


# The formats in which the text of a call tells whether a value has ended.
ENDED = sorted({*FORMATS} - {"kimi_k3", "mistral"})


@pytest.mark.parametrize("pile", [1, 10**6])
@pytest.mark.parametrize("form", ENDED)
def test_mark_of_the_end_within_a_value_is_a_part_of_it(form, pile, answer):
    parser = import_module(f"mlx_lm.tool_parsers.{form}")
    value = f"a {parser.tool_call_start} b {parser.tool_call_end} c"
    text = WRITERS[form]("send", {"v": value, "w": value})
    text = parser.tool_call_end.join([text] + [parser.tool_call_start + text])
    string = {"type": "string"}
    found = answer(form, text, [tool(v=string, w=string)], pile=pile)
    assert functions(found.calls) == [("send", {"v": value, "w": value})] * 2
    assert found.text == ""


@pytest.mark.parametrize("form", ["json_tools", "kimi_k2"])
def test_mark_of_the_end_right_after_an_escape_is_a_part_of_the_value(form, answer):
    end = import_module(f"mlx_lm.tool_parsers.{form}").tool_call_end
    text = WRITERS[form]("send", {"v": "X" + end}).replace("X", "\\u00e9")
    assert arguments_of(answer(form, text)) == {"v": "\u00e9" + end}


@pytest.mark.parametrize("pile", [1, 10**6])
@pytest.mark.parametrize(
    "form, broken", [("json_tools", '{"name": "b'), ("pythonic", "[b(v='x)]")]
)
def test_broken_call_whose_value_does_not_end_is_not_more_than_that(
    form, broken, pile, answer
):
    parser = import_module(f"mlx_lm.tool_parsers.{form}")
    start, end = parser.tool_call_start, parser.tool_call_end
    text = f"{broken}{end} and {start}" + WRITERS[form]("send", {"v": "x"})
    found = answer(form, text, pile=pile)
    assert functions(found.calls) == [("send", {"v": "x"})]
    assert found.text == f"{broken}{end} and "


@pytest.mark.parametrize("form", ["glm47", "longcat"])
def test_name_alone_is_a_call_if_a_tool_has_it(form, answer):
    assert functions(answer(form, "\nsend\n").calls) == [("send", {})]
    assert answer(form, "other").calls == []
    assert answer(form, "send", is_cut=True).calls == []


@pytest.mark.parametrize(
    "text, arguments",
    [('send v=5 w="a b"', {"v": 5, "w": "a b"}), ('send\n{"v": 5}', {"v": 5})],
)
def test_call_without_tags_that_upstream_reads_is_one(text, arguments, answer):
    assert arguments_of(answer("glm47", text)) == arguments
    assert answer("glm47", text.replace("send", "Sorry")).calls == []
    assert answer("glm47", "send it to me").text == "send it to me"


@pytest.mark.parametrize(
    "text",
    [
        "[send(1)]",
        "[send(v=1), 5]",
        "[send(v=other(1))]",
        "[send(**{'v': 1})]",
        "[send(v={1, 2})]",
        "[send(v='a)]",
        "send",
        "lambda: 1",
        "[a[0](v=1)]",
    ],
)
def test_python_that_is_no_call_with_named_literals_stays_text(text, answer):
    found = answer("pythonic", text)
    assert (found.text, found.calls) == (text, [])


def test_python_call_may_have_what_python_has_not(answer):
    text = (
        """[my-send.it(class='a\nb "c"', v=[true, null, {"k": -1}], w=("x", 0x1f))]"""
    )
    ((name, arguments),) = functions(answer("pythonic", text).calls)
    expected = {"class": 'a\nb "c"', "v": [True, None, {"k": -1}], "w": ["x", 31]}
    assert (name, arguments) == ("my-send.it", expected)


# Names, ids and tools


@pytest.mark.parametrize("form", FORMATS)
def test_name_that_no_tool_has_is_passed_on(form, answer):
    found = answer(form, WRITERS[form]("other", {"v": "x"}), [tool("send")])
    assert functions(found.calls) == [("other", {"v": "x"})]


def test_half_a_character_in_a_name_is_shown_as_such(answer):
    found = answer("json_tools", '{"name": "a\\ud83d"}')
    assert functions(found.calls) == [("a\ufffd", {})]


def test_ids_are_those_that_mistrals_templates_take(answer):
    text = "".join(WRITERS["mistral"]("send", {}) for _ in range(50))
    ids = {call["id"] for _ in range(2) for call in answer("mistral", text).calls}
    assert len(ids) == 100
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in ids)


@pytest.mark.parametrize(
    "form, text, ids",
    [
        ("kimi_k2", WRITERS["kimi_k2"]("send", {}), ["functions.send:0"]),
        ("mistral", 'send[CALL_ID]abc456XYZ[ARGS]{"v": 1}', ["abc456XYZ"]),
        ("mistral", '[{"name": "send", "id": "a", "arguments": {}}]', ["a"]),
        ("json_tools", '{"name": "send", "id": "call-1"}', ["call-1"]),
    ],
)
def test_ids_of_the_model_are_kept(form, text, ids, answer):
    found = answer(form, text)
    assert [call["id"] for call in found.calls] == ids
    assert found.calls[0]["function"]["name"] == "send"


@pytest.mark.parametrize("written", ['""', "null", "5", '"same"'])
def test_id_that_is_none_or_not_new_is_replaced(written, answer):
    text = f'{{"name": "send", "id": {written}}}' * 2
    ids = [call["id"] for call in answer("json_tools", text).calls]
    assert len(set(ids)) == 2
    assert len(ids[1]) == 9


RECURSIVE = {"$ref": "#/properties/v", "anyOf": [{"$ref": "#"}, 5, None]}


@pytest.mark.parametrize(
    "function",
    [
        None,
        {},
        {"name": "send"},
        {"name": "send", "parameters": None},
        {"name": "send", "parameters": []},
        {"name": "send", "parameters": {"properties": None}},
        {"name": "send", "parameters": {"properties": {"v": None}}},
        {"name": "send", "parameters": {"properties": {"v": RECURSIVE}}},
        {"name": "send", "parameters": {"properties": {"v": {"type": 5}}}},
        {"name": "send", "parameters": {"properties": {"v": {"type": "any"}}}},
        {"name": "send", "parameters": {"properties": {"v": {"enum": {}}}}},
        {"name": "send", "parameters": {"properties": {"v": {"$ref": "#/x/y"}}}},
        {"name": "send", "parameters": {"additionalProperties": True}},
        {"name": ["send"], "parameters": {}},
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_odd_tools_do_no_harm(form, function, answer):
    text = WRITERS[form]("send", {"v": "a b"})
    assert arguments_of(answer(form, text, [{"function": function}])) == {"v": "a b"}


@pytest.mark.parametrize("form", TAGGED)
def test_text_without_a_schema_is_what_upstream_makes_of_it(form, answer):
    is_text = form in ("qwen3_coder", "minimax_m2", "minicpm5")
    for text, value in (("5", 5), ("True", True), ("5x", "5x"), ("[1]", [1])):
        found = arguments_of(answer(form, WRITERS[form]("send", {"v": text})))
        assert found == {"v": text if is_text and text != "[1]" else value}


def test_schema_of_further_properties_counts(answer):
    parameters = {"additionalProperties": {"type": "integer"}}
    tools = [{"function": {"name": "send", "parameters": parameters}}]
    text = WRITERS["qwen3_coder"]("send", {"v": 5})
    assert arguments_of(answer("qwen3_coder", text, tools)) == {"v": 5}


# Time

MARKS = [
    "<function=f>", "<parameter=a>", "</parameter>", "</function>", "</parameter>\n",
    '<invoke name="f">', '<parameter name="a">', '"f">', '<param name="a">', "<![CDATA[",
    "]]>", "</param>", "f<arg_key>a</arg_key>", "<arg_value>", "</arg_value>", "\\n",
    "f<longcat_arg_key>", '<atem:invoke name="f">', '<atem:parameter name="a">', "<escape>",
    "call:f{", "a:", '<|"|>', "f[ARGS]", "[CALL_ID]", "f(", "a=", '"', '\\"', "'", "[", "{",
    "<|tool_call_begin|>", "functions.f:0<|tool_call_argument_begin|>", "<|open|>call", " ",
    '<|open|>argument key="a"', "<|sep|>", "-", "a", "1", ",", "null", 'name="', "(", "\n",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_no_text_keeps_a_parser_busy(form):
    parser = ToolCallParser(
        import_module(f"mlx_lm.tool_parsers.{form}").parse_tool_call, [tool("f")]
    )
    rng = random.Random(form)
    texts = [mark * (60_000 // len(mark)) for mark in MARKS]
    for _ in range(30):
        first, *rest = rng.choices(MARKS, k=3)
        texts.append(first + "".join(rest) * (60_000 // len("".join(rest))))
    for text in texts:
        start = time.thread_time()
        try:
            parser.parse(text)
        except Exception:
            pass
        assert time.thread_time() - start < 3, text[:100]


def test_no_number_keeps_a_parser_busy():
    number = allowed_for("v", {"properties": {"v": {"type": "number"}}})
    start = time.thread_time()
    for digits in ("1" * 20_000, "." + "1" * 20_000, "1." + "1" * 20_000):
        assert value_of(digits + "x", number) == digits + "x"
    assert time.thread_time() - start < 3


@pytest.mark.parametrize("form", sorted({*FORMATS} - {"kimi_k3"}))
def test_call_that_writes_a_large_file_is_one(form, answer):
    text = "a line of code\n" * 13_000
    found = answer(
        form, WRITERS[form]("send", {"v": text}), [tool(v={"type": "string"})]
    )
    assert arguments_of(found) == {"v": text}


@pytest.mark.parametrize("is_wide", [True, False])
def test_large_schema_is_looked_at_in_part_only(is_wide):
    references = [{"$ref": f"#/$defs/{i}"} for i in range(5000)]
    defs = {
        str(i): {"type": "integer", "anyOf": references if is_wide else [following]}
        for i, following in enumerate(references[1:])
    }
    names = [f"v{i}" for i in range(1000)]
    parameters = {"$defs": defs, "properties": dict.fromkeys(names, references[0])}
    start = time.thread_time()
    assert all("integer" in allowed_for(name, parameters).types for name in names)
    assert time.thread_time() - start < 3

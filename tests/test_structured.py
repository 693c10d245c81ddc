"""Structured output: fields, schemas and other grammars, limits, and reasoning before it.

In memory: constraints are made by the plugin and given token ids.
"""

import json
import os
import random
import sys
import threading
import time
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import tiny_tokenizers
from helpers import call, tool_marks
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.plugins import grammars
from mlx_lm_ext.plugins.structured import mlx_lm_make_constraint
from mlx_lm_ext.policies.guarded_constraint import GuardedConstraint
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.fields import make_generation_arguments, parse_body

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
END = "<end>"
# Those of the channels of gpt-oss, and of two ways to think.
MARKS = [END, "<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
THINK, CHANNEL = ["<think>", "</think>"], ["<|channel>", "<channel|>"]
# Words of more than one byte, some of which go on where a mark ends.
WORDS = ['{"', '":', ' {"', "\n\n", ">\n", "</", "think", "thought", "true"]


def make_tokenizer(marks=MARKS, chat_template=None, **kwargs):
    """A tokenizer of bytes, some words, and marks."""
    to_text = tiny_tokenizers.CHARACTERS
    spelt = ["".join(to_text[b] for b in word.encode()) for word in WORDS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = tiny_tokenizers.ids_of([*marks, *letters, *spelt])
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, chat_template=chat_template
    )
    return TokenizerWrapper(fast, **kwargs)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def tool_parser(form):
    """What the tokenizer of a model has that writes calls in a format of mlx-lm."""
    marks, names = tool_marks(form), ("tool_call_start", "tool_call_end", "tool_parser")
    return {name: marks[name] for name in names}


def make_request(tokenizer, n_more=0, begins_in_reasoning=False, **body):
    return SimpleNamespace(
        body=parse_body(json.dumps(body).encode()),
        vocabulary_size=len(tokenizer) + n_more,
        begins_in_reasoning=begins_in_reasoning,
    )


def constrain(tokenizer, **fields):
    return mlx_lm_make_constraint(make_request(tokenizer, **fields), tokenizer)


def by_schema(tokenizer, schema, **fields):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return constrain(tokenizer, response_format=form, **fields)


def ids_of(tokenizer, text):
    """The tokens of a text, in which marks are one token, and other tokens are bytes."""
    return tokenizer.encode(text, add_special_tokens=False)


def allowed(constraint, n):
    """The ids of the allowed tokens."""
    mask = np.full(-(-n // 32), 0xFFFFFFFF, np.uint32)
    constraint.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {int(i) for i in np.flatnonzero(bits) if i < n}


def takes(constraint, tokenizer, tokens):
    """Whether tokens, and then the end of the text, are allowed one after the other."""
    constraint = constraint.copy()
    if isinstance(tokens, str):
        tokens = ids_of(tokenizer, tokens)
    for token in [*tokens, tokenizer.eos_token_id]:
        if token not in allowed(constraint, len(tokenizer)):
            return False
        constraint.advance(token)
    return True


# Fields


BOTH = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMATS = {
    "json_object": (
        {"response_format": {"type": "json_object"}},
        ["{}", '{"b": [1, null]}'],
        ["[]", "1", "{", '{"a": 1} x'],
    ),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": BOTH}}},
        ['{"a": 1}', '{"a": 1, "b": 2}'],
        ["{}", '{"a": "1"}'],
    ),
    "strict": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": BOTH},
            }
        },
        ['{"a": 1}'],
        ["{}"],
    ),
    "without schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ["{}"],
        ["[]"],
    ),
    "schema of json_object": (
        {"response_format": {"type": "json_object", "schema": BOTH}},
        ['{"a": 1}'],
        ["{}"],
    ),
    "json": ({"structured_outputs": {"json": BOTH}}, ['{"a": 1}'], ["{}"]),
    "json as text": (
        {"structured_outputs": {"json": json.dumps(BOTH), "regex": None}},
        ['{"a": 1}'],
        ["{}"],
    ),
    "any object": ({"structured_outputs": {"json_object": True}}, ["{}"], ["1"]),
    "regex": (
        {"structured_outputs": {"regex": "(ab|c)+/d?"}},
        ["ab/", "cab/d"],
        ["", "ab", "xab/", " ab/"],
    ),
    "choice": (
        {"structured_outputs": {"choice": ["good", "go", 'a"\n\\', "😀é"]}},
        ["good", "go", 'a"\n\\', "😀é"],
        ["goo", "good ", "😀"],
    ),
    "lark": (
        {"structured_outputs": {"grammar": 'start: "a" b\nb: "b" | "c" b'}},
        ["ab", "accb"],
        ["a", "bb"],
    ),
    "gbnf": (
        {"structured_outputs": {"grammar": 'root ::= "a" [0-9]+ ws\nws ::= " "?'}},
        ["a12", "a1 "],
        ["a", "1"],
    ),
    "guided_json": ({"guided_json": BOTH}, ['{"a": 1}'], ["{}"]),
    "guided_regex": ({"guided_regex": "a+"}, ["aa"], ["b"]),
    "guided_choice": ({"guided_choice": ["x", "y"]}, ["x"], ["z"]),
    "guided_grammar": ({"guided_grammar": 'start: "x"'}, ["x"], ["y"]),
    "one of both": (
        {"response_format": {"type": "text"}, "guided_regex": "a+"},
        ["a"],
        ["b"],
    ),
}


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"messages": HELLO}])
@pytest.mark.parametrize("name", FORMATS)
def test_answer_has_the_format_of(name, body, tokenizer):
    fields, right, wrong = FORMATS[name]
    constraint = constrain(tokenizer, **fields, **body)
    assert [t for t in right if not takes(constraint, tokenizer, t)] == []
    assert [t for t in wrong if takes(constraint, tokenizer, t)] == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": {}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False}},
        {"guided_json": None, "guided_decoding_backend": "xgrammar"},
    ],
)
def test_without_a_format_nothing_is_restricted(fields, tokenizer):
    assert constrain(tokenizer, prompt="x", **fields) is None


def schema_field(schema):
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


# Fields, the one that the error names, and a part of its message.
WRONG = [
    ({"response_format": "json"}, "response_format", "an object"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": []}}, "response_format.type", "json_schema"),
    (schema_field(7), "response_format.json_schema", "an object"),
    (schema_field({"schema": []}), "response_format.json_schema.schema", "an object"),
    (
        schema_field({"schema": "{}"}),
        "response_format.json_schema.schema",
        "an object",
    ),
    (schema_field({"name": 7}), "response_format.json_schema.name", "a string"),
    (schema_field({"strict": "y"}), "response_format.json_schema.strict", "boolean"),
    ({"structured_outputs": []}, "structured_outputs", "an object"),
    ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "regex"),
    (
        {"structured_outputs": {"structural_tag": "{}"}},
        "structured_outputs.structural_tag",
        "not supported",
    ),
    ({"structured_outputs": {"json": True}}, "structured_outputs.json", "JSON schema"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "a string"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
    ({"guided_choice": ["a", 1]}, "guided_choice[1]", "a string"),
    ({"guided_choice": "a"}, "guided_choice", "an array"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_json": [1]}, "guided_json", "JSON schema"),
    (
        {"guided_whitespace_pattern": " *"},
        "guided_whitespace_pattern",
        "is not supported",
    ),
    (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        "response_format and guided_regex",
    ),
    (
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "structured_outputs.choice",
        "structured_outputs.regex and structured_outputs.choice",
    ),
    ({"guided_regex": "(a"}, "guided_regex", "regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-ahead"),
    ({"guided_grammar": 'start: "a" x'}, "guided_grammar", '"x"'),
    ({"guided_grammar": 'root ::= "a" x'}, "guided_grammar", "'x'"),
    ({"guided_grammar": "root ::= ((("}, "guided_grammar", "GBNF"),
]


@pytest.mark.parametrize("fields, param, part", WRONG)
def test_what_is_wrong_is_a_400_that_names_the_field(fields, param, part, tokenizer):
    with pytest.raises(RequestError) as error:
        constrain(tokenizer, prompt="x", **fields)
    assert (error.value.status, error.value.param) == (400, param)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    "fields, param, part",
    [
        *WRONG[-5:],
        (
            schema_field({"schema": {"not": {}}}),
            "response_format.json_schema.schema",
            "not",
        ),
    ],
)
def test_tools_are_not_blamed_for_a_wrong_format(fields, param, part, choice, strict):
    tokenizer = make_tokenizer(MARKS + CALL, **tool_parser("json_tools"))
    function = {"name": "f", "strict": strict, "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    with pytest.raises(RequestError) as error:
        constrain(tokenizer, messages=HELLO, tools=tools, tool_choice=choice, **fields)
    assert (error.value.status, error.value.param) == (400, param)
    assert part in str(error.value)


# Keywords and other things that cannot be checked while an answer is made.
REFUSED = [
    ({"not": {"type": "string"}}, "not"),
    ({"if": {}, "then": {}}, "then"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {}}, "contains"),
    ({"properties": {"a": {"propertyNames": {"pattern": "a"}}}}, "propertyNames"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    # The engine's own options are not for clients.
    ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "format": "strange"}, "strange"),
    ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
    ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
    ({"$ref": "#/$defs/no"}, "no"),
    ({"type": "frog"}, "frog"),
    ({"type": "string", "pattern": "(a"}, "unclosed group"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
    ({"$ref": "#"}, "nothing fits"),
]


@pytest.mark.parametrize("schema, part", REFUSED)
def test_schema_that_cannot_be_followed_is_refused(schema, part, tokenizer):
    with pytest.raises(RequestError) as error:
        by_schema(tokenizer, schema, prompt="x")
    assert error.value.param == "response_format.json_schema.schema"
    assert part in str(error.value) and "\n" not in str(error.value)


# Schemas


def record(required=None, **properties):
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | {"required": [*properties] if required is None else required}


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
TREE = record(value=NUMBER, children={"type": "array", "items": {"$ref": "#"}})
LIST = {
    "$defs": {"node": record(v=TEXT, next={"$ref": "#/$defs/list"})},
    "$ref": "#/$defs/list",
}
LIST["$defs"]["list"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
EVENT = {
    "oneOf": [
        record(kind={"const": "move"}, x=NUMBER),
        record(kind={"const": "stop"}, why=TEXT),
    ],
    "discriminator": {"propertyName": "kind"},
}
# A schema, values that are valid, and values that are not.
SCHEMAS = {
    "object": (record(a=NUMBER, b=TEXT), [{"a": 1, "b": ""}], [{}, {"a": 1}, [], 1]),
    "optional": (
        record([], a=NUMBER, b=TEXT),
        [{}, {"a": -1}, {"b": 'é\n"\\'}],
        [{"a": None}, {"c": 1}],
    ),
    "nested": (
        record(a=record(b=record(c={"type": "boolean"}))),
        [{"a": {"b": {"c": True}}}],
        [{"a": {"b": {}}}, {"a": {"c": True}}],
    ),
    "array": (
        {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 3},
        [[1, 2], [1, 2, 3]],
        [[], [1], [1, 2, 3, 4], [1, "2"]],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [TEXT, NUMBER], "minItems": 2, "items": False},
        [["a", 1]],
        [[], ["a"], [1, "a"], ["a", 1, 1]],
    ),
    "enum": ({"enum": ["a", 1, None, [2]]}, ["a", 1, None, [2]], ["b", 2, [], True]),
    "const": (record(kind={"const": "x y"}), [{"kind": "x y"}], [{"kind": "x"}]),
    "anyOf": (
        {"anyOf": [TEXT, record(a=NUMBER), {"type": "null"}]},
        ["x", {"a": 1}, None],
        [1, {}, [None]],
    ),
    "discriminated": (
        EVENT,
        [{"kind": "move", "x": 1}, {"kind": "stop", "why": "now"}],
        [{"kind": "move", "why": "now"}, {"kind": "go", "x": 1}],
    ),
    "allOf": (
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
        [3, 5],
        [2, 6, 4.5],
    ),
    "tree": (
        TREE,
        [{"value": 1, "children": [{"value": 2, "children": []}]}],
        [{"value": 1}, {"value": 1, "children": [1]}],
    ),
    "list": (
        LIST,
        [None, {"v": "a", "next": {"v": "b", "next": None}}],
        [1, {"v": ""}],
    ),
    "pattern": (
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        ["AB-123"],
        ["ab-123", "AB-12", "AB-1234", " AB-123"],
    ),
    "length": (TEXT | {"minLength": 2, "maxLength": 3}, ["éé", "abc"], ["a", "abcd"]),
    "date-time": (
        {"type": "string", "format": "date-time"},
        ["2024-02-29T12:30:00Z"],
        ["2024-02-29", "yesterday"],
    ),
    "uuid": (
        {"type": "string", "format": "uuid"},
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567"],
    ),
    "email": ({"type": "string", "format": "email"}, ["a@b.example"], ["a", 1]),
    "range": (
        {"type": "integer", "minimum": -5, "exclusiveMaximum": 100},
        [-5, 0, 99],
        [-6, 100, 1.5, "1"],
    ),
    "number": (
        {"type": "number", "minimum": 0, "maximum": 1},
        [0, 0.25, 1],
        [-0.1, 1.01, None],
    ),
    "multiple": ({"type": "integer", "multipleOf": 5}, [0, 25], [1, 26]),
    "map": (
        {"type": "object", "additionalProperties": NUMBER},
        [{}, {"any": 1, "other": 2}],
        [{"any": "1"}],
    ),
    "patternProperties": (
        {"patternProperties": {"^a": NUMBER}, "additionalProperties": TEXT}
        | {"type": "object"},
        [{"a1": 1, "b": "x"}],
        [{"a1": "x"}, {"b": 1}],
    ),
    "types": ({"type": ["string", "null"]}, ["", None], [1, False]),
    "annotated": (
        record(a={**NUMBER, "title": "A", "description": "b", "default": 1})
        | {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": "c"},
        [{"a": 2}],
        [{"a": 2, "title": "A"}],
    ),
}
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.mark.parametrize("name", SCHEMAS)
def test_all_valid_and_no_invalid_values_are_possible(name, tokenizer):
    schema, valid, invalid = SCHEMAS[name]
    check = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
    assert all(map(check.is_valid, valid))
    # Without an optional library, jsonschema does not check some formats.
    assert name == "date-time" or not any(map(check.is_valid, invalid))
    constraint = by_schema(tokenizer, schema, messages=HELLO)
    for layout in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": "\t"}):
        for value in valid:
            text = json.dumps(value, ensure_ascii=False, **layout)
            assert takes(constraint, tokenizer, text), text
        for value in invalid:
            text = json.dumps(value, ensure_ascii=False, **layout)
            assert not takes(constraint, tokenizer, text), text


@pytest.mark.skipif(
    "MLX_LM_EXT_SCHEMAS" not in os.environ,
    reason="MLX_LM_EXT_SCHEMAS names no file of schemas",
)
def test_schemas_of_a_file_are_followed_or_refused(tokenizer):
    """Of objects with a ``name``, a ``schema`` and ``tests`` with ``valid`` and ``data``."""
    refused, wrong = [], []
    with open(os.environ["MLX_LM_EXT_SCHEMAS"]) as file:
        cases = json.load(file)
    for case in cases:
        try:
            constraint = by_schema(tokenizer, case["schema"], prompt="x")
        except RequestError as e:
            refused.append(str(e))
            continue
        for test in case["tests"]:
            for separators in (None, (",", ":")):
                text = json.dumps(test["data"], separators=separators)
                matcher, tokens = constraint.copy().matcher, ids_of(tokenizer, text)
                n = matcher.try_consume_tokens(tokens)
                if (n == len(tokens) and matcher.is_accepting()) != test["valid"]:
                    wrong.append((case["name"], text))
    assert not wrong
    assert len(refused) < len(cases) / 10, refused
    names = ("Unimplemented keys", "Unknown format", "oneOf")
    assert all(any(name in line for name in names) for line in refused), refused


def test_random_answers_are_valid(tokenizer):
    """With the tokens that a mask allows, whichever they are."""
    schema = record(a={"type": "array", "items": record(b=NUMBER), "maxItems": 2})
    constraint, rng = by_schema(tokenizer, schema, prompt="x"), random.Random(0)
    for _ in range(30):
        row, tokens = constraint.copy(), []
        while tokenizer.eos_token_id not in tokens and len(tokens) < 400:
            tokens.append(rng.choice(sorted(allowed(row, len(tokenizer)))))
            row.advance(tokens[-1])
        if tokens.pop() == tokenizer.eos_token_id:
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), schema)


def test_blanks_are_bounded(tokenizer):
    constraint = by_schema(tokenizer, record(a=NUMBER), prompt="x")
    deep = "\n" + " " * 32
    right = [' {"a": 1}', '{ "a" : 1 }', '{%s"a": 1\n}' % deep]
    wrong = ['  {"a": 1}', '\n{"a": 1}', '{"a":  1}', '{\n\n"a": 1}', '{"a": 1} ']
    wrong += ['{%s "a": 1}' % deep, '{"a":\n 1}\n']
    assert all(takes(constraint, tokenizer, t) for t in right)
    assert not any(takes(constraint, tokenizer, t) for t in wrong)


# Constraints


def test_ids_beyond_the_tokenizer_are_not_allowed(tokenizer):
    n = len(tokenizer)
    for n_more in (0, 1, 31, 100):
        constraint = constrain(
            tokenizer, prompt="x", guided_regex="(.|\n)*", n_more=n_more
        )
        ids = allowed(constraint, n + n_more)
        assert max(ids) < n and len(ids) > 150


def test_model_may_have_fewer_tokens_than_its_tokenizer(tokenizer):
    n_more = -(len(WORDS) + 2)
    constraint = constrain(tokenizer, prompt="x", guided_regex="(.|\n)*", n_more=n_more)
    n = len(tokenizer) + n_more
    # Bits beyond the vocabulary would count as tokens that are left.
    mask = np.full(-(-n // 32), 0xFFFFFFFF, np.uint32)
    constraint.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert n % 32 and not bits[n:].any() and bits[:n].sum() > 150


def test_masks_of_several_rows_are_those_of_each(tokenizer):
    rows = [
        constrain(tokenizer, prompt="x", guided_regex=r) for r in ("a+", "b", "[ab]c")
    ]
    rows.append(rows[0].copy())
    rows[0].advance(ids_of(tokenizer, "a")[0])
    masks = np.full((4, -(-len(tokenizer) // 32)), 0xFFFFFFFF, np.uint32)
    type(rows[0]).fill_all(rows, masks)
    for row, mask in zip(rows, masks):
        alone = np.full_like(mask, 0xFFFFFFFF)
        row.fill(alone)
        assert (alone == mask).all()
    # A copy goes on by itself.
    assert not (masks[0] == masks[3]).all()


def test_nothing_more_is_taken_after_the_end(tokenizer):
    constraint = constrain(tokenizer, prompt="x", guided_choice=["a"])
    (a,) = ids_of(tokenizer, "a")
    end = tokenizer.eos_token_id
    constraint.advance(a)
    assert allowed(constraint, len(tokenizer)) == {end}
    for token in (end, end, a):
        constraint.advance(token)


def test_row_that_leaves_its_grammar_fails_alone(tokenizer):
    good, bad = (
        GuardedConstraint(
            "plugin",
            constrain(tokenizer, prompt="x", guided_regex="a+"),
            len(tokenizer),
        )
        for _ in range(2)
    )
    bad.advance(ids_of(tokenizer, "b")[0])
    GuardedConstraint.fill_all([good, bad])
    assert good.error is None and "constraint failed" in str(bad.error)
    assert "doesn't satisfy the grammar" in str(bad.error.__cause__)


def test_mask_of_a_matcher_that_becomes_too_large_is_an_error(tokenizer):
    """It would otherwise say that the text ends here."""
    row = constrain(tokenizer, prompt="x", guided_regex=".*a.{300}c.*")
    rng = random.Random(0)
    with pytest.raises(ValueError, match="too many states"):
        for _ in range(2000):
            assert len(allowed(row, len(tokenizer))) > 1
            row.advance(ids_of(tokenizer, rng.choice("ab"))[0])


def test_all_end_tokens_end_an_answer():
    tokenizer = make_tokenizer()
    tokenizer.eos_token_ids = [0, 3]
    constraint = constrain(tokenizer, prompt="x", guided_choice=["a"])
    constraint.advance(ids_of(tokenizer, "a")[0])
    assert allowed(constraint, len(tokenizer)) == {0, 3}
    constraint.advance(3)


SENTENCES = ["sentencepiece", "sentencepiece without strip"]


@pytest.mark.parametrize("kind", SENTENCES)
def test_answer_may_begin_with_the_space_that_a_tokenizer_adds(kind):
    tokenizer = tiny_tokenizers.KINDS[kind]()
    tokenizer.eos_token_ids = [2]
    tokens = [i for i in ids_of(tokenizer, "hello")]
    assert tokenizer.convert_ids_to_tokens(tokens)[0] == "▁"
    request = make_request(tokenizer, prompt="x", guided_choice=["hello"])
    constraint = mlx_lm_make_constraint(request, tokenizer)
    # A choice has one only if the text of the answer does not show it.
    assert (tokens[0] in allowed(constraint, len(tokenizer))) == (kind == SENTENCES[0])
    request = make_request(tokenizer, prompt="x", guided_json={})
    constraint = mlx_lm_make_constraint(request, tokenizer)
    assert tokens[0] in allowed(constraint, len(tokenizer))


@pytest.mark.parametrize("kind", ["own", "wordpiece", "metaspace"])
def test_tokenizer_that_cannot_be_used_is_a_400(kind):
    tokenizer = tiny_tokenizers.KINDS[kind]()
    tokenizer.eos_token_ids = [2]
    with pytest.raises(RequestError, match="this model's tokenizer") as error:
        constrain(tokenizer, prompt="x", guided_regex="a")
    assert (error.value.status, error.value.param) == (400, "guided_regex")


# Limits


def choices(n):
    return {"anyOf": [record(**{f"p{n}_{i}": TEXT}) for i in range(4)]}


def chain(n, step):
    definitions = {f"d{i}": step({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{n}": TEXT}}


def nested(n):
    schema = TEXT
    for _ in range(n):
        schema = {"items": schema}
    return schema


HOSTILE = {
    "minItems": {"guided_json": {"type": "array", "minItems": 10**6}},
    "minLength": {"guided_json": {"type": "string", "minLength": 10**9}},
    "repeated": {"guided_regex": "(a{1,1000}){1,1000}"},
    "more repeated": {"guided_regex": r"((\w{1,1000}){1,1000}x){1,1000}"},
    "long pattern": {"guided_json": {"pattern": "|".join(map(str, range(30_000)))}},
    "parentheses": {"guided_regex": "(" * 5000 + "a" + ")" * 5000},
    "many values": {"guided_json": {"enum": [f"value {i}" for i in range(10_000)]}},
    "many properties": {
        "guided_json": {"properties": {f"p{i}": TEXT for i in range(20_000)}}
    },
    "properties": {"guided_json": record([], **{f"p{i}": TEXT for i in range(1900)})},
    "deep": {"guided_json": nested(450)},
    "deep references": {"guided_json": chain(1900, lambda r: record(x=r))},
    "deep choices": {"guided_json": chain(2500, lambda r: {"anyOf": [r, TEXT]})},
    "recursive": {"guided_json": chain(0, dict) | {"$defs": {"d0": {"$ref": "#"}}}},
    "doubling": {"guided_json": chain(40, lambda r: record(x=r, y=r))},
    "products": {"guided_json": {"allOf": [choices(i) for i in range(6)]}},
    "more products": {"guided_json": {"allOf": [choices(i) for i in range(12)]}},
    "multiples": {"guided_json": {"type": "integer", "multipleOf": 9_999_991}},
    "rules": {
        "guided_grammar": "start: r0\n"
        + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000))
    },
    "terminals": {
        "guided_grammar": "start: R0\n"
        + "".join(f'R{i}: R{i + 1} "a"?\n' for i in range(900))
        + 'R900: "a"'
    },
    "references in a grammar": {
        "guided_grammar": "start: %json "
        + json.dumps(chain(3000, lambda r: {"properties": {"x": r}}))
    },
    "nested gbnf": {"guided_grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    "ambiguous": {"guided_grammar": 'start: s\ns: s s s | s s | "a" | "a" s | '},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_compiled_or_refused_in_time(name, tokenizer):
    begin = time.process_time()
    try:
        constraint = constrain(tokenizer, prompt="x", **HOSTILE[name])
    except RequestError as e:
        assert e.status == 400 and len(str(e)) < 600 and "\n" not in str(e)
    else:
        assert allowed(constraint, len(tokenizer))
    # Mostly less than one.
    assert time.process_time() - begin < 5


TOO_LARGE = [
    ({"guided_json": {"properties": {f"p{i}": {} for i in range(2001)}}}, "properties"),
    ({"guided_json": nested(100)}, "in each other"),
    ({"guided_json": {"const": "x" * (256 << 10)}}, "bytes"),
    ({"guided_regex": "x" * (256 << 10)}, "bytes"),
    ({"guided_choice": ["x"] * 10_001}, "10000"),
    ({"guided_grammar": "start: x\n" + "\n" * 1000}, "1000 lines"),
]


@pytest.mark.parametrize("fields, part", TOO_LARGE)
def test_what_is_too_large_is_refused(fields, part, tokenizer):
    with pytest.raises(RequestError, match=part) as error:
        constrain(tokenizer, prompt="x", **fields)
    assert (error.value.status, error.value.param) == (400, *fields)


def test_what_takes_too_long_is_left_alone(tokenizer, monkeypatch):
    goes_on = threading.Event()

    class Slow(grammars.Grammars):
        def check_start(self, matcher):
            goes_on.wait(60)
            return super().check_start(matcher)

    monkeypatch.setattr(grammars, "MAX_SECONDS", 0.01)
    slow = Slow(tokenizer, len(tokenizer))
    with pytest.raises(RequestError, match="takes longer than 0.01 s") as error:
        slow.constrain("start: /a+/", "guided_regex")
    goes_on.set()
    assert (error.value.status, error.value.param) == (400, "guided_regex")
    monkeypatch.setattr(grammars, "compiling", threading.Semaphore(0))
    with pytest.raises(RequestError, match="too many grammars") as error:
        constrain(tokenizer, prompt="x", guided_regex="(abc?)+d")
    assert error.value.status == 503


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_while_it_is_compiled_is_not_said_to_be_slow(tokenizer):
    class Failing(grammars.Grammars):
        def check_start(self, matcher):
            raise RuntimeError

    failing = Failing(tokenizer, len(tokenizer))
    with pytest.raises(RequestError, match="guided_regex cannot be used") as error:
        failing.constrain("start: /a+/", "guided_regex")
    assert (error.value.status, error.value.param) == (400, "guided_regex")


def test_compiled_grammars_are_kept_up_to_a_limit(tokenizer, monkeypatch):
    compiled = []

    class Counting(grammars.Grammars):
        def compile(self, grammar, field):
            compiled.append(grammar)
            return super().compile(grammar, field)

    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    kept = Counting(tokenizer, len(tokenizer))
    a, b, c = ('start: "%s"' % letter for letter in "abc")
    for grammar in (a, b, a, c, a, b):
        kept.constrain(grammar, "guided_grammar")
    assert compiled == [a, b, c, b] and len(kept.kept) == 2


def test_grammars_are_let_go_with_their_tokenizer():
    tokenizer = make_tokenizer()
    constrain(tokenizer, prompt="x", guided_regex="a")
    n = len(grammars.tokenizers)
    del tokenizer
    assert len(grammars.tokenizers) == n - 1


# Reasoning


THINKING = {
    "one token": (make_tokenizer(MARKS + THINK), "<think>", "</think>"),
    "two tokens": (make_tokenizer(MARKS + CHANNEL), "<|channel>thought", "<channel|>"),
}


@pytest.fixture(params=THINKING)
def thinking(request):
    tokenizer, start, end = THINKING[request.param]
    assert (tokenizer.think_start, tokenizer.think_end) == (start, end)
    return tokenizer


def begun(tokenizer, begins_in_reasoning=False, **fields):
    fields = {"messages": HELLO, **(fields or {"guided_json": record(a=NUMBER)})}
    return constrain(tokenizer, begins_in_reasoning=begins_in_reasoning, **fields)


def test_answer_begins_after_the_reasoning_of_the_prompt(thinking):
    constraint, end = begun(thinking, True), thinking.think_end
    n = len(thinking)
    assert len(allowed(constraint, n)) == n
    for blanks in ("", "\n\n", " \n \n"):
        text = f'Well, [1\n{{"a": {end}{blanks}{{"a": 1}}'
        assert takes(constraint, thinking, text)
    for wrong in ("x", '{"a": "1"}', '\n\n\n\n\n{"a": 1}', f'{{"a": 1}}{end}'):
        assert not takes(constraint, thinking, f"Well{end}{wrong}")
    # The model may also end in the middle of it.
    constraint.advance(ids_of(thinking, "W")[0])
    assert thinking.eos_token_id in allowed(constraint, n)


def test_answer_may_begin_with_a_reasoning(thinking):
    constraint, start, end = begun(thinking), thinking.think_start, thinking.think_end
    assert takes(constraint, thinking, '{"a": 1}')
    # Upstream knows how the mark is tokenized.
    mark, rest = [*thinking.think_start_tokens], f'Well{end}{{"a": 1}}'
    assert takes(constraint, thinking, mark + ids_of(thinking, rest))
    assert not takes(constraint, thinking, f"Well{end}{{}}")
    assert not takes(constraint, thinking, '{"a": 1}' + start)
    again = mark + ids_of(thinking, f"Well{end}") + mark
    assert not takes(constraint, thinking, again)


def test_mark_of_the_end_is_found_however_it_is_tokenized():
    tokenizer = THINKING["one token"][0]
    constraint = begun(tokenizer, True)
    mark = tokenizer.convert_tokens_to_ids(["</", "think", ">Ċ"])
    assert None not in mark
    right, wrong = ids_of(tokenizer, '{"a": 1}'), ids_of(tokenizer, "x")
    assert takes(constraint, tokenizer, [*mark, *right])
    # The line break of the mark's last token is one of four.
    for n, fits in ((3, True), (4, False)):
        blanks = ids_of(tokenizer, "\n") * n
        assert takes(constraint, tokenizer, [*mark, *blanks, *right]) == fits
    assert not takes(constraint, tokenizer, [*mark, *wrong])


def test_token_that_ends_the_mark_is_allowed_if_the_answer_may_begin_with_its_rest():
    tokenizer = THINKING["one token"][0]
    begin, end = tokenizer.convert_tokens_to_ids(["</", "think"]), ids_of(
        tokenizer, ">"
    )
    (and_line_break,) = [tokenizer.convert_tokens_to_ids(">Ċ")]
    for fields, fits in (
        ({"guided_choice": ["a"]}, False),
        ({"guided_regex": "a"}, False),
        ({"guided_grammar": 'start: "a"'}, False),
        ({"guided_regex": "\\na"}, True),
    ):
        constraint = begun(tokenizer, True, **fields)
        # In the text of the reasoning it is a token like others.
        assert and_line_break in allowed(constraint, len(tokenizer))
        answer = ids_of(tokenizer, "\na" if fits else "a")
        assert takes(constraint, tokenizer, [*begin, *end, *answer])
        for token in begin:
            constraint.advance(token)
        assert (and_line_break in allowed(constraint, len(tokenizer))) == fits
        # Other tokens only go on with the reasoning.
        assert len(allowed(constraint, len(tokenizer))) == len(tokenizer) - (not fits)


def test_rows_in_all_states_are_filled_together(thinking):
    rows = [begun(thinking), begun(thinking, True), begun(thinking)]
    for token in ids_of(thinking, ' {"'):
        rows[2].advance(token)
    masks = np.full((3, -(-len(thinking) // 32)), 0xFFFFFFFF, np.uint32)
    type(rows[0]).fill_all(rows, masks)
    for row, mask in zip(rows, masks):
        alone = np.full_like(mask, 0xFFFFFFFF)
        row.copy().fill(alone)
        assert (alone == mask).all()


def test_text_completion_has_no_reasoning(thinking):
    constraint = constrain(thinking, prompt="x", guided_choice=["a"])
    assert allowed(constraint, len(thinking)) == {ids_of(thinking, "a")[0]}


CALL = ["<tool_call>", "</tool_call>"]
PARAMETERS = {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"]}


@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {}])
def test_call_that_the_model_makes_without_ending_its_reasoning_is_kept_to_its_schema(
    fields,
):
    tokenizer = make_tokenizer(MARKS + THINK + CALL, **tool_parser("json_tools"))
    function = {"name": "f", "strict": True, "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    constraint = begun(tokenizer, True, tools=tools, **fields)
    for reasoning in ("", "Well, <tool", "Well</think>"):
        for name, n, fits in (("f", 1, True), ("f", 2, False), ("g", 1, False)):
            call = f'{{"name": "{name}", "arguments": {{"n": {n}}}}}'
            text = f"{reasoning}<tool_call>{call}</tool_call>"
            assert takes(constraint, tokenizer, text) == fits


def test_error_of_a_strict_function_has_nothing_of_its_grammar():
    tokenizer = make_tokenizer(MARKS + CALL, **tool_parser("json_tools"))
    parameters = {"type": "object", "properties": {"n": {"not": {}}}}
    function = {"name": "f", "strict": True, "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    with pytest.raises(RequestError) as error:
        begun(tokenizer, tools=tools)
    assert str(error.value) == (
        "tools[0].function.parameters cannot be done with strict: "
        'Unimplemented keys: ["not"]'
    )


def test_where_the_prompt_ends_is_read_with_the_first_token(thinking):
    request = make_request(thinking, messages=HELLO, guided_choice=["a"])
    constraint = mlx_lm_make_constraint(request, thinking)
    request.begins_in_reasoning = True
    assert len(allowed(constraint.copy(), len(thinking))) == len(thinking)


HARMONY = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"


def test_answer_of_gpt_oss_is_in_its_last_channel():
    tokenizer = make_tokenizer(chat_template=f"{HARMONY}{{{{ messages }}}}")
    constraint = begun(tokenizer)
    for right in (FINAL, f"{HARMONY}Well,\n{{{NEXT}{FINAL}", f"{HARMONY}{NEXT}{FINAL}"):
        assert takes(constraint, tokenizer, right + '{"a": 1}')
        assert not takes(constraint, tokenizer, right + "[]")
    commentary = FINAL.replace("final", "commentary")
    for wrong in ("", HARMONY, f"{HARMONY}Well{NEXT}", commentary):
        assert not takes(constraint, tokenizer, wrong + '{"a": 1}')
    # The message that is continued has begun already, and a text completion has no channels.
    going_on = begun(tokenizer, guided_choice=["a"], continue_final_message=True)
    assert takes(going_on, tokenizer, "a")
    text = constrain(tokenizer, prompt="x", guided_choice=["a"])
    assert takes(text, tokenizer, "a")


# The server


def test_default_of_max_tokens_is_larger_for_a_format():
    def limit(*argv, **fields):
        body = parse_body(json.dumps(fields).encode())
        return make_generation_arguments(
            body, make_parser().parse_args(argv)
        ).max_tokens

    form = {"response_format": {"type": "json_object"}}
    assert limit() == limit(response_format={"type": "text"}) == 512
    assert limit(**form) == 32_768
    assert limit("--max-tokens", "512", **form) == 512
    assert limit(max_tokens=7, **form) == limit(max_completion_tokens=7, **form) == 7


def test_without_llguidance_only_requests_with_a_format_are_refused(
    tokenizer, monkeypatch
):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert constrain(tokenizer, prompt="x") is None
    with pytest.raises(
        RequestError, match=r'pip install "mlx-lm-ext\[structured\]"'
    ) as e:
        constrain(tokenizer, prompt="x", guided_regex="a")
    assert (e.value.status, e.value.param) == (400, "guided_regex")


def test_plugin_is_listed_and_can_be_blocked():
    args = make_parser().parse_args([])
    assert "plugin 'structured' (mlx-lm-ext" in Plugins().describe(args)
    assert "structured: blocked" in Plugins(["no:structured"]).describe(args)


def test_format_is_refused_if_nothing_restricts_the_answer(start_server):
    engine, port = start_server()
    engine.policies.plugins.manager.unregister(name="structured")
    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert "the plugin structured" in answer["error"]["message"]


def test_wrong_schema_is_a_400_of_the_server(start_server):
    _, port = start_server()
    body = {"messages": HELLO, **schema_field({"schema": {"not": {}}})}
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (
        400,
        "response_format.json_schema.schema",
    )
    assert "not" in answer["error"]["message"]

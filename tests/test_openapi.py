"""The OpenAPI description: it says of each field and route what the code says."""

import json
from dataclasses import fields
from importlib.resources import files

import pytest
from helpers import call
from jsonschema import Draft202012Validator

from mlx_lm_ext import __version__
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.interfaces import ServerStatistics
from mlx_lm_ext.plugins.tokens import MAX_TOKENS
from mlx_lm_ext.policies.loading import Plugins
from mlx_lm_ext.request.fields import (
    FIELDS,
    GUIDED,
    MAX_ANSWERS,
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_STOP_WORD,
    MAX_STOP_WORDS,
    TOOL_MODES,
    UNSET,
    Field,
)
from mlx_lm_ext.request.history import ROLE
from mlx_lm_ext.request.other_fields import CHAT_ONLY, TEXT_ONLY
from mlx_lm_ext.routes import HEALTH, METHODS

TEXT = files("mlx_lm_ext.server").joinpath("openapi.json").read_text("utf-8")
DESCRIPTION = json.loads(TEXT)
SCHEMAS = DESCRIPTION["components"]["schemas"]
TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
COMMON = SCHEMAS["CommonFields"]["properties"]
CHAT, TEXTS = (
    SCHEMAS[name]["allOf"][1]["properties"] for name in ("ChatRequest", "TextRequest")
)


def schema_of(name):
    """What the code says of a field."""
    field = FIELDS[name]
    schema = {"type": [TYPES[field.kind], "null"]}
    if field.kind in (int, float):
        schema |= {"minimum": field.minimum, "maximum": field.maximum}
    elif field.kind is str and field.maximum < Field.maximum:
        schema["maxLength"] = field.maximum
    values = [
        value
        for value in UNSET.get(name, ([], None))[0]
        if field.kind not in (int, float) or not field.minimum <= value <= field.maximum
    ]
    return {"anyOf": [schema, {"enum": values}]} if values else schema


@pytest.mark.parametrize("name", FIELDS)
def test_field_is_described_as_it_is_checked(name):
    (place,) = [p for p in (COMMON, CHAT, TEXTS) if name in p]
    assert (place is TEXTS) == (name in TEXT_ONLY)
    assert (place is CHAT) == (name in CHAT_ONLY)
    described = dict(place[name])
    assert described.pop("description").endswith(".")
    assert described == schema_of(name)


def test_other_limits_are_those_of_the_code():
    assert CHAT["messages"]["maxItems"] == MAX_MESSAGES
    assert SCHEMAS["Message"]["properties"]["role"]["maxLength"] == ROLE.maximum
    assert SCHEMAS["Prompts"]["anyOf"][2]["maxItems"] == MAX_ANSWERS
    text, texts, _ = COMMON["stop"]["anyOf"]
    assert text["maxLength"] == texts["items"]["maxLength"] == MAX_STOP_WORD
    assert texts["maxItems"] == MAX_STOP_WORDS
    assert CHAT["tool_choice"]["anyOf"][0]["enum"] == [*TOOL_MODES, None]
    top = FIELDS["top_logprobs"]
    assert (TEXTS["logprobs"]["minimum"], TEXTS["logprobs"]["maximum"]) == (
        top.minimum,
        top.maximum,
    )
    assert set(GUIDED) <= set(COMMON)
    tokens = SCHEMAS["DetokenizeRequest"]["properties"]["tokens"]
    assert tokens["maxItems"] == MAX_TOKENS
    assert COMMON["guided_choice"]["maxItems"] == MAX_CHOICES


def test_statistics_are_all_described():
    described = SCHEMAS["ServerInfo"]["properties"]["statistics"]
    names = [field.name for field in fields(ServerStatistics)]
    assert list(described["properties"]) == described["required"] == names


def test_errors_are_described_as_they_are_made():
    validator = Draft202012Validator(SCHEMAS["Error"])
    for status in (400, 404, 429, 500, 503):
        validator.validate(RequestError(status, "wrong", "model").to_json())
    assert not validator.is_valid({"error": {"message": "wrong"}})


def test_all_routes_of_the_server_and_its_plugins_are_described():
    described = {
        (method.upper(), path)
        for path, methods in DESCRIPTION["paths"].items()
        for method in methods
    }
    own = {
        (methods.partition(",")[0], path if path == HEALTH else f"/v1{path}")
        for path, methods in METHODS.items()
    }
    plugins = set(Plugins().routes(make_parser().parse_args([])))
    assert described == own | plugins | {("GET", "/v1/models/{model}")}


def parts(value):
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, (dict, list)):
            yield from parts(part)


def test_schemas_are_valid_and_references_lead_somewhere():
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)
    for part in parts(DESCRIPTION):
        if "$ref" in part:
            found = DESCRIPTION
            for name in part["$ref"].removeprefix("#/").split("/"):
                found = found[name]


def test_server_gives_the_description_with_its_version_without_a_key(start_server):
    _, port = start_server("llama", "--api-key", "secret")
    status, answer = call(port, "GET", "/openapi.json")
    assert (status, answer["info"].pop("version")) == (200, __version__)
    assert answer == DESCRIPTION | {
        "info": {k: v for k, v in DESCRIPTION["info"].items() if k != "version"}
    }

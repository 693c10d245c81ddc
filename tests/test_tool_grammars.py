"""What a grammar of tool calls accepts is read by the server as valid calls, and what models
write is accepted."""

import json
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tool_marks
from mlx_lm import tool_parsers
from mlx_lm.chat_templates.muse_spark import RESPONSE_FORMAT as MUSE
from mlx_lm.server import CompletionRequest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.plugins.tool_grammars import FORMATS, tool_grammar
from mlx_lm_ext.request.detokenizing import Decoder
from mlx_lm_ext.request.request import Token
from mlx_lm_ext.server.answer import AnswerParser, Delta
from mlx_lm_ext.server.harmony import with_channels

jsonschema = pytest.importorskip("jsonschema")
llguidance = pytest.importorskip("llguidance")

PARSERS = sorted(p.stem for p in Path(tool_parsers.__path__[0]).glob("[a-z]*.py"))

# The marks that are tokens of their own in the tokenizers of each family.
TOKENS = {
    "json_tools": ["<tool_call>", "</tool_call>"],
    "qwen3_coder": ["<tool_call>", "</tool_call>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "mistral list": ["[TOOL_CALLS]"],
    "kimi_k2": [
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ],
    "kimi_k3": ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
    "pythonic": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "gemma4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "function_gemma": [
        "<start_function_call>",
        "<end_function_call>",
        "<escape>",
    ],
    "minimax_m2": ["<minimax:tool_call>", "</minimax:tool_call>"],
    "minicpm5": ["<function", "</function>", "<param", "</param>"],
    "glm47": [
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>"),
    ],
    "laguna": ["<tool_call>", "</tool_call>"],
    "longcat": ["<longcat_tool_call>", "</longcat_tool_call>"],
    "muse_spark": ["<|start|>", "<|message|>", "<|eom|>", "<|eot|>"],
    "gpt-oss": [
        f"<|{name}|>"
        for name in "start end message channel constrain call return".split()
    ],
    "none": [],
}
SPECIAL_ONLY = ("gpt-oss", "mistral", "muse_spark", "none")
# Each family with these tokens, and where all is plain text, if there are such.
FAMILIES = [
    *TOKENS,
    *(f"{name} in text" for name in TOKENS if name not in SPECIAL_ONLY),
]

# Pieces of text that are tokens, so that random answers have them, and come to their end.
AWKWARD = (
    '" \\ \\" \\n \n } ] ) , : \\u00e9 \u00e9 \U0001f600 null true 5 -1.5 x \' & </tool_ call>'
    " <tool_call > \n</parameter> </parameter> <parameter= </param> <param ]]> <![CDATA["
    ' </atem: parameter> </arg_ value> <arg_ key> <|"|> </longcat_arg_value> <escape>'
    " <|close|> argument <|sep|> <|close|>argument<|sep|> call: functions. [ARGS] [TOOL_"
    ' CALLS] {" "}'
).split(" ")


def make_tokenizer(family):
    """A tokenizer of bytes, with the pieces, and the marks of a family."""
    name, _, plain = family.partition(" in text")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|x|>"]
    special += [] if plain or " in text" in family else TOKENS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [level.pre_tokenize_str(piece)[0][0] for piece in AWKWARD]
    vocabulary = dict.fromkeys([*special, *alphabet, *pieces])
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    if name == "gpt-oss":
        fast.chat_template = "<|channel|>analysis<|message|>"
    marks = {}
    if name not in ("gpt-oss", "none"):
        marks = tool_marks(name.removesuffix(" list"))
    names = ("tool_call_start", "tool_call_end", "tool_parser")
    return TokenizerWrapper(
        fast,
        eos_token_ids=[0, 2],
        response_format=MUSE if name == "muse_spark" else None,
        **{name: marks.get(name) for name in names},
    )


class Family:
    """A tokenizer, what llguidance has of it, and the server's parser of its answers."""

    def __init__(self, name):
        self.name = name
        self.tokenizer = make_tokenizer(name)
        self.decoder = Decoder(self.tokenizer)
        self.ll = llguidance.LLTokenizer(
            self.tokenizer.backend_tokenizer.to_str(),
            n_vocab=len(self.tokenizer),
            eos_token=sorted(self.tokenizer.eos_token_ids),
            slices=[],
        )
        # Those that are not single bytes.
        ids = range(len(self.tokenizer))
        self.is_piece = np.array([len(self.tokenizer.decode([i])) > 1 for i in ids])
        self.ends = sorted(self.tokenizer.eos_token_ids)

    def grammar(self, body, **kwargs):
        kwargs = {"check": llguidance.LLMatcher.validate_grammar, **kwargs}
        return tool_grammar(body, self.tokenizer, **kwargs)

    def matcher(self, grammar):
        matcher = llguidance.LLMatcher(self.ll, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def sample(self, grammar, rng, longest=800, matcher=None):
        """The tokens of a random answer; None if it does not come to an end."""
        matcher, tokens = matcher or self.matcher(grammar), []
        while len(tokens) < longest:
            mask = np.frombuffer(matcher.compute_logit_bias(), np.uint8) > 0
            mask[self.ends] = False
            allowed, likely = mask.nonzero()[0], (mask & self.is_piece).nonzero()[0]
            if matcher.is_accepting() and (not len(allowed) or rng.random() < 0.3):
                return tokens
            assert len(allowed)
            is_likely = len(likely) and rng.random() < 0.7
            token = int(rng.choice(likely if is_likely else allowed))
            assert matcher.consume_token(token), matcher.get_error()
            tokens.append(token)
        return None

    def call(self, request, grammar, rng):
        """The call of a random answer that is one."""
        samples = (self.sample(grammar, rng) for _ in range(50))
        tokens = next(tokens for tokens in samples if tokens is not None)
        (call,) = self.parse(request, tokens).tool_calls
        return call

    def accepts(self, grammar, text):
        """Whether the grammar accepts a text as the tokenizer splits it."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        matcher = self.matcher(grammar)
        n = matcher.try_consume_tokens(tokens)
        return n == len(tokens) and matcher.is_accepting()

    def parse(self, body, tokens):
        request = SimpleNamespace(
            model=SimpleNamespace(tokenizer=self.tokenizer, decoder=self.decoder),
            completion=CompletionRequest("chat", "", [], body["tools"], None),
            body=body,
            args=SimpleNamespace(stop_words=[], logprobs=False),
            initial_state=self.tokenizer.response_initial_state or "normal",
        )
        parser = AnswerParser(request)
        tokens = [*map(Token, tokens), Token(0, finish_reason="stop")]
        answer = Delta()
        answer.add(parser.feed(tokens))
        return answer


@pytest.fixture(scope="session")
def family():
    made = {}

    def get(name):
        if name not in made:
            made[name] = Family(name)
        return made[name]

    return get


def tool(name, parameters=None, **fields):
    function = {"name": name, "parameters": parameters} | fields
    return {"type": "function", "function": function}


def properties(required=None, **schemas):
    required = [*schemas] if required is None else required
    return {
        "type": "object",
        "properties": schemas,
        "required": required,
        "additionalProperties": False,
    }


STRING, INTEGER = {"type": "string"}, {"type": "integer"}
NESTED = {
    "$defs": {"point": properties(x=INTEGER, label=STRING, required=["x"])},
    **properties(
        at={"$ref": "#/$defs/point"},
        path={"type": "array", "items": {"$ref": "#/$defs/point"}},
    ),
}
TREE = {
    "$defs": {
        "node": properties(
            value=STRING,
            children={"type": "array", "items": {"$ref": "#/$defs/node"}},
        )
    },
    **properties(root={"$ref": "#/$defs/node"}),
}
TOOLS = [
    tool("nothing"),
    tool("empty", {"type": "object", "properties": {}}),
    tool("any", {"type": "object"}),
    tool("say", properties(text=STRING)),
    tool(
        "both.ways-of_it",
        properties(
            ["text"],
            text={"type": ["string", "null"]},
            n={"anyOf": [INTEGER, {"type": "null"}]},
            mixed={"anyOf": [STRING, INTEGER]},
            kind={"enum": ["a b", "5", 'say "x"', "<&>", "null", ""]},
            maybe={"enum": ["on", None]},
            level={"enum": [1, 2.5, True]},
            ok={"type": "boolean"},
            x={"type": "number", "minimum": -3, "maximum": 4},
        ),
    ),
    tool("nested", NESTED),
    tool("tree", TREE),
    tool(
        "lists",
        properties(
            words={"type": "array", "items": STRING},
            grid={"type": "array", "items": {"type": "array", "items": INTEGER}},
            thing=properties(
                a=STRING, b={"type": "object", "properties": {"c": STRING}}
            ),
            few={"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2},
        ),
    ),
    tool("short", properties(code={**STRING, "minLength": 2, "maxLength": 3})),
    tool("map", {"type": "object", "additionalProperties": INTEGER}),
]


def body(tools=TOOLS, choice="required", **fields):
    return {"messages": [], "tools": tools, "tool_choice": choice, **fields}


def named(name):
    return {"type": "function", "function": {"name": name}}


def check_calls(tools, calls):
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    for call in calls:
        function = call["function"]
        schema = schemas[function["name"]]
        arguments = json.loads(function["arguments"])
        assert isinstance(arguments, dict)
        jsonschema.validate(arguments, schema or {"maxProperties": 0})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_that_a_grammar_accepts_is_read_as_valid_calls(name, family):
    family = family(name)
    rng = random.Random(name)
    for one in TOOLS:
        name = one["function"]["name"]
        request = body(choice=named(name))
        grammar = family.grammar(request)
        n_read = 0
        for _ in range(60):
            tokens = family.sample(grammar, rng)
            if tokens is None:
                continue
            answer = family.parse(request, tokens)
            text = family.tokenizer.decode(tokens)
            assert answer.text.strip() == "", text
            (call,) = answer.tool_calls
            assert call["function"]["name"] == name, text
            check_calls(TOOLS, [call])
            n_read += 1
            if n_read == 4:
                break
        assert n_read >= 2, name


# Only the calls of the first one are checked.
FREE_TOOLS = [tool("say", properties(text=STRING), strict=True), tool("other", NESTED)]


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_in_free_text_are_valid_if_a_function_is_strict(name, family):
    family = family(name)
    rng = random.Random(name)
    request = body(FREE_TOOLS, "auto")
    grammar = family.grammar(request)
    if name == "none":
        # Its calls stay text.
        assert grammar is None
        return
    start = with_channels(family.tokenizer).tool_call_start
    n_calls = n_read = 0
    for _ in range(25):
        # A text, perhaps with the beginning of the mark of a call, and then this mark.
        begun = start[: rng.randrange(len("<|open|>"))]
        text = f"hm. <|x|>\n{begun}\n"
        tokens = family.tokenizer.encode(text + start, add_special_tokens=False)
        matcher = family.matcher(grammar)
        assert matcher.consume_tokens(tokens), matcher.get_error()
        assert not matcher.is_accepting()
        rest = family.sample(grammar, rng, matcher=matcher)
        if rest is None:
            continue
        answer = family.parse(request, tokens + rest)
        check_calls(
            [*FREE_TOOLS[:1], tool("other", {"type": "object"})], answer.tool_calls
        )
        n_calls += len(answer.tool_calls)
        assert start not in answer.text
        n_read += 1
    assert n_calls >= n_read >= 4


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "none"])
def test_mark_that_is_spelled_in_text_begins_no_free_call(name, family):
    family = family(name)
    grammar = family.grammar(body(FREE_TOOLS, "auto"))
    start = with_channels(family.tokenizer).tool_call_start
    spelled = [t for c in start for t in family.tokenizer.encode(c)]
    rest = family.tokenizer.encode("nonsense ~")
    for before in ("", "hm. ", "<|x|>"):
        tokens = family.tokenizer.encode(before) + spelled
        assert (
            family.matcher(grammar).try_consume_tokens(tokens[:-1]) == len(tokens) - 1
        )
        tokens += rest
        assert family.matcher(grammar).try_consume_tokens(tokens) < len(tokens)


# What models write

JSON = '{"text": "hi"}'
WRITTEN = {
    "json_tools": [
        '<tool_call>\n{"name": "say", "arguments": {"text": "hi"}}\n</tool_call>\n'
    ],
    "mistral": [
        f"[TOOL_CALLS]say[ARGS]{JSON}",
        f"[TOOL_CALLS]say[CALL_ID]ab1[ARGS]{JSON}",
    ],
    "mistral list": [
        f'[TOOL_CALLS] [{{"name": "say", "arguments": {JSON}, "id": "abcDEF123"}}]'
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.say:0"
        f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>"
    ],
    "kimi_k3": [
        '<|open|>tools<|sep|><|open|>call tool="say" index="1"<|sep|>'
        '<|open|>argument key="text" type="string"<|sep|>hi<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>"
    ],
    "pythonic": ['<|tool_call_start|>[say(text="hi")]<|tool_call_end|>'],
    "gemma4": ['<|tool_call>call:say{text:<|"|>hi<|"|>}<tool_call|>'],
    "function_gemma": [
        "<start_function_call>call:say{text:<escape>hi<escape>}<end_function_call>"
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=say>\n<parameter=text>\nhi\n</parameter>\n</function>\n"
        "</tool_call>"
    ],
    "minimax_m2": [
        '<minimax:tool_call>\n<invoke name="say">\n<parameter name="text">hi</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    ],
    "minicpm5": [
        '<function name="say"><param name="text">hi</param></function>',
        '<function name="say"><param name="text"><![CDATA[hi]]></param></function>',
    ],
    "glm47": [
        "<tool_call>say<arg_key>text</arg_key><arg_value>hi</arg_value></tool_call>",
        "<tool_call>say\n<arg_key>text</arg_key>\n<arg_value>hi</arg_value>\n</tool_call>",
    ],
    "laguna": [
        "<tool_call>say\n<arg_key>text</arg_key>\n<arg_value>hi</arg_value>\n</tool_call>"
    ],
    "longcat": [
        "<longcat_tool_call>say\n<longcat_arg_key>text</longcat_arg_key>\n"
        "<longcat_arg_value>hi</longcat_arg_value>\n</longcat_tool_call>\n"
    ],
    "muse_spark": [
        f"{header}<atem:function_calls>\n"
        '<atem:invoke name="say">\n<atem:parameter name="text">hi</atem:parameter>\n'
        "</atem:invoke>\n</atem:function_calls>"
        for header in (
            " to=say<|message|>",
            "to=self<|message|>hm<|eom|><|start|>assistant to=say<|message|>",
        )
    ],
    "gpt-oss": [
        f"{header}<|message|>{JSON}"
        for header in (
            "<|channel|>commentary to=functions.say <|constrain|>json",
            "<|channel|>commentary to=functions.say",
            " to=functions.say<|channel|>commentary json",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary"
            " to=functions.say <|constrain|>json",
        )
    ],
    "none": [f'[{{"name": "say", "arguments": {JSON}}}]'],
}
# Where an answer has one call.
SINGLE = ("gpt-oss",)


def both(name, text):
    """Two calls, as the model writes them."""
    if name in ("mistral list", "none"):
        return text[:-1] + ", " + text[text.index("{") :]
    if name == "pythonic":
        return text.replace('")]', '"), say(text="hi")]')
    inside = {
        "kimi_k2": "<.tool_call_begin.>.*<.tool_call_end.>",
        "kimi_k3": "<.open.>call.*<.close.>call<.sep.>",
        "minimax_m2": "<invoke.*</invoke>\n",
        "muse_spark": "<atem:invoke.*</atem:invoke>\n",
    }.get(name, ".*")
    return re.sub(f"(?s)({inside})", r"\1\1", text, count=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_models_write_is_accepted(name, family):
    family, form = family(name), name.removesuffix(" in text")
    strict = [tool("say", properties(text=STRING), strict=True)]
    for text in WRITTEN[form]:
        tokens = family.tokenizer.encode(text, add_special_tokens=False)
        for request in (
            body(choice=named("say")),
            body(strict, "auto"),
            body(choice="required", parallel_tool_calls=False),
        ):
            if form != "none" or request["tool_choice"] != "auto":
                assert family.accepts(family.grammar(request), text), text
                (call,) = family.parse(request, tokens).tool_calls
                assert call["function"] == {"name": "say", "arguments": JSON}


@pytest.mark.parametrize("name", FAMILIES)
def test_number_of_calls_is_what_the_request_says(name, family):
    family, form = family(name), name.removesuffix(" in text")
    text = WRITTEN[form][0]
    two = both(form, text)
    several, once = body(), body(parallel_tool_calls=False)
    assert not any(family.accepts(family.grammar(b), "") for b in (several, once))
    assert not any(family.accepts(family.grammar(b), "hi") for b in (several, once))
    assert family.accepts(family.grammar(several), two) == (form not in SINGLE)
    if form not in SINGLE:
        tokens = family.tokenizer.encode(two, add_special_tokens=False)
        assert len(family.parse(several, tokens).tool_calls) == 2
    for request in (once, body(choice=named("say"))):
        assert family.accepts(family.grammar(request), text)
        assert not family.accepts(family.grammar(request), two)


def one_call(name, arguments):
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>{call}</tool_call>"


def allowed(mode, *names):
    tools = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": tools}


@pytest.mark.parametrize("name", ["json_tools", "json_tools in text"])
def test_only_the_functions_of_the_choice_can_be_called(name, family):
    family = family(name)
    tools = [tool("say", properties(text=STRING)), tool("count", properties(n=INTEGER))]
    say, count = one_call("say", {"text": "hi"}), one_call("count", {"n": 5})
    for choice, text, is_accepted in (
        ("required", say, True),
        ("required", count, True),
        ("required", "hi", False),
        (named("say"), say, True),
        (named("say"), count, False),
        (allowed("required", "count"), count, True),
        (allowed("required", "count"), say, False),
        (allowed("required", "count"), "hi", False),
        (allowed("auto", "count"), count, True),
        (allowed("auto", "count"), f"well\n{count} and {count}.", True),
        (allowed("auto", "count"), say, False),
        (allowed("auto", "count"), "hi <b>", True),
        # Without strict, the arguments are free as long as no call is forced.
        (allowed("auto", "count"), one_call("count", {"m": "x"}), True),
        (allowed("required", "count"), one_call("count", {"m": "x"}), False),
    ):
        grammar = family.grammar(body(tools, choice))
        assert family.accepts(grammar, text) == is_accepted, (choice, text)


def test_nothing_is_restricted_if_nothing_is_asked_for(family):
    family = family("json_tools")
    for request in (body(choice="auto"), body(choice="none"), {"messages": []}):
        assert family.grammar(request) is None
    assert family.grammar({"messages": [], "tools": TOOLS}) is None


def test_strict_function_beside_others_restricts_its_own_arguments_only(family):
    family = family("json_tools")
    tools = [
        tool("say", properties(text=STRING), strict=True),
        tool("count", properties(n=INTEGER), strict=False),
    ]
    grammar = family.grammar(body(tools, "auto"))
    assert family.accepts(grammar, "No call.")
    assert family.accepts(grammar, "Now: " + one_call("say", {"text": "hi"}))
    assert family.accepts(grammar, one_call("count", {"m": [1]}))
    assert not family.accepts(grammar, one_call("say", {"text": 5}))
    assert not family.accepts(grammar, one_call("shout", {}))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "none"])
def test_answer_without_calls_may_have_a_grammar_of_its_own(name, family):
    family, form = family(name), name.removesuffix(" in text")
    text = 'text: %json {"type": "integer"}'
    grammar = family.grammar(body(choice="auto"), text=text)
    assert family.accepts(grammar, "512")
    assert not family.accepts(grammar, "five")
    assert family.accepts(grammar, WRITTEN[form][0])


# Schemas that cannot be done


NOT = {"type": "object", "properties": {"v": {"not": STRING}}}


@pytest.mark.parametrize("name", FAMILIES)
def test_schema_that_cannot_be_done_gives_any_object_or_is_refused(name, family):
    family = family(name)
    tools = [tool("say", properties(text=STRING)), tool("odd", NOT)]
    rng, n_read = random.Random(name), 0
    request = body(tools, named("odd"))
    grammar = family.grammar(request)
    for _ in range(12):
        tokens = family.sample(grammar, rng)
        if tokens is not None:
            (call,) = family.parse(request, tokens).tool_calls
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            n_read += 1
    assert n_read
    # The other function keeps its schema.
    assert family.grammar(body(tools)) is not None
    tools[1]["function"]["strict"] = True
    for choice in ("required", named("odd")) + (("auto",) if name != "none" else ()):
        with pytest.raises(RequestError, match='"not"') as raised:
            family.grammar(body(tools, choice))
        assert raised.value.status == 400
        assert raised.value.param == "tools[1].function.parameters"


@pytest.mark.parametrize(
    "parameters",
    [
        properties(a=5),
        properties(a={"type": "array", "items": 5}),
        properties(a={"type": {}}),
        properties(a={"type": ["string", 5]}),
        properties(a={"anyOf": [5, STRING]}),
        # Nothing fits these.
        properties(a={"enum": []}),
        properties(a={"type": "string", "enum": [5]}),
        {"type": "object", "additionalProperties": 5},
        {"type": {}},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_schema_that_is_none_gives_any_object_or_is_refused(name, family, parameters):
    family = family(name)
    assert family.grammar(body([tool("f", parameters)], named("f")))
    with pytest.raises(RequestError) as raised:
        family.grammar(body([tool("f", parameters, strict=True)], named("f")))
    assert raised.value.status == 400
    assert raised.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "array", "items": INTEGER},
        {"type": ["string", "null"]},
        {"enum": ["a"], "type": "string"},
        {"type": ["array", "object"]},
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_arguments_are_an_object_whatever_their_schema_says(name, family, parameters):
    family, rng, n_read = family(name), random.Random(name), 0
    request = body([tool("f", parameters)], named("f"))
    grammar = family.grammar(request)
    for _ in range(20):
        tokens = family.sample(grammar, rng)
        if tokens is not None:
            (call,) = family.parse(request, tokens).tool_calls
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
            n_read += 1
    assert n_read
    request = body([tool("f", parameters, strict=True)], named("f"))
    if "object" in parameters["type"]:
        assert family.grammar(request)
    else:
        with pytest.raises(RequestError, match="incompatible types"):
            family.grammar(request)


@pytest.mark.parametrize(
    "date",
    [
        {"type": "string", "pattern": "^[0-9]{4}$"},
        {"type": "string", "enum": ["a", "2000"], "minLength": 2},
    ],
    ids=["pattern", "enum"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_format_cannot_hold_is_written_as_json_if_it_is_strict(
    name, date, family
):
    family = family(name)
    tools = [
        tool("when", properties(date=date), strict=True),
        tool("say", properties(text=STRING)),
    ]
    rng = random.Random(name)
    request = body(tools, named("when"))
    grammar = family.grammar(request)
    for _ in range(10):
        call = family.call(request, grammar, rng)
        check_calls(tools, [call])


ODD_NAMES = [
    'a"b',
    "a b",
    "a<b>&",
    "a\\n",
    "gr\u00fc\u00dfe\U0001f600",
    "x/y",
    "a{0}[1]:=",
    "\x01",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_names_may_have_any_characters(name, family):
    family = family(name)
    rng = random.Random(name)
    for odd in ODD_NAMES:
        tools = [tool(odd, properties(**{odd: INTEGER})), tool("say")]
        request = body(tools, named(odd))
        call = family.call(request, family.grammar(request), rng)
        assert call["function"]["name"] == odd
        check_calls(tools, [call])


def test_every_parser_of_mlx_lm_has_a_grammar():
    assert {*PARSERS} - {"laguna"} == {*FORMATS}


def test_schemas_that_refer_to_themselves_or_are_huge_take_no_time(family):
    loop = {"$ref": "#/$defs/a"}
    wide = {"anyOf": [loop] * 50}
    deep = {"type": "string"}
    for _ in range(150):
        deep = properties(v=deep)
    for parameters in (
        properties(v=loop) | {"$defs": {"a": {"anyOf": [loop, loop]}}},
        properties(v=loop) | {"$defs": {"a": wide}},
        properties(**{f"v{i}": loop for i in range(300)})
        | {"$defs": {"a": {"type": "string", "pattern": "x" * 5000}}},
        deep,
    ):
        for name in ("qwen3_coder", "gemma4", "pythonic"):
            start = time.thread_time()
            try:
                family(name).grammar(body([tool("f", parameters)]))
            except RequestError:
                pass
            assert time.thread_time() - start < 3


@pytest.mark.parametrize("name", FAMILIES)
def test_schemas_that_are_too_much_together_give_any_object(name, family):
    family = family(name)
    tools = [tool("say", properties(text=STRING)), tool("count", properties(n=INTEGER))]

    def check(grammar):
        # Each of them alone has no name.
        return "too big" if "say" in grammar and "text" in grammar else ""

    grammar = family.grammar(body(tools), check=check)
    assert "text" not in grammar
    for one in tools:
        one["function"]["strict"] = True
    with pytest.raises(RequestError, match="too big") as raised:
        family.grammar(body(tools), check=check)
    assert raised.value.param == "tools"


def test_grammar_of_many_tools_is_made_quickly(family):
    tools = [
        tool(
            f"f{i}",
            properties(**{f"a{i}": STRING, "n": INTEGER, "on": {"enum": ["a", None]}}),
        )
        for i in range(1024)
    ]
    for name in ("json_tools", "qwen3_coder", "gemma4"):
        start = time.thread_time()
        grammar = family(name).grammar(body(tools))
        assert family(name).accepts(grammar, "") is False
        assert time.thread_time() - start < 5

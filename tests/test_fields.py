"""Fields that other servers have: honoured, refused by name, or documented as without effect."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import ALONE, Reference, call, plugin, saying, stream, submit

from mlx_lm_ext.bench.random_model import SPECIAL
from mlx_lm_ext.interfaces import Constraint
from mlx_lm_ext.request.fields import FIELDS, GUIDED
from mlx_lm_ext.request.other_fields import REFUSED

README = Path(__file__).parent.parent / "mlx_lm_ext" / "server" / "README.md"
README = README.read_text()
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
END = SPECIAL.index("<|im_end|>")
# Lets an answer end at once.
ENDS = {"logit_bias": {END: 100}}
HELLO = [{"role": "user", "content": "Hello there"}]


def ask(port, path=TEXT, **body):
    """The text, the finish reason and the number of tokens of an answer, which are the same
    when it is streamed."""
    body = ({"messages": HELLO} if path == CHAT else {"prompt": "Hello"}) | body
    status, answer = call(port, "POST", path, body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    n = answer["usage"]["completion_tokens"]
    parts = [event["choices"][0] for event in stream(port, path, **body)]
    texts = [p.get("text", p.get("delta", {}).get("content")) or "" for p in parts]
    assert "".join(texts) == text
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    if body.get("logprobs") is not None:
        assert "".join(choice["logprobs"]["tokens"]) == text
    return text, choice["finish_reason"], n


@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_end_of_text_is_ignored(path, argv, start_server):
    _, port = start_server("llama", *argv)
    assert ask(port, path, **ENDS) == ("", "stop", 1)
    body = dict(ENDS, ignore_eos=True, max_tokens=3)
    assert ask(port, path, **body) == ("<|im_end|>" * 3, "length", 3)
    assert ask(port, path, skip_special_tokens=True, **body) == ("", "length", 3)


@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
def test_answer_ends_at_a_stop_token(argv, start_server):
    engine, port = start_server("llama", *argv)
    reference = Reference(engine.cli_args.model)
    tokens = reference.tokens("Hello", 12)
    n = tokens.index(tokens[7])
    text = reference.tokenizer.decode(tokens[:n])
    body = dict(max_tokens=12, stop_token_ids=[tokens[7], 0])
    assert ask(port, **body) == (text, "stop", n + 1)
    assert ask(port, **body, ignore_eos=True) == (text, "stop", n + 1)
    assert ask(port, **ENDS, stop_token_ids=[0]) == ("", "stop", 1)


def test_answer_has_as_many_tokens_as_it_must_have(start_server):
    engine, port = start_server()
    banned = {"logit_bias": {END: -100}}
    text, _, _ = ask(port, max_tokens=5, **banned)
    assert ask(port, min_tokens=5, max_tokens=5) == (text, "length", 5)
    text, reason, n = ask(port, min_tokens=5, max_tokens=9, **ENDS, logprobs=1)
    assert (len(text), reason, n) == (5, "stop", 6)
    # It counts the tokens of the answer, those of the prompt not.
    assert ask(port, prompt="x" * 50, min_tokens=5, **ENDS)[2] == 6
    ids = {"stop_token_ids": [65], "logit_bias": {END: 50, 65: 100}}
    assert ask(port, min_tokens=2, **ids)[1:] == ("stop", 3)


def test_rows_beside_one_that_must_go_on_end_as_they_would(start_engine):
    engine = start_engine()
    jobs = [submit(engine, "Hello", **ENDS, min_tokens=n) for n in (0, 3, 0, 6)]
    counts = []
    for job in jobs:
        tokens = []
        while not tokens or tokens[-1].finish_reason is None:
            tokens += job.receive(timeout=60)
        counts.append(len(tokens))
    assert counts == [1, 4, 1, 7]


@pytest.mark.parametrize(
    "stop, n, text",
    [
        ("ab", 0, ""),
        ("ab", 2, "abc"),
        # It ends in a token that counts.
        ("bc", 2, "a"),
        ("bc", 3, "abca"),
        (["ab", "c"], 3, "abc"),
        (["abcabc", "xa"], 6, "abc"),
    ],
)
def test_stop_words_count_after_the_tokens_that_an_answer_must_have(
    stop, n, text, start_server
):
    _, port = start_server(plugin=saying("abcabcabc"))
    assert ask(port, stop=stop, min_tokens=n, logprobs=1)[:2] == (text, "stop")


def test_stop_word_is_part_of_the_answer_if_it_is_to_be(start_server):
    _, port = start_server()
    free = dict(max_tokens=30, temperature=1.5, seed=3, logprobs=1)
    text, _, _ = ask(port, **free)
    stop = text[5:8]
    before = text.partition(stop)[0]
    assert ask(port, **free, stop=stop)[0] == before
    answer, reason, _ = ask(port, **free, stop=stop, include_stop_str_in_output=True)
    assert (answer, reason) == (before + stop, "stop")


@pytest.mark.parametrize(
    "body, param",
    [
        ({"min_tokens": -2}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": True}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1, 2.5]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ],
)
def test_what_an_end_cannot_be_is_refused(body, param, start_server):
    _, port = start_server()
    status, answer = call(port, "POST", TEXT, {"prompt": "Hello"} | body)
    assert (status, answer["error"]["param"]) == (400, param)


def test_minimum_is_refused_where_it_cannot_be_kept(start_server):
    _, port = start_server("llama", *ALONE)
    body = {"prompt": "Hello", "max_tokens": 2}
    status, answer = call(port, "POST", TEXT, body | {"min_tokens": 1})
    assert (status, answer["error"]["param"]) == (400, "min_tokens")
    assert call(port, "POST", TEXT, body | {"min_tokens": 0})[0] == 200


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_answer_whose_constraint_ends_it_cannot_be_made_to_go_on(fields, start_server):
    class Free(Constraint):
        def advance(self, token):
            pass

        def fill(self, mask):
            pass

    _, port = start_server(plugin=plugin(mlx_lm_make_constraint=lambda: Free()))
    body = {"prompt": "Hello", "max_tokens": 2}
    status, answer = call(port, "POST", TEXT, body | fields)
    assert (status, answer["error"]["param"]) == (400, *fields)
    off = {name: 0 if name == "min_tokens" else False for name in fields}
    assert call(port, "POST", TEXT, body | off)[0] == 200


def test_fields_of_other_servers_are_refused_unless_they_ask_for_the_default(
    start_server,
):
    _, port = start_server()
    for name, (values, _) in REFUSED.items():
        for value in (*values, None):
            body = {"prompt": "Hello", "max_tokens": 1, name: value}
            assert call(port, "POST", TEXT, body)[0] == 200, (name, value)
        for value in (0.25, "x", {"a": 1}, -2):
            body = {"prompt": "Hello", "max_tokens": 1, name: value}
            status, answer = call(port, "POST", TEXT, body)
            assert (status, answer["error"]["param"]) == (400, name), value
            assert answer["error"]["code"] == "unsupported_value"


def names(text):
    """What is in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


SECTION = README.partition("## Fields of a request")[2].partition("\n## ")[0]
HEAD, _, REST = SECTION.partition("These have **no effect**")
HINTS, _, REST = REST.partition("These are **refused**")


def test_readme_says_of_each_field_what_becomes_of_it():
    # The text before the list has an example.
    _, refused, left, *_ = REST.split("\n\n")
    rows = re.findall(r"^\| (`.*?) \|", HEAD, re.MULTILINE)
    honoured = set().union(*map(names, rows))
    assert names(refused) == set(REFUSED)
    assert not honoured & (names(HINTS) | REFUSED.keys())
    # These may be of several types.
    several = {"stop", "logprobs", "tool_choice", *GUIDED}
    assert honoured <= FIELDS.keys() | several
    assert FIELDS.keys() <= honoured | names(left)


def test_hints_have_no_effect(start_server):
    _, port = start_server()
    for path in (TEXT, CHAT):
        plain = ask(port, path, max_tokens=3)
        for value in (0, 2.5, "x", [1], {"a": True}, True):
            hints = dict.fromkeys(names(HINTS), value)
            assert ask(port, path, max_tokens=3, **hints) == plain


def test_special_tokens_are_added_to_texts_only(start_server):
    _, port = start_server()
    bodies = {TEXT: {"prompt": "Hello"}, CHAT: {"messages": HELLO}}
    for path, value, right in [
        (TEXT, True, 200),
        (TEXT, False, 400),
        (CHAT, False, 200),
        (CHAT, True, 400),
    ]:
        body = bodies[path] | {"add_special_tokens": value, "max_tokens": 1}
        assert call(port, "POST", path, body)[0] == right


@pytest.mark.parametrize("tools", [[1], [{"function": {"strict": True}}]])
def test_text_completions_have_nothing_of_a_chat(tools, start_server):
    _, port = start_server()
    body = {"prompt": "Hello", "max_tokens": 1, "tool_choice": "required"}
    for fields in ({"messages": HELLO}, {"messages": "x"}, {"tools": tools}):
        status, answer = call(port, "POST", TEXT, body | fields)
        assert (status, answer["error"]["param"]) == (400, *fields)
        assert answer["error"]["code"] == "unsupported_value"
    assert call(port, "POST", TEXT, body | {"messages": [], "tools": tools})[0] == 400
    for empty in ([], None):
        assert ask(port, **body, messages=empty, tools=empty) == ask(port, **body)


TOOL = {"type": "function", "function": {"name": "look_up", "description": "x"}}
CALLED = [
    *HELLO,
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "look_up", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "found"},
]
SAID = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("argv", [[], ALONE], ids=["batch", "alone"])
def test_tools_that_the_model_would_not_hear_of_are_refused(
    argv, has_template, start_server, model_folder, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    if not has_template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config.pop("chat_template", None)
        path.write_text(json.dumps(config))
    _, port = start_server("llama", *argv, "--model", str(folder))
    body = {"messages": CALLED, "max_tokens": 1}
    status, answer = call(port, "POST", CHAT, body | {"tools": [TOOL]})
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "--chat-template" in answer["error"]["message"]
    for fields in ({}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        assert call(port, "POST", CHAT, body | fields)[0] == 200


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools | tojson if tools }}" + SAID,
        "{% for t in tools or [] %}{{ t.function.description }}{% endfor %}" + SAID,
        # Only beside what the system says.
        "{% if messages[0].role == 'system' and tools %}{{ tools }}{% endif %}" + SAID,
        # It is not known what it does.
        "{{ tools }}{% if messages | length > 1 %}{{ messages[0].content }}{% endif %}",
        # The model has calls, and may hear of tools from the system.
        "{% if false %}<tool_call>{{ tool_call.name }}</tool_call>{% endif %}" + SAID,
    ],
)
def test_tools_that_the_model_may_hear_of_are_accepted(template, start_server):
    _, port = start_server("llama", "--chat-template", template)
    body = {"messages": HELLO, "max_tokens": 1, "tools": [TOOL]}
    assert call(port, "POST", CHAT, body)[0] == 200

"""The tokens of log probabilities are those of the answer's text."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
from helpers import call, saying, stream, tool_marks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.server import CompletionRequest
from tiny_tokenizers import KINDS, write_model

from mlx_lm_ext.request.request import Token
from mlx_lm_ext.request.served_model import ServedModel
from mlx_lm_ext.server.answer import AnswerParser
from mlx_lm_ext.server.logprobs import chat_logprobs, in_json, text_logprobs

EXACT = [
    "byte level",
    "tekken",
    "metaspace",
    "sentencepiece",
    "sentencepiece without strip",
    "odd sequence",
    "own",
]


@cache
def model_of(kind):
    return ServedModel(None, KINDS[kind](), 0, None, 0, False, None)


def encode(kind, text):
    return model_of(kind).tokenizer.encode(text, add_special_tokens=False)


def parse(kind, ids, stop=(), finish_reason="stop", sizes=(1,), top=()):
    """The text and the chosen tokens of an answer; its tokens come in groups."""
    request = SimpleNamespace(
        model=model_of(kind),
        completion=CompletionRequest("text", "", [], None, None),
        body={},
        args=SimpleNamespace(stop_words=list(stop), logprobs=True),
        initial_state="normal",
    )
    tokens = [Token(i, -0.5, ((i, -0.5), *((t, -1.5) for t in top))) for i in ids]
    if finish_reason == "stop":
        tokens.append(Token(2, -0.5, (), "stop"))
    elif tokens:
        tokens[-1] = tokens[-1]._replace(finish_reason=finish_reason)
    parser, text, chosen = AnswerParser(request), "", []
    sizes = list(sizes)
    while tokens:
        n = sizes[0]
        sizes.append(sizes.pop(0))
        delta = parser.feed(tokens[:n])
        text += delta.text
        chosen += delta.logprobs
        # No token is given out before its text.
        assert sum(len(c.text) for c in chosen) <= len(text)
        if delta.finish_reason:
            break
        tokens = tokens[n:]
    return text, chosen


def parse_chat(text, stop, finish_reason="stop"):
    """The text and the chosen tokens of a chat's answer that may have reasoning and calls."""
    model = model_of("byte level")
    marks = tool_marks("json_tools") | dict(
        has_thinking=True, think_start="<think>", think_end="</think>"
    )
    request = SimpleNamespace(
        model=SimpleNamespace(
            tokenizer=SimpleNamespace(**marks),
            decoder=model.decoder,
            token_bytes=model.token_bytes,
        ),
        completion=CompletionRequest("chat", "", [], [{}], None),
        body={},
        args=SimpleNamespace(stop_words=stop, logprobs=True),
        initial_state="normal",
    )
    answer, chosen = "", []
    answer_parser = AnswerParser(request)
    for token in [*encode("byte level", text), None]:
        last = token is None
        delta = answer_parser.feed(
            [Token(2 if last else token, -0.5, (), finish_reason if last else None)]
        )
        answer += delta.text
        chosen += delta.logprobs
        if delta.finish_reason:
            break
    return answer, chosen


def in_chat(kind, *args, **kwargs):
    return chat_logprobs(parse(kind, *args, **kwargs)[1], model_of(kind).token_bytes)


def in_text(kind, *args, **kwargs):
    return text_logprobs(parse(kind, *args, **kwargs)[1], model_of(kind).token_bytes)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([*" \nab.\0", "\u4e16", "\u4e17", "\U0001f600", "hello"])
    ).map("".join),
    st.lists(st.text("ab \u4e16\U0001f600", min_size=1, max_size=3), max_size=2),
    st.sampled_from(["stop", "length"]),
    st.lists(st.integers(1, 9), min_size=1),
)
@example("  a", [], "stop", [1])
@example("b\u4e16a", ["\u4e16a"], "length", [1])
def test_tokens_and_bytes_add_up_to_the_text(kind, text, stop, finish_reason, sizes):
    text, chosen = parse(kind, encode(kind, text), stop, finish_reason, sizes)
    assert "".join(c.text for c in chosen) == text
    assert b"".join(c.raw for c in chosen) == text.encode()
    offsets = text_logprobs(chosen, model_of(kind).token_bytes)["text_offset"]
    assert offsets == [sum(len(c.text) for c in chosen[:i]) for i in range(len(chosen))]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tokens_add_up_to_what_is_no_text(kind, data):
    n = len(model_of(kind).tokenizer)
    ids = data.draw(st.lists(st.integers(0, n + 3), max_size=40))
    text, chosen = parse(
        kind, ids, sizes=data.draw(st.lists(st.integers(1, 9), min_size=1))
    )
    assert "".join(c.text for c in chosen) == text
    assert [c.token.id for c in chosen] == ids


@pytest.mark.parametrize("stop", [[], ["lo"], ["v"], ["\ufffd"], ["> "]])
@pytest.mark.parametrize(
    "text",
    ["hello <tool_call>{v: 1}</tool_call> lo", "a\ufffd<b", "\U0001f600 <tool_call>v"],
)
def test_tokens_of_a_broken_call_are_those_of_its_text(text, stop):
    said, chosen = parse_chat(text, stop)
    ends = [text.index(word) for word in stop if word in text]
    assert said == text[: min(ends, default=len(text))]
    assert "".join(c.text for c in chosen) == said


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "own"])
def test_part_of_a_character_has_its_bytes_and_the_last_part_its_text(kind):
    n_before = len(encode(kind, "a"))
    content = in_chat(kind, encode(kind, "a\U0001f600"))["content"]
    parts = content[n_before:]
    assert len(parts) > 1
    assert b"".join(bytes(p["bytes"]) for p in parts) == "\U0001f600".encode()
    texts = [p["token"] for p in parts]
    assert texts == [""] * (len(parts) - 1) + ["\U0001f600"]


def test_character_that_is_never_completed_is_shown_as_such():
    ids = encode("byte level", "a\U0001f600")[:-1]
    text, chosen = parse("byte level", ids, finish_reason="length")
    assert "".join(c.text for c in chosen) == text == "a\ufffd"
    assert b"".join(c.raw for c in chosen) == b"a\xf0\x9f"


def test_only_the_first_token_loses_its_space():
    (hello,) = model_of("sentencepiece").tokenizer.convert_tokens_to_ids(["▁hello"])
    content = in_chat("sentencepiece", [hello, hello])["content"]
    assert [e["token"] for e in content] == ["hello", " hello"]
    assert [bytes(e["bytes"]) for e in content] == [b"hello", b" hello"]


def test_token_that_only_the_model_has_is_not_the_first_of_a_text():
    tokenizer = model_of("sentencepiece").tokenizer
    (hello,) = tokenizer.convert_tokens_to_ids(["▁hello"])
    text, chosen = parse("sentencepiece", [len(tokenizer), hello])
    assert [c.text for c in chosen] == ["", text] == ["", "hello"]


def test_token_in_which_a_stop_word_begins_is_cut_there():
    (hello,) = model_of("sentencepiece").tokenizer.convert_tokens_to_ids(["hello"])
    text, chosen = parse("sentencepiece", [hello, hello], stop=["lloh"])
    assert [(c.text, c.raw) for c in chosen] == [(text, b"he")]


def test_all_of_the_most_likely_tokens_of_a_text_completion_have_names():
    tokenizer = model_of("sentencepiece").tokenizer
    names = ["▁hello", "hello", "<0xF0>", "a", "<0x61>"]
    spaced, plain, part, a, byte = tokenizer.convert_tokens_to_ids(names)
    beyond = len(tokenizer)
    first, second = in_text(
        "sentencepiece",
        [plain, a],
        top=[spaced, part, byte, beyond, beyond + 1],
    )["top_logprobs"]
    # Without a space the first text is another one's; with it, it is not.
    assert list(first) == [
        "hello",
        " hello",
        r"bytes:\xf0",
        "a",
        "",
        f"token_id:{beyond + 1}",
    ]
    assert list(second)[:4] == ["a", " hello", r"bytes:\xf0", f"token_id:{byte}"]


def test_chosen_token_is_among_the_most_likely_under_its_own_name():
    (spaced,) = model_of("sentencepiece").tokenizer.convert_tokens_to_ids(["▁hello"])
    (plain,) = model_of("sentencepiece").tokenizer.convert_tokens_to_ids(["hello"])
    logprobs = in_text("sentencepiece", [spaced], top=[plain])
    assert logprobs["tokens"] == ["hello"]
    assert logprobs["top_logprobs"] == [{"hello": -0.5, f"token_id:{plain}": -1.5}]
    content = in_chat("sentencepiece", [spaced], top=[plain])["content"]
    assert [top["id"] for top in content[0]["top_logprobs"]] == [spaced, plain]


def test_token_that_is_unlikely_is_added_to_those_of_a_text_completion():
    chosen = Token(100, -9.0, ((101, -0.5),))
    _, (c,) = parse("byte level", [100], finish_reason="length")
    logprobs = text_logprobs(
        [c._replace(token=chosen)], model_of("byte level").token_bytes
    )
    assert sorted(logprobs["top_logprobs"][0].values()) == [-9.0, -0.5]


def test_bytes_that_nobody_knows_are_null():
    n = KINDS["own of bytes"]().vocab_size
    (entry,) = in_chat("own of bytes", [n - 2])["content"]
    assert (entry["token"], entry["bytes"]) == ("\ufffd\ufffd", None)


@pytest.mark.parametrize(
    "logprob, expected", [(-1.5, -1.5), (-math.inf, -9999.0), (math.nan, -9999.0)]
)
def test_log_probability_that_is_no_number_is_the_least(logprob, expected):
    assert in_json(logprob) == expected


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_stop_word_and_end_have_no_log_probabilities_but_are_counted(
    kind, start_server, tmp_path
):
    model = write_model(tmp_path / "model", model_of(kind).tokenizer)
    ids = encode(kind, "a b\u4e16 hello x")
    _, port = start_server("llama", "--model", str(model), plugin=saying(ids))
    body = dict(prompt="a", max_tokens=50, logprobs=1)
    _, whole = call(port, "POST", "/v1/completions", body)
    assert whole["usage"]["completion_tokens"] == len(ids) + 1
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == len(ids)
    body["stop"] = "\u4e16 h"
    _, cut = call(port, "POST", "/v1/completions", body)
    logprobs = cut["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == cut["choices"][0]["text"] == "a b"
    assert cut["usage"]["completion_tokens"] > len(logprobs["tokens"]) + 2
    events = stream(port, "/v1/completions", **body)
    streamed = [e["choices"][0]["logprobs"] for e in events]
    assert sum((s["tokens"] for s in streamed), []) == logprobs["tokens"]
    assert sum((s["text_offset"] for s in streamed), []) == logprobs["text_offset"]

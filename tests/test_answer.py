"""Answers are parsed to the same text however many tokens arrive together."""

from types import SimpleNamespace

import pytest
from mlx_lm.server import CompletionRequest
from mlx_lm.utils import load_tokenizer

from mlx_lm_ext.request.detokenizing import Decoder
from mlx_lm_ext.request.request import Token
from mlx_lm_ext.server.answer import AnswerParser, Delta


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return load_tokenizer(model_folder())


class ToolTokenizer:
    """A tokenizer whose model thinks and calls tools."""

    has_thinking = has_tool_calling = True
    think_start, think_end = "<think>", "</think>"
    tool_call_start, tool_call_end = "<tool>", "</tool>"
    structural_markers = ()
    response_transitions = {}

    def __init__(self, tokenizer):
        self.encode = tokenizer.encode
        self.decode = tokenizer.decode
        self.get_vocab = tokenizer.get_vocab

    @staticmethod
    def tool_parser(text, tools):
        if not text.startswith("call "):
            raise ValueError("no call")
        return {"name": text[5:], "arguments": {"x": 1}}


def parse(
    tokenizer,
    text,
    pile=1,
    stop=(),
    finish_reason="stop",
    request_type="chat",
    tools=[{}],
    **body,
):
    """Parse a text, or its tokens, ``pile`` tokens at a time; gives the joined answer."""
    request = SimpleNamespace(
        model=SimpleNamespace(tokenizer=tokenizer, decoder=Decoder(tokenizer)),
        completion=CompletionRequest(request_type, "", [], tools, None),
        body=body,
        args=SimpleNamespace(stop_words=list(stop), logprobs=False),
        initial_state="normal",
    )
    ids = tokenizer.encode(text) if isinstance(text, str) else text
    tokens = [Token(i) for i in ids]
    if finish_reason == "stop":
        tokens.append(Token(0, finish_reason="stop"))
    elif finish_reason:
        tokens[-1] = Token(tokens[-1].id, finish_reason=finish_reason)
    parser = AnswerParser(request)
    answer = Delta()
    for i in range(0, len(tokens), pile):
        answer.add(parser.feed(tokens[i : i + pile]))
        if answer.finish_reason:
            break
    return SimpleNamespace(
        text=answer.text,
        reasoning=answer.reasoning,
        calls=answer.tool_calls,
        n_tokens=len(answer.tokens),
        end=answer.finish_reason,
    )


@pytest.mark.parametrize("pile", [1, 3, 1000])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_text_arrives_whole(tokenizer, pile, finish_reason):
    text = "plain text, \u00e9\u4e16\U0001f600 and more"
    answer = parse(tokenizer, text, pile, finish_reason=finish_reason)
    assert (answer.text, answer.end) == (text, finish_reason)


@pytest.mark.parametrize("pile", [1, 3, 1000])
def test_stop_word_across_tokens_and_piles_ends_the_answer(tokenizer, pile):
    answer = parse(tokenizer, "one two three two", pile, stop=["zzz", "two"])
    assert (answer.text, answer.end) == ("one ", "stop")
    # The count does not depend on how many tokens arrive together.
    assert answer.n_tokens == len("one two")


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    tokens = tokenizer.encode("caf\u00e9")[:-1]
    answer = parse(tokenizer, tokens, finish_reason="length")
    assert answer.text == tokenizer.decode(tokens) == "caf\ufffd"


def test_start_of_a_stop_word_at_the_end_is_text(tokenizer):
    assert parse(tokenizer, "half a st", stop=["stop"]).text == "half a st"


@pytest.mark.parametrize("pile", [1, 4, 1000])
def test_reasoning_and_tool_calls_are_set_apart(tokenizer, pile):
    text = "<think>hm, <x</think>so<tool>call f</tool><tool>call g</tool> end"
    answer = parse(ToolTokenizer(tokenizer), text, pile)
    assert answer.reasoning == "hm, <x"
    assert answer.text == "so end"
    assert [c["function"]["name"] for c in answer.calls] == ["f", "g"]
    assert answer.end == "tool_calls"


@pytest.mark.parametrize("pile", [1, 4, 1000])
def test_second_of_parallel_tool_calls_is_dropped_if_one_is_wanted(tokenizer, pile):
    text = "so<tool>call f</tool> and<tool>call g</tool> end"
    answer = parse(ToolTokenizer(tokenizer), text, pile, parallel_tool_calls=False)
    assert [c["function"]["name"] for c in answer.calls] == ["f"]
    assert (answer.text, answer.end) == ("so", "tool_calls")
    assert answer.n_tokens == len("so<tool>call f</tool>")


def test_text_around_the_only_tool_call_is_kept_up_to_it(tokenizer):
    tokenizer = ToolTokenizer(tokenizer)
    pieces = ["so", "<tool>call f", "</tool> and", "."]
    tokenizer.decode = lambda ids: "".join(pieces[i] for i in ids)
    answer = parse(tokenizer, [0, 1, 2, 3], stop=["so long"], parallel_tool_calls=False)
    assert (answer.text, answer.n_tokens) == ("so", 3)
    assert [c["function"]["name"] for c in answer.calls] == ["f"]


def test_tool_call_in_an_answer_to_a_request_without_tools_is_text(tokenizer):
    tokenizer = ToolTokenizer(tokenizer)
    tokenizer.response_transitions = {
        "normal": [("<call>", "tool"), ("<hm>", "reasoning")]
    }
    text = "<think>hm</think>so<tool>call f</tool> and<call>call g<hm>!"
    answer = parse(tokenizer, text, tools=None)
    assert answer.reasoning == "hm!"
    assert answer.text == "so<tool>call f</tool> and<call>call g"
    assert (answer.calls, answer.end) == ([], "stop")


def test_text_completion_has_neither_reasoning_nor_tool_calls(tokenizer):
    text = "<think>hm</think>so<tool>call f</tool>"
    answer = parse(ToolTokenizer(tokenizer), text, request_type="text")
    assert (answer.text, answer.reasoning, answer.calls) == (text, "", [])


def test_marker_cut_off_at_the_end_is_text(tokenizer):
    assert parse(ToolTokenizer(tokenizer), "a <thi").text == "a <thi"


@pytest.mark.parametrize("ending", ["</tool>", ""])
@pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError])
def test_tool_call_that_cannot_be_parsed_stays_text(tokenizer, ending, error):
    def tool_parser(text, tools):
        raise error("no call")

    tokenizer = ToolTokenizer(tokenizer)
    tokenizer.tool_parser = tool_parser
    answer = parse(tokenizer, "so<tool>nonsense" + ending)
    assert answer.text == "so<tool>nonsense" + ending
    assert (answer.calls, answer.end) == ([], "stop")


@pytest.mark.parametrize("pile", [1, 4, 1000])
def test_reasoning_goes_on_after_a_call_in_it(tokenizer, pile):
    text = "<think>hm<tool>call f</tool>\n<tool>what</tool></think>so"
    answer = parse(ToolTokenizer(tokenizer), text, pile)
    assert answer.reasoning == "hm\n<tool>what</tool>"
    assert (answer.text, len(answer.calls)) == ("so", 1)


@pytest.mark.parametrize(
    "text", ["x" * 70_000, "call:a{" * 65, "<arg_key>" * 65, "<atem:" + 'name="' * 65]
)
def test_text_that_would_keep_a_tool_parser_busy_stays_text(tokenizer, text):
    def tool_parser(text, tools):
        raise SystemExit("it was called")

    tokenizer = ToolTokenizer(tokenizer)
    tokenizer.tool_parser = tool_parser
    answer = parse(tokenizer, f"so<tool>{text}</tool>", pile=1000)
    assert (answer.text, answer.calls) == (f"so<tool>{text}</tool>", [])


def test_stop_word_is_not_looked_for_in_reasoning(tokenizer):
    text = "<think>stop</think>go on stop here"
    answer = parse(ToolTokenizer(tokenizer), text, stop=["stop"])
    assert (answer.reasoning, answer.text) == ("stop", "go on ")


FORMAT = {"response_format": {"type": "json_object"}}
IN_VALUE = '{"a": "<think>b</think> <tool>call f</tool>"}'


@pytest.mark.parametrize("pile", [1, 4, 1000])
@pytest.mark.parametrize("reasoning", ["", "hm, {"])
def test_marks_in_an_answer_with_a_format_are_text(tokenizer, pile, reasoning):
    before = f"<think>{reasoning}</think>" if reasoning else ""
    answer = parse(ToolTokenizer(tokenizer), before + IN_VALUE, pile, **FORMAT)
    assert (answer.reasoning, answer.text) == (reasoning, IN_VALUE)
    assert (answer.calls, answer.end) == ([], "stop")


@pytest.mark.parametrize("pile", [1, 4, 1000])
def test_calls_may_stand_in_place_of_an_answer_with_a_format(tokenizer, pile):
    text = "<think>hm</think>\n\n<tool>call f</tool>\n<tool>call g</tool>"
    answer = parse(ToolTokenizer(tokenizer), text, pile, **FORMAT)
    assert [c["function"]["name"] for c in answer.calls] == ["f", "g"]
    assert (answer.reasoning, answer.end) == ("hm", "tool_calls")


CALLED = '{"v": "<|message|>"}'


@pytest.mark.parametrize("pile", [1, 4, 1000])
@pytest.mark.parametrize(
    "said, reasoning, text, has_call",
    [
        ("<|channel|>final<|message|>a <|x|> b", "", "a <|x|> b", False),
        ("no channel", "", "no channel", False),
        (
            "<|channel|>analysis<|message|>hm<|channel|>final<|message|>a",
            "hm",
            "a",
            False,
        ),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
            "<|channel|>commentary<|message|>a<|end|><|start|>assistant"
            f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{CALLED}",
            "hm",
            "a",
            True,
        ),
        (f" to=functions.f<|channel|>commentary json<|message|>{CALLED}", "", "", True),
        (
            "<|channel|>commentary to=python code<|message|>1",
            "",
            "<|channel|>commentary to=python code<|message|>1",
            False,
        ),
    ],
)
def test_channels_become_reasoning_text_and_calls(
    tokenizer, said, reasoning, text, has_call, pile
):
    channels = ToolTokenizer(tokenizer)
    channels.has_thinking = channels.has_tool_calling = False
    channels.chat_template = "... <|channel|>analysis<|message|> ..."
    answer = parse(channels, said, pile)
    assert (answer.reasoning, answer.text) == (reasoning, text)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in answer.calls]
    assert calls == ([("f", CALLED)] if has_call else [])
    answer = parse(channels, said, pile, tools=None)
    assert (answer.reasoning, answer.calls) == (reasoning, [])
    assert answer.text.startswith(text) and (CALLED in answer.text) == has_call
    assert parse(channels, said, pile, request_type="text").text == said

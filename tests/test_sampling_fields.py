"""The sampling fields as clients of other servers send them: values that mean none, and
numbers of languages that have only floats."""

import json

import pytest
from helpers import ALONE, Always, call, plugin, read, submit

from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.fields import make_generation_arguments, parse_body
from mlx_lm_ext.sampling import default as sampling

# What a request with these fields is equal to.
SAME = [
    ({"max_tokens": -1}, {}),
    ({"max_completion_tokens": -1, "max_tokens": 5}, {"max_tokens": 5}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": -1.0}, {"top_k": 0}),
    ({"seed": -1}, {}),
    ({"seed": -1.0}, {}),
    ({"repetition_penalty": 1}, {}),
    ({"repetition_penalty": 1.0}, {}),
    ({"repetition_penalty": 0}, {}),
    ({"repetition_context_size": -1}, {"repetition_context_size": 0}),
    ({"presence_context_size": -1}, {"presence_context_size": 0}),
    ({"frequency_context_size": -1}, {"frequency_context_size": 0}),
    ({"stop": ""}, {}),
    ({"stop": []}, {}),
    ({"stop": {}}, {}),
    ({"stop": [""]}, {}),
    ({"stop": [None]}, {}),
    ({"stop": ["", "a", ""]}, {"stop": "a"}),
    ({"logit_bias": {}}, {}),
    ({"logit_bias": []}, {}),
    ({"temperature": 0.7, "top_p": 0}, {"temperature": 0}),
    ({"temperature": 0.7, "top_p": 1e-12}, {"temperature": 0}),
    ({"temperature": 1e-8}, {"temperature": 0}),
    ({"max_tokens": 100.0}, {"max_tokens": 100}),
    ({"max_completion_tokens": 1e2}, {"max_completion_tokens": 100}),
    ({"top_k": 40.0}, {"top_k": 40}),
    ({"seed": 7.0}, {"seed": 7}),
    ({"seed": -0.0}, {"seed": 0}),
    ({"n": 1.0}, {}),
    ({"logprobs": True, "top_logprobs": 2.0}, {"logprobs": True, "top_logprobs": 2}),
    ({"logprobs": 2.0}, {"logprobs": 2}),
]


def arguments(**body):
    body = parse_body(json.dumps(body).encode())
    return make_generation_arguments(body, make_parser().parse_args(["--top-k", "9"]))


@pytest.mark.parametrize("sent, meant", SAME, ids=str)
def test_values_that_mean_the_same_give_the_same_arguments(sent, meant):
    assert arguments(**sent) == arguments(**meant)


def test_none_that_is_sent_wins_over_the_command_line():
    assert arguments().sampling.top_k == 9
    assert arguments(top_k=-1).sampling.top_k == 0


def test_top_k_may_be_larger_than_any_vocabulary(start_engine):
    engine = start_engine()
    for top_k in (2**30, 2**31 - 1, 2**63 - 1):
        request = submit(engine, "x", max_tokens=1, temperature=1.0, top_k=top_k)
        assert request.args.sampling.top_k == 0
        read(request)


@pytest.mark.parametrize("argv", [[], ["--max-kv-bytes", "200000"], ALONE])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_largest_integers_of_all_types_are_no_limit(name, argv, start_engine):
    engine = start_engine("llama", *argv, "--context-length", "64")
    for most in (2**31 - 1, 2**32 - 1, 2.0**53, 2**63 - 1, 2**64 - 1):
        request = submit(engine, "x" * 60, **{name: most})
        assert request.args.max_tokens == 4
        assert len(read(request)) <= 4


@pytest.mark.parametrize(
    "body",
    [
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_k": float("nan")},
        {"seed": 0.5},
        {"seed": 1e300},
        {"seed": float("inf")},
        {"max_tokens": 1e400},
        {"max_tokens": "2"},
        {"stop": False},
        {"stop": 0},
        {"stop": ["a", 7]},
        {"stop": {"a": 1}},
        {"logit_bias": ""},
        {"logit_bias": [[1, 2]]},
        {"repetition_penalty": True},
        {"repetition_penalty": -1},
        {"temperature": -1},
        {"top_p": -1},
    ],
    ids=str,
)
def test_what_may_mean_something_else_is_refused_by_name(body):
    with pytest.raises(RequestError) as error:
        arguments(**body)
    assert error.value.param == next(iter(body))


@pytest.mark.parametrize("argv", [[], ALONE])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_top_p_of_0_takes_the_most_likely_token_whatever_else_is_sent(
    argv, on_cpu, start_engine, monkeypatch
):
    monkeypatch.setattr(sampling, "on_cpu", lambda: on_cpu)
    engine = start_engine("llama", *argv)
    greedy = read(submit(engine, "hello", max_tokens=12))
    for more in ({}, {"top_k": 3}, {"xtc_probability": 1, "xtc_threshold": 0.001}):
        body = dict(max_tokens=12, temperature=1e6, top_p=0, **more)
        assert read(submit(engine, "hello", **body)) == greedy


@pytest.mark.parametrize("argv", [[], ALONE])
def test_seed_of_minus_1_is_another_one_each_time(argv, start_engine):
    engine = start_engine("llama", *argv)
    body = dict(max_tokens=12, temperature=1.5)
    answers = set()
    for _ in range(3):
        # Alone, this would decide what follows.
        read(submit(engine, "hello", seed=5, **body))
        answers.add(tuple(read(submit(engine, "hello", seed=-1, **body))))
    assert len(answers) == 3


def test_sampler_of_a_plugin_sees_one_value_for_none(start_engine):
    seen = []

    class Watching(Always):
        def __init__(self, args, request, tokenizer):
            super().__init__(args, request, tokenizer)
            seen.append((request.args, request.body))

    engine = start_engine(
        "llama",
        "--sampler",
        "always",
        plugin=plugin(mlx_lm_register_samplers=lambda: [Watching]),
    )
    none = dict(top_k=-1, seed=-1, repetition_penalty=1, stop="", logit_bias=[])
    for fields in (none, dict(top_k=0)):
        read(submit(engine, "x", max_tokens=1.0, temperature=1, top_p=0, **fields))
    (sent, body), (meant, _) = seen
    assert sent == meant
    assert (sent.sampling.temperature, sent.sampling.top_p) == (0.0, 1.0)
    assert body["top_k"] == 0 and not {"seed", "stop", "logit_bias"} & set(body)


def test_answer_to_a_client_that_sends_none_for_everything(start_server):
    _, port = start_server()
    body = dict(top_k=-1, seed=-1, stop="", logit_bias={}, repetition_penalty=1.0)
    body |= dict(prompt="hello", max_tokens=4.0, min_p=0, presence_penalty=0.0)
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 4

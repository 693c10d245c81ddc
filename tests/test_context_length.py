"""How many tokens a model takes: what configurations say, and what requests may ask for."""

from pathlib import Path

import mlx_lm.models
import pytest
from helpers import call, read, submit

from mlx_lm_ext.bench.random_model import write_model
from mlx_lm_ext.engine.context_length import (
    TABLE_MODELS,
    find_context_length,
    find_vocabulary_size,
)
from mlx_lm_ext.errors import RequestError

GPT2 = dict(
    model_type="gpt2",
    n_ctx=64,
    n_embd=32,
    n_head=2,
    n_layer=2,
    n_positions=48,
    layer_norm_epsilon=1e-5,
)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 512}, 512),
        ({"n_ctx": 1024}, 1024),
        ({"max_sequence_length": 2048}, 2048),
        ({"max_seq_len": 2048, "text_config": {}}, 2048),
        ({"text_config": {"max_position_embeddings": 100}}, 100),
        ({"block_size": 512}, 512),
        ({"block_size": 32, "max_position_embeddings": 4096}, 4096),
    ],
    ids=str,
)
def test_length_is_read_from_the_keys_of_all_architectures(config, expected):
    assert find_context_length(config) == expected


@pytest.mark.parametrize(
    "length, rope, expected",
    [
        (32768, dict(type="yarn", factor=4.0), 131072),
        (32768, dict(rope_type="yarn", factor=4), 131072),
        (32768, dict(type="linear", factor=4.0), 131072),
        (4096, dict(type="dynamic", factor=2.0), 8192),
        # Some configurations give the stretched length, others the original one.
        (32768, dict(type="yarn", factor=4.0, original=32768), 131072),
        (163840, dict(type="deepseek_yarn", factor=40, original=4096), 163840),
        # These always give the stretched length.
        (131072, dict(rope_type="llama3", factor=32.0, original=8192), 131072),
        (131072, dict(type="longrope", factor=32.0, original=4096), 131072),
        (4096, dict(type="mrope", factor=4.0), 4096),
        (4096, dict(rope_type="default", factor=4.0), 4096),
        (4096, dict(type="yarn"), 4096),
        (4096, dict(type="yarn", factor=float("inf")), 4096),
        (4096, dict(factor=None), 4096),
    ],
    ids=str,
)
def test_length_is_stretched_as_the_rope_is(length, rope, expected):
    if "original" in rope:
        rope = rope | {"original_max_position_embeddings": rope["original"]}
    config = {"max_position_embeddings": length}
    assert find_context_length(config | {"rope_scaling": rope}) == expected
    assert find_context_length(config | {"rope_parameters": rope}) == expected
    layers = {"rope_parameters": {"full_attention": rope, "sliding_attention": {}}}
    assert find_context_length(config | layers) == expected
    assert find_context_length({"text_config": config | layers}) == expected


def test_length_of_gemma3_is_stretched_already():
    config = {
        "model_type": "gemma3_text",
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert find_context_length(config) == 131072


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": "yarn"},
        {"rope_scaling": [1]},
        {"rope_parameters": 5},
        {"rope_parameters": {"full_attention": None, "sliding_attention": [1]}},
        {"rope_scaling": {"type": ["yarn"], "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": "2"}},
        {"rope_scaling": {"type": "yarn", "factor": 1e308}},
        {"rope_scaling": {"type": "yarn", "factor": 10**400}},
        {"rope_scaling": {"type": "yarn", "factor": float("nan")}},
        {"n_ctx": "64", "n_positions": -1, "max_seq_len": True},
        {"text_config": "x"},
        {"text_config": [1]},
        {"text_config": {"max_position_embeddings": None}},
        {"model_type": "gpt2", "n_positions": "48"},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_no_lengths(config):
    config = {"max_position_embeddings": 4096} | config
    assert find_context_length(config) == 4096
    assert find_context_length(config, 100) == 100


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"vocab_size": 300}, 300),
        ({"vocab_size": 300, "text_config": {"vocab_size": 200}}, 200),
        ({"vocab_size": 300, "text_config": {"vocab_size": None}}, 300),
        ({"vocab_size": None}, None),
        ({"vocab_size": "300"}, None),
    ],
    ids=str,
)
def test_size_of_the_vocabulary_is_that_of_the_text(config, expected):
    assert find_vocabulary_size(config) == expected


@pytest.mark.parametrize("config", [{}, {"max_position_embeddings": 4096}])
def test_argument_takes_precedence(config):
    assert find_context_length(config, 100) == 100
    assert find_context_length(config, 10_000) == 10_000


def test_all_models_with_a_table_of_positions_are_known():
    (folder,) = mlx_lm.models.__path__
    found = [
        path.stem
        for path in sorted(Path(folder).glob("*.py"))
        if "wpe = nn.Embedding(" in path.read_text(encoding="utf-8")
    ]
    assert tuple(found) == TABLE_MODELS


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model that has 48 positions, and says that it takes 64."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    return write_model(folder, "gpt2", GPT2)


def test_prompt_beyond_the_table_of_positions_is_refused(gpt2, start_engine):
    engine = start_engine("llama", "--model", str(gpt2))
    assert len(read(submit(engine, "x" * 40, max_tokens=100))) <= 8
    with pytest.raises(RequestError) as error:
        submit(engine, "x" * 48)
    assert error.value.code == "context_length_exceeded"


def test_argument_beyond_the_table_of_positions_is_refused(gpt2, start_engine):
    allow = "--allow-models", str(gpt2)
    engine = start_engine("llama", *allow, "--context-length", "49")
    with pytest.raises(RequestError, match="--context-length may be 48 at most"):
        submit(engine, "x", model=str(gpt2))


def test_draft_model_with_fewer_positions_is_refused(gpt2, start_engine):
    allow = "--allow-models", str(gpt2)
    engine = start_engine("llama", *allow)
    with pytest.raises(RequestError, match="48 positions, and the model takes 4096"):
        submit(engine, "x", draft_model=str(gpt2))
    engine = start_engine("llama", *allow, "--context-length", "48")
    assert submit(engine, "x", max_tokens=1, draft_model=str(gpt2)).model


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_answer_shrinks_to_what_fits(name, start_server):
    _, port = start_server()
    body = {
        "prompt": "x" * 4090,
        name: 65535,
        "logit_bias": {i: -100 for i in range(3)},
    }
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "length"


def test_prompt_that_leaves_no_room_is_refused(start_server):
    _, port = start_server("llama", "--context-length", "100")
    for n in (100, 5000):
        body = {"prompt": "x" * n, "max_tokens": 1}
        status, answer = call(port, "POST", "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert answer["error"]["code"] == "context_length_exceeded"
        assert "100 tokens" in answer["error"]["message"]

"""The sampling that a model's ``generation_config.json`` gives: which value is used, and what
a missing or wrong file does."""

import json
import shutil
import sys

import pytest
from helpers import ALONE, read, submit
from processes import run_program

from mlx_lm_ext.engine.generation_config import FILE, read_sampling
from mlx_lm_ext.errors import RequestError

GIVEN = dict(
    do_sample=True,
    temperature=0.6,
    top_p=0.9,
    top_k=20,
    min_p=0.1,
    repetition_penalty=1.2,
)


@pytest.fixture
def with_config(model_folder, tmp_path):
    """Makes the folder of a model whose generation_config.json is this."""

    def make(config, name="model"):
        folder = shutil.copytree(model_folder(), tmp_path / name)
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / FILE).write_text(text)
        return folder

    return make


def serve(start_engine, folder, *argv):
    return start_engine("llama", "--model", str(folder), *argv)


def sampled(engine, **body):
    """What a request is sampled with."""
    request = submit(engine, "x", max_tokens=1, **body)
    read(request)
    s = request.args.sampling
    penalty = request.args.logits.repetition_penalty
    return s.temperature, s.top_p, s.top_k, s.min_p, penalty


def test_request_wins_over_the_command_line_and_that_over_the_model(
    with_config, start_engine
):
    folder = with_config(GIVEN)
    engine = serve(start_engine, folder)
    assert sampled(engine) == (0.0, 1.0, 0, 0.0, 0.0)
    engine = serve(start_engine, folder, "--generation-config", "model")
    assert sampled(engine) == (0.6, 0.9, 20, 0.1, 1.2)
    none = dict(top_p=1, top_k=-1, min_p=0, repetition_penalty=1)
    assert sampled(engine, temperature=1, **none) == (1, 1, 0, 0, 0)
    assert sampled(engine, top_p=0)[:2] == (0.0, 1.0)
    # Arguments win even if they are the defaults, or abbreviated.
    argv = ["--generation-config", "model", "--temp", "0", "--top-p", "1", "--min", "0"]
    engine = serve(start_engine, folder, *argv)
    assert sampled(engine) == (0.0, 1.0, 20, 0.0, 1.2)
    assert sampled(engine, temperature=0.5)[0] == 0.5


def test_requests_served_alone_are_sampled_so_too(with_config, start_engine):
    folder = with_config({"do_sample": True, "temperature": 0.9, "top_k": 1})
    engine = serve(start_engine, folder, "--generation-config", "model", *ALONE)
    assert sampled(engine)[:3] == (0.9, 1.0, 1)
    greedy = read(submit(engine, "hello", max_tokens=8, temperature=0))
    assert read(submit(engine, "hello", max_tokens=8)) == greedy


@pytest.mark.parametrize(
    "config, values",
    [
        ({}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": None, "top_k": None}, {}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"eos_token_id": 2, "max_new_tokens": 9, "penalty_alpha": 0.6}, {}),
    ],
)
def test_file_means_what_it_means_for_transformers(config, values, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(config))
    assert read_sampling(tmp_path) == values


def test_each_model_that_requests_name_has_its_own(with_config, start_engine):
    folder = with_config({"temperature": 0.5})
    other = with_config({"temperature": 0.7}, "other")
    plain = with_config({}, "plain")
    engine = serve(
        start_engine, folder, "--generation-config", "model", "--allow-models", "any"
    )
    models = (None, str(other), str(plain), str(folder))
    assert [sampled(engine, model=m)[0] for m in models] == [0.5, 0.7, 0.0, 0.5]


BROKEN = ["{", "[]", '{"temperature": "hot"}', '{"top_p": 2}', '{"top_k": 1.5}', "\0"]
BROKEN += ['{"do_sample": "no"}', '{"do_sample": 0}']


@pytest.mark.parametrize("text", BROKEN)
def test_wrong_file_of_a_model_that_a_request_names_is_one_line(
    text, with_config, start_engine
):
    folder, other = with_config({}), with_config(text, "other")
    argv = ["--allow-models", "any", "--generation-config"]
    engine = serve(start_engine, folder, *argv, "model")
    with pytest.raises(RequestError, match=FILE) as error:
        sampled(engine, model=str(other))
    assert error.value.status == 404 and "\n" not in str(error.value)
    assert sampled(engine)[0] == 0.0
    if text[0] == "{":
        engine = serve(start_engine, folder, *argv, "none")
        assert sampled(engine, model=str(other))[0] == 0.0


def test_wrong_file_of_the_served_model_ends_the_start_with_one_line(with_config):
    folder = with_config('{"temperature": -1}')
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--log-level", "WARNING", "--model", str(folder)]
    result = run_program([*command, "--generation-config", "model"])
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert f"{FILE} cannot be used: temperature must be at least 0" in line


def test_missing_file_changes_nothing(model_folder, start_engine):
    engine = start_engine("llama", "--generation-config", "model")
    assert sampled(engine) == (0.0, 1.0, 0, 0.0, 0.0)

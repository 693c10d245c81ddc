"""The default model in a started server, asked by the ``openai`` client."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import server_process
from helpers import Reference

from mlx_lm_ext import demo_model

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WORDS = "one river two hills three birds four stones five roads six clouds".split()


@pytest.fixture(scope="module")
def server():
    with server_process("--use-prompt-cache") as (port, lines, _):
        yield port, lines


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server[0]}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


def test_start_says_which_model_is_served(server):
    assert any(f"serving {demo_model.NAME}" in line for line in server[1])


def test_chat_answers_the_question(client):
    answer = client.chat.completions.create(model="default_model", messages=QUESTION)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8


def test_streamed_chat_gives_the_same_and_its_usage(client):
    chunks = client.chat.completions.create(
        model=demo_model.NAME,
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = chunks
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == "The capital of France is Paris."
    assert last.usage.completion_tokens == 8


def test_next_turn_takes_the_first_from_the_cache(client):
    first = client.chat.completions.create(model="default_model", messages=QUESTION)
    turn = [
        *QUESTION,
        first.choices[0].message.model_dump(include={"role", "content"}),
        {"role": "user", "content": "And of Italy?"},
    ]
    answer = client.chat.completions.create(
        model="default_model", messages=turn, max_tokens=8
    )
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens


def test_models_lists_the_default_model(client):
    assert client.models.list().data[0].id == demo_model.NAME


def test_error_reaches_the_client_as_its_own(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="default_model", messages=QUESTION, max_tokens=0
        )
    assert error.value.param == "max_tokens"


def test_32_prompts_at_once_get_the_text_of_generate(client):
    reference = Reference(demo_model.ensure(quantized=False))
    prompts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 8]) + f" {i}" for i in range(32)]
    expected = [reference.text(p, 6) for p in prompts]

    def whole(prompt):
        answer = client.completions.create(
            model="default_model", prompt=prompt, max_tokens=6
        )
        return answer.choices[0].text

    def streamed(prompt):
        chunks = client.completions.create(
            model="default_model", prompt=prompt, max_tokens=6, stream=True
        )
        return "".join(c.choices[0].text for c in chunks)

    with ThreadPoolExecutor(32) as pool:
        for answer in (whole, streamed):
            assert list(pool.map(answer, prompts)) == expected

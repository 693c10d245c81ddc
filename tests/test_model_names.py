"""Which models a request may name, and what it is told of the others."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from helpers import call, complete, read, submit
from huggingface_hub import constants
from mlx_lm.server import ModelDescription
from processes import PATIENCE
from tiny_models import make_adapter

from mlx_lm_ext.engine import model_names
from mlx_lm_ext.engine import models as model_provider
from mlx_lm_ext.engine.models import MAX_DESCRIBED
from mlx_lm_ext.errors import RequestError

MODELS = "--allow-models"


@pytest.fixture
def folders(model_folder, tmp_path):
    """Folders with models: two that may be named, and one that may not."""
    for name in ("models/a", "models/b", "secret/c"):
        shutil.copytree(model_folder(), tmp_path / name)
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "secret" / "broken").mkdir()
    return tmp_path


def refusal(engine, **names):
    with pytest.raises(RequestError) as error:
        submit(engine, "x", max_tokens=1, **names)
    assert error.value.status == 404
    return str(error.value)


def test_only_the_served_model_is_loaded_by_default(
    folders, model_folder, start_engine, tmp_path
):
    adapter = str(make_adapter(tmp_path / "adapter", model_folder()))
    engine = start_engine("llama", "--adapter-path", adapter)
    served = str(model_folder())
    for names in ({}, {"model": served}, {"adapters": adapter}):
        assert submit(engine, "x", max_tokens=1, **names).model is not None
    secret = str(folders / "secret")
    for field in ("model", "adapters", "draft_model"):
        told = {
            refusal(engine, **{field: f"{secret}/{name}"}).replace(f"secret/{name}", "")
            for name in ("c", "broken", "nothing")
        }
        # Whether something is there cannot be told apart.
        assert len(told) == 1
        assert "--allow-models" in told.pop()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "Expecting value"),
        ("[1]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ("[" * 100_000, "recursion"),
        ("\N{BYTE ORDER MARK}{}", "BOM"),
        (None, "Is a directory"),
    ],
)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json"]
)
def test_broken_file_of_a_model_is_named(name, text, reason, folders, start_engine):
    path = folders / "models" / "a" / name
    if text is None:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_text(text)
    served = "--model", str(folders / "models" / "b"), "--generation-config", "model"
    engine = start_engine("llama", *served, MODELS, str(folders / "models" / "*"))
    answer = refusal(engine, model=str(path.parent))
    assert "\n" not in answer
    if (name, text) == ("config.json", None):
        assert "it has no config.json" in answer
    else:
        assert f"its {name} cannot be used: " in answer and reason in answer
    # At the start too, where the weights are loaded first.
    provider = engine.model_provider
    with pytest.raises(RequestError, match=name):
        provider.switch_to((str(path.parent), None, None))


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("models/a", True),
        ("models/b/.", True),
        ("models/x/../a", True),
        ("secret/c", False),
        ("models/../secret/c", False),
        ("models/a/../../secret/c", False),
        ("models", False),
        ("models/link/../c", False),
        ("models/a\0", False),
        ("models/\ud800/..", False),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_pattern_allows_folders_whatever_the_spelling(
    name, allowed, relative, folders, start_engine, monkeypatch
):
    monkeypatch.chdir(folders)
    (folders / "models" / "link").symlink_to(folders / "secret" / "broken")
    root = "" if relative else f"{folders}/"
    engine = start_engine("llama", MODELS, f"{root}models/*")
    if allowed:
        assert submit(engine, "x", max_tokens=1, model=root + name)
    else:
        refusal(engine, model=root + name)


def test_link_that_a_pattern_allows_is_followed(folders, start_engine):
    (folders / "models" / "link").symlink_to(folders / "secret" / "c")
    engine = start_engine("llama", MODELS, f"{folders}/models/*")
    job = submit(engine, "x", max_tokens=1, model=f"{folders}/models/link")
    assert job.model.key[0] == os.path.realpath(folders / "secret" / "c")


def test_model_that_may_be_named_is_known_by_its_id(
    folders, model_folder, start_server, monkeypatch
):
    monkeypatch.chdir(folders)
    cache = folders / "cache"
    shutil.copytree(model_folder(), cache / "models--some--model" / "snapshots" / "1")
    patterns = [f"{folders}/models/*", "some/*"]
    (folders / "link").symlink_to(model_folder())
    _, port = start_server("llama", "--model", "link", MODELS, *patterns)
    monkeypatch.setattr(
        model_provider,
        "cached_snapshot",
        {"some/model": str(cache / "models--some--model" / "snapshots" / "1")}.get,
    )
    served = os.path.realpath(model_folder())
    known = [str(folders / "models/a"), "models/b", "some/model", "link", served]
    for name in known:
        for path in (name, quote(name, safe="")):
            status, model = call(port, "GET", f"/v1/models/{path}")
            assert (status, model.get("id")) == (200, name)
    for name in (
        "models/empty",
        "models/none",
        "secret/c",
        "some/none",
        "%00",
        "a/../",
    ):
        assert call(port, "GET", f"/v1/models/{name}")[0] == 404
        assert call(port, "GET", f"/v1/models/{folders}/{name}")[0] == 404


@pytest.mark.parametrize("pattern", ["any", "/*"])
def test_name_that_is_too_long_for_a_file_is_not_found(pattern, start_server):
    _, port = start_server("llama", MODELS, pattern)
    for name in ("x" * 5000, "/" + "x" * 5000, "a/" * 2500):
        assert call(port, "GET", f"/v1/models/{name}")[0] == 404
    for name in ("x" * 4000, "/" + "x" * 4000, "a/" * 2000):
        for field in ("model", "adapters", "draft_model"):
            body = {"prompt": "x", field: name}
            status, answer = call(port, "POST", "/v1/completions", body)
            assert (status, answer["error"]["param"]) == (404, field)


def test_none_may_be_named_if_the_list_is_empty(start_engine, monkeypatch):
    monkeypatch.setattr(model_names, "snapshot_download", None)
    refusal(start_engine("llama", MODELS), model="cached/model")


def test_model_of_the_cache_is_loaded_from_there_alone(
    model_folder, start_server, monkeypatch
):
    def snapshot_download(name, local_files_only):
        assert local_files_only
        if name != "cached/model":
            raise FileNotFoundError
        return str(model_folder("llama"))

    monkeypatch.setattr(model_names, "snapshot_download", snapshot_download)
    monkeypatch.setattr(model_provider, "download", None)
    _, port = start_server("lfm2")
    assert complete(port, "hello", max_tokens=2, model="cached/model")
    body = {"prompt": "x", "model": "other/model"}
    assert call(port, "POST", "/v1/completions", body)[0] == 404


def cache_repository(cache, name, files, links=()):
    """Make a repository in a Hugging Face cache."""
    snapshot = cache / name / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / name / "refs").mkdir()
    (cache / name / "refs" / "main").write_text("0123")
    for file in files:
        (snapshot / file).touch()
    for file in links:
        (snapshot / file).symlink_to("nowhere")


@pytest.mark.parametrize(
    "argv, listed",
    [
        ([], ["a/model", "b/model"]),
        ([MODELS], []),
        ([MODELS, "b/*"], ["b/model"]),
        ([MODELS, "any"], ["a/model", "b/model"]),
    ],
)
def test_models_that_may_be_named_are_listed(
    argv, listed, start_server, monkeypatch, tmp_path
):
    files = ["config.json", "tokenizer_config.json", "model.safetensors"]
    cache_repository(tmp_path, "models--b--model", files)
    cache_repository(tmp_path, "models--a--model", files)
    cache_repository(tmp_path, "datasets--a--set", files)
    cache_repository(tmp_path, "models--a--tokenizer", files[:2])
    cache_repository(tmp_path, "models--a--half", files[:2], links=files[2:])
    (tmp_path / "models--a--nothing").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    engine, port = start_server("llama", *argv)
    _, answer = call(port, "GET", "/v1/models")
    names = [model["id"] for model in answer["data"]]
    assert names == [engine.cli_args.model_id, *listed]


def test_model_with_a_broken_chat_template_takes_texts(
    folders, model_folder, start_server
):
    (folders / "models/a/chat_template.jinja").write_text("{{ messages")
    _, port = start_server("llama", MODELS, f"{folders}/models/*")
    model = f"{folders}/models/a"
    assert complete(port, "hello", max_tokens=2, model=model)
    body = {"messages": [{"role": "user", "content": "x"}], "model": model}
    status, answer = call(port, "POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "messages")


def test_draft_model_that_knows_more_tokens_is_refused(folders, start_engine):
    config = folders / "models/b/config.json"
    larger = json.loads(config.read_text())
    larger["vocab_size"] += 1
    config.write_text(json.dumps(larger))
    engine = start_engine("llama", MODELS, f"{folders}/models/*")
    draft = f"{folders}/models/"
    assert submit(engine, "x", max_tokens=1, draft_model=draft + "a").model
    with pytest.raises(RequestError) as error:
        submit(engine, "x", max_tokens=1, draft_model=draft + "b")
    assert (error.value.status, error.value.param) == (400, "draft_model")


def test_model_is_described_once_for_all_who_ask_at_a_time(
    folders, start_engine, monkeypatch
):
    engine = start_engine("llama", MODELS, "any")
    loaded, together = [], threading.Barrier(8)

    def load_tokenizer(path, *args):
        loaded.append(path)
        return load(path, *args)

    load = model_provider.load_tokenizer
    monkeypatch.setattr(model_provider, "load_tokenizer", load_tokenizer)
    path = str(folders / "models" / "a")
    model = ModelDescription(path, "default_model", None)

    def ask(_):
        together.wait(PATIENCE)
        return engine.model_provider.describe(model)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(ask, range(8))))) == 1
    assert len(loaded) == 1


def test_error_has_the_spelling_of_the_request(folders, start_engine, monkeypatch):
    monkeypatch.chdir(folders)
    engine = start_engine("llama", MODELS, "models/*")
    message = refusal(engine, model="models/empty")
    assert "'models/empty'" in message and str(folders) not in message


def test_spellings_of_a_path_are_one_model(folders, start_engine, monkeypatch):
    monkeypatch.chdir(folders)
    engine = start_engine("llama", MODELS, "any")
    path = str(folders / "models" / "a")
    (folders / "link").symlink_to(path)
    spellings = [path, f"{path}/", f"{path}/.", path.replace("/", "//"), "link"]
    models = {id(submit(engine, "x", max_tokens=1, model=s).model) for s in spellings}
    assert len(models) == 1


def test_model_that_is_loaded_is_the_one_that_was_described(folders, start_engine):
    engine = start_engine("llama", MODELS, f"{folders}/models/*")
    request = submit(engine, "x", max_tokens=1, model=f"{folders}/models/a")
    read(request)
    again = submit(engine, "x", max_tokens=1, model=f"{folders}/models/a")
    assert again.model is request.model
    assert engine.model_provider.tokenizer is request.model.tokenizer


def test_models_that_are_kept_are_bounded(model_folder, start_engine, tmp_path):
    engine = start_engine("llama", MODELS, "any")
    provider = engine.model_provider
    first = submit(engine, "x", max_tokens=1).model
    for i in range(MAX_DESCRIBED + 3):
        folder = shutil.copytree(model_folder(), tmp_path / str(i))
        submit(engine, "x", max_tokens=1, model=str(folder))
    assert len(provider._served) <= MAX_DESCRIBED + 1
    assert submit(engine, "x", max_tokens=1).model is first

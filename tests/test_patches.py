"""The patches: listed, explained and small; each one proven by the test that it adds to mlx-lm's;
all of them harmless to mlx-lm's own tests and to this package.

The slow tests need the sources of mlx-lm, which have its tests, from pip.
"""

import ast
import os
import re
import shutil
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Set

import mlx_lm
import pytest
from processes import run_program

from mlx_lm_ext.bench.random_model import LLAMA, write_model

PATCHES = Path(__file__).parent.parent / "patches"
SERIES = (PATCHES / "series").read_text().split()
# mlx-lm's tests load this model, in whose place is a tiny one of the same architecture.
MODEL = "models--mlx-community--Qwen1.5-0.5B-Chat-4bit"
# What only that model can pass: "!" is the first token of its vocabulary, and it says what it is
# asked to say.
NEED_TRAINED_MODEL = {
    "tests/test_generate.py::TestGenerate::test_generate_with_logit_bias",
    "tests/test_generate.py::TestGenerate::test_stream_generate_input_embeddings",
    "tests/test_generate.py::TestGenerate::test_stream_generate_input_embeddings_prefill",
}
# What uses the parts of mlx-lm that the patches change, of this package's tests.
OWN_TESTS = [
    "test_upstream_contract.py",
    "test_chat_templates.py",
    "test_command_line.py::test_other_arguments_have_the_defaults_of_upstream",
    "test_engine.py::test_what_upstream_serves_alone_is_served_alone",
    "test_operation.py::test_import_of_mlx_lm_keeps_the_limit_of_open_files",
    "test_operation.py::test_plugin_that_imports_mlx_lm_does_not_lower_the_limit",
    "test_prompt_cache.py",
]


def header(name):
    return (PATCHES / name).read_text().split("\n---\n")[0]


def changes(name):
    """The changed lines of each file of a patch."""
    body = (PATCHES / name).read_text().split("\n---\n")[1]
    files = re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^diff |\Z)", body, re.M | re.S)
    return {file: re.findall(r"^[+-].*$", lines, re.M) for file, lines in files}


def is_test(file):
    return file.startswith("tests/")


def own_tests(name):
    """The names of the tests that a patch adds."""
    lines = [line for f, c in changes(name).items() if is_test(f) for line in c]
    return re.findall(r"^\+    def (test_\w+)\(", "\n".join(lines), re.M)


def apply(folder, names, *options):
    for name in names:
        command = ["git", "apply", *options, PATCHES / name]
        result = run_program(command, cwd=folder)
        assert result.returncode == 0, (name, result.stderr)


def test_series_lists_every_patch():
    assert sorted(SERIES) == sorted(p.name for p in PATCHES.glob("*.patch"))


@pytest.mark.parametrize("name", SERIES)
def test_every_patch_says_what_it_is_for(name):
    status = r"^Upstream-Status: (Pending|(Submitted|Backport|Denied) \[\S+\])$"
    for line in (r"^Subject: \w+: .+$", status, r"^Applies-To: mlx-lm .+$"):
        assert re.search(line, header(name), re.M), line
    removes = r"^Removes: (?:nothing here \(.+\)|(\S+)::(\w+) \(.+\))$"
    file, function = re.search(removes, header(name), re.M).groups()
    if file is not None:
        # What a merge will remove here must exist.
        assert f"def {function}(" in (PATCHES.parent / file).read_text()


@pytest.mark.parametrize("name", SERIES)
def test_a_patch_is_small_and_brings_a_test(name):
    assert sum(len(c) for f, c in changes(name).items() if not is_test(f)) <= 60
    assert own_tests(name)


@pytest.fixture
def patched(tmp_path):
    """A folder with the installed mlx-lm, to which all patches are applied."""
    target, source = tmp_path / "mlx_lm", Path(mlx_lm.__file__).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    apply(tmp_path, SERIES, "--exclude=tests/*")
    return tmp_path


def test_all_apply_to_the_installed_mlx_lm(patched):
    changed = (patched / "mlx_lm" / "server.py").read_text()
    functions = {
        node.name: ast.unparse(node)
        for node in ast.parse(changed).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "server_class, handler_class)" in functions["run"]
    assert "setup_arg_parser()" in functions["main"]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The sources of the installed mlx-lm."""
    folder = tmp_path_factory.mktemp("sdist")
    requirement = f"mlx-lm=={version('mlx-lm')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder]
    pip = run_program([*command, "--no-binary", "mlx-lm", requirement])
    if pip.returncode != 0 and "NewConnectionError" in pip.stderr:
        pytest.skip("pip reaches no package index")
    assert pip.returncode == 0, pip.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    return tree


@pytest.fixture
def make_tree(sdist, tmp_path):
    """Makes a copy of the sources, with patches."""

    def make(names=()):
        tree = shutil.copytree(sdist, tmp_path / "tree")
        apply(tree, names)
        return tree

    return make


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder of the Hub's cache with the model of mlx-lm's tests."""
    folder = tmp_path_factory.mktemp("hub")
    snapshot = folder / MODEL / "snapshots" / "0"
    # With heads of 64 numbers, because KV is quantized in groups of so many.
    write_model(snapshot, "qwen2", LLAMA | dict(model_type="qwen2", hidden_size=256))
    (snapshot / "model.safetensors.index.json").touch()
    (folder / MODEL / "refs").mkdir()
    (folder / MODEL / "refs" / "main").write_text("0")
    return folder


class Result(NamedTuple):
    """What tests came to: those that passed and those that did not, and the output of pytest."""

    passed: Set[str]
    failed: Set[str]
    output: str


def run_tests(folder, path, *arguments, **env):
    """Run tests in ``folder`` with the mlx-lm in ``path``."""
    path = os.pathsep.join([str(path), str(PATCHES.parent)])
    env = os.environ | env | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    output = run_program(command, cwd=folder, env=env).stdout
    found = [
        re.findall(rf"^(?:{w}) (\S+)", output, re.M) for w in ("PASSED", "FAILED|ERROR")
    ]
    return Result(*map(set, found), output)


def run_own_tests(tree, hub, names):
    """Run the tests that patches add. Their names are without file and class."""
    tests = [test for name in names for test in own_tests(name)]
    files = {f for name in names for f in changes(name) if is_test(f)}
    result = run_tests(
        tree, tree, "-k", " or ".join(tests), *sorted(files), HF_HUB_CACHE=str(hub)
    )
    plain = ({test.split("::")[-1] for test in found} for found in result[:2])
    return Result(*plain, result.output)


@pytest.mark.slow
def test_the_tests_of_all_patches_pass(make_tree, hub):
    result = run_own_tests(make_tree(SERIES), hub, SERIES)
    assert not result.failed, result.output
    assert result.passed == {test for name in SERIES for test in own_tests(name)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SERIES)
def test_without_a_patch_its_own_tests_fail(name, make_tree, hub):
    # The others apply without it, too.
    tree = make_tree([other for other in SERIES if other != name])
    apply(tree, [name], "--include=tests/*")
    result = run_own_tests(tree, hub, [name])
    assert not result.passed, result.output
    assert result.failed == set(own_tests(name)), result.output


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], SERIES], ids=["released", "patched"])
def test_mlx_lm_passes_its_own_tests(names, make_tree, hub):
    tree = make_tree(names)
    files = [f"tests/test_{name}.py" for name in ("server", "prompt_cache", "generate")]
    result = run_tests(tree, tree, *files, HF_HUB_CACHE=str(hub))
    assert result.failed == NEED_TRAINED_MODEL, result.output
    assert len(result.passed) > 90


@pytest.mark.slow
def test_this_package_works_with_all_patches(patched):
    folder = Path(__file__).parent
    result = run_tests(folder, patched, "-m", "not slow", *OWN_TESTS)
    assert not result.failed, result.output
    assert len(result.passed) > 200


@pytest.mark.parametrize("is_patched", [False, True])
def test_this_package_uses_what_a_patch_adds(is_patched, patched):
    code = """
import resource
from mlx_lm_ext.descriptors import limit_kept

setrlimit = resource.setrlimit
with limit_kept():
    print(resource.setrlimit is setrlimit)
"""
    path = [str(patched)] * is_patched + [str(PATCHES.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    result = run_program([sys.executable, "-c", code], env=env)
    assert result.stdout.strip() == str(is_patched), result.stderr

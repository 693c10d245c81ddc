"""The patches: listed, explained and small; each one proven by the test that it adds to mlx-lm's;
all of them harmless to mlx-lm's own tests and to this package."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from patching import PATCHES, SERIES, apply, make_patched
from processes import run_program
from upstream_cases import make_hub, run_cases
from upstream_sources import upstream_sources

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# The cases of mlx-lm that fail with the tiny model of ``make_hub``, and why.
NEED_THEIR_MODEL = {
    "TestGenerate.test_batch_max_kv_size_creates_rotating_cache": "it makes its own caches",
    "TestGenerate.test_generate_with_logit_bias": "! is not its first token",
    "TestGenerate.test_stream_generate_input_embeddings": "it has learned nothing",
    "TestGenerate.test_stream_generate_input_embeddings_prefill": "it has learned nothing",
}
# Of this package's tests, those of what uses the parts of mlx-lm that the patches change.
OWN_TESTS = [
    "test_upstream_contract.py",
    "test_chat_templates.py",
    "test_command_line.py::test_other_arguments_have_the_defaults_of_upstream",
    "test_engine.py::test_what_upstream_serves_alone_is_served_alone",
    "test_operation.py::test_import_of_mlx_lm_keeps_the_limit_of_open_files",
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


def added_tests(name):
    """The names of the tests that a patch adds."""
    lines = [line for f, c in changes(name).items() if is_test(f) for line in c]
    return set(re.findall(r"^\+    def (test_\w+)\(", "\n".join(lines), re.M))


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
        assert f"def {function}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("name", SERIES)
def test_a_patch_is_small_and_brings_a_test(name):
    assert sum(len(c) for f, c in changes(name).items() if not is_test(f)) <= 60
    assert added_tests(name)


def test_all_apply_to_the_installed_mlx_lm(tmp_path):
    changed = (make_patched(tmp_path) / "mlx_lm" / "server.py").read_text()
    functions = {
        node.name: ast.unparse(node)
        for node in ast.parse(changed).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "server_class, handler_class)" in functions["run"]
    assert "setup_arg_parser()" in functions["main"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def make_tree(tmp_path_factory, tmp_path):
    """Makes a copy of the sources of mlx-lm, with patches."""

    def make(names):
        tree = shutil.copytree(upstream_sources(tmp_path_factory), tmp_path / "tree")
        apply(tree, names)
        return tree

    return make


@pytest.fixture
def run_upstream(hub, tmp_path):
    """Runs mlx-lm's tests on the mlx-lm beside them."""

    def run(tree, *arguments):
        results = tmp_path / "results.xml"
        return run_cases(arguments, tree, results, [tree, ROOT], HF_HUB_CACHE=str(hub))

    return run


@pytest.fixture
def run_added(run_upstream):
    """Runs the tests that patches add; gives the errors by the names of the tests."""

    def run(tree, names):
        tests = sorted(set.union(*map(added_tests, names)))
        files = sorted({f for name in names for f in changes(name) if is_test(f)})
        cases = run_upstream(tree, "-k", " or ".join(tests), *files)
        errors = {case.split(".")[-1]: error for case, error in cases.items()}
        assert sorted(errors) == tests
        return errors

    return run


@pytest.mark.slow
def test_the_tests_of_all_patches_pass(make_tree, run_added):
    errors = run_added(make_tree(SERIES), SERIES)
    assert not any(errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", SERIES)
def test_without_a_patch_its_tests_fail(name, make_tree, run_added):
    # The others apply without it, too.
    tree = make_tree([other for other in SERIES if other != name])
    apply(tree, [name], "--include=tests/*")
    errors = run_added(tree, [name])
    assert all(errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("names", [[], SERIES], ids=["released", "patched"])
def test_mlx_lm_passes_its_own_tests(names, make_tree, run_upstream):
    files = [f"tests/test_{name}.py" for name in ("server", "prompt_cache", "generate")]
    errors = run_upstream(make_tree(names), *files)
    assert {case for case in errors if errors[case]} == {*NEED_THEIR_MODEL}, errors
    assert len(errors) > 90


@pytest.mark.slow
def test_this_package_works_with_all_patches(tmp_path):
    path = [make_patched(tmp_path), ROOT]
    arguments = ["-m", "not slow", *OWN_TESTS]
    errors = run_cases(arguments, TESTS, tmp_path / "results.xml", path)
    assert not any(errors.values()), errors
    assert len(errors) > 200


@pytest.mark.parametrize("is_patched", [False, True])
def test_this_package_uses_what_a_patch_adds(is_patched, tmp_path):
    code = """
import resource
from mlx_lm_ext.descriptors import limit_kept

setrlimit = resource.setrlimit
with limit_kept():
    print(resource.setrlimit is setrlimit)
"""
    path = [make_patched(tmp_path)] * is_patched + [ROOT]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    result = run_program([sys.executable, "-c", code], env=env)
    assert result.stdout.strip() == str(is_patched), result.stderr

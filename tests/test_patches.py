"""The patches: listed, explained, applying to the installed mlx-lm, and each one tested by what
it adds to the tests of mlx-lm."""

import ast
import os
import re
import shutil
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import mlx_lm
import pytest
from processes import run_program

from mlx_lm_ext.bench.random_model import LLAMA, write_model

PATCHES = Path(__file__).parent.parent / "patches"
SERIES = (PATCHES / "series").read_text().split()
# mlx-lm's tests serve this model, in whose place is a tiny one.
MODEL = "models--mlx-community--Qwen1.5-0.5B-Chat-4bit"


def test_series_lists_every_patch():
    assert sorted(SERIES) == sorted(p.name for p in PATCHES.glob("*.patch"))


def test_every_patch_says_what_it_is_for():
    for name in SERIES:
        header = (PATCHES / name).read_text().split("\n---\n")[0]
        status = r"^Upstream-Status: (Pending|(Submitted|Backport|Denied) \[\S+\])$"
        for line in (r"^Subject: \w+: .+$", status, r"^Applies-To: mlx-lm .+$"):
            assert re.search(line, header, re.M), (name, line)
        removes = r"^Removes: (?:nothing here \(.+\)|(\S+)::(\w+) \(.+\))$"
        file, function = re.search(removes, header, re.M).groups()
        if file is not None:
            # What a merge will remove here must exist.
            assert f"def {function}(" in (PATCHES.parent / file).read_text()


def changed_lines(name):
    body = (PATCHES / name).read_text().split("\n---\n")[1]
    return re.findall(r"^[+-](?!\+\+ |-- ).*$", body, re.M)


@pytest.mark.parametrize("name", SERIES)
def test_a_patch_is_small_and_brings_a_test(name):
    assert len(changed_lines(name)) <= 60
    assert own_tests(name)


def own_tests(name):
    """The names of the tests that a patch adds or changes."""
    body = (PATCHES / name).read_text().split("\n---\n")[1]
    found = re.findall(r"^\+    def (test_\w+)\(", body, re.M)
    return found


def apply(folder, skipped=None, *options):
    for name in SERIES:
        if name != skipped:
            command = ["git", "apply", *options, PATCHES / name]
            run_program(command, cwd=folder, check=True)


def test_all_apply_to_the_installed_mlx_lm(tmp_path):
    target = tmp_path / "mlx_lm"
    source = Path(mlx_lm.__file__).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    apply(tmp_path, None, "--exclude=tests/*")
    changed = (target / "server.py").read_text()
    assert changed != (source / "server.py").read_text()
    functions = {
        node.name: ast.unparse(node)
        for node in ast.parse(changed).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "server_class, handler_class)" in functions["run"]
    assert "setup_arg_parser()" in functions["main"]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """The source distribution of the installed mlx-lm, which has its tests."""
    folder = tmp_path_factory.mktemp("sdist")
    requirement = f"mlx-lm=={version('mlx-lm')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder]
    command += ["--no-binary", "mlx-lm", requirement]
    pip = run_program(command)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"pip cannot fetch the sources of mlx-lm: {pip.stderr[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = (p for p in folder.iterdir() if p.is_dir())
    return tree


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder of the Hub's cache with the model of mlx-lm's tests."""
    folder = tmp_path_factory.mktemp("hub")
    snapshot = folder / MODEL / "snapshots" / "0"
    write_model(snapshot, "llama", LLAMA)
    (folder / MODEL / "refs").mkdir()
    (folder / MODEL / "refs" / "main").write_text("0")
    return folder


def run_tests(tree, hub, names):
    """Run tests of mlx-lm by name, and give the names of those that passed."""
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    env["HF_HUB_CACHE"] = str(hub)
    files = ["server", "utils", "generate"]
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider"]
    command += ["-k", " or ".join(names), *(f"tests/test_{f}.py" for f in files)]
    result = run_program(command, cwd=tree, env=env)
    passed = re.findall(r"^PASSED \S+::(test_\w+)", result.stdout, re.M)
    return sorted(passed), result.stdout[-4000:]


@pytest.mark.slow
def test_the_tests_of_all_patches_pass(sdist, hub, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree")
    apply(tree)
    names = [test for name in SERIES for test in own_tests(name)]
    passed, output = run_tests(tree, hub, names)
    assert passed == sorted(names), output


@pytest.mark.slow
@pytest.mark.parametrize("name", SERIES)
def test_without_a_patch_its_own_tests_fail(name, sdist, hub, tmp_path):
    tree = shutil.copytree(sdist, tmp_path / "tree")
    apply(tree, name)
    # Its tests alone.
    only = ["git", "apply", "--include=tests/*", PATCHES / name]
    run_program(only, cwd=tree, check=True)
    passed, output = run_tests(tree, hub, own_tests(name))
    assert not passed, output
    assert f"{len(own_tests(name))} failed" in output

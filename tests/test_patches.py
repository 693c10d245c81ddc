"""The patches: listed, explained, and applying to the installed mlx-lm."""

import ast
import re
import shutil
from pathlib import Path

import mlx_lm
from processes import run_program

PATCHES = Path(__file__).parent.parent / "patches"
SERIES = (PATCHES / "series").read_text().split()


def test_series_lists_every_patch():
    assert sorted(SERIES) == sorted(p.name for p in PATCHES.glob("*.patch"))


def test_every_patch_says_what_it_is_for():
    for name in SERIES:
        header = (PATCHES / name).read_text().split("\n---\n")[0]
        status = r"^Upstream-Status: (Pending|(Submitted|Backport|Denied) \[\S+\])$"
        for line in (r"^Subject: \w+: .+$", status, r"^Applies-To: mlx-lm .+$"):
            assert re.search(line, header, re.M), (name, line)
        # What a merge will remove here must exist.
        file, function = re.search(r"^Removes: (\S+)::(\w+)", header, re.M).groups()
        assert f"def {function}(" in (PATCHES.parent / file).read_text()


def test_all_apply_to_the_installed_mlx_lm(tmp_path):
    target = tmp_path / "mlx_lm"
    source = Path(mlx_lm.__file__).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SERIES:
        run_program(["git", "apply", PATCHES / name], cwd=tmp_path, check=True)
    changed = (target / "server.py").read_text()
    assert changed != (source / "server.py").read_text()
    functions = {
        node.name: ast.unparse(node)
        for node in ast.parse(changed).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "server_class, handler_class)" in functions["run"]
    assert "setup_arg_parser()" in functions["main"]

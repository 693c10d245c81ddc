"""The door to upstream's private names, and the rules of the package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest

import mlx_lm_ext
from mlx_lm_ext.engine import upstream as _upstream

PACKAGE = Path(mlx_lm_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Private members of what upstream's classes give their subclasses.
PRIVATE = {
    name
    for file in ("generate.py", "server.py")
    for name in re.findall(
        r"self\.(_[a-z]\w*)", (Path(mlx_lm.__file__).parent / file).read_text()
    )
}


def test_only_one_file_uses_private_names_of_upstream():
    for path in FILES:
        if path.name in ("upstream.py", "generator.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "mlx_lm."
            ):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path.name}: {private}"
            elif isinstance(node, ast.Attribute):
                assert node.attr not in PRIVATE, f"{path.name}: {node.attr}"


def test_package_imports_no_mlx():
    code = "import sys, mlx_lm_ext; print('mlx.core' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout == "False\n"


def test_files_say_what_they_are():
    for path in FILES:
        text = path.read_text()
        if text:
            assert ast.get_docstring(ast.parse(text)), path.name


@pytest.mark.parametrize(
    "version, good",
    [("0.32.2", True), ("0.32.10", True), ("0.32.1", False), ("0.33.0", False)],
)
def test_other_series_of_upstream_are_refused(version, good, monkeypatch):
    monkeypatch.setattr(_upstream, "__version__", version)
    if good:
        _upstream.check_version()
    else:
        with pytest.raises(RuntimeError, match=version):
            _upstream.check_version()

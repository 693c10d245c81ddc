"""What the package asks of mlx-lm, and of its own files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_lm_ext
from mlx_lm_ext.engine import upstream as _upstream

PACKAGE = Path(mlx_lm_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


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

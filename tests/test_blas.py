"""OpenBLAS is loaded before MLX, and only where MLX needs it."""

import subprocess
import sys

import pytest

from mlx_lm_ext import blas


def test_blas_is_not_looked_for_on_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(blas, "LIBRARIES", None)
    assert blas.load() == ""


def test_blas_is_not_looked_for_without_the_cpu_wheel(monkeypatch):
    def distribution(name):
        raise blas.PackageNotFoundError(name)

    monkeypatch.setattr(blas, "distribution", distribution)
    monkeypatch.setattr(blas, "LIBRARIES", None)
    assert blas.load() == ""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


linux_only = pytest.mark.skipif(not blas.is_needed(), reason="MLX has a fast BLAS")


@linux_only
def test_missing_blas_is_one_line_that_says_how_to_get_it():
    code = (
        "from mlx_lm_ext import blas; blas.LIBRARIES = ('libnone.so.9',);"
        "print(blas.load())"
    )
    line = run(code)
    assert line == blas.ADVICE
    assert "apt-get install" in line


@linux_only
def test_blas_after_mlx_is_refused():
    code = (
        "import mlx.core; from mlx_lm_ext import blas\n"
        "try: blas.load()\n"
        "except RuntimeError as e: print(e)"
    )
    assert "before mlx" in run(code)


@linux_only
def test_products_of_mlx_are_computed_by_the_loaded_blas():
    """The library's own thread count changes nothing unless MLX calls it."""
    code = (
        "from mlx_lm_ext import blas; line = blas.load()\n"
        "import mlx.core as mx\n"
        "a = mx.ones((512, 512)); mx.eval(a)\n"
        "import time\n"
        "def run():\n"
        "    t = time.perf_counter(); mx.eval(a @ a); return time.perf_counter() - t\n"
        "print('OpenBLAS' in line, min(run() for _ in range(20)))"
    )
    found, seconds = run(code).split()
    # The reference BLAS takes about 0.05 s, OpenBLAS on one slow core 0.004 s.
    assert (found == "True") == (float(seconds) < 0.02)

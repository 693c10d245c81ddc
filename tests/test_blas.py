"""OpenBLAS is loaded before MLX, and only where MLX needs it."""

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
from processes import run_program

from mlx_lm_ext import blas


def test_blas_is_not_looked_for_on_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(blas, "LIBRARIES", None)
    assert blas.load_openblas.__wrapped__() == (None, "")


def test_blas_is_not_looked_for_without_the_cpu_wheel(monkeypatch):
    def distribution(name):
        raise blas.PackageNotFoundError(name)

    monkeypatch.setattr(blas, "distribution", distribution)
    monkeypatch.setattr(blas, "LIBRARIES", None)
    assert blas.load_openblas.__wrapped__() == (None, "")


@pytest.mark.parametrize(
    ("flags", "given", "kernels"),
    [
        ("flags\t\t: sse2 avx", None, None),
        ("flags\t\t: sse2 avx avx2 fma avx512f", None, "Haswell"),
        (f"flags\t\t: {' '.join(blas.AVX2 + blas.AVX512)}", None, "SkylakeX"),
        (f"flags\t\t: {' '.join(blas.AVX2)}", "Zen", "Zen"),
        ("Features\t: fp asimd", None, None),
    ],
    ids=["old", "Haswell", "SkylakeX", "given", "ARM"],
)
def test_kernels_fit_cpus_that_are_newer_than_openblas(
    monkeypatch, flags, given, kernels
):
    # Set first, so that the value of before comes back.
    monkeypatch.setenv("OPENBLAS_CORETYPE", given or "")
    if given is None:
        monkeypatch.delenv("OPENBLAS_CORETYPE")
    cpu = f"model\t: 1\n{flags}\n"
    monkeypatch.setattr(blas, "open", lambda path: io.StringIO(cpu), raising=False)
    blas.name_kernels()
    assert os.environ.get("OPENBLAS_CORETYPE") == kernels


def command(code):
    return [sys.executable, "-c", f"from mlx_lm_ext import blas\n{code}"]


def run(code, folder):
    """What ``code`` prints in a process of its own, whose cache is in ``folder``."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    return run_program(command(code), check=True, env=environment).stdout.strip()


# Prints the line for the log, and the OpenBLAS that MLX would find.
LOAD = """
import ctypes
print(blas.load())
everything = ctypes.CDLL(None)
if hasattr(everything, "cblas_sgemm"):
    everything.openblas_get_config.restype = ctypes.c_char_p
    print(everything.openblas_get_config().decode())
"""
NO_SYSTEM = "blas.LIBRARIES = ('libnone.so.9',)\n"

linux_only = pytest.mark.skipif(not blas.is_needed(), reason="MLX has a fast BLAS")
wheel_only = pytest.mark.skipif(
    not blas.is_needed() or find_spec("scipy_openblas32") is None,
    reason='needs the extra "cpu" on Linux',
)


def assert_is_wheel(output, *parts):
    """The OpenBLAS of the wheel is loaded, and its one line has ``parts``."""
    line, config = output.splitlines()
    version = blas.distribution("scipy-openblas32").version
    assert line.startswith(f"CPU BLAS: OpenBLAS {version} (scipy-openblas32)")
    assert config.startswith("OpenBLAS " + ".".join(version.split(".")[:3]))
    for part in parts:
        assert part in line


def assert_kept(folder):
    """``folder`` has one copy, which is loaded without patchelf, and give its path."""
    assert_is_wheel(run(NO_PATCHELF + NO_SYSTEM + LOAD, folder), "scipy-openblas32).")
    (copy,) = (folder / "mlx-lm-ext" / "blas").iterdir()
    return copy


NO_PATCHELF = "blas.shutil.which = lambda *args, **kwargs: None\n"


@wheel_only
def test_blas_of_the_wheel_is_copied_once(tmp_path):
    assert_is_wheel(run(LOAD, tmp_path), "scipy-openblas32).")
    assert_kept(tmp_path)


@wheel_only
def test_processes_that_start_at_the_same_time_leave_one_copy(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        for output in pool.map(run, [LOAD] * 3, [tmp_path] * 3):
            assert_is_wheel(output, "scipy-openblas32).")
    assert_kept(tmp_path)


@wheel_only
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "library", "broken"])
def test_copy_that_is_not_whole_is_made_anew(tmp_path, damage):
    run(LOAD, tmp_path)
    copy = assert_kept(tmp_path)
    whole = copy.read_bytes()
    with open(copy.with_name("new"), "wb") as f:
        if damage == "cut":
            f.write(whole[: len(whole) // 2])
        elif damage == "text":
            f.write(b"not a library\n" * 100)
        elif damage == "library":
            f.write(whole[: -len(copy.name)])
        elif damage == "broken":
            f.write(b"broken" + whole[6:])
    os.replace(copy.with_name("new"), copy)
    assert_is_wheel(run(LOAD, tmp_path), "scipy-openblas32).")
    assert assert_kept(tmp_path).read_bytes() == whole


@wheel_only
def test_process_that_is_killed_leaves_nothing_that_is_loaded(tmp_path):
    kill = "import os; blas.os.replace = lambda *args: os._exit(0)\n"
    assert run(kill + LOAD, tmp_path) == ""
    line = run(NO_PATCHELF + NO_SYSTEM + LOAD, tmp_path)
    assert "slow reference BLAS" in line
    assert_is_wheel(run(LOAD, tmp_path), "scipy-openblas32).")


def block_cache(folder):
    (folder / "mlx-lm-ext").write_text("a file")


def block_folder(folder):
    (folder / "mlx-lm-ext").mkdir()
    (folder / "mlx-lm-ext" / "blas").write_text("a file")


def block_copy(folder):
    run(LOAD, folder)
    copy = assert_kept(folder)
    copy.unlink()
    copy.mkdir()


FULL = "def full(*args): raise OSError(28, 'No space left on device')\n"
NO_HOME = "def no_home(): raise RuntimeError('Could not determine home directory.')\n"


@wheel_only
@pytest.mark.parametrize(
    ("block", "code", "reason"),
    [
        (block_cache, "", "mlx-lm-ext"),
        (block_folder, "", "blas"),
        (block_copy, "", "libopenblas-"),
        (None, FULL + "blas.os.fsync = full\n", "No space left on device"),
        (None, NO_HOME + "blas.cache_directory = no_home\n", "home directory"),
    ],
    ids=["cache is a file", "folder is a file", "copy is a folder", "full", "no home"],
)
def test_copy_that_cannot_be_kept_is_loaded_from_memory(tmp_path, block, code, reason):
    if block:
        block(tmp_path)
    output = run(NO_SYSTEM + code + LOAD, tmp_path)
    assert_is_wheel(output, "in memory", reason, "XDG_CACHE_HOME")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 99]


FAILING = "blas.shutil.which = lambda *args, **kwargs: {!r}\n"


@wheel_only
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (NO_PATCHELF, "the program patchelf is missing"),
        (FAILING.format("/none/patchelf"), "No such file"),
        (FAILING.format(sys.executable), "patchelf failed: "),
        ("blas.os.memfd_create = blas.keep = full\n", "No space left on device"),
        ("blas.open_kept = blas.open_library = full\n", "No space left on device"),
    ],
    ids=["no patchelf", "cannot run", "fails", "no place", "not loaded"],
)
def test_wheel_that_cannot_be_used_is_one_line_that_says_why(tmp_path, code, reason):
    (line,) = run(NO_SYSTEM + FULL + code + LOAD, tmp_path).splitlines()
    assert line.startswith("CPU BLAS: the slow reference BLAS of the mlx-cpu wheel")
    assert f"scipy-openblas32 cannot be used ({reason}" in line or reason in line
    assert blas.ADVICE in line


NO_WHEEL = """
found = blas.distribution
def distribution(name):
    if name == "scipy-openblas32":
        raise blas.PackageNotFoundError(name)
    return found(name)
blas.distribution = distribution
"""


@linux_only
def test_missing_blas_is_one_line_that_says_how_to_get_it(tmp_path):
    (line,) = run(NO_WHEEL + NO_SYSTEM + LOAD, tmp_path).splitlines()
    assert "slow reference BLAS" in line
    assert "scipy-openblas32 is not installed" in line
    assert 'pip install --upgrade "mlx-lm-ext[cpu]"' in line


@wheel_only
def test_blas_of_the_system_is_next_best(tmp_path):
    run(LOAD, tmp_path)
    system = f"blas.LIBRARIES = ('libnone.so.9', {str(assert_kept(tmp_path))!r})\n"
    line, config = run(NO_WHEEL + system + LOAD, tmp_path).splitlines()
    assert "of this system" in line
    assert "scipy-openblas32 is not installed" in line
    assert 'pip install --upgrade "mlx-lm-ext[cpu]"' in line
    assert config.startswith("OpenBLAS ")


@linux_only
def test_blas_after_mlx_is_refused(tmp_path):
    code = """
import mlx.core
try: blas.load()
except RuntimeError as e: print(e)
"""
    assert "before mlx" in run(code, tmp_path)


@linux_only
def test_products_of_mlx_are_computed_by_the_loaded_blas(tmp_path):
    """The library's own thread count changes nothing unless MLX calls it."""
    code = """
line = blas.load()
import time
import mlx.core as mx
a = mx.ones((512, 512)); mx.eval(a)
def run():
    t = time.perf_counter(); mx.eval(a @ a); return time.perf_counter() - t
print("slow" not in line, min(run() for _ in range(20)))
"""
    found, seconds = run(code, tmp_path).split()
    # The reference BLAS takes about 0.05 s, OpenBLAS on one slow core 0.004 s.
    assert (found == "True") == (float(seconds) < 0.02)


@wheel_only
def test_factorizations_of_mlx_are_right_with_the_blas_of_the_wheel(tmp_path):
    code = LOAD + """
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
a = mx.random.normal((40, 40)); s = a @ a.T + 40 * mx.eye(40)
u, w, v = mx.linalg.svd(a)
q, r = mx.linalg.qr(a)
l = mx.linalg.cholesky(s)
e, x = mx.linalg.eigh(s)
g, y = mx.linalg.eig(a)
pairs = [
    (u @ mx.diag(w) @ v, a), (q @ r, a), (l @ l.T, s), (x @ mx.diag(e) @ x.T, s),
    (mx.linalg.inv(s) @ s, mx.eye(40)), (a @ y, y * g),
]
print(all(np.allclose(left, right, atol=1e-2) for left, right in pairs))
"""
    output, right = run(code, tmp_path).rsplit("\n", 1)
    assert_is_wheel(output)
    assert right == "True"

"""Kernels for CUDA are compiled in processes beside the server, once on a machine."""

import os
import re
import subprocess
import sys
import threading

import pytest
from processes import join, run_program

from mlx_lm_ext import log
from mlx_lm_ext.engine import kernels
from mlx_lm_ext.engine.kernels import KernelBuild


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for kernels, as if there were a GPU. The processes run on the CPU."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "device_kind", lambda: "cuda")
    monkeypatch.setattr(kernels, "device_memory", lambda: 2 * kernels.MEMORY_OF_PROCESS)
    return tmp_path


@pytest.fixture
def helper(monkeypatch, tmp_path_factory):
    """Has the processes run a script that only the path of this process finds."""

    def write(script):
        folder = tmp_path_factory.mktemp("helper")
        body = "".join(f"    {line}\n" for line in script.splitlines())
        (folder / "a_helper.py").write_text(f"def main():\n{body}")
        # Not all that is in a path is a string.
        monkeypatch.setattr(sys, "path", [folder, *sys.path])
        monkeypatch.setattr(kernels, "__name__", "a_helper")

    return write


def build(dtype="float32"):
    """Compile what there is to compile; gives the number of processes."""
    kernel_build = KernelBuild()
    kernel_build.start(dtype)
    if kernel_build.watcher is not None:
        join(kernel_build.watcher)
    return len(kernel_build.processes)


@pytest.mark.slow
def test_kernels_are_compiled_once_in_several_processes(folder, caplog):
    caplog.set_level("INFO")
    assert build() == min(2, os.cpu_count())
    assert "Compiling kernels in" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".built"]
    assert build() == 0


def test_each_type_of_logits_has_kernels_of_its_own(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert build("float16") and build("bfloat16")
    assert not build("float16")


def test_process_that_fails_is_one_line_and_tried_again(folder, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "__name__", "no_such_module")
    assert build()
    (warning,) = caplog.records
    assert warning.message.endswith("No module named 'no_such_module')")
    assert build()


def test_process_that_is_killed_is_one_line(folder, monkeypatch, caplog, helper):
    helper("import os; os.kill(os.getpid(), 9)")
    assert build()
    (warning,) = caplog.records
    assert warning.message.endswith("(exit code -9)")


# The last two are those of a program in which Python is embedded.
@pytest.mark.parametrize("python", ["/no/such/python", "", None])
def test_no_process_is_one_line(python, folder, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", python)
    assert build() == 0
    (warning,) = caplog.records
    assert "No process can be started" in warning.message


@pytest.mark.parametrize("lacking", ["folder", "cuda"])
def test_nothing_is_compiled_where_it_is_of_no_use(lacking, folder, monkeypatch):
    if lacking == "folder":
        monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    else:
        monkeypatch.setattr(kernels, "device_kind", lambda: "metal")
    assert build() == 0


def test_modules_of_the_processes_are_those_of_the_server(
    folder, monkeypatch, tmp_path_factory, helper
):
    current = tmp_path_factory.mktemp("current")
    for name in ("a_helper", "mlx_lm_ext", "subprocess", "struct"):
        (current / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(current)
    result = folder / "result"
    helper(f"import struct, sys; open({str(result)!r}, 'w').write(sys.argv[1])")
    assert build("bfloat16")
    assert result.read_text() == "bfloat16"
    assert (folder / f"mlx-lm-ext-{kernels.__version__}-bfloat16.built").exists()


FOREVER = "import threading; threading.Event().wait()"


def test_compiling_tells_how_long_it_takes(folder, monkeypatch, helper):
    told = threading.Event()

    def info(line):
        if "processes, once on this machine: 0 s so far" in line:
            told.set()

    monkeypatch.setattr(log.logger, "info", info)
    monkeypatch.setattr(log, "PROGRESS_INTERVAL", 0.01)
    helper(FOREVER)
    kernel_build = KernelBuild()
    kernel_build.start("float32")
    was_told = told.wait(10)
    kernel_build.stop()
    assert was_told


@pytest.mark.parametrize("n_before", [0, 1])
def test_stop_that_comes_during_the_start_leaves_no_process(
    n_before, folder, monkeypatch, helper
):
    helper(FOREVER)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    kernel_build, original = KernelBuild(), subprocess.Popen

    def start(*args, **kwargs):
        process = original(*args, **kwargs)
        kernel_build.stop()
        return process

    if n_before:
        monkeypatch.setattr(kernels.subprocess, "Popen", start)
    else:
        kernel_build.stop()
    kernel_build.start("float32")
    assert len(kernel_build.processes) == 2 * n_before
    assert [p.wait(60) for p in kernel_build.processes] == [-9, -9][: 2 * n_before]


def test_stop_ends_the_processes(folder, caplog, helper):
    helper(FOREVER)
    kernel_build = KernelBuild()
    kernel_build.start("float32")
    kernel_build.stop()
    join(kernel_build.watcher)
    assert not kernel_build.is_running
    assert not caplog.records


WARM_UP = """
import sys
from mlx_lm_ext import blas
blas.load()
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.batch import generator
from mlx_lm_ext.engine import warm_up
from mlx_lm_ext.engine.models import BatchModelProvider
from mlx_lm_ext.sampling import default
for module in (warm_up, generator, default):
    module.on_cpu = lambda: False
argv = ["--model", sys.argv[1], "--batch-size", "3"]
provider = BatchModelProvider(make_parser().parse_args(argv))
provider.switch_to(provider.default_key)
warming = warm_up.WarmUp.of_server(provider)
while warming.pieces:
    warming.run_next(lambda: False)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles for a CPU only there")
def test_all_that_the_warm_up_of_a_gpu_compiles_is_compiled(tmp_path, model_folder):
    """MLX names compiled functions on the CPU as with CUDA."""
    compiled = {}
    for name, command in (
        ("warm-up", ["-c", WARM_UP, str(model_folder())]),
        ("processes", ["-m", "mlx_lm_ext.engine.kernels", "float32", "0", "1"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        env = os.environ | {"TMPDIR": str(folder)}
        run_program([sys.executable, *command], env=env, check=True)
        names = {path.stem for path in folder.rglob("*.so")}
        compiled[name] = {re.sub("_(contiguous|strided_.*)", "", n) for n in names}
    assert len(compiled["warm-up"]) > 5
    assert compiled["warm-up"] <= compiled["processes"]

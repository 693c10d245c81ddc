"""What is set for MLX's CUDA build, with a driver and wheels that are made up."""

import os
import struct
import sys
from pathlib import Path

import pytest
from processes import run_program

from mlx_lm_ext import cuda

DEFAULTS = {
    "MLX_CUDA_GRAPH_CACHE_SIZE": "2000",
    "MLX_CUDA_SDPA_CACHE_SIZE": "2000",
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}
FOLDER = "MLX_PTX_CACHE_DIR"


class Driver:
    """Takes the place of ``libcuda``, whose functions return 0 if all is well."""

    attributes = {75: 9, 76: 0}
    failing = ""

    def call(self, name, target, value):
        if name == self.failing:
            return 100  # CUDA_ERROR_NO_DEVICE
        if target is not None:
            target._obj.value = value
        return 0

    def cuInit(self, flags):
        return self.call("cuInit", None, None)

    def cuDeviceGet(self, device, number):
        return self.call("cuDeviceGet", device, number)

    def cuDeviceGetAttribute(self, value, attribute, device):
        return self.call("cuDeviceGetAttribute", value, self.attributes[attribute])


@pytest.fixture
def wheels():
    return {"mlx-cuda-13": "0.32.4"}


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path, wheels, driver):
    """A machine with a GPU and a user's cache, and nothing in the environment."""

    def version(name):
        if name not in wheels:
            raise cuda.PackageNotFoundError(name)
        return wheels[name]

    def library(name):
        assert name == "libcuda.so.1"
        return driver

    monkeypatch.setattr(cuda, "version", version)
    monkeypatch.setattr(cuda.ctypes, "CDLL", library)
    for name in [*cuda.CAPACITIES, cuda.THRASHING_CHECK, FOLDER]:
        # Set first, so that what the test leaves behind is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def kept(tmp_path):
    """The folder for the kernels of this machine."""
    return tmp_path / "cache/mlx-lm-ext/kernels/0.32.4-cuda13-sm_90"


def settings():
    return {k: v for k, v in os.environ.items() if k.startswith("MLX_")}


# The driver


def test_device_is_described_by_the_driver():
    assert cuda.compute_capability() == "sm_90"


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_what_the_driver_does_not_say_is_none(function, driver):
    driver.failing = function
    assert cuda.compute_capability() is None


def no_driver(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_device_is_none_without_a_driver(monkeypatch):
    monkeypatch.setattr(cuda.ctypes, "CDLL", no_driver)
    assert cuda.compute_capability() is None


# The variables


def test_everything_is_set_and_told_in_one_line(kept):
    expected = DEFAULTS | {FOLDER: str(kept)}
    assert cuda.prepare() == [
        "CUDA: " + ", ".join(f"{name}={value}" for name, value in expected.items())
    ]
    assert settings() == expected
    assert kept.is_dir()


def test_nothing_is_left_to_set_the_second_time():
    cuda.prepare()
    assert cuda.prepare() == []


def test_nothing_is_set_without_the_cuda_build_of_mlx(wheels, monkeypatch):
    wheels.clear()
    # The driver is not even loaded.
    monkeypatch.setattr(cuda.ctypes, "CDLL", None)
    assert cuda.prepare() == []
    assert settings() == {}


def test_nothing_is_set_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda.ctypes, "CDLL", no_driver)
    assert cuda.prepare() == []
    assert settings() == {}
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_set_without_a_gpu(driver):
    driver.failing = "cuDeviceGet"
    assert cuda.prepare() == []
    assert settings() == {}


def test_kernels_of_other_wheels_and_gpus_are_kept_apart(wheels, driver, tmp_path):
    names = []
    for wheel, number, attributes in [
        ("mlx-cuda-13", "0.32.4", {75: 9, 76: 0}),
        ("mlx-cuda-13", "0.32.4", {75: 12, 76: 0}),
        ("mlx-cuda-13", "0.32.5", {75: 9, 76: 0}),
        ("mlx-cuda-12", "0.32.5", {75: 8, 76: 6}),
    ]:
        wheels.clear()
        wheels[wheel] = number
        driver.attributes = attributes
        os.environ.pop(FOLDER, None)
        cuda.prepare()
        names.append(Path(os.environ[FOLDER]).name)
    assert names == [
        "0.32.4-cuda13-sm_90",
        "0.32.4-cuda13-sm_120",
        "0.32.5-cuda13-sm_90",
        "0.32.5-cuda12-sm_86",
    ]


def test_what_the_environment_says_stays(tmp_path, monkeypatch):
    given = {
        "MLX_CUDA_GRAPH_CACHE_SIZE": "50",
        "MLX_CUDA_SDPA_CACHE_SIZE": " +0100 shapes",  # MLX reads 100
        "MLX_CUDA_CONV_CACHE_SIZE": "2147483647",
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "1",
        FOLDER: str(tmp_path / "mine"),
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cuda.prepare() == []
    assert settings() == given
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "value", ["0", "abc", "", " ", "-1", "+-1", "x2000", "00", "2147483648", "10" * 9]
)
@pytest.mark.parametrize(
    "variable",
    [f"MLX_CUDA_{c}_CACHE_SIZE" for c in "GRAPH SDPA SDPA_BACKWARD CONV FFT".split()],
)
def test_capacity_that_mlx_refuses_is_named_and_replaced(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    first, last = cuda.prepare()
    assert first.startswith(f"{variable}={value!r} cannot be used")
    assert "from 1 to 2147483647" in first
    assert os.environ.get(variable) == DEFAULTS.get(variable)
    assert (f"{variable}=2000" in last) == (variable in DEFAULTS)


def empty(tmp_path):
    return ""


def a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return str(path)


def below_a_file(tmp_path):
    return a_file(tmp_path) + "/kernels"


def too_long(tmp_path):
    return str(tmp_path / ("x" * 300))


UNUSABLE = [empty, a_file, below_a_file, too_long]


@pytest.mark.parametrize("make", UNUSABLE)
def test_folder_that_cannot_be_used_is_named_and_replaced(
    make, tmp_path, monkeypatch, kept
):
    value = make(tmp_path)
    monkeypatch.setenv(FOLDER, value)
    first, last = cuda.prepare()
    assert first.startswith(f"{FOLDER}={value!r} cannot be used (")
    assert f"{FOLDER}={kept}" in last
    assert os.environ[FOLDER] == str(kept)


def test_folder_that_cannot_be_written_to_is_replaced(tmp_path, monkeypatch, kept):
    folder = tmp_path / "mine"
    folder.mkdir()

    # Root may write everywhere, whatever the mode says.
    def refuse(dir):
        if dir == str(folder):
            raise PermissionError(13, "Permission denied", f"{dir}/tmp1")
        return open(os.devnull)

    monkeypatch.setattr(cuda.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv(FOLDER, str(folder))
    first, _ = cuda.prepare()
    assert "cannot be used (Permission denied)" in first
    assert os.environ[FOLDER] == str(kept)


@pytest.mark.parametrize("given", [None, ""])
def test_folder_is_left_to_mlx_if_the_cache_cannot_be_used(
    given, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", a_file(tmp_path))
    if given is not None:
        monkeypatch.setenv(FOLDER, given)
    *_, line, last = cuda.prepare()
    assert line.startswith("Compiled CUDA kernels cannot be kept in ")
    assert "XDG_CACHE_HOME" in line
    assert settings() == DEFAULTS
    assert FOLDER not in last


def test_folder_is_left_to_mlx_if_the_user_has_no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    line, _ = cuda.prepare()
    assert "(Could not determine home directory.)" in line
    assert settings() == DEFAULTS


# The kernels


def cubin(n_segments=2):
    """An ELF file laid out as NVIDIA's compiler does it: its two tables are at its end."""
    code = b"\x90" * 100
    sections, segments = bytes(3 * 64), bytes(n_segments * 56)
    place = 64 + len(code)
    head = struct.pack(
        "<4s12BHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 65, *[0] * 8, 2, 190, 1, 0),
        *(
            place + len(sections) if n_segments else 0,
            place,
            0,
            64,
            56,
            n_segments,
            64,
            3,
            1,
        ),
    )
    return head + code + sections + segments


WHOLE = {".ptx": cubin(), ".txt": b"f<int>\t_Z1f\ng\t_Z1g\n", ".cu": b"void f() {}"}
LONG = f"{'a' * 245}/{'b' * 245}/c"


@pytest.fixture
def write(kept):
    """Writes the files of a kernel, some of them other than they should be; gives the path
    of its code."""

    def write(name, **others):
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        files = WHOLE | {f".{ending}": content for ending, content in others.items()}
        for ending, content in files.items():
            if content is not None:
                Path(f"{kept / name}{ending}").write_bytes(content)
        return Path(f"{kept / name}.ptx")

    return write


HALF_MADE = {
    "no code": {"ptx": b""},
    "only zeros": {"ptx": bytes(len(cubin()))},
    "no functions": {"txt": None, "cu": None},
    "an empty list of functions": {"txt": b"", "cu": None},
    "no name of a function": {"txt": b"f<int>\n"},
    "half a line": {"txt": WHOLE[".txt"][:-3]},
    "perhaps not all lines": {"cu": None},
    "no room for the source": {"cu": b""},
}


@pytest.mark.parametrize("name", ["kernel", "v1.5", LONG])
@pytest.mark.parametrize("others", HALF_MADE.values(), ids=HALF_MADE)
def test_half_made_kernel_is_compiled_again(name, others, write, kept):
    code = write(name, **others)
    whole = write("whole")
    lines = cuda.prepare()
    assert lines[0] == f"Half-made CUDA kernels removed from {kept}: 1"
    assert not code.exists()
    assert whole.exists()


@pytest.mark.parametrize("n_segments", [0, 2])
def test_code_that_is_cut_anywhere_is_compiled_again(n_segments, write, kept):
    whole = cubin(n_segments)
    codes = [write(f"cut{n}", ptx=whole[:n]) for n in range(len(whole))]
    assert cuda.prepare()[0].endswith(f": {len(whole)}")
    assert not any(code.exists() for code in codes)


@pytest.mark.parametrize(
    "name, others",
    [
        ("kernel", {}),
        (LONG, {}),
        ("longer", {"ptx": cubin() + b"more"}),
        # Not of this compiler, or not of MLX at all.
        ("text", {"ptx": b"//\n.version 8.0\n", "txt": None, "cu": None}),
        ("elf32", {"ptx": b"\x7fELF\x01\x01", "txt": None}),
        ("a folder/kernel", {"ptx": b""}),
    ],
)
def test_kernel_that_is_whole_or_foreign_stays(name, others, write):
    code = write(name, **others)
    assert len(cuda.prepare()) == 1
    assert code.exists()


@pytest.mark.parametrize("is_whole", [False, True])
def test_kernels_are_not_all_there_if_one_was_half_made(is_whole, write, kept):
    write("kernel", **({} if is_whole else HALF_MADE["no code"]))
    built = kept / "all.built"
    built.touch()
    cuda.prepare()
    assert built.exists() == is_whole


def test_foreign_files_stay(kept, write):
    write("whole")
    files = [kept / name for name in ("README", "half.txt", "half.cu", "x.ptx.tmp")]
    for file in files:
        file.touch()
    (kept / "folder.ptx").mkdir()
    (kept / "loop.ptx").symlink_to("loop.ptx")
    os.mkfifo(kept / "pipe.ptx")
    assert len(cuda.prepare()) == 1
    assert all(file.exists() for file in files)
    assert (kept / "folder.ptx").is_dir()


def test_kernels_in_the_folder_of_the_environment_are_mended(write, kept, monkeypatch):
    code = write("kernel", ptx=b"")
    monkeypatch.setenv(FOLDER, str(kept))
    assert cuda.prepare()[0].startswith("Half-made CUDA kernels removed")
    assert not code.exists()


@pytest.mark.parametrize("function", ["open", "remove"])
def test_kernel_that_another_server_has_removed_is_no_error(
    function, write, monkeypatch, kept
):
    code = write("kernel", ptx=b"")

    def gone(path, *args):
        raise FileNotFoundError(2, "No such file or directory", path)

    owner = cuda if function == "open" else cuda.os
    monkeypatch.setattr(owner, function, gone, raising=False)
    assert len(cuda.prepare()) == 1
    assert os.environ[FOLDER] == str(kept)
    assert code.exists()


def test_folder_with_a_half_made_kernel_that_cannot_be_removed_is_not_used(
    write, kept, monkeypatch
):
    write("kernel", ptx=b"")

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(cuda.os, "remove", refuse)
    line, _ = cuda.prepare()
    assert f"{kept} (Operation not permitted)" in line
    assert FOLDER not in os.environ


# The server


def test_server_prepares_before_mlx_is_imported_and_logs_what_was_set():
    code = (
        "import sys\n"
        "from mlx_lm_ext import batch_server, cuda\n"
        "def prepare(): return [f'imported: {\"mlx.core\" in sys.modules}', 'second']\n"
        "cuda.prepare = prepare\n"
        "batch_server.main(['--model', '/nowhere', '--port', '0'])"
    )
    process = run_program([sys.executable, "-c", code])
    assert process.returncode == 1
    assert "INFO - imported: False\n" in process.stderr
    assert "INFO - second\n" in process.stderr

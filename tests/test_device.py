"""The memory that this process may use: control groups, and the limit of address space."""

import os
import sys

import pytest
from helpers import call, complete, read, submit
from processes import run_program

from mlx_lm_ext import device
from mlx_lm_ext.device import (
    cgroup_limit,
    device_memory,
    machine_free,
    usable_memory,
)
from mlx_lm_ext.engine import models as model_provider
from mlx_lm_ext.engine.loop import Engine
from mlx_lm_ext.errors import RequestError

GB = 1 << 30


@pytest.fixture
def place(tmp_path):
    """Makes the files of control groups; gives their root."""

    def make(groups, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "groups, files, limit",
    [
        ("0::/\n", {"memory.max": 5 * GB}, 5 * GB),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 3 * GB}, 3 * GB),
        ("0::/a/b\n", {"a/b/memory.max": GB, "a/memory.max": 3 * GB}, GB),
        ("0::/seen/outside\n", {"memory.max": 2 * GB}, 2 * GB),
        (
            "5:cpu,memory:/a\n1:cpu:/\n0::/\n",
            {"memory/a/memory.limit_in_bytes": GB, "memory.max": 2 * GB},
            GB,
        ),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": 7 * GB}, 7 * GB),
        ("1:cpu:/\n", {"cpu/memory.limit_in_bytes": GB}, None),
    ],
)
def test_limit_of_the_control_groups(groups, files, limit, place):
    assert cgroup_limit(place(groups, files)) == limit


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_limit(tmp_path) is None


def test_memory_of_the_device_is_bounded_by_the_limits(monkeypatch):
    monkeypatch.setattr(device, "cgroup_limit", lambda: 5 * GB)
    monkeypatch.setattr(device.mx, "device_info", lambda: {})
    assert device_memory() == 5 * GB
    monkeypatch.setattr(device, "address_space_limit", lambda share: GB)
    assert device_memory() == GB
    # The limits do not apply to the memory of a GPU.
    monkeypatch.setattr(device.mx, "device_info", lambda: {"memory_size": 9 * GB})
    assert device_memory() == 9 * GB


def test_usable_memory_is_what_other_processes_leave(monkeypatch):
    monkeypatch.setattr(device, "device_memory", lambda: 9 * GB)
    monkeypatch.setattr(device.mx, "get_active_memory", lambda: 2 * GB)
    monkeypatch.setattr(device.mx, "get_cache_memory", lambda: GB)
    monkeypatch.setattr(device.mx, "device_info", lambda: {})
    monkeypatch.setattr(device, "machine_free", lambda: 4 * GB)
    assert usable_memory() == 7 * GB
    monkeypatch.setattr(device, "machine_free", lambda: 40 * GB)
    assert usable_memory() == 9 * GB
    monkeypatch.setattr(device, "machine_free", lambda: None)
    assert usable_memory() == 9 * GB
    # With a GPU, the free memory is that of the GPU.
    monkeypatch.setattr(device.mx, "device_info", lambda: {"free_memory": GB})
    assert usable_memory() == 4 * GB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
def test_free_memory_of_the_machine_is_a_part_of_it():
    assert 0 < machine_free() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_limit_of_address_space_counts_what_is_taken():
    code = (
        "import resource; from mlx_lm_ext.device import *\n"
        "assert address_space_left() is None and device_memory() > 1 << 30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "left = address_space_left()\n"
        "print(0 < left < 4 << 30, abs(device_memory() - left // 2) < 1 << 20)"
    )
    command = [sys.executable, "-c", code]
    result = run_program(command)
    assert result.stdout == "True True\n", result.stderr


def test_model_for_which_there_is_no_room_is_not_loaded(
    model_folder, start_engine, monkeypatch
):
    engine = start_engine("llama", "--allow-models", "any")
    monkeypatch.setattr(model_provider, "process_limit", lambda: 1000)
    with pytest.raises(RequestError, match="weights take .* GB, .* leaves 0.0 GB"):
        read(submit(engine, "x", model=str(model_folder("lfm2"))))
    # The model that was loaded before still serves.
    assert read(submit(engine, "x", max_tokens=1))


def test_prompt_cache_is_bounded_by_the_limits(start_engine, monkeypatch):
    monkeypatch.setattr("mlx_lm_ext.batch.kv_memory.device_memory", lambda: 3_000_000)
    engine = start_engine("llama", "--use-prompt-cache")
    read(submit(engine, "hello", max_tokens=2))
    assert engine.prompt_cache.max_bytes == engine.batch.kv_memory.limit < 3_000_000


@pytest.mark.logs_errors
def test_step_without_address_space_fails_its_requests_and_not_the_server(
    start_server, monkeypatch
):
    _, port = start_server(make_engine=type("Watched", (Engine,), {}))
    assert complete(port, "hello", max_tokens=2)
    monkeypatch.setattr(device, "address_space_left", lambda: device.MIN_LEFT - 1)
    body = {"prompt": "hello", "max_tokens": 2}
    status, answer = call(port, "POST", "/v1/completions", body)
    assert (status, answer["error"]["type"]) == (503, "server_error")
    monkeypatch.setattr(device, "address_space_left", lambda: device.MIN_LEFT)
    assert complete(port, "hello", max_tokens=2)

"""mlx-lm's sources. They come with its own tests, which the installed package lacks."""

import fcntl
import os
import sys
import tarfile
from importlib.metadata import version

import pytest
from processes import run_program


def upstream_sources(tmp_path_factory):
    """The folder of the unpacked sdist of the installed mlx-lm. It is fetched once a session,
    also with several processes of pytest-xdist. Without a package index, the test is skipped.

    Args:
        tmp_path_factory (pytest.TempPathFactory): pytest's fixture.

    Returns:
        Path: A folder with ``mlx_lm`` and ``tests``, in which nothing may be written.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    name = f"mlx_lm-{version('mlx-lm')}"
    folder = session / "sdist"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            fetch(folder)
            with tarfile.open(folder / f"{name}.tar.gz") as sdist:
                sdist.extractall(folder / "partial", filter="data")
            (folder / "partial" / name).rename(folder / name)
    return folder / name


def fetch(folder):
    """Fetch the sdist into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--no-binary", "mlx-lm", f"mlx-lm=={version('mlx-lm')}"]
    pip = run_program([*command, "--dest", folder])
    if pip.returncode and "NewConnectionError" in pip.stderr:
        pytest.skip("pip reaches no package index, where the sources of mlx-lm are")
    assert pip.returncode == 0, pip.stderr

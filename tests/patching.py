"""The patches for mlx-lm, and copies of mlx-lm to which they are applied."""

import shutil
from pathlib import Path

import mlx_lm
from processes import run_program

PATCHES = Path(__file__).parent.parent / "patches"
SERIES = (PATCHES / "series").read_text().split()


def apply(folder, names, *options):
    """Apply patches to the sources in ``folder``."""
    for name in names:
        command = ["git", "apply", *options, PATCHES / name]
        result = run_program(command, cwd=folder)
        assert result.returncode == 0, (name, result.stderr)


def make_patched(folder):
    """Copy the installed mlx-lm into ``folder``, and apply all patches."""
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(mlx_lm.__file__).parent, folder / "mlx_lm", ignore=hidden)
    apply(folder, SERIES, "--exclude=tests/*")
    return folder

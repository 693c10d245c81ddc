"""Runs of mlx-lm's own tests in a process of its own."""

import os
import sys
from xml.etree import ElementTree

from processes import run_program

from mlx_lm_ext.bench.random_model import LLAMA, write_like, write_model

# The model that mlx-lm's tests load.
MODEL = "mlx-community/Qwen1.5-0.5B-Chat-4bit"


def make_hub(folder):
    """A cache folder of Hugging Face's that has a tiny random model by the name of ``MODEL``.

    Args:
        folder (Path): A folder that exists.
    """
    # Heads of 64: the tests quantize KV in groups of so many.
    config = dict(LLAMA, hidden_size=256)
    source = write_model(folder / "model", "llama", config)
    repository = folder / f"models--{MODEL.replace('/', '--')}"
    # Without an end of the text: the tests want some of it.
    snapshot = write_like(repository / "snapshots" / "0", source, {}, "float32")
    # Without one, ``/v1/models`` does not list it.
    (snapshot / "model.safetensors.index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    return folder


def run_cases(arguments, folder, results, path, **env):
    """Run tests with pytest.

    Args:
        arguments (Sequence): Of pytest.
        folder (Path): Where it runs.
        results (Path): A file for pytest's report.
        path (Sequence[Path]): Where modules are looked for first.
        **env (str): More of its environment.

    Returns:
        Dict[str, str]: The error of each case that has run, which is empty if it has passed.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={results}", *arguments]
    env = dict(HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(map(str, path)), **env)
    pytest = run_program(command, cwd=folder, env=os.environ | env)
    # Some cases may have failed.
    assert pytest.returncode in (0, 1), pytest.stdout + pytest.stderr
    cases = {}
    for case in ElementTree.parse(results).iter("testcase"):
        *_, cls = case.get("classname").split(".")
        # Of a case that was skipped, too: it has not passed.
        cases[f"{cls}.{case.get('name')}"] = "\n".join(e.get("message") for e in case)
    return cases

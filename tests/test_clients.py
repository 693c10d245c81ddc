"""The examples for clients run as they are printed, against a started server whose model says what
a good one would.

The clients are in an environment of their own, whose Python ``CLIENTS_PYTHON`` names: some cannot
be installed beside mlx-lm. ``NODE_MODULES`` is the folder with those for JavaScript.
"""

import json
import os
import re
from pathlib import Path

import pytest
from helpers import saying
from processes import run_program

import mlx_lm_ext

PYTHON = os.environ.get("CLIENTS_PYTHON")
NODE_MODULES = os.environ.get("NODE_MODULES")
needs_python = pytest.mark.skipif(
    not PYTHON,
    reason="CLIENTS_PYTHON is not set: install tests/clients.txt in an environment of its own",
)
PAGE = Path(mlx_lm_ext.__file__).parent / "examples" / "clients.md"
BLOCK = re.compile(r"^```(\w+)( shared)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
PERSON = {"name": "Ann", "age": 30}
# A template that offers tools in the format of ``json_tools``.
TEMPLATE = """{% for m in messages %}{{ m.content }}{% endfor %}
{% if tools %}{{ tools | tojson }}<tool_call>{"name": tool_call.name}</tool_call>{% endif %}"""
SERVER = "http://localhost:8080/v1"


def examples(heading, language):
    """The code under a heading of the page."""
    section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [code for kind, _, code in BLOCK.findall(section) if kind == language]


def answer(request):
    """The call of the first tool if there is one, and the person as JSON if not."""
    tools = request.body.get("tools")
    if not tools or request.body.get("tool_choice") == "none":
        return json.dumps(PERSON)
    call = {"name": tools[0]["function"]["name"], "arguments": PERSON}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


@pytest.fixture
def url(start_server):
    """The address of a server."""
    _, port = start_server("llama", "--chat-template", TEMPLATE, plugin=saying(answer))
    return f"http://127.0.0.1:{port}/v1"


def run(command, **kwargs):
    """What a program prints, which has to succeed."""
    result = run_program(command, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_python
@pytest.mark.parametrize(
    "heading, n_persons",
    [
        ("openai", 5),
        ("LangChain", 3),
        ("instructor", 3),
        ("Pydantic AI", 3),
        ("LlamaIndex", 1),
    ],
)
def test_python_example(heading, n_persons, url, tmp_path):
    blocks = BLOCK.findall(PAGE.read_text())
    (shared,) = [code for _, is_shared, code in blocks if is_shared]
    (code,) = examples(heading, "python")
    script = tmp_path / "example.py"
    script.write_text((shared + code).replace(SERVER, url))
    printed = run([PYTHON, script], cwd=tmp_path)
    assert printed.count("name='Ann' age=30") == n_persons, printed
    if heading == "openai":
        # The arguments came in pieces.
        assert '{|"|n|a|m|e|"' in printed


@needs_python
def test_llm(url, tmp_path):
    (models,), (command,) = examples("llm", "yaml"), examples("llm", "sh")
    (tmp_path / "extra-openai-models.yaml").write_text(models.replace(SERVER, url))
    path = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "PATH": path}
    assert json.loads(run(command, shell=True, env=env)) == PERSON


@needs_python
def test_lm_eval(start_server, model_folder, tmp_path):
    engine, port = start_server()
    lines = [
        {"q": f"{i} and", "choices": [" one", " two", " three"], "gold": i % 3}
        for i in range(4)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    choice |= {"doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}]}
    text = {"output_type": "generate_until", "doc_to_target": "{{choices[gold]}}"}
    text |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 8}}
    text |= {"metric_list": [{"metric": "exact_match"}]}
    for name, task in (("choice", choice), ("text", text)):
        # JSON is YAML.
        task = {"task": name, **common, **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    (command,) = examples("lm-eval", "sh")
    command = command.replace(SERVER, f"http://127.0.0.1:{port}/v1")
    command = command.replace("=MODEL", f"={engine.cli_args.model}")
    command = command.replace("arc_easy", "choice,text").replace("gsm8k", "text")
    command = command.replace(
        "lm_eval", f"{PYTHON} -m lm_eval --include_path {tmp_path}"
    )
    cache = {"HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    printed = run(f"set -e\n{command}", shell=True, env=os.environ | cache)
    assert len(re.findall(r"\|(choice|text) *\|Yaml", printed)) == 3, printed


@pytest.mark.skipif(
    not NODE_MODULES,
    reason="NODE_MODULES is not set: npm install ai @ai-sdk/openai-compatible zod",
)
def test_ai_sdk(url, tmp_path):
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (code,) = examples("AI SDK", "js")
    (tmp_path / "example.mjs").write_text(code.replace(SERVER, url))
    printed = run(["node", "example.mjs"], cwd=tmp_path)
    assert printed.count("{ name: 'Ann', age: 30 }") == 3, printed

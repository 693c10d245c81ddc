"""The command line: defaults, errors of one line, and what ends the process."""

import argparse
import os
import re
import signal
import socket
import sys
from pathlib import Path

import mlx_lm.server
import pytest
from conftest import server_process
from helpers import complete
from mlx_lm.server import ModelDescription
from processes import run_program

from mlx_lm_ext import batch_server
from mlx_lm_ext.arguments import make_parser
from mlx_lm_ext.policies.loading import Plugins

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

DEFAULTS = {
    "model": None,
    "adapter_path": None,
    "host": "127.0.0.1",
    "port": 8080,
    "batch_size": 32,
    "max_tokens": 512,
    "trust_remote_code": False,
    "log_level": "INFO",
    "use_prompt_cache": False,
    "radix_cache_size": 1073741824,
    "chat_template": "",
    "use_default_chat_template": False,
    "chat_template_args": {},
    "temp": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
}


def test_defaults_are_the_documented_ones():
    args = vars(make_parser().parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def upstream_defaults(monkeypatch):
    # patches/server-setup-arg-parser.patch
    if hasattr(mlx_lm.server, "setup_arg_parser"):
        return vars(mlx_lm.server.setup_arg_parser().parse_args([]))

    class Parsed(Exception):
        pass

    def parse_args(self):
        raise Parsed(vars(argparse.ArgumentParser.parse_known_args(self, [])[0]))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        mlx_lm.server.main()
    monkeypatch.undo()
    (upstream,) = parsed.value.args
    return upstream


def test_other_arguments_have_the_defaults_of_upstream(monkeypatch):
    upstream = upstream_defaults(monkeypatch)
    ours = vars(make_parser().parse_args([]))
    # These two differ: prompts are bounded by the tokens of a step, and web pages of other
    # sites may not call.
    shared = set(upstream) & set(ours) - {"prompt_concurrency", "allowed_origins"}
    assert {"kv_bits", "prefill_step_size", "adapter_path"} < shared
    assert {n: ours[n] for n in shared} == {n: upstream[n] for n in shared}


@pytest.mark.parametrize(
    "text, n_bytes",
    [
        ("0", 0),
        ("123", 123),
        ("512MB", 512 * 10**6),
        ("2GB", 2 * 10**9),
        ("1.5g", 15 * 10**8),
    ],
)
def test_sizes_may_have_units(text, n_bytes):
    args = make_parser().parse_args(["--radix-cache-size", text])
    assert args.radix_cache_size == n_bytes


@pytest.mark.parametrize(
    "argv, mode",
    [
        ([], "background"),
        (["--warmup", "full"], "full"),
        (["--no-warmup"], "off"),
        (["--warmup", "full", "--no-warmup"], "off"),
    ],
)
def test_warm_up_is_in_the_background_unless_the_command_line_says_otherwise(
    argv, mode
):
    assert make_parser().parse_args(argv).warmup == mode


def test_chat_template_may_be_a_file(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    for value in (str(path), "{{ messages }}"):
        args = make_parser().parse_args(["--chat-template", value])
        assert args.chat_template == "{{ messages }}"
    long = "{{ messages }}" * 100
    assert make_parser().parse_args(["--chat-template", long]).chat_template == long


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "70000"],
        ["--port", "x"],
        ["--batch-size", "0"],
        ["--max-tokens", "-1"],
        ["--log-level", "LOUD"],
        ["--radix-cache-size", "2 apples"],
        ["--radix-cache-size", "-1"],
        ["--chat-template", "no/such/file.jinja"],
        ["--chat-template", "{{ messages"],
        ["--chat-template", "{% if x %}"],
        ["--chat-template", "/"],
        ["--chat-template-args", "[1]"],
        ["--chat-template-args", "{"],
        ["--temp", "-1"],
        ["--temp", "nan"],
        ["--top-p", "1.5"],
        ["--top-k", "-1"],
        ["--min-p", "2"],
        ["--kv-bits", "7"],
        ["--prefill-step-size", "0"],
        ["--num-draft-tokens", "0"],
    ],
)
def test_wrong_value_is_one_line_that_names_the_argument(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        make_parser().parse_args(argv)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert argv[0] in line


def run(*argv):
    """Run the server's command, which is expected to end by itself."""
    return run_program([sys.executable, "-m", "mlx_lm_ext.batch_server", *argv])


def test_wrong_argument_ends_the_process_before_mlx_is_imported():
    code = (
        "import sys; from mlx_lm_ext.batch_server import main\n"
        "try: main(['--temp', 'x'])\n"
        "except SystemExit as e: print(e.code, 'mlx.core' in sys.modules)"
    )
    # An installed plugin may import it.
    alone = dict(os.environ, MLX_LM_EXT_DISABLE_AUTOLOAD="1")
    result = run_program([sys.executable, "-c", code], env=alone)
    assert result.stdout == "2 False\n"


@pytest.mark.slow
def test_what_keeps_the_server_from_starting_is_one_line(model_folder, tmp_path):
    folder = str(model_folder())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no_such_model"}')
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        cases = {
            port: ["--model", folder, "--port", port],
            "nobody/nothing": ["--model", "nobody/nothing"],
            "broken": ["--model", str(broken)],
            "no/adapter": ["--model", folder, "--adapter-path", "no/adapter"],
            "no/draft": ["--model", folder, "--draft-model", "no/draft"],
            "no.such.host": ["--model", folder, "--host", "no.such.host.invalid"],
        }
        for name, argv in cases.items():
            result = run(
                "--log-level",
                "WARNING",
                *([] if name == port else ["--port", "0"]),
                *argv,
            )
            assert result.returncode == 1, name
            (line,) = result.stderr.splitlines()
            assert line.startswith("mlx_lm.batch_server: error: ") and name in line
            assert "Traceback" not in line


@pytest.fixture
def child_takes_sigint():
    """Lets processes start with the default action of SIGINT. They would ignore it if
    this process does, as under ``nohup`` or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_ends_the_server_with_0_after_requests(
    name, model_folder, child_takes_sigint
):
    with server_process("--model", str(model_folder())) as (port, lines, process):
        assert complete(port, "hello", max_tokens=3)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(lines)


def test_garbage_collector_passes_over_what_was_imported(
    tmp_path, monkeypatch, model_folder
):
    (tmp_path / "counting.py").write_text("""
import gc, logging
from mlx_lm_ext import hookimpl

@hookimpl
def mlx_lm_make_logits_processors():
    logging.info(f"{len(gc.get_objects())} of {gc.get_freeze_count()} objects")
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with server_process("--model", str(model_folder()), "-p", "counting") as running:
        port, lines, _ = running
        assert complete(port, "hello", max_tokens=1)
    seen, frozen = re.search(r"(\d+) of (\d+) objects", "".join(lines)).groups()
    assert int(seen) < int(frozen) // 5


def test_chat_template_of_the_command_line_is_used(model_folder, start_engine):
    engine = start_engine("llama", "--chat-template", "{{ messages[0].content }}!")
    model = engine.model_provider.describe(
        ModelDescription("default_model", "default_model", None)
    )
    tokens = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert model.tokenizer.decode(tokens) == "hi!"


def test_readme_lists_every_argument():
    parser = make_parser()
    Plugins(autoload=False).add_arguments(parser)
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                assert f"`{option}" in README, option


@pytest.mark.parametrize(
    "version, good",
    [("0.32.2", True), ("0.32.10", True), ("0.32.1", False), ("0.33.0rc1", False)],
)
def test_other_series_of_upstream_are_refused(version, good, monkeypatch):
    monkeypatch.setattr(batch_server, "version", lambda name: version)
    if good:
        batch_server.check_mlx_lm()
    else:
        with pytest.raises(RuntimeError, match=version):
            batch_server.check_mlx_lm()

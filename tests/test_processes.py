"""What tests wait for has a limit, so that a hang is a failure that says where."""

import ast
import sys
import threading
from pathlib import Path

import processes
import pytest
from processes import join, read_until, started

# They wait for ever, unless they have an argument.
ENDLESS = {"communicate", "join", "result", "wait"}
# They have no limit, unless it is named. Those of connections are for each wait.
UNLIMITED = {"HTTPConnection", "create_connection", "run", "check_output"}


def waits(path):
    """The calls in a file of tests that wait without a limit."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or isinstance(node.func, ast.Name):
            continue
        place, _, name = ast.unparse(node.func).rpartition(".")
        is_endless = name in ENDLESS and not node.args
        if name in UNLIMITED:
            is_endless = place in ("http.client", "socket", "subprocess")
            is_endless &= len(node.args) < 2
        if is_endless and not any(k.arg == "timeout" for k in node.keywords):
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_nothing_is_waited_for_without_a_limit():
    found = [w for path in Path(__file__).parent.glob("*.py") for w in waits(path)]
    # This one has its limit in the arguments.
    assert [w for w in found if "subprocess.run(command, **kwargs)" not in w] == []


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 1)


SILENT = (
    "import sys, threading; sys.stderr.write('started\\n'); threading.Event().wait()"
)


def test_program_that_says_nothing_more_is_killed_and_named(impatient):
    with started([sys.executable, "-c", SILENT]) as process:
        with pytest.raises(TimeoutError, match="took more than 1 seconds") as error:
            read_until(process, "ready")
        assert process.wait(60) < 0
    assert "started" in str(error.value)


def test_program_that_ends_without_what_is_waited_for_shows_what_it_has_written():
    with started([sys.executable, "-c", "raise SystemExit('no model')"]) as process:
        with pytest.raises(RuntimeError, match="no model"):
            read_until(process, "ready")


def test_program_does_not_outlive_the_test():
    with pytest.raises(ZeroDivisionError):
        with started([sys.executable, "-c", SILENT]) as process:
            raise ZeroDivisionError
    assert process.returncode < 0


def test_thread_that_does_not_end_is_named(impatient):
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=[60], name="worker")
    thread.start()
    with pytest.raises(AssertionError, match="worker"):
        join(thread)
    release.set()

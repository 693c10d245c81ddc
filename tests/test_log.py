"""The log: it never blocks a thread that writes lines."""

import logging
import os
import re
import signal
import sys
import threading

import pytest
from helpers import call, complete
from processes import SERVING, read_until, started

from mlx_lm_ext import log
from mlx_lm_ext.log import LogWriter


@pytest.fixture
def root():
    """The root logger, restored after the test."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logging.captureWarnings(False)


def test_lines_that_find_the_queue_full_are_dropped_and_counted(root, capsys):
    log = LogWriter("INFO", max_lines=3)
    (handler,) = log.handlers
    free, entered = threading.Event(), threading.Event()
    emit = handler.emit

    def wait(record):
        entered.set()
        assert free.wait(60)
        emit(record)

    handler.emit = wait
    logging.info("first")
    # The first line has left the queue.
    assert entered.wait(60)
    for i in range(10):
        logging.info(f"line {i}")
    assert not log.drain(timeout=0.01)
    free.set()
    assert log.drain(timeout=60)
    log.stop()
    lines = [line.rpartition(" - ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "first"
    assert lines[1].startswith("7 lines of the log were dropped")
    assert lines[2:] == ["line 0", "line 1", "line 2"]


def test_tracebacks_warnings_and_the_lines_of_libraries_are_written(root, capsys):
    log = LogWriter("INFO")
    library = logging.getLogger("a_library")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    log.take_over("a_library")
    try:
        raise ArithmeticError("a fault")
    except ArithmeticError:
        logging.exception("It failed")
    library.warning("of a library")
    logging.debug("not this")
    assert log.drain(timeout=60)
    log.stop()
    written = capsys.readouterr().err
    assert "ArithmeticError: a fault" in written
    assert written.count("of a library") == 1
    assert "not this" not in written


@pytest.mark.slow
def test_log_that_nobody_reads_stops_neither_requests_nor_the_end(model_folder):
    read, write = os.pipe()
    command = [sys.executable, "-m", "mlx_lm_ext.batch_server", "--port", "0"]
    command += ["--warmup", "off", "--model", str(model_folder())]
    command += ["--log-level", "DEBUG"]
    with open(read) as pipe, started(command, stderr=write) as process:
        os.close(write)
        serving, _ = read_until(process, SERVING, pipe)
        port = int(serving[1])
        # More than a pipe holds.
        for _ in range(1200):
            assert call(port, "GET", "/health")[0] == 200
        assert complete(port, "hello", max_tokens=2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_what_takes_long_is_told_with_its_time(caplog, monkeypatch):
    monkeypatch.setattr(log, "PROGRESS_INTERVAL", 0.01)
    caplog.set_level("INFO")
    told = threading.Event()
    monkeypatch.setattr(
        log.logger, "info", lambda text: (lines.append(text), told.set())
    )
    lines = []
    with log.stage("Loading"):
        assert told.wait(60)
    assert lines[0] == "Loading: 0 s so far"
    assert re.fullmatch(r"Loading: \d+\.\d s", lines[-1])


def test_what_fails_is_not_told_to_have_ended(caplog):
    caplog.set_level("INFO")
    with pytest.raises(OSError), log.stage("Loading"):
        raise OSError
    assert not caplog.records

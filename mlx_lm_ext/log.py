"""The log, which a thread of its own writes.

A write to a pipe that is full blocks until somebody reads from it. Threads that wrote log
lines themselves would be blocked one after the other.

Rules:
1. To log never blocks. If the queue of lines is full, new lines are dropped and counted.
2. The process can end even if the lines cannot be written.
"""

import json
import logging
import time
import warnings
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from threading import Event, Thread
from typing import Iterator

logger = logging.getLogger(__name__)


class JSONFormatter(logging.Formatter):
    """Makes an object of JSON of each line, in one line: its time in UTC, its severity, its
    message, and what the ``fields`` of its ``extra`` have."""

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


# How lines are written, by the values of ``--log-format``.
FORMATS = {
    "text": logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"),
    "json": JSONFormatter(),
}
# Lines that may wait to be written.
MAX_LINES = 10_000
# Seconds for which lines are collected before they are written. If each line woke the
# writing thread, it would often take the interpreter lock from threads that serve.
INTERVAL = 0.05
# Seconds between two lines about something that takes long.
PROGRESS_INTERVAL = 2.5


class BoundedQueueHandler(QueueHandler):
    """Puts lines into a queue, and drops them if it is full."""

    n_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        # ``logging`` calls this under the handler's lock, so the count is right.
        try:
            self.queue.put_nowait(record)
        except Full:
            self.n_dropped += 1


class LogWriter(QueueListener):
    """Writes the root logger's lines to stderr.

    Args:
        level (str): The lowest level that is written.
        format (str): One of ``FORMATS``.
        max_lines (int): How many lines may wait to be written.
    """

    def __init__(self, level: str, format: str = "text", max_lines: int = MAX_LINES):
        self.lines: "Queue[logging.LogRecord]" = Queue(max_lines)
        self.source = BoundedQueueHandler(self.lines)
        # Dropped lines that a line of the log has reported.
        self.n_reported = 0
        # No formatter here: lines are formatted by the thread that logs them.
        super().__init__(self.lines, logging.StreamHandler())
        self.source.setFormatter(FORMATS[format])
        logging.getLogger().setLevel(level)
        logging.getLogger().addHandler(self.source)
        logging.captureWarnings(True)
        # Tool parsers compile text that a model has written.
        warnings.simplefilter("ignore", SyntaxWarning)
        self.start()

    def take_over(self, *names: str) -> None:
        """Let the lines of libraries go through this log.

        Args:
            names (str): Names of loggers that have handlers of their own.
        """
        for name in names:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True

    def dequeue(self, block: bool) -> logging.LogRecord:
        if not self.lines.qsize():
            time.sleep(INTERVAL)
        return super().dequeue(block)

    def handle(self, record: logging.LogRecord) -> None:
        n = self.source.n_dropped - self.n_reported
        if n:
            self.n_reported += n
            text = f"{n} lines of the log were dropped: nobody read them in time"
            lost = logging.LogRecord("root", logging.WARNING, "", 0, text, (), None)
            super().handle(self.source.prepare(lost))
        super().handle(record)

    def drain(self, timeout: float) -> bool:
        """Wait until all lines are written.

        Args:
            timeout (float): Seconds to wait at most.

        Returns:
            Whether all are written.
        """
        with self.lines.all_tasks_done:
            return self.lines.all_tasks_done.wait_for(
                lambda: not self.lines.unfinished_tasks, timeout
            )


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log how long something takes that the user waits for, and every few seconds that it
    still goes on.

    Args:
        name (str): What it does: "Loading ...".
    """
    start = time.perf_counter()
    is_over = Event()

    def report() -> None:
        while not is_over.wait(PROGRESS_INTERVAL):
            logger.info(f"{name}: {int(time.perf_counter() - start)} s so far")

    Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
    logger.info(f"{name}: {time.perf_counter() - start:.1f} s")

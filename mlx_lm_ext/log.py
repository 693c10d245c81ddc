"""Log lines are written by a thread of their own.

A pipe that nobody reads stops who writes to it: all threads, one after the other.

Rules:
1. Who logs never waits. Lines that find the queue full are dropped and counted.
2. The process ends, whether the lines can be written or not.
"""

import logging
import time
import warnings
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue

FORMAT = "%(asctime)s - %(levelname)s - %(message)s"
# Lines that wait to be written.
MAX_LINES = 10_000
# Seconds between two times that lines are written: a thread that is woken for each line
# keeps those from running that serve.
INTERVAL = 0.05


class BoundedQueueHandler(QueueHandler):
    """Puts lines into a queue as long as there is room."""

    n_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        # Under the lock of the handler.
        try:
            self.queue.put_nowait(record)
        except Full:
            self.n_dropped += 1


class LogWriter(QueueListener):
    """Writes the root logger's lines to stderr.

    Args:
        level (str): The least severity of what is written.
        max_lines (int): How many may wait.
    """

    def __init__(self, level: str, max_lines: int = MAX_LINES):
        self.source = BoundedQueueHandler(Queue(max_lines))
        self.n_told = 0
        # The lines are formatted by who logs them.
        super().__init__(self.source.queue, logging.StreamHandler())
        self.source.setFormatter(logging.Formatter(FORMAT))
        logging.getLogger().setLevel(level)
        logging.getLogger().addHandler(self.source)
        logging.captureWarnings(True)
        # Upstream's tool parsers compile what models write.
        warnings.simplefilter("ignore", SyntaxWarning)
        self.start()

    def take_over(self, *names: str) -> None:
        """Write the lines of libraries that write their own."""
        for name in names:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True

    def dequeue(self, block: bool) -> logging.LogRecord:
        if not self.queue.qsize():
            time.sleep(INTERVAL)
        return super().dequeue(block)

    def handle(self, record: logging.LogRecord) -> None:
        n = self.source.n_dropped - self.n_told
        if n:
            self.n_told += n
            text = f"{n} lines of the log were dropped: nobody read them in time"
            lost = logging.LogRecord("root", logging.WARNING, "", 0, text, (), None)
            super().handle(self.source.prepare(lost))
        super().handle(record)

    def drain(self, timeout: float) -> bool:
        """Wait until all lines are written; gives False if the time runs out."""
        with self.queue.all_tasks_done:
            return self.queue.all_tasks_done.wait_for(
                lambda: not self.queue.unfinished_tasks, timeout
            )

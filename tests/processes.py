"""Programs and threads that tests start, none of which is waited for without a limit."""

import re
import subprocess
import threading
from contextlib import contextmanager

# Seconds for what a test waits for. Nothing takes as long, unless it hangs.
PATIENCE = 120
# The line with which a server tells its port.
SERVING = r"Serving .* at https?://.*:(\d+)/v1"


def run_program(command, **kwargs):
    """Run a program to its end; gives what it has written."""
    kwargs = dict(capture_output=True, text=True, timeout=PATIENCE) | kwargs
    return subprocess.run(command, **kwargs)


@contextmanager
def started(command, **kwargs):
    """A started program, which is killed if it has not ended at the end of the block."""
    kwargs = dict(stderr=subprocess.PIPE, text=True) | kwargs
    with subprocess.Popen(command, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def reading(process, lines=()):
    """A limit for a block that reads what a started program writes: after it the program is
    killed, so that the reading ends.

    Args:
        process (subprocess.Popen): The program.
        lines (Sequence[str]): What was read of it, for the error.

    Raises:
        TimeoutError: If the program was killed.
    """
    is_late = threading.Event()

    def end():
        is_late.set()
        process.kill()

    timer = threading.Timer(PATIENCE, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if is_late.is_set():
            message = f"{process.args} took more than {PATIENCE} seconds:\n"
            raise TimeoutError(message + "".join(lines))


def read_until(process, pattern, stream=None):
    """Read what a started program writes, up to the line in which a pattern is found.

    Args:
        process (subprocess.Popen): The program.
        pattern (str): The pattern.
        stream (Optional[TextIO]): What is read. By default, its stderr.

    Returns:
        Tuple[re.Match, List[str]]: What was found, and the lines.

    Raises:
        RuntimeError: If the program has ended without it.
        TimeoutError: If it has not written it in time.
    """
    lines = []
    with reading(process, lines):
        for line in stream or process.stderr:
            lines.append(line)
            if match := re.search(pattern, line):
                return match, lines
        raise RuntimeError(f"no line is like {pattern}:\n" + "".join(lines))


def join(*threads):
    """Wait for the end of threads."""
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread} has not ended"

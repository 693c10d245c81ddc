"""Chromium without a window, driven through the pipe of its debugging protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# As root there is no sandbox, and containers have little shared memory.
FLAGS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --disable-gpu --no-first-run"
)
# What a page is waited for, in seconds.
PATIENCE = 60

# Resolves when an expression is true, which is tried after each change of the page.
UNTIL = """new Promise((resolve, reject) => {
  const look = () => { if (%s) { observer.disconnect(); resolve(true); } };
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true,
    characterData: true});
  setTimeout(() => reject(new Error(document.body.innerText)), %d);
  look();
})"""


class Page:
    """A page in a browser.

    Args:
        send (Callable): Sends a command of the protocol, and gives its result.
    """

    def __init__(self, send):
        target = send("Target.createTarget", url="about:blank")["targetId"]
        session = send("Target.attachToTarget", targetId=target, flatten=True)
        self.send = partial(send, session=session["sessionId"])
        self.send("Page.enable")

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression):
        """The value of an expression; that of a promise is waited for."""
        result = self.send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition):
        """Wait until an expression is true."""
        return self.evaluate(UNTIL % (condition, 1000 * PATIENCE))

    def screenshot(self, path, width=1000, height=800, scheme="light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser_page(folder):
    """A page in a new browser, whose profile is in ``folder``."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()
    # The protocol is on the descriptors 3 and 4. Each message ends with a NUL.
    script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
    flags = [*FLAGS.split(), f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", CHROMIUM, *flags],
        pass_fds=(to_read, to_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    n_sent = 0
    with (
        open(commands, "wb", buffering=0) as output,
        open(answers, "rb", buffering=0) as source,
    ):

        def messages():
            raw = b""
            # Longer than what it is told to wait for.
            while select.select([source], [], [], 2 * PATIENCE)[0]:
                if not (part := source.read(1 << 16)):
                    raise RuntimeError("the browser has ended")
                *whole, raw = (raw + part).split(b"\0")
                yield from map(json.loads, whole)

        received = messages()

        def send(method, session=None, **params):
            nonlocal n_sent
            n_sent += 1
            message = {"id": n_sent, "method": method, "params": params}
            message |= {"sessionId": session} if session else {}
            output.write(json.dumps(message).encode() + b"\0")
            for answer in received:
                if answer.get("id") == n_sent:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
            raise TimeoutError(f"the browser has not answered {method}")

        try:
            yield Page(send)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()

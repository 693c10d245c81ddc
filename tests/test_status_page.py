"""The status page: what it may load, and what a browser shows of a server."""

import http.client
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from browser import CHROMIUM, browser_page
from helpers import JSON, complete

from mlx_lm_ext.plugins.status_page import policy

PAGE = files("mlx_lm_ext.plugins").joinpath("status.html").read_text("utf-8")
KEY = "a-secret-key"
FIGURES = "!document.getElementById('figures').hidden"


def get(port, path="/"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"User-Agent": JSON["User-Agent"]})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response, raw.decode()


def test_page_needs_no_key_and_says_nothing_of_the_server(start_server):
    _, port = start_server("llama", "--api-key", KEY)
    response, text = get(port)
    assert response.status == 200
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert text == PAGE
    assert get(port, "/server_info")[0].status == 401


def test_policy_of_the_page_lets_it_run_only_its_own_code(start_server):
    _, port = start_server()
    sent = get(port)[0].getheader("Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in sent.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules[kind])
    assert policy(PAGE.replace("const SECONDS", "var SECONDS")) != sent


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_page_loads_nothing_and_keeps_the_key_in_the_session_only():
    tags = Tags()
    tags.feed(PAGE)
    links = [a[k] for _, a in tags.found for k in ("src", "href", "action") if k in a]
    assert links == ["data:,"]
    assert not [a for _, a in tags.found for k in a if k == "style" or k[:2] == "on"]
    assert "http" not in PAGE and "localStorage" not in PAGE and "cookie" not in PAGE
    assert "innerHTML" not in PAGE


# In a browser


@pytest.fixture
def page(tmp_path):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with browser_page(tmp_path / "profile") as page:
        yield page


def text_of(page, id):
    return page.evaluate(f"document.getElementById('{id}').textContent")


@pytest.mark.slow
def test_page_shows_what_the_server_does(page, start_server, tmp_path):
    _, port = start_server("llama", "--use-prompt-cache", "--served-model-name", "tiny")
    page.open(f"http://127.0.0.1:{port}/")
    page.wait(FIGURES)
    assert text_of(page, "model") == "tiny"
    assert text_of(page, "status") == "ok"
    for _ in range(2):
        complete(port, "hello " * 20, max_tokens=50)
    page.wait("parseFloat(document.getElementById('speed').textContent) > 0")
    page.wait("document.getElementById('generated').textContent === '100'")
    page.wait("document.getElementById('cached').textContent === '50%'")
    assert " of 1.1 GB" in text_of(page, "cache-text")
    meter = "document.getElementById('cache').getAttribute('aria-valuenow')"
    assert page.evaluate(meter) == "0"
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
def test_page_asks_for_the_key_and_forgets_a_wrong_one(page, start_server):
    _, port = start_server("llama", "--api-key", KEY)
    page.open(f"http://127.0.0.1:{port}/")
    shown = "!document.getElementById('login').hidden"
    enter = (
        "document.getElementById('key').value = '%s';"
        "document.querySelector('#login button').click()"
    )
    page.wait(shown)
    assert text_of(page, "notice") == "This server needs an API key."
    page.evaluate(enter % "wrong")
    page.wait(f"{shown} && document.body.innerText.includes('key is wrong')")
    assert page.evaluate("sessionStorage.length") == 0
    page.evaluate(enter % KEY)
    page.wait(FIGURES)
    assert not page.evaluate(shown)
    assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [
        0,
        "",
        "",
    ]
    # It is still there when the page is loaded again.
    page.open(f"http://127.0.0.1:{port}/?again")
    page.wait(FIGURES)


@pytest.mark.slow
def test_page_says_that_the_server_has_left_and_comes_back_with_it(page, start_server):
    _, port = start_server()
    page.open(f"http://127.0.0.1:{port}/")
    page.wait(FIGURES)
    page.send("Network.enable")
    network = dict(latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.send("Network.emulateNetworkConditions", offline=True, **network)
    page.wait("document.body.innerText.includes('cannot be reached')")
    assert not page.evaluate(FIGURES)
    page.send("Network.emulateNetworkConditions", offline=False, **network)
    page.wait(FIGURES)
    assert page.evaluate("document.getElementById('notice').hidden")

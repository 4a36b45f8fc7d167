"""The report page in a real browser: sorting by mouse and keyboard, the choice of a budget, links, narrow screens.

Headless Chromium is driven through chromedriver's own protocol (W3C WebDriver, JSON over HTTP on the loopback), so
that no package is needed; without these two programs the tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from pages import ladder, made, put

from pyrometer.benchmarks.page import report

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not (DRIVER and CHROMIUM), reason="chromium and chromedriver are not both installed (apt: chromium chromium-driver)"
)

ENTER, TAB = "\ue007", "\ue004"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the protocol gives a reference to an element


class Browser:
    """A session: `run` executes a function body in the page and returns its value."""

    def __init__(self, address: str) -> None:
        self.address = address
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        wanted = {
            "goog:chromeOptions": {"args": arguments, "binary": CHROMIUM},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self.session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def ask(self, method, path, body=None):
        return self._ask(method, f"/session/{self.session}{path}", body)

    def run(self, script, *arguments):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def open(self, file, width=1280):
        self.ask("POST", "/window/rect", {"width": width, "height": 900})
        # a headless window is never narrower than 500: the device is told to be
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.ask("POST", "/goog/cdp/execute", command)
        self.ask("POST", "/url", {"url": file.resolve().as_uri()})

    def click(self, selector):
        self.ask("POST", f"/element/{self.find(selector)}/click", {})

    def find(self, selector):
        return self.ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def keys(self, text):
        pressed = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": pressed}]})

    def errors(self):
        return [line["message"] for line in self.ask("POST", "/se/log", {"type": "browser"})]

    def rows(self, table):
        script = (
            "return [...document.getElementById(arguments[0]).tBodies[0].rows].filter(r => !r.hidden)"
            ".map(r => r.cells[0].textContent.trim() + '@' + r.cells[1].textContent.trim())"
        )
        return self.run(script, table)


@pytest.fixture(scope="module")
def browser():
    process = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        found = None
        for line in process.stdout:
            if "started successfully on port" in line:
                found = Browser(f"http://127.0.0.1:{int(line.rstrip('. ' + chr(10)).rpartition(' ')[2])}")
                break
        yield found
        found.ask("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    found = ladder("nuts", (0.061, 0.058, 0.064)) + ladder("svi", (0.31, 0.32, 0.30), level="caution")
    found += ladder("a_very_long_name_of_an_engine" * 3, (0.01, 0.02, 0.03), problem="a<b>&c" + "x" * 120)
    found += [made("smc", seed, state="failed", reason="the weights vanished") for seed in range(3)]
    return report(put(folder / "runs", *found), folder / "report.html").page


@pytest.fixture
def coin(browser, page):
    """The table of the problem 'coin', on a fresh page."""
    browser.open(page)
    return browser.run('return [...document.querySelectorAll(\'table[id^="m-coin"][id$="-table"]\')][0].id')


def column(browser, table, name):
    script = (
        "const heads = [...document.querySelectorAll(`#${arguments[0]} thead th`)];"
        "return heads.findIndex(h => h.textContent.trim() === arguments[1]) + 1"
    )
    return browser.run(script, table, name)


def test_a_click_sorts_up_then_down_and_what_is_missing_stays_last(browser, coin):
    head = f"#{coin} thead th:nth-child({column(browser, coin, 'error of means')})"
    before = browser.rows(coin)
    up = ["nuts@4000 calls", "nuts@1000 calls", "svi@4000 calls", "svi@1000 calls", "smc@1000 calls"]
    assert sorted(before) == sorted(up)
    assert before != up
    browser.click(f"{head} button")
    assert browser.rows(coin) == up
    assert browser.run("return document.querySelector(arguments[0]).getAttribute('aria-sort')", head) == "ascending"
    browser.click(f"{head} button")
    assert browser.rows(coin) == [*up[3::-1], "smc@1000 calls"]
    assert browser.run("return document.querySelectorAll('[aria-sort=descending]').length") == 1
    browser.click(f"#{coin} thead th:first-child button")
    assert [row.partition("@")[0] for row in browser.rows(coin)] == ["nuts", "nuts", "smc", "svi", "svi"]
    assert browser.run("return document.querySelectorAll('[aria-sort=ascending]').length") == 1


def test_a_keyboard_sorts_too(browser, coin):
    head = f"#{coin} thead th:nth-child({column(browser, coin, 'calls') - 1}) button"
    browser.run("document.querySelector(arguments[0]).focus()", head)
    browser.keys(TAB)
    assert browser.run("return document.activeElement.textContent") == "calls"
    browser.keys(ENTER)
    assert browser.rows(coin)[:2] == ["nuts@1000 calls", "svi@1000 calls"]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid", "the focus can be seen"


def test_a_budget_can_be_chosen(browser, coin):
    script = (
        "const s = document.querySelector(`select[data-filters='${arguments[0]}']`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change')); return !s.closest('.filter').hidden"
    )
    assert browser.run(script, coin, "4000 calls") is True
    assert sorted(browser.rows(coin)) == ["nuts@4000 calls", "svi@4000 calls"]
    browser.run(script, coin, "")
    assert len(browser.rows(coin)) == 5


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(browser, page, coin):
    anchors = browser.run("return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href'))")
    assert len(anchors) >= 4
    for anchor in anchors:
        assert browser.run("return document.getElementById(arguments[0].slice(1)) !== null", anchor), anchor
    files = browser.run("return [...document.querySelectorAll('a[download]')].map(a => decodeURI(a.pathname))")
    assert files
    assert all(os.path.isfile(file) for file in files)
    browser.click("nav a")
    assert browser.run("return location.hash")
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in loaded)
    assert browser.run("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.errors() == []


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_is_no_wider_than_the_screen(browser, page, width):
    browser.open(page, width)
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    scroll, inner = browser.run(wide)
    assert inner == width
    assert scroll <= width
    assert browser.run("return [...document.querySelectorAll('.wide')].some(w => w.scrollWidth > w.clientWidth)") == (
        width < 500
    )


def test_print_shows_what_is_folded_and_what_is_filtered(browser, coin):
    folded = "return document.querySelectorAll('details:not([open])').length"
    assert browser.run(folded) > 0
    assert browser.run("dispatchEvent(new Event('beforeprint'));" + folded) == 0


def test_no_script_of_a_name_runs(browser, tmp_path):
    names = ("<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">")
    found = [made(name, seed, problem=name) for name in names for seed in range(2)]
    browser.open(report(put(tmp_path / "runs", *found), tmp_path / "r.html").page)
    time.sleep(0.3)
    assert browser.run("return document.title") == "Pyrometer: runs"
    assert browser.run("return document.scripts.length") == 1
    # and if one came in all the same, the policy of the page would not let it
    browser.run(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\";"
        "document.body.append(s)"
    )
    assert browser.run("return document.title") == "Pyrometer: runs"

"""The chat page in a real browser, with the demo model and an adapter behind it.

What: headless Chromium asks both models side by side. Constraint: no console message, no request
to any other address, nothing wider than the window. Needs ``playwright`` and a Chromium on the
machine; skipped without.
"""

from __future__ import annotations

import shutil
import time

import pytest
from serving_command import make_adapter, served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
KEY = "a-key-for-the-page"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tuned = make_adapter(folder / "tuned")
    with served("demo", "--adapter", f"tuned={tuned}", cwd=folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser, url):
    """A window that has the page open; what it logged and where it went is looked at afterwards."""
    made = browser.new_page(viewport={"width": 1280, "height": 800})
    logged, asked = [], []
    made.on("console", lambda m: logged.append(m.text) if m.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: logged.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.goto(url)
    made.wait_for_selector("section:nth-of-type(2)")
    yield made
    made.close()
    assert logged == []
    assert {address for address in asked if not address.startswith((url, "data:"))} == set()


def until(page, condition, seconds=30):
    """Wait; the page's policy refuses playwright's own waiting, which evaluates text in it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def answers(page):
    return page.eval_on_selector_all(".assistant", "nodes => nodes.map(n => n.textContent)")


def finished(page):
    page.wait_for_selector("#stop", state="hidden", timeout=60_000)
    return answers(page)


def test_two_models_stream_their_answers_side_by_side(page):
    assert page.eval_on_selector_all("select", "nodes => nodes.map(n => n.value)") == [
        "demo",
        "tuned",
    ]
    page.keyboard.type("What is the capital of France?")  # the box has the focus
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.assistant')?.textContent.length > 3")
    early = answers(page)
    assert page.is_visible("#stop")
    first, second = finished(page)
    assert len(first) > len(early[0])
    assert second and second != first
    page.keyboard.type("And of Italy?")  # the focus came back
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("One word.")
    assert page.input_value("#text") == "And of Italy?\nOne word."
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.assistant').length == 4")
    page.keyboard.press("Escape")  # stops both
    assert len(finished(page)) == 4
    page.click("#reset")
    assert answers(page) == []


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (400, 760)])
def test_nothing_leaves_the_window(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.keyboard.insert_text("w" * 300 + "\nline" * 40)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.assistant')?.textContent.length > 3")
    page.keyboard.press("Escape")
    finished(page)
    talks = page.locator(".talk")
    for place in range(2):  # what does not fit is scrolled to, not drawn over the footer
        page.wait_for_timeout(50)
        assert talks.nth(place).evaluate("t => t.scrollHeight > t.clientHeight")
        box, footer = talks.nth(place).bounding_box(), page.locator("footer").bounding_box()
        assert box["y"] + box["height"] <= footer["y"] + 1
        assert talks.nth(place).evaluate("t => t.scrollTop + t.clientHeight > t.scrollHeight - 60")
    page.click("summary")
    for name in ("section:nth-of-type(1)", "section:nth-of-type(2)", "#text", "#temperature"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, name
        assert box["height"] > 20, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_can_be_reached_with_the_keyboard(page):
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for name in ("split", "reset", "SUMMARY", "SELECT", "text"):
        assert name in reached, (name, reached)


def test_a_key_is_asked_for_where_it_is_needed(browser, tmp_path):
    with served("demo", cwd=tmp_path, FINEGRAFT_API_KEY=KEY) as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", KEY)
        page.keyboard.press("Tab")
        page.wait_for_selector("section")
        assert page.eval_on_selector_all("option", "nodes => nodes.map(n => n.value)") == ["demo"]
        page.close()

"""The page of ``finegraft ui`` in a real browser: from rows to a verified export.

What: headless Chromium drives the real server, which starts the real commands; the quick tests
train a tiny model, the slow one the demo model. Constraint: no console message, no request to any
other address, nothing wider than the window. Needs ``playwright`` and a Chromium on the machine;
skipped without. The accessibility check needs ``FINEGRAFT_AXE``, the path of axe-core's ``axe.js``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import make_model, write_rows
from ui_window import CHROMIUM, Window, opened

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
AXE = os.environ.get("FINEGRAFT_AXE")
RUN, STEPS = "first try", 150
NARROW = {"width": 400, "height": 800}
PAGES = ("#/data", f"#/run/{RUN}", "#/train", "#/runs", "#/try", "#/export", "#/models")
PAGES += ("#/data?file=data/sums.jsonl", "#/compare?runs=first%20try,first%20try")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A workspace with a tiny model; the address signs in once."""
    folder = tmp_path_factory.mktemp("project")
    make_model(folder / "tiny")
    with opened(folder) as (address, _):
        yield folder, address


@pytest.fixture(scope="module")
def main_window(browser, project):
    """Signed in with the printed address, which works once."""
    made = Window(browser, project[1])
    yield made
    made.close()


@pytest.fixture(scope="module")
def trained(main_window, project, tmp_path_factory):
    """Rows sent and a run trained by the page; what was seen on the way."""
    window, page = main_window, main_window.page
    rows = write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl", 24)
    window.go("#/data")
    page.set_input_files("input[type=file]", str(rows))
    window.shows("Rows as training sees them")
    page.fill("#content input[list=models-here]", "tiny")
    page.keyboard.press("Tab")
    window.until("document.querySelectorAll('.span-trained').length > 5")
    seen = {"rows": page.inner_text("article >> nth=0"), "format": page.inner_text(".tiles")}
    page.click("text=Train on these rows")
    window.until("document.querySelector('[data-key=data] input')?.value === 'data/sums.jsonl'")
    settings = {"model": "tiny", "max_steps": STEPS, "max_length": 64, "eval_fraction": 0.25}
    window.set(**settings, name=RUN)
    window.until("document.querySelector('aside .tiles')")
    seen["forecast"] = page.inner_text("aside")
    page.click("text=Start training")
    window.until(f"/^\\d+\\/{STEPS} /.test(document.title)", 60)
    seen["live"] = window.title()
    window.until("document.querySelector('.plot polyline')")
    seen["early"] = page.get_attribute(".plot polyline", "points")
    window.until("document.title.startsWith('finished')", 60)
    window.shows("Before and after")
    return seen


def _events(folder):
    lines = (folder / "runs" / RUN / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_become_a_run_and_its_curve_grows(trained, main_window, project):
    window, (folder, _) = main_window, project
    assert "It is 0." in trained["rows"] and "tokens trained" in trained["rows"]
    assert "prompt_completion" in trained["format"] and "24" in trained["format"]
    command = "finegraft train --model tiny --data data/sums.jsonl --eval-fraction 0.25 "
    command += f"--max-length 64 --max-steps {STEPS} --output 'runs/{RUN}'"
    assert "it fits" in trained["forecast"] and command in trained["forecast"]
    step = int(trained["live"].split("/")[0])
    assert 0 <= step <= STEPS
    window.go(f"#/run/{RUN}")
    window.until("document.querySelectorAll('.plot polyline').length === 5")
    late = window.page.get_attribute(".plot polyline", "points")
    told = _events(folder)
    steps = [event for event in told if event["type"] == "step"]
    assert len(late.split()) == len(steps) == STEPS
    assert len(trained["early"].split()) <= len(late.split())
    held_out = window.page.locator(".plot >> nth=0").locator("circle")
    assert held_out.count() == len([event for event in told if event["type"] == "eval"])
    for words in ("Forecast and actual", "held out", f"finegraft report 'runs/{RUN}'"):
        window.shows(words)


def test_a_chart_is_read_out_with_the_keyboard(trained, main_window, project):
    window, page = main_window, main_window.page
    window.go(f"#/run/{RUN}")
    window.until("document.querySelector('.plot polyline')")
    page.locator(".plot >> nth=0").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    read = page.inner_text(".chart.first .read")
    second = next(e for e in _events(project[0]) if e["type"] == "step" and e["step"] == 2)
    assert read.startswith("step 2: ") and f"{second['loss']:.4g}" in read
    assert page.get_attribute(".plot >> nth=0", "aria-valuetext") == read
    straight = page.get_attribute(".plot polyline", "points")
    page.click("button[aria-label='log axis of Loss']")
    assert page.get_attribute(".plot polyline", "points") != straight


def test_settings_that_do_not_hold_are_told_at_their_field(trained, main_window):
    window, page = main_window, main_window.page
    window.go("#/train")
    page.click("text=Clear all")
    window.set(model="tiny", data="data/sums.jsonl", r="many")
    field = page.locator("[data-key=r]")
    window.until(
        "document.querySelector('[data-key=r] .wrong').textContent.includes('not a number')"
    )
    window.set(r=0)
    window.shows("FG-CONF-002")
    assert "nothing to train" in field.locator(".wrong").inner_text()
    assert field.locator("input").get_attribute("aria-invalid") == "true"
    window.set(r=4)
    window.until("document.querySelector('aside .tiles')")
    assert "--r 4" in page.inner_text("aside")
    window.set(model="nowhere")
    window.until("document.querySelector('aside .fault, [data-key=model] .wrong:not([hidden])')")
    page.click("text=Clear all")


def test_notes_stay_and_a_deleted_run_comes_back(trained, main_window, project):
    window, page = main_window, main_window.page
    folder = project[0] / "runs" / RUN
    window.go(f"#/run/{RUN}")
    page.fill("textarea", "worth <b>keeping</b>")
    window.shows("saved")
    window.go("#/runs")
    window.shows("worth <b>keeping</b>")
    page.click(f"text={RUN}")
    page.click("main >> text=Delete")
    window.shows("is in the trash")
    window.shows("No runs yet.")
    assert not folder.exists()
    page.click("text=Undo")
    window.shows("is back")
    window.until("document.querySelector('.runs-table')")
    assert (folder / "events.jsonl").is_file()
    window.go(f"#/run/{RUN}")
    page.click("main >> text=Delete")
    page.click("text=Trash: 1 run")  # also long after the notice has gone
    page.click(f"[aria-label='Take back {RUN}']")
    window.until("document.querySelector('.runs-table')")
    assert (folder / "events.jsonl").is_file()


@pytest.mark.parametrize("address", PAGES)
def test_no_page_is_wider_than_a_narrow_window(trained, main_window, address):
    window, page = main_window, main_window.page
    page.set_viewport_size(NARROW)
    try:
        window.go(address)
        page.wait_for_timeout(250)
        for fold in page.locator("main summary").all()[:4]:
            fold.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        for shown in page.locator("main button:visible").all():
            box = shown.bounding_box()
            inside = shown.evaluate("b => b.closest('.scroll') !== null")
            assert inside or (box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"])
    finally:
        page.set_viewport_size({"width": 1280, "height": 860})


def test_pages_are_reached_with_the_keyboard_and_their_titles_tell_them(trained, main_window):
    window, page = main_window, main_window.page
    window.go("#/models")
    page.locator(".skip").focus()
    for name in ("finegraft", "Data", "Train", "Runs"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == name
    page.keyboard.press("Enter")
    window.until("document.title.startsWith('Runs')")
    assert page.get_attribute("#nav a[aria-current]", "href") == "#/runs"


def test_an_address_opens_the_page_once(trained, browser, project):
    context = browser.new_context()
    page = context.new_page()
    page.goto(project[1])
    page.wait_for_selector(".fault")
    assert "Enter" in page.inner_text("main") and page.title().startswith("closed")
    context.close()


@pytest.mark.skipif(not AXE, reason="FINEGRAFT_AXE does not name axe-core's axe.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(trained, main_window, scheme):
    window, page = main_window, main_window.page
    page.emulate_media(color_scheme=scheme)
    page.evaluate(Path(AXE).read_text())
    found = []
    for address in PAGES:
        window.go(address)
        page.wait_for_timeout(400)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        found += [
            (address, one["id"], [node["target"] for node in one["nodes"]][:3])
            for one in result["violations"]
            if one["impact"] in ("serious", "critical")
        ]
    assert found == []


@pytest.mark.slow
def test_the_demo_model_from_rows_to_a_verified_export(browser, tmp_path):
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}, it is."} for i in range(60)]
    file = write_rows(tmp_path / "sums.jsonl", [*rows, rows[3], rows[4]])
    (tmp_path / "project").mkdir()
    with opened(tmp_path / "project") as (address, _):
        window = Window(browser, address)
        _look(window, file)
        _train(window, "a", 20, stop_at=4)
        _resume(window)
        _train(window, "b", 4)
        _compare(window)
        _talk(window)
        _export(window)
        window.close()


def _look(window, file):
    page = window.page
    window.go("#/data")
    window.shows("No rows yet.")
    page.set_input_files("input[type=file]", str(file))
    window.until("document.querySelectorAll('.span-trained').length >= 5", 60)
    page.click("text=Check the rows")
    window.shows("Verdict: look at these", 90)
    assert "rows 61, 62" in page.inner_text("[aria-label=Verdict]")
    page.click("text=Write a mended copy")
    window.shows("rows kept", 90)
    assert "60" in page.inner_text("[aria-label=Mending] .tiles")


def _train(window, name, steps, stop_at=None):
    page = window.page
    window.go("#/train")
    page.click("text=Clear all")
    window.set(model="demo", data="data/sums.jsonl", max_steps=steps, max_length=96)
    window.set(per_device_train_batch_size=4, eval_fraction=0.1, name=name)
    window.until("document.querySelector('aside .tiles')", 60)
    page.click("text=Start training")
    if stop_at is None:
        return window.until("document.title.startsWith('finished')", 180)
    at = "Number(document.title.split('/')[0])"
    window.until(f"{at} >= {stop_at} && document.querySelector('.plot polyline')", 180)
    early = page.get_attribute(".plot polyline", "points")
    window.until(f"document.querySelector('.plot polyline').getAttribute('points') !== '{early}'")
    page.click("main >> button:text-is('Stop')")
    return window.until("document.title.startsWith('stopped')", 60)


def _resume(window):
    stopped = int(window.page.inner_text(".progress .words").split("step ")[1].split()[0])
    assert 4 <= stopped < 20
    window.page.click("main >> button:text-is('Resume')")
    window.until("document.title.startsWith('finished')", 240)
    assert "step 20 of 20" in window.page.inner_text(".progress .words")


def _compare(window):
    page = window.page
    window.go("#/runs")
    page.check("input[aria-label='Compare a']")
    page.check("input[aria-label='Compare b']")
    page.click("text=Compare 2")
    window.until("document.querySelector('.chart.first').querySelectorAll('polyline').length === 2")
    window.shows("max_steps")
    assert "finegraft compare runs/" in page.inner_text("main")


def _talk(window):
    page = window.page
    window.go("#/try?run=a")
    page.click("main >> button:text-is('Open')")
    window.until("document.querySelector('.compose')", 120)
    page.click("text=Sampling")
    page.fill("[data-key=max_tokens]", "12")
    page.fill("#message", "7 and 7?")
    page.keyboard.press("Enter")
    done = "document.querySelectorAll('.pane .pace:not(:empty)').length === 2"
    window.until(done, 120)
    base, tuned = (page.locator(".pane").nth(i).inner_text() for i in range(2))
    assert "7 and 7?" in base and "tokens/s" in base and base.split("?")[1] != tuned.split("?")[1]
    page.click("text=Close the models")
    window.shows("The models are closed.")


def _export(window):
    page = window.page
    window.go("#/export?run=a")
    window.until("document.querySelector('#format-gguf-q8_0')", 60)
    page.click("main >> button:text-is('Export')")
    window.until("document.title.startsWith('exported')", 240)
    assert "verified" in page.inner_text("[aria-label=Verification]")
    window.until("document.querySelector('[aria-label=Exports]').innerText.includes('To use it')")
    assert "finegraft generate" in page.inner_text("[aria-label=Exports]")

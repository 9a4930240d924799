"""The page of a run: what it says, that it opens alone, and in a real browser."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from training_tiny import llama, rows, tokenizer

from finegraft.core.errors import ConfigError
from finegraft.core.schema import build
from finegraft.training.report import page
from finegraft.training.report.before_after import SHARE
from finegraft.training.report.read import history, summary
from finegraft.training.report.texts import GENERAL
from finegraft.training.run import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, and a run that held some out."""
    folder = tmp_path_factory.mktemp("report")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(40)))
    train(settings(folder, "run", learning_rate=1e-2, report_rows=8, max_steps=24))
    return folder


def settings(folder, name, **changes):
    values = {"model": str(folder / "base"), "data": str(folder / "rows.jsonl"), "max_length": 64}
    values |= {"output": str(folder / name), "max_steps": 6, "save_steps": 50, "eval_steps": 6}
    return build({**values, "eval_fraction": 0.25, **changes})


def event_of(folder, name, kind="before_after"):
    return history(folder / name).last(kind)


def test_rows_are_measured_before_and_after(place):
    event = event_of(place, "run")
    assert len(event["rows"]) == 8 and len(event["texts"]) == len(GENERAL) == 20
    together = event["held_out"]
    low, high = together["interval"]
    assert low <= together["difference"] <= high < 0 and event["of"] == 10
    assert all(pair["tokens"] > 0 and pair["answer"] for pair in event["rows"])
    assert event["skipped"] is None
    evaluated = event_of(place, "run", "eval")["loss"]
    assert abs(together["after"] - evaluated) < 0.3  # 8 of the 10 rows that the evaluation saw


def test_before_is_the_base_itself(place):
    """All held-out rows with the adapter off give the loss that a run of no learning has."""
    train(settings(place, "still", learning_rate=1e-12, report_rows=10, max_steps=1))
    train(settings(place, "moved", learning_rate=1e-2, report_rows=10))
    still, moved = (event_of(place, name)["held_out"] for name in ("still", "moved"))
    assert still["difference"] == pytest.approx(0, abs=1e-4)
    assert moved["before"] == pytest.approx(still["before"], abs=1e-5)
    assert moved["after"] == pytest.approx(event_of(place, "moved", "eval")["loss"], abs=1e-4)


def test_packed_rows_are_measured_one_by_one(place):
    train(settings(place, "packed", packing=True, report_rows=10))
    train(settings(place, "loose", report_rows=10))
    packed, loose = (event_of(place, name) for name in ("packed", "loose"))
    assert packed["of"] == loose["of"] == 10
    assert packed["held_out"]["before"] == pytest.approx(loose["held_out"]["before"], abs=1e-4)


def test_it_takes_a_tenth_of_the_training_time_and_can_be_turned_off(place, monkeypatch):
    from finegraft.training.report import before_after

    stock = before_after._loss

    def slow(*args):
        time.sleep(0.02)
        return stock(*args)

    monkeypatch.setattr(before_after, "_loss", slow)
    train(settings(place, "bounded"))
    event, end = event_of(place, "bounded"), event_of(place, "bounded", "end")
    chunk = 2 * before_after._CHUNK * 0.05  # it ends with the chunk that is begun
    assert event["seconds"] <= SHARE * end["seconds"] + chunk
    assert len(event["rows"]) < 10
    train(settings(place, "off", report_rows=0))
    assert event_of(place, "off")["skipped"] == "report_rows is 0"
    assert "Not measured: report_rows is 0" in (place / "off/report/index.html").read_text()


def test_what_has_no_base_in_memory_says_so(place):
    train(settings(place, "whole", full_finetuning=True))
    assert "every weight was trained" in event_of(place, "whole")["skipped"]


def test_the_page_tells_what_came_out(place):
    text = (place / "run/report/index.html").read_text()
    line = summary(place / "run")
    for words in (
        "Run run",
        "finished",
        f"{line.loss:.4f}",
        f"{line.eval_loss:.4f}",
        "Training helped on rows that it has not seen.",
        "Largest gains",
        "General texts",
        "Learning rate",
        "Gradient norm",
        "Memory, GB",
        "All settings",
        "transformers",
    ):
        assert words in text, words
    assert ">nan" not in text and ">None" not in text


def test_the_page_of_a_broken_or_short_run_can_be_drawn(place):
    run = place / "broken"
    run.mkdir()
    (run / "events.jsonl").write_text(
        '{"type": "start", "time": 1.0, "step": 0, "total_steps": 9}\n'
        '{"type": "step", "time": 2.0, "step": 1, "total_steps": 9, "loss": NaN, '
        '"learning_rate": 0.1, "grad_norm": Infinity}\n'
        '{"type": "forecast", "time": 2.0, "peak_memory_bytes": 1000000, "seconds": 60}\n'
        '{"type": "watch", "time": 2.0, "code": "FG-WATCH-001", "severity": "error", "step": 1, '
        '"message": "<script>alert(1)</script>", "cause": "a", "cure": "b"}\n'
        '{"type": "failed", "time": 3.0, "code": "FG-WATCH-001", "message": "no number"}\n'
        '{"type": "st'
    )
    text = page.write(run).read_text()
    assert "<script>" not in text and "FG-WATCH-001" in text and "failed" in text
    assert "was not a number at step 1" in text and "Forecast and actual" in text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"FG-RUN-020.*no run in"):
        page.write(tmp_path / "none")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, or a skip with the reason."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_from_disk_in_a_browser(place, browser, width, scheme):
    asked, said = [], []
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    address = (place / "run/report/index.html").as_uri()
    view.goto(address)
    assert [url for url in asked if not url.startswith("data:")] == [address] and said == []
    assert view.locator("svg.chart").count() == 5
    for chart in view.locator("svg.chart").all():
        box = chart.bounding_box()
        assert box["width"] > 250 and box["x"] + box["width"] <= width
        assert chart.locator("polyline").count() >= 1
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    colours = view.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) for c in colours]
    assert (light[0] < light[1]) == (scheme == "light")
    view.close()


def test_every_fold_opens_with_the_keyboard(place, browser):
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    view.goto((place / "run/report/index.html").as_uri())
    folds, reached = view.locator("summary").count(), set()
    for _ in range(folds + 40):
        view.keyboard.press("Tab")
        place_of = view.evaluate(
            "[...document.querySelectorAll('summary')].indexOf(document.activeElement)"
        )
        if place_of >= 0 and place_of not in reached:
            reached.add(place_of)
            view.keyboard.press("Enter")
    assert len(reached) == folds == view.locator("details[open]").count() > 5
    view.close()

"""What events look like: lines for files, a panel for terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from finegraft.cli import progress as view


def step(number, total=100, loss=1.0, **more):
    return {
        "type": "step",
        "step": number,
        "total_steps": total,
        "loss": loss,
        "learning_rate": 1e-3,
        "tokens_per_second": 961.4,
        "memory_bytes": 2_340_000_000,
        "eta_seconds": 187.0,
        "next_save_step": 50,
        **more,
    }


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(view.time, "monotonic", lambda: Clock.now)
    return Clock


def plain():
    to = io.StringIO()
    return view.PlainProgress(Console(file=to, width=200)), to


def shown_steps(text):
    return [int(line.split()[1].split("/")[0]) for line in text.splitlines()]


def test_plain_lines_come_first_last_and_every_ten_steps(clock):
    listener, to = plain()
    for number in range(1, 36):
        clock.now += 0.01
        listener(step(number, total=35))
    assert shown_steps(to.getvalue()) == [1, 11, 21, 31, 35]


def test_slow_steps_get_a_line_every_five_seconds(clock):
    listener, to = plain()
    for number in range(1, 9):
        clock.now += 2.5
        listener(step(number))
    assert shown_steps(to.getvalue()) == [1, 3, 5, 7]


def test_a_line_has_every_number(clock):
    listener, to = plain()
    listener(step(1))
    line = to.getvalue()
    for words in ("step 1/100", "loss 1.0000", "961 tokens/s", "2.3 GB", "3:07", "step 50"):
        assert words in line


def test_missing_numbers_are_left_out(clock):
    listener, to = plain()
    keys = ("tokens_per_second", "memory_bytes", "eta_seconds", "next_save_step", "loss")
    listener(step(1, **dict.fromkeys(keys)))
    assert "loss ?" in to.getvalue() and "left ?" in to.getvalue()
    assert "None" not in to.getvalue()


@pytest.mark.parametrize(
    ("losses", "arrow"),
    [
        ([2.0], " "),
        ([2.0, 1.0], "↓"),
        ([1.0, 2.0], "↑"),
        ([1.0] * 8, "→"),
        ([3.0] * 5 + [9.0] + [2.0] * 9, "↓"),
        ([9.0] * 20 + [1.0] * 5 + [2.0] * 5, "↑"),
    ],
)
def test_trend(losses, arrow):
    picture = view.Picture()
    for number, loss in enumerate(losses, 1):
        picture.update(step(number, loss=loss))
    assert picture.trend == arrow


def test_lasting_lines():
    data = {
        "type": "data",
        "rows": 660,
        "tokens": 30000,
        "trained_tokens": 12000,
        "truncated": 2,
        "dropped": 0,
        "format": "prompt_completion",
        "warnings": ["2 of 660 rows were cut"],
    }
    (first, _), (second, style) = view.lasting(data)
    assert "660 rows" in first and "12,000 of them learnt" in first
    assert "2 truncated" in first and "dropped" not in first
    assert second == "warning: 2 of 660 rows were cut" and style == "yellow"
    start = {
        "type": "start",
        "total_steps": 126,
        "epochs": 3,
        "batch": 16,
        "trainable": 4_884_480,
        "parameters": 139_400_000,
        "device": "cpu",
        "dtype": "bfloat16",
    }
    assert "4.9M of 139.4M parameters" in view.lasting(start)[0][0]
    assert view.lasting({"type": "an event of a later version"}) == []


def test_the_panel_shows_the_step_and_the_spinner_waits(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    listener = view.progress(console)
    assert isinstance(listener, view.LiveProgress)

    def drawn():
        with console.capture() as got:
            console.print(listener._draw())
        return got.get()

    listener({"type": "phase", "name": "loading model"})
    clock.now += 1.0
    assert "loading model" not in drawn()
    clock.now += 1.5
    assert "loading model" in drawn()
    listener({"type": "phase", "name": "training"})
    listener(step(40))
    text = drawn()
    for words in ("40/100", "1.0000", "961 tokens/s", "3:07", "step 50"):
        assert words in text


def test_a_pipe_gets_plain_lines():
    assert isinstance(view.progress(Console(file=io.StringIO())), view.PlainProgress)


def test_clock_and_size():
    assert [view.clock(s) for s in (None, 5, 187, 3723)] == ["?", "0:05", "3:07", "1:02:03"]
    assert [view.size(b) for b in (None, 2.5e3, 2e6, 2.34e9)] == ["?", "2 kB", "2.0 MB", "2.3 GB"]

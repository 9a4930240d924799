"""Training as a person sees it, drawn from the same events that ``events.jsonl`` holds.

What: a listener for ``training.run.train``. How: events change a ``Picture``; in a terminal rich
redraws it four times a second under the lines that stay, elsewhere a line is written every ten
steps or five seconds. Constraint: it reads events and nothing else, so whatever it shows can be
shown again from the file. Trade-off: the spinner of a phase appears after two seconds, so quick
ones pass unseen.

Units: seconds, bytes, tokens a second, steps.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

Event = dict[str, Any]

PLAIN_EVERY_STEPS = 10
PLAIN_EVERY_SECONDS = 5.0
SPINNER_AFTER_SECONDS = 2.0
TREND_STEPS = 5
CELLS_A_LINE = 3  # fits 80 columns


def clock(seconds: float | None) -> str:
    """``3:07`` or ``1:02:03``; ``?`` for what is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float | None) -> str:
    """Bytes in units of a thousand: ``2.3 GB``."""
    if not count:
        return "?"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _count(number: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return f"{number:,.0f}"


@dataclass
class Picture:
    """The latest of everything that events say."""

    phase: str = ""
    phase_since: float = 0.0
    step: Event | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=2 * TREND_STEPS))

    def update(self, event: Event) -> None:
        """Take one event in."""
        if event["type"] == "phase":
            self.phase, self.phase_since = event["name"], time.monotonic()
        elif event["type"] == "step":
            self.step = event
            if event.get("loss") is not None:
                self.losses.append(event["loss"])

    @property
    def trend(self) -> str:
        """An arrow: the mean of the last five losses against the five before."""
        losses = list(self.losses)
        if len(losses) < 2:
            return " "
        half = min(TREND_STEPS, len(losses) // 2)
        now = sum(losses[-half:]) / half
        then = sum(losses[-2 * half : -half]) / half
        if abs(now - then) <= 0.01 * abs(then):
            return "→"
        return "↓" if now < then else "↑"


def lasting(event: Event) -> list[tuple[str, str]]:
    """The lines that an event leaves behind for good, each with a rich style."""
    maker = _LASTING.get(event["type"])
    return maker(event) if maker else []


def _data(event: Event) -> list[tuple[str, str]]:
    words = f"{event['rows']:,} rows ({event.get('format', '?')}), {event['tokens']:,} tokens"
    if "trained_tokens" in event:
        words += f", {event['trained_tokens']:,} of them learnt"
    if event.get("held_out"):
        words += f"; {event['held_out']:,} more are held out"
    if event.get("labels"):
        words += "; labels: " + ", ".join(f"{n} {c:,}" for n, c in event["labels"].items())
    for key in ("truncated", "dropped"):
        if event.get(key):
            words += f", {event[key]:,} {key}"
    return [(words, "")] + [(f"warning: {text}", "yellow") for text in event.get("warnings", [])]


def _start(event: Event) -> list[tuple[str, str]]:
    words = (
        f"{event['total_steps']:,} steps of {event['batch']} rows on {event['device']} in "
        f"{str(event['dtype']).removeprefix('torch.')}; {_count(event['trainable'])} of "
        f"{_count(event['parameters'])} parameters train"
    )
    if event.get("step"):
        words += f"; going on after step {event['step']:,}"
    return [(words, "")]


def _watch(event: Event) -> list[tuple[str, str]]:
    style = "bold red" if event["severity"] == "error" else "yellow"
    words = f"{event['code']}: {event['message']}. Likely: {event['cause']}. Try: {event['cure']}"
    return [(words, style)]


def _evaluation(event: Event) -> str:
    words = f"step {event['step']}: held-out loss {event['loss']:.4f}"
    for name, value in event.get("metrics", {}).items():
        if isinstance(value, int | float):
            words += f", {name.replace('_', ' ')} {value:.3f}"
    return words


_LASTING = {
    "data": _data,
    "start": _start,
    "eval": lambda e: [(_evaluation(e), "cyan")],
    "notice": lambda e: [(e["message"], "yellow")],
    "watch": _watch,
    "interrupted": lambda e: [(f"stopping after step {e['step']}, saved to {e['path']}", "yellow")],
}


def _numbers(picture: Picture) -> list[tuple[str, str]]:
    """The parts of a step that both views show, as label and value."""
    step = picture.step or {}
    parts = [("loss", f"{step['loss']:.4f} {picture.trend}" if step.get("loss") else "?")]
    if step.get("learning_rate") is not None:
        parts.append(("learning rate", f"{step['learning_rate']:.1e}"))
    if step.get("tokens_per_second"):
        parts.append(("speed", f"{step['tokens_per_second']:,.0f} tokens/s"))
    if step.get("memory_bytes"):
        parts.append(("memory", size(step["memory_bytes"])))
    parts.append(("left", clock(step.get("eta_seconds"))))
    if step.get("next_save_step"):
        parts.append(("next save", f"step {step['next_save_step']}"))
    return parts


class PlainProgress:
    """Lines for pipes and log files.

    Args:
        console: Where they go.
    """

    def __init__(self, console: Console):
        self.console = console
        self.picture = Picture()
        self._shown_step = 0
        self._shown_at = float("-inf")

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def __call__(self, event: Event) -> None:
        self.picture.update(event)
        if event["type"] == "phase":
            self._line(f"{event['name']} ...")
        elif event["type"] == "step":
            self._step(event)
        elif event["type"] == "save":
            self._line(f"step {event['step']}: saved {event['path']}")
        for words, style in lasting(event):
            self._line(words, style)

    def _step(self, event: Event) -> None:
        number, total, now = event["step"], event["total_steps"], time.monotonic()
        due = number - self._shown_step >= PLAIN_EVERY_STEPS
        if due or number in (1, total) or now - self._shown_at >= PLAIN_EVERY_SECONDS:
            self._shown_step, self._shown_at = number, now
            parts = [f"{label} {value}" for label, value in _numbers(self.picture)]
            self._line("  ".join([f"step {number}/{total}", *parts]))

    def _line(self, words: str, style: str = "") -> None:
        self.console.print(words, style=style, markup=False, soft_wrap=True)


class LiveProgress:
    """A panel that is redrawn, under the lines that stay. Gone when training ends.

    Args:
        console: A console that is a terminal.
    """

    def __init__(self, console: Console):
        self.console = console
        self.picture = Picture()
        self._live = Live(console=console, get_renderable=self._draw, transient=True)
        self._spinner = Spinner("dots")

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        self.picture.update(event)
        for words, style in lasting(event):
            self.console.print(words, style=style, markup=False)

    def _draw(self) -> RenderableType:
        picture = self.picture
        if picture.phase == "training" and picture.step:
            return _panel(picture)
        waited = time.monotonic() - picture.phase_since
        if picture.phase and waited >= SPINNER_AFTER_SECONDS:
            self._spinner.update(text=f"{picture.phase} ({clock(waited)})")
            return self._spinner
        return Text("")


def _panel(picture: Picture) -> RenderableType:
    step = picture.step or {}
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_row(
        f"step {step['step']}/{step['total_steps']}",
        ProgressBar(total=step["total_steps"], completed=step["step"]),
    )
    numbers = Table.grid(padding=(0, 3), expand=True)
    cells = [Text.assemble((f"{label} ", "dim"), value) for label, value in _numbers(picture)]
    for first in range(0, len(cells), CELLS_A_LINE):
        numbers.add_row(*cells[first : first + CELLS_A_LINE])
    return Panel(Group(bar, numbers), title="training", title_align="left", border_style="green")


def progress(console: Console) -> PlainProgress | LiveProgress:
    """The listener that suits ``console``; use it in a ``with`` block."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)

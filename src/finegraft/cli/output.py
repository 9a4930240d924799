"""What reaches the terminal, and in which shape.

What: one ``Output`` per command: tables and words for people, or exactly one JSON object for
programs. How: with ``--json`` everything that anything prints goes to stderr and only ``result``
and the errors write to the real stdout. Constraint: nothing here imports torch, so that ``--help``
stays quick. Trade-off: third-party output is moved at the level of Python's ``sys.stdout``; a C
library that writes to descriptor 1 itself would slip through, and none of ours does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from finegraft.core.errors import FinegraftError

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130


class Stopped(KeyboardInterrupt):
    """An end that was asked for.

    Args:
        by: ``Ctrl-C`` or the name of a signal.
        fix: The command that goes on from here, if there is one.
    """

    def __init__(self, by: str = "Ctrl-C", fix: str | None = None):
        super().__init__(by)
        self.by = by
        self.fix = fix


def debugging() -> bool:
    """Whether ``FINEGRAFT_DEBUG=1`` asks for tracebacks."""
    return os.environ.get("FINEGRAFT_DEBUG", "") not in ("", "0")


def _plain(value: Any) -> Any:
    """The value as JSON has it: paths as text, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


class Output:
    """Where one command writes.

    Args:
        as_json: One JSON object on stdout, the rest on stderr.

    Attributes:
        err: Console on stderr: progress, logs, errors.
        human: Console for results; stdout, or stderr with ``as_json``.
    """

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.answered = False
        self._stdout = sys.stdout
        self.err = Console(stderr=True, highlight=False)
        self.human = self.err if as_json else Console(highlight=False)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep stdout for the JSON object and show finegraft's log lines, for one command."""
        log = logging.getLogger("finegraft")
        handler, level = _LogLines(self.err), log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            with contextlib.ExitStack() as stack:
                if self.as_json:
                    stack.enter_context(contextlib.redirect_stdout(sys.stderr))
                yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)

    def result(self, values: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Write the one JSON object, or let ``show`` write for people."""
        if not self.as_json:
            show(self.human)
        elif not self.answered:  # an error after the result must not make a second object
            self.answered = True
            line = json.dumps(_plain(values), ensure_ascii=False, allow_nan=False)
            self._stdout.write(line + "\n")
            self._stdout.flush()

    def failure(self, error: FinegraftError) -> None:
        """Show an error: an object, a red block in a terminal, plain lines elsewhere."""
        self.result({"error": error.as_dict()}, lambda _: self._block(error))

    def _block(self, error: FinegraftError) -> None:
        if not self.err.is_terminal:
            self.err.print(str(error), markup=False, soft_wrap=True)
            return
        body = Text(error.found)
        for label, words in (("allowed", error.allowed), ("fix", error.fix)):
            if words:
                body.append(f"\n\n{label}: ", style="bold")
                body.append(words)
        title = f"[bold]{error.code}[/bold]"
        self.err.print(Panel(body, title=title, title_align="left", border_style="red"))

    def interrupted(self, stop: BaseException | None = None) -> None:
        """One line for Ctrl-C or ``Stopped``, and one for how to go on."""
        by, fix = (stop.by, stop.fix) if isinstance(stop, Stopped) else ("Ctrl-C", None)
        error = FinegraftError("FG-CLI-002", f"stopped by {by}", fix=fix)
        lines = [error.found, f"Go on with:\n  {fix}"] if fix else [error.found]
        show = "\n".join(lines)
        self.result(
            {"error": error.as_dict()},
            lambda _: self.err.print(show, markup=False, soft_wrap=True),
        )

    def note(self, words: str) -> None:
        """One dim line on stderr."""
        self.err.print(words, style="dim", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def busy(self, words: str) -> Iterator[None]:
        """A spinner in a terminal, nothing elsewhere."""
        if self.err.is_terminal:
            with self.err.status(words):
                yield
        else:
            yield


class _LogLines(logging.Handler):
    """finegraft's own log lines: information dim, warnings yellow."""

    def __init__(self, console: Console):
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self.console.print(record.getMessage(), style=style, markup=False, soft_wrap=True)


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Leave out what finegraft's log says beyond warnings, for one block."""
    log = logging.getLogger("finegraft")
    level = log.level
    log.setLevel(logging.INFO if debugging() else logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the bars and chatter of other libraries for a block, by their own switches.

    Download bars of the hub stay: a person wants to see those. datasets takes 0.3 s to import and
    only training needs it, so it has a block of its own.
    """
    if debugging():
        yield
        return
    from transformers.utils import logging as own

    bitsandbytes = logging.getLogger("bitsandbytes")  # says at import what it would have liked
    level, verbosity, bars = bitsandbytes.level, own.get_verbosity(), own.is_progress_bar_enabled()
    bitsandbytes.setLevel(logging.ERROR)
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        yield
    finally:
        bitsandbytes.setLevel(level)
        own.set_verbosity(verbosity)
        if bars:
            own.enable_progress_bar()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """The same for datasets, whose map and filter draw bars while rows are prepared."""
    if debugging():
        yield
        return
    import datasets

    verbosity, disabled = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not disabled:
            datasets.enable_progress_bars()

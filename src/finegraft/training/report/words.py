"""Numbers of a run in words, for the page and for tables."""

from __future__ import annotations

import math


def clock(seconds: float | None) -> str:
    """``3:07`` or ``1:02:03``; ``?`` for what is not known."""
    if seconds is None or not math.isfinite(seconds):
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


def loss(value: float | None) -> str:
    """A loss with four digits, ``nan`` for what is not a number, ``?`` for what is not known."""
    return "?" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"

"""What differs between two runs, and which of it likely matters.

What: ``compare`` lists the causes (settings, rows, versions, hardware) and the results apart. How:
causes get the weight that ``reasons`` gives them, moved by how far the values are apart and by what
the runs themselves say: a cause that changes the first step is less likely where both runs begin
with the same loss. Constraint: what follows from another difference (more tokens from a longer
``max_length``) is no cause of its own. Trade-off: a ranking from house knowledge, not a proof; the
proof is a third run.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finegraft.training.report import reasons
from finegraft.training.report.read import History, Summary, history, require_run, summary
from finegraft.training.report.reasons import MATTERS, Reason

_SAME_WEIGHT = 1e-2  # relative: weights that may be opened in another precision
_SAME = 1e-4  # relative: two first losses that differ less are called the same
_SHOWN_ROWS = 5
_HASH_LETTERS = 8
_DATA_KEYS = {"data", "eval_data"}
_CUTS_ROWS = {"max_length", "truncation_side"}
_NOT_SETTINGS = {"output", "overwrite"}


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        kind: settings, base, data, versions or hardware.
        weight: 0 to 100, how likely it is that results differ because of it.
    """

    kind: str
    name: str
    a: Any
    b: Any
    weight: int
    reason: str

    @property
    def likely(self) -> bool:
        """Whether it usually changes a result."""
        return self.weight >= MATTERS


@dataclass(frozen=True)
class _Side:
    run: Path
    told: History
    line: Summary
    data: dict[str, Any]

    @property
    def first_loss(self) -> float | None:
        """Loss of step 1, before anything was learnt; None where it was not logged alone."""
        first = (self.told.of("step") or [{}])[0]
        return first.get("loss") if first.get("step") == 1 else None


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare two run folders.

    Returns:
        ``runs``, ``verdict``, ``differences`` (most likely first), ``results`` (name, a, b),
        ``same_start`` (None: not known) and ``apart_from_step``.

    Raises:
        ConfigError: FG-RUN-020, no run in one of them.
    """
    sides = [_side(require_run(path)) for path in (a, b)]
    one, two = sides
    same_start = _same_start(one, two)
    found = [
        *_settings(one, two),
        *_base(one, two),
        *_data(one, two),
        *_versions(one, two),
        *_hardware(one, two),
    ]
    ranked = sorted((_weighed(d, same_start) for d in found), key=lambda d: -d.weight)
    return {
        "runs": [str(side.run) for side in sides],
        "verdict": _verdict(ranked, one, two),
        "differences": [{**asdict(d), "likely": d.likely} for d in ranked],
        "results": _results(one, two),
        "same_start": same_start,
        "apart_from_step": _apart(one, two),
    }


def _side(run: Path) -> _Side:
    try:
        data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    return _Side(run, history(run), summary(run), data)


def _same_start(one: _Side, two: _Side) -> bool | None:
    a, b = one.first_loss, two.first_loss
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return None
    return abs(a - b) <= _SAME * max(abs(a), abs(b))


def _apart(one: _Side, two: _Side) -> int | None:
    """The first step whose losses differ; None if none does."""
    losses = [{e["step"]: e["loss"] for e in side.told.of("step")} for side in (one, two)]
    for step in sorted(losses[0].keys() & losses[1].keys()):
        a, b = losses[0][step], losses[1][step]
        if not abs(a - b) <= _SAME * max(abs(a), abs(b)):  # also where one is not a number
            return step
    return None


def _weighed(found: Difference, same_start: bool | None) -> Difference:
    """Move a weight by what the first losses say."""
    at_start = reasons.of_setting(found.name).at_start if found.kind == "settings" else None
    if found.kind == "data" and found.name in ("rows", "order"):
        at_start = True
    if at_start is None or same_start is None or at_start != same_start or not found.likely:
        return found
    words = (
        f"{found.reason}; but both runs begin with the same loss, which it would usually change"
        if same_start
        else f"{found.reason}; but the runs begin with different losses, which it does not explain"
    )
    return Difference(found.kind, found.name, found.a, found.b, found.weight * 2 // 3, words)


def _settings(one: _Side, two: _Side) -> list[Difference]:
    a, b = one.told.config, two.told.config
    names = [n for n in {**a, **b} if n not in _NOT_SETTINGS | _DATA_KEYS]
    out = []
    for name in names:
        if a.get(name) == b.get(name):
            continue
        known = reasons.of_setting(name)
        weight, words = _distance(name, known, a.get(name), b.get(name))
        if name in _CUTS_ROWS:
            weight, words = _cut(weight, words, one, two)
        out.append(Difference("settings", name, a.get(name), b.get(name), weight, words))
    return out


def _distance(name: str, known: Reason, a: Any, b: Any) -> tuple[int, str]:
    """Numbers that are close matter less than numbers that are far apart."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
    if not numbers or name == "seed" or min(a, b) <= 0:
        return known.weight, known.words
    times = max(a, b) / min(a, b)
    weight = known.weight if times >= 1.5 else known.weight * 2 // 3
    if times >= 5 and known.weight >= MATTERS:
        weight = min(97, known.weight + round(8 * math.log10(times)))
    return weight, f"{known.words}: {times:.3g} times as large in {'A' if a > b else 'B'}"


def _cut(weight: int, words: str, one: _Side, two: _Side) -> tuple[int, str]:
    """A longest length matters where rows are cut."""
    cuts = [(side.data.get("counts") or {}).get("truncated") for side in (one, two)]
    if None in cuts:
        return weight, words
    if not any(cuts):
        return 3, "no row is cut in either run"
    return weight, f"{words}: {cuts[0]:,} rows are cut in A, {cuts[1]:,} in B"


def _base(one: _Side, two: _Side) -> list[Difference]:
    """Other weights under the same name, by a sample of the embedding."""
    a, b = (side.told.last("base") for side in (one, two))
    names = [side.told.config.get("model") for side in (one, two)]
    if not a or not b or names[0] != names[1]:
        return []
    flat = [[v for row in event.get("values", []) for v in row] for event in (a, b)]
    pairs = zip(*flat, strict=True) if len(flat[0]) == len(flat[1]) else [(0.0, 1.0)]
    if all(abs(x - y) <= _SAME_WEIGHT * max(abs(x), abs(y)) + 1e-6 for x, y in pairs):
        return []
    words = "the model under this name had other weights"
    return [Difference("base", "base weights", *names, 96, words)]


def _data(one: _Side, two: _Side) -> list[Difference]:
    """Rows that changed, by what the runs kept of them."""
    out = []
    a, b = one.data.get("fingerprint"), two.data.get("fingerprint")
    specs = [side.told.config.get("data") for side in (one, two)]
    mixed = specs[0] != specs[1] and not all(isinstance(spec, str) for spec in specs)
    if a and b and (a != b or mixed):
        name, weight, words = _rows_changed(one, two)
        out.append(Difference("data", name, *_short(specs, (a, b)), weight, words))
    held = [((s.data.get("digests") or {}).get("held_out") or {}).get("rows") for s in (one, two)]
    paths = [side.told.config.get("eval_data") for side in (one, two)]
    same_split = one.told.config.get("eval_fraction") == two.told.config.get("eval_fraction")
    if held[0] != held[1] and same_split and (paths[0] or paths[1]):
        known = reasons.SETTINGS["eval_data"]
        out.append(Difference("data", "held-out rows", *paths, known.weight, known.words))
    return out


def _short(paths: list[Any], prints: tuple[str, str]) -> tuple[str, str]:
    first, second = (f"{path} ({found[:8]})" for path, found in zip(paths, prints, strict=True))
    return first, second


def _rows_changed(one: _Side, two: _Side) -> tuple[str, int, str]:
    """Name, weight and words for two files that are not the same bytes."""
    digests = [(side.data.get("digests") or {}).get("train") for side in (one, two)]
    if not all(digests):
        return "rows", 75, "the files hold other bytes; which rows, these runs did not keep"
    first, second = digests
    if first["order"] == second["order"]:
        return "file", 5, "other bytes, but the same rows in the same order were trained on"
    if first["rows"] == second["rows"]:
        return "order", 34, "the same rows in another order"
    if _rendered_otherwise(one, two):
        return "rows", 72, "the files hold other bytes; settings that change every row differ too"
    return "rows", *_which(*(_hashes(digest) for digest in (first, second)))


def _rendered_otherwise(one: _Side, two: _Side) -> bool:
    """Whether settings differ that change the ids of every row."""
    names = ("model", "chat_template", "max_length", "map", "completion_only_loss", "task")
    return any(one.told.config.get(n) != two.told.config.get(n) for n in names)


def _hashes(digest: dict[str, Any]) -> list[str]:
    joined = digest.get("hashes", "")
    return [joined[i : i + _HASH_LETTERS] for i in range(0, len(joined), _HASH_LETTERS)]


def _which(a: list[str], b: list[str]) -> tuple[int, str]:
    """Weight and words for rows that changed, by their hashes."""
    if len(a) == len(b):
        changed = [i + 1 for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if 0 < len(changed) <= len(a) // 2:
            share = len(changed) / len(a)
            return 40 + round(40 * min(1.0, 4 * share)), f"{_named(changed)} changed"
    only_a, only_b = set(a) - set(b), set(b) - set(a)
    share = (len(only_a) + len(only_b)) / max(len(a), len(b), 1)
    parts = []
    if only_a:
        parts.append(f"{_named([i + 1 for i, h in enumerate(a) if h in only_a])} only in A")
    if only_b:
        parts.append(f"{_named([i + 1 for i, h in enumerate(b) if h in only_b])} only in B")
    words = ", ".join(parts) or f"{len(a):,} rows in A, {len(b):,} in B, some more than once"
    return 40 + round(40 * min(1.0, 2 * share)), words


def _named(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    more = f" and {len(rows) - _SHOWN_ROWS:,} more" if len(rows) > _SHOWN_ROWS else ""
    return f"{'row' if len(rows) == 1 else f'{len(rows):,} rows:'} {shown}{more}"


def _versions(one: _Side, two: _Side) -> list[Difference]:
    a, b = (side.told.last("run").get("versions") or {} for side in (one, two))
    out = []
    for name in {**a, **b} if a and b else ():
        if a.get(name) == b.get(name):
            continue
        far, near = reasons.LIBRARIES.get(name, (10, 5))
        major = str(a.get(name)).split(".")[0] != str(b.get(name)).split(".")[0]
        words = "another version may compute, render or batch otherwise"
        out.append(
            Difference("versions", name, a.get(name), b.get(name), far if major else near, words)
        )
    return out


def _hardware(one: _Side, two: _Side) -> list[Difference]:
    a, b = (side.told.last("run").get("hardware") or {} for side in (one, two))
    out = []
    for name in {**a, **b} if a and b else ():
        if a.get(name) != b.get(name):
            known = reasons.HARDWARE.get(name, Reason(5, "another machine"))
            out.append(
                Difference("hardware", name, a.get(name), b.get(name), known.weight, known.words)
            )
    begun = [side.told.last("start") for side in (one, two)]
    asked = [side.told.config.get("dtype") for side in (one, two)]
    dtypes = [start.get("dtype") for start in begun]
    if asked[0] == asked[1] and all(dtypes) and dtypes[0] != dtypes[1]:
        words = "dtype auto chose another precision on this machine"
        out.append(Difference("hardware", "dtype", *dtypes, 38, words))
    return out


def _results(one: _Side, two: _Side) -> list[dict[str, Any]]:
    """What came out, side by side."""
    counts = [side.data.get("counts") or {} for side in (one, two)]
    pairs = {
        "state": [side.line.state for side in (one, two)],
        "steps": [side.line.step for side in (one, two)],
        "last loss": [side.line.loss for side in (one, two)],
        "held-out loss": [side.line.eval_loss for side in (one, two)],
        "tokens a second": [side.line.tokens_per_second for side in (one, two)],
        "seconds": [side.line.seconds for side in (one, two)],
        "trainable parameters": [s.told.last("start").get("trainable") for s in (one, two)],
        "peak memory": [s.told.last("end").get("peak_memory_bytes") for s in (one, two)],
        "rows": [c.get("rows") for c in counts],
        "trained tokens": [c.get("trained_tokens", c.get("tokens")) for c in counts],
        "rows cut": [c.get("truncated") for c in counts],
    }
    return [{"name": n, "a": a, "b": b} for n, (a, b) in pairs.items() if (a, b) != (None, None)]


def _verdict(ranked: list[Difference], one: _Side, two: _Side) -> str:
    """The answer in a sentence."""
    if not ranked:
        apart = _apart(one, two)
        if apart is None:
            return "Nothing differs that was recorded, and the losses are the same."
        return (
            f"Nothing differs that was recorded, and yet the losses part at step {apart}: the base "
            "weights under the same name, or sums in another order."
        )
    likely = [d for d in ranked if d.likely]
    if not likely:
        names = ", ".join(d.name for d in ranked[:3])
        return f"What differs ({names}) does not usually change a result."
    first = likely[0]
    rest = f" Then: {', '.join(d.name for d in likely[1:4])}." if len(likely) > 1 else ""
    return f"Likely matters most: {first.name}, {first.a} -> {first.b} ({first.reason}).{rest}"

"""The page of a sweep: ``index.html``, drawn from the values of ``sweep.json``.

What: the best run, the loss against each key that was varied, the curves of the best runs, and the
table of all. How: ``core.page`` and ``core.charts``; curves are read from the runs' events.
Constraint: one file that opens from disk and asks no address for anything. Trade-off: with several
keys each chart shows all runs against one of them, its line the best of each value; how two keys
work together stands in the table only.

Units: seconds, nats a token.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finegraft.core import charts
from finegraft.core.journal import by_step, read_events
from finegraft.core.page import Markup, Section, badge, code, escape, page, paragraph, table, tiles
from finegraft.core.paths import write_whole
from finegraft.training.report.words import clock, loss
from finegraft.training.sweep.one import settled
from finegraft.training.sweep.results import measure_words
from finegraft.training.sweep.space import label, shown

NAME = "index.html"
_CURVES = 4
_FAR_APART = 4.0  # times between values, from which their axis is logarithmic
_LOSSES_FAR_APART = 10.0
_TONES = {"finished": "good", "pruned": "note", "failed": "error"}


def write(values: Mapping[str, Any], folder: Path) -> None:
    """Draw the page.

    Args:
        values: What ``running.sweep`` returns.
        folder: Of the sweep.

    Raises:
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    write_whole(folder / NAME, document(values))


def document(values: Mapping[str, Any]) -> str:
    """The whole page as HTML."""
    sections = [_settings(values), _curves(values), _runs(values), _next(values)]
    done = len(values["runs"]) == values["of"]
    return page(
        f"Sweep {Path(values['sweep']).name}",
        [section for section in sections if section],
        lead=_lead(values),
        tone="good" if done and values["best"] else "note",
        footer=f"finegraft, drawn {time.strftime('%Y-%m-%d %H:%M')} from sweep.json",
    )


def _lead(values: Mapping[str, Any]) -> str:
    runs, best = values["runs"], values["best"]
    counts = {
        state: sum(row["state"] == state for row in runs)
        for state in ("finished", "pruned", "failed")
    }
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "none done yet"
    about = f"{Path(str(values['model'])).name} on {_data(values)}: "
    about += f"{values['of']} runs ({told}), ordered by the {measure_words(values['measure'])}"
    numbers: list[tuple[str, object, str]] = []
    if best:
        numbers.append((measure_words(values["measure"]), loss(best["loss"]), "of the best run"))
        numbers += [(key, shown(value), "of the best run") for key, value in best["values"].items()]
    seconds = sum(row["seconds"] or 0 for row in runs)
    numbers.append(("training", clock(seconds), "in all runs that finished"))
    return paragraph(about) + tiles(numbers) + "".join(paragraph(note) for note in values["notes"])


def _data(values: Mapping[str, Any]) -> str:
    return Path(str(values["data"])).name


def _settings(values: Mapping[str, Any]) -> Section | None:
    """The loss against each key."""
    finished = [row for row in values["runs"] if row["loss"] is not None]
    if not finished:
        return None
    losses = [row["loss"] for row in finished]
    far = min(losses) > 0 and max(losses) / min(losses) > _LOSSES_FAR_APART
    drawn = []
    for key in values["varied"]:
        found = sorted(finished, key=lambda row: _sortable(row["values"][key]))
        points = [(_place(row["values"][key]), row["loss"], _said(row)) for row in found]
        places = [x for x, _, _ in points]
        numbers = [x for x in places if not isinstance(x, str)]
        apart = len(numbers) == len(places) and min(numbers) > 0
        drawn.append(
            charts.dots(
                f"{measure_words(values['measure']).capitalize()} by {key}",
                points,
                x_name=key,
                logarithmic_x=apart and max(numbers) / min(numbers) >= _FAR_APART,
                logarithmic_y=far,
            )
        )
    body = f'<div class="pair">{"".join(drawn)}</div>'
    body += paragraph(
        "Each dot is a run; the line leads through the best of each value.", soft=True
    )
    return Section("Settings", body)


def _place(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number else shown(value)


def _sortable(value: Any) -> tuple[int, float, str]:
    place = _place(value)
    return (1, 0.0, place) if isinstance(place, str) else (0, place, "")


def _said(row: Mapping[str, Any]) -> str:
    return f"{label(row['values'])}: {loss(row['loss'])}"


def _curves(values: Mapping[str, Any]) -> Section | None:
    """How the loss of the best runs went."""
    held_out = values["measure"] == "eval_loss"
    series = {}
    for row in [row for row in values["runs"] if row["loss"] is not None][:_CURVES]:
        file = Path(row["run"]) / "events.jsonl"
        events = read_events(file) if file.is_file() else []
        lines = [
            e for e in by_step(events, "eval" if held_out else "step") if e["loss"] is not None
        ]
        points = [(float(e["step"]), float(e["loss"])) for e in lines]
        if not held_out:
            points = [
                (x, settled([y for _, y in points[: i + 1]]) or y)
                for i, (x, y) in enumerate(points)
            ]
        if points:
            series[label(row["values"])] = points
    if not series:
        return None
    title = f"{measure_words(values['measure']).capitalize()}, the best {len(series)} runs"
    return Section("Curves", charts.lines(title, series, x_name="step"))


def _runs(values: Mapping[str, Any]) -> Section:
    keys = list(values["varied"])
    measures = _measures(values["runs"])
    head = ["", *keys, "held-out loss", "training loss", *measures, "steps", "time", "state"]
    if values["measure"] != "eval_loss":
        head.remove("held-out loss")
    lines = []
    for place, row in enumerate(values["runs"], 1):
        cells: list[object] = [place, *(shown(row["values"][key]) for key in keys)]
        if values["measure"] == "eval_loss":
            cells.append(_loss(row["eval_loss"]))
        cells += [_loss(row["train_loss"]), *(_loss(measures_of(row).get(m)) for m in measures)]
        cells += [row["steps"] or "", clock(row["seconds"]) if row["seconds"] else "", _state(row)]
        lines.append(cells)
    body = table(head, lines, label="runs")
    for row in values["runs"]:
        if error := row["error"]:
            fix = f" ({error['fix']})" if error.get("fix") else ""
            words = f"{label(row['values'])}: {error['found']}{fix}"
            body += f"<p>{badge(error['code'], 'error')}{escape(words)}</p>"
    return Section("Runs", body)


def measures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Measures of the saved model beside its loss."""
    found = row.get("metrics") or {}
    return {name: value for name, value in found.items() if name != "loss"}


def _measures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in runs for name in measures_of(row))
    return [name for name in names if name in ("accuracy", "macro_f1", "micro_f1", "f1", "mse")]


def _loss(value: float | None) -> Markup:
    return Markup("" if value is None else loss(value))


def _state(row: Mapping[str, Any]) -> Markup:
    words = row["state"]
    if words == "pruned":
        words += f" at step {row['steps']} of {row['total_steps']}"
    return badge(words, _TONES[row["state"]])


def _next(values: Mapping[str, Any]) -> Section | None:
    best = values["best"]
    if not best:
        return None
    run = shlex.quote(best["run"])
    command = "predict" if str(values["task"]).endswith("classification") else "chat"
    words = "The folder of the best run is a run like any other; its config.yaml repeats it."
    return Section("Next", paragraph(words) + code(f"finegraft {command} {run}"))

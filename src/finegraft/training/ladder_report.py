"""What a ladder found, as a picture and as a page.

What: ``ladder.png`` (quality with intervals against trained parameters and against seconds) and
``report.md``. How: both are drawn from the values of ``ladder.json`` alone. Constraint: matplotlib
through its objects, no state of the process is touched. Trade-off: names of methods stand in a
legend, because close points would cover one another's labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finegraft.core.paths import write_whole

_MARKERS = "osD^vP*Xh<>p"
_WORDS = {"loss": "held-out loss (nats a token)", "mse": "held-out squared error"}


def write(values: Mapping[str, Any], folder: Path) -> None:
    """Write ``ladder.png``, if a method was trained, and ``report.md``.

    Args:
        values: What ``ladder.climb`` returns.
        folder: Of the ladder.
    """
    drawn = chart(values, folder / "ladder.png")
    write_whole(folder / "report.md", page(values, drawn))


def number(value: float, measure: str) -> str:
    """A quality in words."""
    return f"{value:.1%}" if measure == "accuracy" else f"{value:.4f}"


def size(count: float | None) -> str:
    """Bytes in units of a thousand."""
    if count is None:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def cells(rung: Mapping[str, Any], measure: str) -> list[str]:
    """One line of the table, as ``titles`` names its cells."""
    if rung.get("error"):
        return [rung["method"], "", "", "", "", "", "", "", "", ""]
    low, high = rung["interval"]
    second = rung["metrics"].get(second_measure(measure))
    trained, every = rung["trainable_parameters"], rung["parameters"]
    return [
        rung["method"],
        number(rung["quality"], measure),
        f"{number(low, measure)} to {number(high, measure)}",
        "" if second is None else f"{second:.3f}",
        f"{trained:,}",
        f"{trained / every:.3%}",
        f"{rung['learning_rate']:g}" if rung.get("learning_rate") else "",
        f"{rung['seconds']:,.0f} s",
        size(rung["peak_memory_bytes"]),
        size(rung["adapter_bytes"]),
    ]


def second_measure(measure: str) -> str:
    """The measure that is shown beside the quality."""
    return {"loss": "perplexity", "accuracy": "macro_f1"}.get(measure, "mae")


def titles(measure: str) -> list[str]:
    """Titles of the table's columns."""
    return [
        "method",
        measure,
        "95% interval",
        second_measure(measure).replace("_", " "),
        "trained",
        "share",
        "rate",
        "time",
        "memory",
        "on disk",
    ]


def page(values: Mapping[str, Any], has_chart: bool) -> str:
    """The text of ``report.md``."""
    measure = values["measure"]
    model, rows, held = Path(values["model"]).name, values["rows"], values["held_out_rows"]
    chosen = values["recommendation"]
    heads = titles(measure)
    lines = [
        f"# Methods on {Path(values['data']).name}",
        "",
        f"**Recommended: {chosen['method'] or 'none'}.** {chosen['reason']}",
        "",
        f"{model}, {values['task']}, {rows:,} rows to train on, {held:,} held out; "
        f"{values['better']} {measure} is better.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" + "|---:" * (len(heads) - 1) + "|",
    ]
    for rung in values["rungs"]:
        lines.append("| " + " | ".join(cells(rung, measure)) + " |")
    if has_chart:
        lines += ["", "![Quality against trained parameters and time](ladder.png)"]
    failed = [rung for rung in values["rungs"] if rung.get("error")]
    if failed:
        lines += ["", "## Not trained", ""]
    for rung in failed:
        error = rung["error"]
        fix = f" ({error['fix']})" if error.get("fix") else ""
        lines.append(f"- `{rung['method']}`: {error['code']}: {error['found']}{fix}")
    lines += [
        "",
        "Every method saw the same rows in the same order for as many steps. The interval holds "
        + (
            "95% of 2,000 draws of the held-out rows"
            if measure != "accuracy"
            else "the true accuracy in 95% of such samples (Wilson)"
        )
        + "; memory is the most that the run's process held; time is that of the training steps "
        "and of evaluations between them. A smaller method is recommended instead of the best one "
        "only if the two cannot be told apart on the same held-out rows. One seed: repeat a close "
        "decision with another --seed.",
    ]
    return "\n".join(lines) + "\n"


def chart(values: Mapping[str, Any], target: Path) -> bool:
    """Draw the picture; False when no method was trained."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [r for r in values["rungs"] if r.get("quality") is not None]
    trained = [r for r in good if r["trainable_parameters"]]
    if not trained:
        return False
    measure, chosen = values["measure"], values["recommendation"]["method"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "trainable_parameters"), (right, "seconds")):
        for place, rung in enumerate(trained):
            low, high = rung["interval"]
            quality = rung["quality"]
            axes.errorbar(
                rung[key],
                quality,
                yerr=[[max(quality - low, 0)], [max(high - quality, 0)]],
                fmt=_MARKERS[place % len(_MARKERS)],
                color=f"C{place % 10}",
                markersize=11 if rung["method"] == chosen else 7,
                capsize=3,
                label=rung["method"] + (" (recommended)" if rung["method"] == chosen else ""),
            )
        axes.grid(alpha=0.3)
    _base(good, left, right, measure, trained)
    left.set(
        xlabel="trained parameters", xscale="log", ylabel=_WORDS.get(measure, f"held-out {measure}")
    )
    right.set(xlabel="training time (s)")
    right.set_xlim(left=0)
    figure.suptitle(f"{Path(values['model']).name} on {Path(values['data']).name}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(target, dpi=120)
    return True


def _base(good: list[Any], left: Any, right: Any, measure: str, trained: list[Any]) -> None:
    """The untrained model as a line; losses that lie far apart are drawn on a logarithmic axis."""
    base = next((r for r in good if not r["trainable_parameters"]), None)
    if base is not None:
        for axes in (left, right):
            axes.axhline(base["quality"], color="grey", linestyle="--", label="untrained")
    if measure == "accuracy":
        return
    values = [r["quality"] for r in good]
    if min(values) > 0 and max(values) / min(values) > 10:
        left.set_yscale("log")

"""The loss curve as a picture, drawn from ``events.jsonl``."""

from __future__ import annotations

from pathlib import Path

from finegraft.training.events import by_step, read_events


def loss_curve(events_file: Path, target: Path) -> bool:
    """Draw training and held-out loss by step to a PNG; return False when there is nothing yet.

    Args:
        events_file: The run's ``events.jsonl``.
        target: The picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_events(events_file)
    steps, held_out = by_step(events, "step"), by_step(events, "eval")
    if not steps:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], alpha=0.35, label="each step")
    smooth, average = [], steps[0]["loss"]
    for event in steps:
        average += 0.1 * (event["loss"] - average)
        smooth.append(average)
    axes.plot([e["step"] for e in steps], smooth, color="C0", label="training, smoothed")
    if held_out:
        x, y = [e["step"] for e in held_out], [e["loss"] for e in held_out]
        axes.plot(x, y, "o-", color="C1", label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=events_file.parent.name)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return True

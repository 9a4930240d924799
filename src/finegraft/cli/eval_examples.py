"""Rows of an evaluation that are worth reading, and all of them for the report file.

What: the rows on which a model gained and lost most against another, or its worst ones. How: by the
first measure of answers, chrF before the others and a person's own before chrF. Constraint: this
module is imported inside the command, because it imports ``inference``.
"""

from __future__ import annotations

from typing import Any

from finegraft.inference import evaluate
from finegraft.inference.evaluate import Answered, Metric

EXAMPLES = 3  # rows of each kind


def _first(metrics: dict[str, Metric]) -> str | None:
    """The measure that rows are ordered by: one's own, else chrF, else another of answers."""
    answers = [name for name, metric in metrics.items() if metric.reads == "answers"]
    own = [name for name in answers if metrics[name].about.startswith("mean of score()")]
    return next(iter([*own, *(n for n in answers if n == "chrf"), *answers, *metrics]), None)


def telling(
    metrics: dict[str, Metric], one: Answered, other: Answered | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows worth reading: the largest gains and losses, or the worst answers of one model."""
    name = _first(metrics)
    if name is None:
        return {}
    metric = metrics[name]
    scores = evaluate.each_row(metric, one)
    answered = any(each.reads == "answers" for each in metrics.values())
    if other is not None:
        if metric.reads == "losses" and not evaluate.same_tokens(one, other):
            return {}
        places = evaluate.changed(metric, one, other, EXAMPLES)
    else:
        sign = 1.0 if metric.better == "more" else -1.0
        scored = [(sign * score, place) for place, score in enumerate(scores) if score is not None]
        places = {"worst": [place for _, place in sorted(scored)[:EXAMPLES]]}
    others = evaluate.each_row(metric, other) if other is not None else scores
    return {
        kind: [
            {
                "row": place + 1,
                "by": name,
                "score": scores[place],
                **({"other_score": others[place]} if other is not None else {}),
                "prompt": one.prompts[place],
                "reference": one.references[place],
                "answer": one.answers[place] if answered else None,
                **({"other_answer": other.answers[place]} if other and answered else {}),
            }
            for place in found
        ]
        for kind, found in places.items()
    }


def every_row(
    metrics: dict[str, Metric], one: Answered, other: Answered | None
) -> list[dict[str, Any]]:
    """Every row with its answers and scores, for the report file."""
    scores = {name: evaluate.each_row(metric, one) for name, metric in metrics.items()}
    others = {
        name: evaluate.each_row(metric, other)
        for name, metric in metrics.items()
        if other is not None
    }
    return [
        {
            "prompt": one.prompts[i],
            "reference": one.references[i],
            "answer": one.answers[i],
            "scores": {name: values[i] for name, values in scores.items()},
            **(
                {
                    "other_answer": other.answers[i],
                    "other_scores": {name: values[i] for name, values in others.items()},
                }
                if other is not None
                else {}
            ),
        }
        for i in range(len(one.prompts))
    ]

"""``finegraft eval`` for classifiers: labels, several labels, values, and spans of texts.

What: held-out texts are predicted and measured, with intervals, of one model or of two. How: the
tables come from ``training.metrics``, the intervals from ``inference.evaluate``. Constraint: the
measures are those of the training, so both say the same of the same rows. Trade-off: spans are
compared by the characters that they cover; a text longer than the model is read in windows, as
``finegraft predict`` does, while training measures what it cut off as not there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from finegraft.cli import eval_rows, eval_show
from finegraft.cli.output import Output, only_warnings, quiet_datasets, quiet_libraries
from finegraft.core.errors import ConfigError

if TYPE_CHECKING:
    from finegraft.cli.eval import Options

_TOKENS = "token_classification"


def _require_fitting(asked: Options, run: eval_rows.Run | None) -> eval_rows.Run:
    """Refuse options of models that write, and models that are no runs.

    Raises:
        ConfigError: FG-EVAL-006, a base to compare with; FG-EVAL-008, another option.
    """
    if run is None:
        raise ConfigError(
            "FG-EVAL-008",
            f"{asked.model} labels texts and is no run, so how its rows are labelled is not known",
            allowed="a run of `finegraft train --task classification` or token_classification",
            fix=f"finegraft predict {asked.model} --file ROWS.jsonl labels texts",
        )
    given = {
        "--metrics": asked.metrics,
        "--scorer": asked.scorer,
        "--lm-eval": asked.lm_eval,
        "--max-new-tokens": asked.max_new_tokens,
        "--map": asked.mapping,
    }
    for flag, value in given.items():
        if value:
            raise ConfigError(
                "FG-EVAL-008",
                f"{flag}, and {asked.model} labels texts",
                allowed="--vs RUN, --data, --limit, --batch-size and --output for classifiers",
                fix=f"leave {flag} out",
            )
    if asked.versus == "base":
        raise ConfigError(
            "FG-EVAL-006",
            "--vs base, and the base of a classifier has no trained head to compare with",
            allowed="another run with the same labels",
            fix="--vs with another run; the share of the most frequent label is shown anyway",
        )
    return run


def examine_labels(out: Output, asked: Options, run: eval_rows.Run | None) -> dict[str, Any]:
    """Everything of ``finegraft eval`` for a classifier."""
    own = _require_fitting(asked, run)
    with out.busy("reading rows"), quiet_libraries(), quiet_datasets():
        checked, held = eval_rows.examples(own, asked.data)
    held = eval_rows.limited(held, asked.limit)
    rows = checked.sides[1].select(held.items)
    values: dict[str, Any] = {
        "model": asked.model,
        "versus": asked.versus,
        "task": own.config.task,
        "data": held.as_dict(),
    }
    said = _predicted(out, asked, asked.model, own, rows)
    other = None
    if asked.versus is not None:
        other = _predicted(out, asked, asked.versus, eval_rows.find_run(asked.versus), rows)
    if own.config.task == _TOKENS:
        return values | _spans(rows, said, other)
    return values | _classes(checked, rows, said, other, held)


def _predicted(
    out: Output, asked: Options, name: str, run: eval_rows.Run | None, rows: Any
) -> list[Any]:
    from finegraft.classifier import FastClassifier

    config = run.config if run else None
    with out.busy(f"loading {name}"), quiet_libraries(), only_warnings():
        model, tokenizer = FastClassifier.from_pretrained(
            name,
            dtype=None if config is None or config.dtype == "auto" else config.dtype,
            load_in_4bit=asked.load_in_4bit or bool(config and config.load_in_4bit),
            load_in_8bit=bool(config and config.load_in_8bit),
            trust_remote_code=bool(config and config.trust_remote_code),
            max_seq_length=config.max_length if config else None,
        )
    with quiet_libraries(), eval_show.progress(out, name) as told:
        found: list[Any] = FastClassifier.predict(
            model,
            tokenizer,
            rows.texts,
            pairs=rows.pairs,
            batch_size=asked.batch_size,
            on_progress=lambda done, of: told("labelling", done, of),
        )
    return found


def _chances(names: tuple[str, ...], said: list[Any], model: str) -> Any:
    """Probabilities in the order of ``names``, [n, c]; of values the values, [n].

    Raises:
        ConfigError: FG-EVAL-006, a model with other labels.
    """
    import numpy as np

    if said[0].value is not None:
        return np.asarray([one.value for one in said])
    missing = [name for name in names if name not in said[0].probabilities]
    if missing:
        raise ConfigError(
            "FG-EVAL-006",
            f"{model} does not know the labels {', '.join(missing[:20])}",
            allowed="models with the labels of the rows: " + ", ".join(names[:20]),
            fix="compare with a run that was trained on the same labels",
        )
    return np.asarray([[one.probabilities[name] for name in names] for one in said])


def _classes(
    checked: Any, rows: Any, said: list[Any], other: list[Any] | None, held: eval_rows.HeldOut
) -> dict[str, Any]:
    """Measures of one label, several labels or a value a row."""
    import numpy as np

    from finegraft.data.labels import CLASSES, VALUES
    from finegraft.inference.evaluate import judge_labels
    from finegraft.training import metrics

    labels = checked.labels
    true = labels.encode(rows)
    mine = _chances(labels.names, said, "the model")
    theirs = _chances(labels.names, other, "the other model") if other is not None else None
    judged = judge_labels(labels.problem_type, true, mine, theirs)
    names = list(labels.names)
    right = np.asarray(true)
    if labels.problem_type == VALUES:
        return {"metrics": judged, "measures": metrics.values(right, mine)}
    if labels.problem_type == CLASSES:
        most, count = Counter(true).most_common(1)[0]
        held.notes.append(
            f"always saying '{names[most]}', the most frequent label, is right on "
            f"{100 * count / len(true):.1f}%"
        )
        tables = metrics.classes(right, mine.argmax(1), names)
    else:
        tables = metrics.several(right, mine >= metrics.THRESHOLD, names)
    return {"metrics": judged, "measures": tables, "data": held.as_dict()}


def _spans(rows: Any, said: list[Any], other: list[Any] | None) -> dict[str, Any]:
    """F1, precision and recall of whole spans."""
    from finegraft.inference.evaluate import judge_spans

    def found(predictions: list[Any]) -> list[set[tuple[int, int, str]]]:
        return [{(e.start, e.end, e.label) for e in one.entities} for one in predictions]

    true = [{(span.start, span.end, span.label) for span in spans} for spans in rows.labels]
    judged = judge_spans(true, found(said), found(other) if other is not None else None)
    return {"metrics": judged}

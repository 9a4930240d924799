"""``finegraft eval``: how good a model is on rows that it was not trained on.

What: loss, perplexity and measures of generated answers with 95% intervals, of one model or of two
on the same rows, and the answers that changed most. How: rows come from ``eval_rows``, answers and
measures from ``inference.evaluate``, tables from ``eval_show``; classifiers go to ``eval_labels``.
Constraint: no row that was trained on is counted, and where the rows come from is always said.
Trade-off: answers are generated for at most 200 rows unless more are asked for.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finegraft.cli import eval_rows, eval_show
from finegraft.cli.help import Help
from finegraft.cli.output import Output, only_warnings, quiet_libraries
from finegraft.core.errors import ConfigError
from finegraft.core.paths import require_writable, write_whole

if TYPE_CHECKING:
    from finegraft.inference.evaluate import Answered, Metric, Rows

LIMIT_ROWS = 200
BASE = "base"
_CAUSAL = "causal"


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    model: str
    versus: str | None
    data: str | None
    metrics: str | None
    scorer: Path | None
    limit: int
    max_new_tokens: int | None
    batch_size: int
    lm_eval: str | None
    load_in_4bit: bool
    mapping: list[str]
    output: Path | None


def eval_(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder; or a model, with --data.")
    ],
    vs: Annotated[
        str | None,
        typer.Option(
            "--vs", metavar="MODEL", help="Compare with: base (what was tuned), or another run."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Rows; unset: those that the run held out."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="NAME,NAME", help="Or all; see docs/eval.md."),
    ] = None,
    scorer: Annotated[
        Path | None,
        typer.Option(
            "--scorer",
            metavar="FILE.py",
            help="Your own: def score(prompt, answer, reference), which returns a number.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="INT", help="Rows, evenly spread; 0: all.")
    ] = LIMIT_ROWS,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            metavar="INT",
            help="Longest answer (unset: 1.5 times the longest right one).",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="INT", help="Rows at a time.")
    ] = 16,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASK,TASK", help="Benchmarks of lm-evaluation-harness as well."
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize the base (a run: as it was trained).")
    ] = False,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="WANTED=FOUND", help="Columns of --data to rename."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Unset: RUN/report/eval.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model on rows it was not trained on.

    For example:

      finegraft eval runs/a --vs base
    """
    out: Output = ctx.obj
    asked = Options(
        model,
        vs,
        data,
        metrics,
        scorer,
        limit,
        max_new_tokens,
        batch_size,
        lm_eval,
        load_in_4bit,
        mapping or [],
        output,
    )
    run = eval_rows.find_run(model)
    eval_rows.require_source(run, model, data)
    target = output or (run.folder / "report" / "eval.json" if run else None)
    if target is not None:
        require_writable(target.absolute().parent)
    if _labels(run, model):
        from finegraft.cli.eval_labels import examine_labels

        values = examine_labels(out, asked, run)
    else:
        values = _examine_answers(out, asked, run)
    rows = values.pop("answers", None)
    values["report"] = str(target) if target else None
    if target is not None:
        whole = {**values, "answers": rows} if rows is not None else values
        write_whole(target, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    out.result(values, lambda to: eval_show.show(values, to))


def _labels(run: eval_rows.Run | None, name: str) -> bool:
    """Whether the model labels texts instead of writing them."""
    if run is not None:
        return run.config.task != _CAUSAL
    from finegraft.models import classifier
    from finegraft.models.locate import locate

    return classifier.kind_of(locate(name)) in (classifier.SEQUENCE, classifier.TOKEN)


def chosen_metrics(asked: Options, has_answers: bool) -> dict[str, Metric]:
    """The measures by name, those that are asked for or those that can be computed.

    Raises:
        ConfigError: FG-EVAL-005, measures of answers for rows without any; FG-EVAL-011, a library
            that is missing; FG-CORE-001, no such measure.
    """
    from importlib import util

    from finegraft.inference.evaluate import METRICS, from_file, require_package

    names = ["loss", "perplexity", "exact_match", "chrf"]
    if asked.metrics == "all":
        names = [*names, *(name for name in METRICS.names() if name not in names)]
    elif asked.metrics is not None:
        names = [name.strip().lower() for name in asked.metrics.split(",") if name.strip()]
    elif util.find_spec("sacrebleu") is None:
        names.remove("chrf")
    found = {name: METRICS.get(name) for name in dict.fromkeys(names)}
    if asked.scorer is not None:
        found[asked.scorer.stem] = from_file(asked.scorer)
    for name, metric in found.items():
        if metric.package:
            require_package(name, metric.package)
    if has_answers:
        return found
    needing = [name for name, metric in found.items() if metric.reads == "answers"]
    if needing and (asked.metrics not in (None, "all") or asked.scorer is not None):
        raise ConfigError(
            "FG-EVAL-005",
            f"{', '.join(needing)} needs answers, and no row ends with one",
            allowed="rows that end with an answer of the assistant, in words",
            fix="--metrics loss,perplexity, or rows of prompt and completion",
        )
    return {name: metric for name, metric in found.items() if metric.reads == "losses"}


def _examine_answers(out: Output, asked: Options, run: eval_rows.Run | None) -> dict[str, Any]:
    """Everything of ``finegraft eval`` for a model that writes."""
    with out.busy("loading libraries"), quiet_libraries():
        from finegraft.cli import eval_examples
        from finegraft.cli.flags import given
        from finegraft.inference import evaluate
        from finegraft.training import tasks  # noqa: F401  (read rows; some libraries chatter)

    with out.busy("reading rows"):
        held = eval_rows.conversations(
            run, asked.data, given({"map": asked.mapping}).get("map", {})
        )
    held = eval_rows.limited(held, asked.limit)
    rows = evaluate.questions(held.items, held.tools)
    has_answers = any(text is not None for text in rows.references)
    metrics = chosen_metrics(asked, has_answers)
    if asked.lm_eval:
        from finegraft.cli.eval_lm import require_harness

        require_harness()
    one, other, tuned, benchmarks = _two_models(out, asked, run, rows, metrics)
    values: dict[str, Any] = {
        "model": asked.model,
        "versus": tuned,
        "task": _CAUSAL,
        "data": held.as_dict(),
        "metrics": evaluate.compare(metrics, one, other),
    }
    answered = any(metric.reads == "answers" for metric in metrics.values())
    if other is not None and not evaluate.same_tokens(one, other):
        held.notes.append("the two models cut text into other tokens; losses are not compared")
        values["data"] = held.as_dict()
    if other is not None and answered and "chrf" in metrics:
        values["pairwise"] = evaluate.pairwise(one, other)
    values["examples"] = eval_examples.telling(metrics, one, other)
    if benchmarks:
        values["lm_eval"] = benchmarks
    values["answers"] = eval_examples.every_row(metrics, one, other)
    return values


def _two_models(
    out: Output,
    asked: Options,
    run: eval_rows.Run | None,
    rows: Rows,
    metrics: dict[str, Metric],
) -> tuple[Answered, Answered | None, str | None, dict[str, Any]]:
    """What the model did with the rows, what the other one did, its name, and benchmarks."""
    from finegraft.inference.evaluate import examine, longest_answer

    model, tokenizer = _load(out, asked.model, run, asked.load_in_4bit)
    settings: dict[str, Any] = {
        "max_length": run.config.max_length if run else _longest(model),
        "completion_only": run.config.completion_only_loss if run else None,
        "max_new_tokens": asked.max_new_tokens or longest_answer(tokenizer, rows),
        "with_answers": any(m.reads == "answers" for m in metrics.values()),
        "with_losses": any(m.reads == "losses" for m in metrics.values()),
        "batch_size": asked.batch_size,
    }
    with quiet_libraries(), eval_show.progress(out, asked.model) as told:
        one = examine(model, tokenizer, rows, **settings, on_progress=told)
    benchmarks: dict[str, Any] = {}
    if asked.lm_eval:
        from finegraft.cli.eval_lm import benchmarks_of

        benchmarks = benchmarks_of(model, tokenizer, asked.lm_eval, asked.batch_size)
    if asked.versus is None:
        return one, None, None, benchmarks
    if asked.versus == BASE and hasattr(model, "peft_config"):
        name = "base"
        with quiet_libraries(), _base(model), eval_show.progress(out, name) as told:
            other = examine(model, tokenizer, rows, **settings, on_progress=told)
        return one, other, name, benchmarks
    name = _other(asked, run)
    del model
    gc.collect()  # two models at a time would need twice the memory
    model, tokenizer = _load(out, name, eval_rows.find_run(name), asked.load_in_4bit)
    with quiet_libraries(), eval_show.progress(out, name) as told:
        other = examine(model, tokenizer, rows, **settings, on_progress=told)
    return one, other, name, benchmarks


@contextlib.contextmanager
def _base(model: Any) -> Iterator[None]:
    """The model without its adapter."""
    from finegraft import adapters

    with adapters.named.disabled(model):
        yield


def _other(asked: Options, run: eval_rows.Run | None) -> str:
    """The model to compare with that has to be loaded.

    Raises:
        ConfigError: FG-EVAL-006, no base is known.
    """
    if asked.versus != BASE:
        return str(asked.versus)
    if run is None:
        raise ConfigError(
            "FG-EVAL-006",
            f"--vs base, and what {asked.model} was made from is not known here",
            allowed="a run or an adapter folder, whose base is known",
            fix="--vs with the name or folder of the other model",
        )
    return run.config.model


def _longest(model: Any) -> int:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    return int(getattr(config, "max_position_embeddings", None) or 1024)


def _load(out: Output, name: str, run: eval_rows.Run | None, load_in_4bit: bool) -> tuple[Any, Any]:
    """The model in the precision that a run was trained in, ready to answer."""
    with out.busy(f"loading {name}"), quiet_libraries(), only_warnings():
        from finegraft.fast import FastLanguageModel

        own: dict[str, Any] = {"load_in_4bit": load_in_4bit}
        if run is not None:
            config = run.config
            own = {
                "load_in_4bit": load_in_4bit or config.load_in_4bit,
                "load_in_8bit": config.load_in_8bit,
                "dtype": None if config.dtype == "auto" else config.dtype,
                "trust_remote_code": config.trust_remote_code,
            }
        model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=None, **own)
        FastLanguageModel.for_inference(model)
    return model, tokenizer


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("eval", cls=Help)(eval_)

"""Rows that fit a layout and are about something that training on text would throw away.

What: preference pairs, rated answers, labelled texts and rows with pictures are refused with what
to do instead. How: by column names and the values of the first rows. Constraint: nothing is trained
that the rows call bad, and no label is dropped silently. Trade-off: a text corpus with a column
``label`` must lose that column first.
"""

from __future__ import annotations

from collections.abc import Sequence

from finegraft.core.errors import DataError
from finegraft.data.conversation import Row

_LOOKED_AT = 100  # first rows
_ANSWERED = frozenset(
    {"completion", "output", "response", "answer", "messages", "conversations", "conversation"}
)
_TEXTS = ("text", "sentence", "review", "comment", "tweet", "utterance", "sentence1", "premise")
_LABELS = ("label", "labels", "sentiment", "intent", "emotion")
_WORDS = ("tokens", "words")
_TAGS = ("ner_tags", "entities")
_MEDIA = ("images", "image", "audios", "audio", "videos", "video")


def refuse_other_tasks(rows: Sequence[Row]) -> None:
    """Raise where rows are recognised as not being for plain training.

    Raises:
        DataError: FG-DATA-034 preferences or ratings, FG-DATA-035 labels, FG-DATA-037 media.
    """
    columns = [str(column) for column in rows[0]]
    if {"chosen", "rejected"} <= set(columns):
        raise _pairs(columns, "chosen")
    if {"chosen_messages", "rejected_messages"} <= set(columns):
        raise _pairs(columns, "chosen_messages")
    rating = rows[0].get("label")
    if isinstance(rating, bool) and _ANSWERED & set(columns):
        raise DataError(
            "FG-DATA-034",
            "the rows rate an answer as good or bad in the column 'label' (KTO), which is not "
            "trained here: bad answers would be learnt like good ones",
            allowed="answers that should be learnt",
            fix="keep the rows whose label is true and remove the column",
        )
    if not _ANSWERED & set(columns):
        _refuse_labels(columns)
    for name in _MEDIA:
        if name in columns and any(row.get(name) for row in rows[:_LOOKED_AT]):
            raise DataError(
                "FG-DATA-037",
                f"the rows have the column '{name}', and only text is trained here",
                allowed="rows of text",
                fix=f"remove the column '{name}' and what refers to it in the texts",
            )


def _pairs(columns: Sequence[str], chosen: str) -> DataError:
    prompts = ("prompt", "conversations", "messages", "question", "instruction")
    prompt = next((name for name in prompts if name in columns), None)
    fix = f"--map completion={chosen}" if prompt else f"--map messages={chosen}"
    if prompt not in (None, "prompt"):
        fix = f"--map prompt={prompt} {fix}"
    return DataError(
        "FG-DATA-034",
        f"the columns ({', '.join(columns)}) are preference pairs, and learning from what was "
        "rejected (DPO, ORPO, reward models) is not done here yet",
        allowed="an answer to learn in each row",
        fix=f"{fix} learns the chosen answers",
    )


def _refuse_labels(columns: Sequence[str]) -> None:
    words = next((name for name in _WORDS if name in columns), None)
    text = words or next((name for name in _TEXTS if name in columns), None)
    names = (*_TAGS, *_LABELS, "tags") if words else (*_TAGS, *_LABELS)  # texts have tags, too
    label = next((name for name in names if name in columns), None)
    if text is None or label is None:
        return
    tagged = words is not None or label in _TAGS
    task = "token_classification" if tagged else "classification"
    answers = "" if tagged else f"; as text: --map prompt={text} --map completion={label}"
    raise DataError(
        "FG-DATA-035",
        f"the columns ({', '.join(columns)}) are texts with labels, and the task is causal, which "
        f"would not learn '{label}'",
        allowed="columns of a conversation, or of raw text without labels",
        fix=f"--task {task} learns the labels{answers}",
    )

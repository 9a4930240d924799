"""Texts to labels with probabilities.

What: ``predict`` for any model with a sequence classification head. How: texts are batched by
length, longest first, so that little is padded and the largest batch comes when memory is asked for
first; results come back in the order of the texts. Constraint: the model's training flags are as
they were afterwards. Trade-off: all texts are tokenized before the first answer.

Shapes: b texts, c labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finegraft.core.errors import ConfigError, DataError
from finegraft.data.labels import CLASSES, SEVERAL, VALUES
from finegraft.inference import modes
from finegraft.models import classifier, swap


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text.

    Attributes:
        label: A name; a list of names where several are possible; None for a value.
        probability: Of the label; the least one of several labels, the greatest where none was
            chosen; None for a value.
        probabilities: Of every label, by name.
        value: Of a regression.
    """

    text: str
    label: str | list[str] | None
    probability: float | None
    probabilities: dict[str, float]
    value: float | None = None
    text_pair: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what this kind of problem has."""
        pair = {"text_pair": self.text_pair} if self.text_pair is not None else {}
        if self.value is not None:
            return {"text": self.text, **pair, "value": self.value}
        return {
            "text": self.text,
            **pair,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
        }


def predict(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    batch_size: int = 32,
    threshold: float = 0.5,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Classify texts.

    Args:
        model: Has a sequence classification head; an adapter may be attached.
        tokenizer: Its ``model_max_length`` and ``truncation_side`` say what is cut.
        texts: One or several.
        pairs: The second text of each pair, for a model of pairs.
        batch_size: Texts at a time.
        threshold: Probability from which one of several labels is said.
        on_progress: Called with how many texts are done, and of how many.

    Returns:
        One prediction a text, in their order.

    Raises:
        DataError: FG-CLASS-020, a text that is empty or no text; pairs of another number.
        ConfigError: FG-CLASS-021, a batch size or threshold out of range; FG-CLASS-022, a model
            without a classification head.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    check(texts, pairs, batch_size, threshold)
    core = swap.core(model)
    _require_head(core)
    lengths = classifier.longest(core.config, getattr(tokenizer, "model_max_length", None), None)
    seconds = list(pairs) if pairs is not None else None
    ids = tokenizer(texts, seconds, truncation=lengths is not None, max_length=lengths)
    order = sorted(range(len(texts)), key=lambda i: -len(ids["input_ids"][i]))
    logits: dict[int, torch.Tensor] = {}
    with modes.answering(model), torch.inference_mode():
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            rows = {name: [values[i] for i in places] for name, values in ids.items()}
            batch = tokenizer.pad(rows, return_tensors="pt").to(core.device)
            more = {"use_cache": False} if classifier.takes_cache(core) else {}
            out = model(**batch, **more).logits.float().cpu()  # [b, c]
            logits |= dict(zip(places, out, strict=True))
            if on_progress is not None:
                on_progress(min(first + batch_size, len(order)), len(order))
    said = [(text, seconds[i] if seconds else None) for i, text in enumerate(texts)]
    return [_prediction(core.config, *said[i], logits[i], threshold) for i in range(len(texts))]


def check(
    texts: Sequence[Any], pairs: Sequence[Any] | None, batch_size: int, threshold: float
) -> None:
    """Prove that texts, pairs and settings can be used.

    Raises:
        DataError: FG-CLASS-020; ConfigError: FG-CLASS-021.
    """
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                "FG-CLASS-020",
                f"text {number} is {text!r}",
                allowed="texts that are not empty",
                fix="leave it out",
            )
    if pairs is not None and (isinstance(pairs, str) or len(pairs) != len(texts)):
        raise DataError(
            "FG-CLASS-020",
            f"{len(texts)} texts and {1 if isinstance(pairs, str) else len(pairs)} pairs",
            allowed="as many pairs as texts",
            fix="pass a second text for each",
        )
    if batch_size < 1 or not 0 < threshold < 1:
        raise ConfigError(
            "FG-CLASS-021",
            f"batch_size is {batch_size}, threshold {threshold}",
            allowed="a batch size of at least 1, a threshold between 0 and 1",
            fix="batch_size=32, threshold=0.5",
        )


def _require_head(core: Any) -> None:
    if not type(core).__name__.endswith("ForSequenceClassification"):
        raise ConfigError(
            "FG-CLASS-022",
            f"{swap.stock_class(core).__name__} has no head that classifies texts",
            allowed="a model from FastClassifier.from_pretrained",
            fix="to generate text: finegraft generate MODEL PROMPT; in Python: model.generate",
        )


def _prediction(
    config: Any, text: str, pair: str | None, logits: torch.Tensor, threshold: float
) -> Prediction:
    """Turn one row of logits, [c], into names and probabilities."""
    kind = config.problem_type or (VALUES if config.num_labels == 1 else CLASSES)
    if kind == VALUES:
        return Prediction(text, None, None, {}, float(logits[0]), pair)
    names = classifier.names_of(config)
    chances = logits.sigmoid() if kind == SEVERAL else logits.softmax(-1)
    table = {name: float(chances[i]) for i, name in enumerate(names)}
    if kind == CLASSES:
        best = names[int(chances.argmax())]
        return Prediction(text, best, table[best], table, None, pair)
    chosen = [name for name in names if table[name] >= threshold]
    least = min((table[name] for name in chosen), default=max(table.values()))
    return Prediction(text, chosen, least, table, None, pair)

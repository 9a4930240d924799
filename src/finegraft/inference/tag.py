"""Texts to the spans in them, with types and probabilities.

What: ``predict`` for any model with a token classification head. How: words are cut as in training,
``data.tags.words``, and a word's tag is read at its first token; batches hold windows of like
length. A text longer than the model is read in windows that overlap by a quarter, each word taken
from the window that shows most around it. Constraint: the model's training flags are as they were
afterwards. Trade-off: a probability is that of the span's least sure word, not of the whole span.

Shapes: b windows, t tokens, c tags.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finegraft.core.errors import ConfigError
from finegraft.data import tags
from finegraft.inference import classify, modes
from finegraft.models import classifier, swap


@dataclass(frozen=True)
class Entity:
    """Characters ``start`` to ``end`` (not included), of the type ``label``."""

    start: int
    end: int
    text: str
    label: str
    probability: float


@dataclass(frozen=True)
class Tagging:
    """A text and what was found in it, in the order of the text."""

    text: str
    entities: list[Entity]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.text, "entities": [vars(entity) for entity in self.entities]}


@dataclass(frozen=True)
class _Read:
    """A word in the window where it was read, with the probabilities of its tags, [c]."""

    context: float
    end: int
    chances: torch.Tensor


def takes(core: Any) -> bool:
    """Whether a model, without its adapter, tags words."""
    return type(core).__name__.endswith("ForTokenClassification")


def predict(
    model: Any,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    batch_size: int = 32,
    threshold: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Tagging]:
    """Find spans.

    Args:
        model: Has a token classification head; an adapter may be attached.
        tokenizer: Its ``model_max_length`` is the length of a window.
        texts: One or several.
        batch_size: Windows at a time.
        threshold: Spans of less probability are left out; None: none are.
        on_progress: Called with how many texts are done, and of how many.

    Returns:
        One tagging a text, in their order.

    Raises:
        DataError: FG-CLASS-020, a text that is empty or no text.
        ConfigError: FG-CLASS-021, a batch size or threshold out of range; FG-CLASS-040, a
            tokenizer without offsets; FG-CLASS-042, a model without such a head.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    classify.check(texts, None, batch_size, 0.5 if threshold is None else threshold)
    core = swap.core(model)
    if not takes(core):
        raise ConfigError(
            "FG-CLASS-042",
            f"{swap.stock_class(core).__name__} has no head that tags words",
            allowed="a model of `finegraft train --task token_classification`, or one that "
            'FastClassifier.from_pretrained(..., task="token-classification") gives',
            fix="FastClassifier.predict labels whole texts",
        )
    tags.require_offsets(tokenizer)
    read: list[dict[int, _Read]] = [{} for _ in texts]
    windows = _windows(core, tokenizer, texts)
    left = Counter(windows["overflow_to_sample_mapping"])
    order = sorted(range(len(windows["input_ids"])), key=lambda i: -len(windows["input_ids"][i]))
    done = 0
    with modes.answering(model), torch.inference_mode():
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            chances = _chances(model, core, tokenizer, windows, places)
            for place, each in zip(places, chances, strict=True):
                number = windows["overflow_to_sample_mapping"][place]
                _keep(read[number], texts[number], windows["offset_mapping"][place], each)
                left[number] -= 1
                done += not left[number]
            if on_progress is not None:
                on_progress(done, len(texts))
    names, least = classifier.names_of(core.config), threshold or 0.0
    found = [_entities(text, words, names) for text, words in zip(texts, read, strict=True)]
    return [
        Tagging(text, [entity for entity in entities if entity.probability >= least])
        for text, entities in zip(texts, found, strict=True)
    ]


def _windows(core: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Ids of every window, its text's number and its tokens' characters."""
    length = classifier.longest(core.config, getattr(tokenizer, "model_max_length", None), None)
    cut: dict[str, Any] = {}
    if length is not None:
        cut = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
        cut["stride"] = (length - tokenizer.num_special_tokens_to_add()) // 4
    made = dict(tokenizer(list(texts), return_offsets_mapping=True, **cut))
    return {"overflow_to_sample_mapping": list(range(len(texts))), **made}


def _chances(
    model: Any, core: Any, tokenizer: Any, windows: dict[str, Any], places: list[int]
) -> torch.Tensor:
    """Probabilities of the tags of a batch, [b, t, c]."""
    names = [name for name in windows if name in tokenizer.model_input_names]
    rows = {name: [windows[name][i] for i in places] for name in names}
    batch = tokenizer.pad(rows, return_tensors="pt").to(core.device)
    more = {"use_cache": False} if classifier.takes_cache(core) else {}
    logits = model(**batch, **more).logits
    logits = logits[:, logits.shape[1] - batch["input_ids"].shape[1] :]  # without trained prompts
    return logits.float().softmax(-1).cpu()


def _keep(
    read: dict[int, _Read], text: str, offsets: Sequence[tuple[int, int]], chances: torch.Tensor
) -> None:
    """Add the words of a window, each where no other window shows more around it.

    Args:
        read: By the word's first character.
    """
    real = [i for i, (start, end) in enumerate(offsets) if end > start]
    if not real:
        return
    first, last = real[0], real[-1]
    from_start = not text[: offsets[first][0]].strip()
    to_end = not text[offsets[last][1] :].strip()
    for word in tags.words(text, offsets):
        before = math.inf if from_start else word.token - first
        after = math.inf if to_end else last - word.token
        context = min(before, after)
        if word.start not in read or context > read[word.start].context:
            read[word.start] = _Read(context, word.end, chances[word.token])


def _entities(text: str, read: dict[int, _Read], names: Sequence[str]) -> list[Entity]:
    starts = sorted(read)
    said = [names[int(read[start].chances.argmax())] for start in starts]
    out = []
    for a, b, kind in tags.chunks(said):
        of_kind = [i for i, name in enumerate(names) if tags.type_of(name) == kind]
        sure = min(float(read[start].chances[of_kind].sum()) for start in starts[a:b])
        start, end = starts[a], read[starts[b - 1]].end
        out.append(Entity(start, end, text[start:end], kind, sure))
    return out

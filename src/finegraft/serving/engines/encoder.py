"""Vectors of texts from an encoder.

What: mean-pooled hidden states of length 1, as sentence encoders are used. How: transformers'
``AutoModel``; texts are batched by length. Constraint: padding never counts. Trade-off: pooling by
the first token is used where the folder's ``1_Pooling/config.json`` says so, nothing else of it.

Shapes: b texts, t tokens, d hidden.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finegraft.core.errors import DataError
from finegraft.serving.engines._contract import (
    EMBEDDINGS,
    Ask,
    Embedded,
    EngineKind,
    Piece,
    Served,
    Settings,
)
from finegraft.serving.engines.inprocess import base_id

_BATCH = 16


class Encoder:
    """See the module."""

    features = frozenset({EMBEDDINGS})

    def __init__(self, settings: Settings):
        self.settings = settings
        self.served: tuple[Served, ...] = (Served(settings.name or base_id(settings.model)),)
        self.slots = settings.slots
        self._thread = ThreadPoolExecutor(1, "finegraft-serving")  # one, as in ``inprocess``
        self._model: Any = None
        self._tokenizer: Any = None
        self._first_token = False

    async def start(self) -> None:
        """Load model and tokenizer."""
        await asyncio.wrap_future(self._thread.submit(self._load))

    def _load(self) -> None:
        import torch
        from transformers import AutoModel

        from finegraft import opening
        from finegraft.models.locate import locate

        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        located = locate(self.settings.model)
        self._tokenizer = opening.open_text_tokenizer(located)
        self._model = AutoModel.from_pretrained(located.path, weights_only=True).eval()
        pooling = located.path / "1_Pooling" / "config.json"
        if pooling.is_file():
            values = json.loads(pooling.read_text(encoding="utf-8"))
            self._first_token = bool(values.get("pooling_mode_cls_token"))
        self.longest = int(self._tokenizer.model_max_length)
        self.vocabulary = self._model.get_input_embeddings().weight.shape[0]

    async def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Not this engine's business; ``features`` says so."""
        raise NotImplementedError
        yield

    async def embed(self, model: str, texts: list[str | list[int]]) -> Embedded:
        """Vectors in the order of ``texts``.

        Raises:
            DataError: FG-SERVE-020 a text that is too long, FG-SERVE-022 an empty one.
        """
        return await asyncio.wrap_future(self._thread.submit(self._embed, texts))

    def _embed(self, texts: list[str | list[int]]) -> Embedded:
        rows = [self._ids(number, text) for number, text in enumerate(texts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        vectors: list[list[float]] = [[]] * len(rows)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            for i, vector in zip(batch, self._vectors([rows[i] for i in batch]), strict=True):
                vectors[i] = vector
        return Embedded(vectors, sum(map(len, rows)))

    def _ids(self, number: int, text: str | list[int]) -> list[int]:
        if isinstance(text, list):
            ids = text
            if not all(0 <= token < self.vocabulary for token in ids):
                ids = []
        else:
            too_long = len(text) > self.longest * 100  # no word piece has 100 characters
            ids = [0] * (self.longest + 1) if too_long else self._tokenizer(text)["input_ids"]
        if not ids or not text:
            raise DataError(
                "FG-SERVE-022",
                f"input {number} is empty or not made of tokens",
                fix="leave it out, or send a text that is not empty",
            )
        if len(ids) > self.longest:
            raise DataError(
                "FG-SERVE-020",
                f"input {number} has more tokens than the model reads",
                allowed=f"{self.longest} tokens",
                fix="split the text",
            )
        return list(ids)

    def _vectors(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # [b, t, d]
        if self._first_token:
            pooled = hidden[:, 0]
        else:
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(pooled.float(), dim=-1).tolist()


def _unfit(settings: Settings) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from finegraft.models.load import load_config
    from finegraft.models.locate import locate

    if settings.adapters:
        return "it takes no adapters"
    located = locate(settings.model)
    if located.kind == "adapter":
        return "it is an adapter"
    config = load_config(located.path)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or decodes:
        return f"model_type '{config.model_type}' is no encoder"
    return None


ENGINE = EngineKind(summary="vectors of texts from an encoder", unfit=_unfit, make=Encoder)

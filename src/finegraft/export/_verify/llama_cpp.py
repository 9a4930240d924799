"""A GGUF file as llama.cpp reads it, through the xllamacpp package.

What: a ``Reader`` over llama.cpp's own server, on a free port of this machine. How: its template
and tokenizer are asked as its chat endpoint would ask them; probabilities come from completions of
one token, whose prompt is kept between them. Constraint: the numbers are llama.cpp's before any
sampling: a bias brings the wanted token forward and its probability is told as it was. Trade-off:
one request a token, and beside the wanted token only the likeliest are known.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finegraft.core.errors import ExportError
from finegraft.export._verify.prompts import LONGEST, TOKENS, Row

_LIKELIEST = 64
_BIAS = 1000.0


def missing() -> str | None:
    """What is to be installed before GGUF files can be run; None where it is."""
    if importlib.util.find_spec("xllamacpp"):
        return None
    return "pip install 'finegraft[serve]'"


class GgufReader:
    """llama.cpp with one file in it.

    Args:
        file: The GGUF file.
        size: Rows of the vocabulary.
        adapter: A GGUF adapter to put beside it.

    Raises:
        ExportError: FG-EXPORT-041 xllamacpp is not installed, FG-EXPORT-042 llama.cpp does not
            load the file.
    """

    def __init__(self, file: Path, size: int, adapter: Path | None = None):
        if missing():
            raise ExportError(
                "FG-EXPORT-041",
                f"{file.name} cannot be verified, because xllamacpp is not installed",
                allowed="llama.cpp itself, which xllamacpp brings",
                fix=str(missing()),
            )
        library: Any = importlib.import_module("xllamacpp")
        settings = library.CommonParams()
        settings.model.path = str(file)
        if adapter is not None:
            settings.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
        settings.n_ctx = LONGEST + 2 * TOKENS
        settings.n_parallel = 1
        settings.port = 0
        settings.warmup = False
        settings.verbosity = -1
        settings.cpuparams.n_threads = torch.get_num_threads()
        try:
            self.server = library.Server(settings)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                "FG-EXPORT-042",
                f"llama.cpp does not load {adapter or file}: {error}",
                fix="export it again; if that does not help, the file is a bug worth reporting",
            ) from error
        self.size = size

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as answer:
            return json.loads(answer.read())

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """See ``Reader``."""
        try:
            text = self._ask("/apply-template", {"messages": row.asked})["prompt"]
        except urllib.error.HTTPError as error:
            return f"(llama.cpp refuses the conversation: {error.read().decode()[:200]})", []
        return text, self.text(text)

    def text(self, text: str) -> list[int]:
        """See ``Reader``."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        return list(self._ask("/tokenize", asked)["tokens"])

    def score(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See ``Reader``."""
        return [self._score(row) for row in rows]

    def _score(self, row: Row) -> torch.Tensor:
        found = torch.full((len(row.scored), self.size), torch.nan)
        for line, place in enumerate(row.scored):
            before, wanted = list(row.ids[:place]), row.ids[place]
            # an end of turn is not told when it is what comes: something else must come
            told = self._next(before, wanted, _LIKELIEST) or self._next(
                before, self.text("a")[-1], self.size
            )
            for entry in told:
                if entry["id"] < self.size and entry["logprob"] is not None:
                    found[line, entry["id"]] = entry["logprob"]
        return found

    def _next(self, before: list[int], forced: int, count: int) -> list[dict[str, Any]]:
        """The likeliest tokens after ``before``, and ``forced``, which is brought forward."""
        asked = {
            "prompt": before,
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0,
            "cache_prompt": True,
            "logit_bias": [[forced, _BIAS]],
        }
        told = self._ask("/completion", asked).get("completion_probabilities")
        return [*told[0]["top_logprobs"], told[0]] if told else []

    def close(self) -> None:
        """See ``Reader``."""
        self.server = None

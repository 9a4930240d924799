"""llama.cpp for the tests, through xllamacpp's server: token ids and log-probabilities."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch

KEEP_FLOATS = 0  # ggml's number for float32


class LlamaCpp:
    """One loaded file. The cache holds float32, so that only the weights' rounding is seen."""

    def __init__(self, file: Path, *, adapter: Path | None = None, **settings: Any):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.port = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.ui, params.verbosity = False, False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type(KEEP_FLOATS)
        for key, value in settings.items():
            setattr(params, key, value)
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        return self.post("/tokenize", content=text, add_special=special, parse_special=True)[
            "tokens"
        ]

    def next_logprobs(self, ids: list[int], vocabulary: int) -> torch.Tensor:
        """Log-probabilities of every token after ``ids``, [vocabulary]."""
        # a token is forced, since an end token would give an answer without probabilities
        out = self.post(
            "/completion", prompt=ids, n_predict=1, n_probs=vocabulary, logit_bias=[[10, 1e6]]
        )
        found = torch.full((vocabulary,), -torch.inf)
        for token in out["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def logprob_of(self, ids: list[int], target: int) -> float:
        """Log-probability of ``target`` after ``ids``: reported before the bias that forces it."""
        out = self.post(
            "/completion", prompt=ids, n_predict=1, n_probs=1, logit_bias=[[target, 1e6]],
            cache_prompt=True,
        )  # fmt: skip
        token = out["completion_probabilities"][0]
        assert token["id"] == target
        return float(token["logprob"])

    def embedding(self, text: str) -> torch.Tensor:
        out = self.post("/embedding", content=text)
        return torch.tensor(out[0]["embedding"][0])

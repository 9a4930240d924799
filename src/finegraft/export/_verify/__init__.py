"""Reload an export with the library that will run it, and compare it with what was trained.

What: ``verify`` makes the checks and names the cause of a failure. How: the same conversations go
to the trained model in memory and to the export; texts and ids are compared first, then
probabilities, then perplexity. Constraint: the export is read from its own files alone. Trade-off:
the trained model and the export are in memory at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finegraft import opening
from finegraft.core.errors import ExportError, ModelError
from finegraft.export._contract import Check
from finegraft.export._origin import ENCODER, Origin, open_origin
from finegraft.export._verify import (
    causes,
    contents,
    gguf_files,
    llama_cpp,
    measure,
    prompts,
    readers,
    report,
)
from finegraft.export._verify.prompts import Row
from finegraft.export._verify.readers import Expected, FolderReader, Reader
from finegraft.export._verify.report import TOLERANCES, Report, mark
from finegraft.models import classifier, swap, tokens

__all__ = ["TOLERANCES", "Report", "absolute", "artefacts", "mark", "verify", "verify_all"]

logger = logging.getLogger(__name__)


def artefacts(path: str | Path) -> dict[Path, str]:
    """Exports in ``path`` by their format: a folder, a GGUF file, or a folder of several.

    Raises:
        ExportError: FG-EXPORT-044, there is none.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return {path: "gguf"}
    if (path / "adapter_config.json").is_file():
        return {path: "lora"}
    if (path / "config.json").is_file():
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return {path: "merged_4bit" if values.get("quantization_config") else "merged_16bit"}
    found: dict[Path, str] = {}
    if path.is_dir():
        found = dict.fromkeys(gguf_files.listed(path), "gguf")
        for inner in sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != "."):
            if any((inner / name).is_file() for name in ("config.json", "adapter_config.json")):
                found |= artefacts(inner)
            elif any(inner.glob("*.gguf")):
                found |= dict.fromkeys(gguf_files.listed(inner), "gguf")
    if not found:
        raise ExportError(
            "FG-EXPORT-044",
            f"there is no export in {path}",
            allowed="a model folder, an adapter folder, a .gguf file, or a folder with several",
            fix="finegraft export RUN --to gguf:q8_0 --output DIR makes one",
        )
    return found


def verify_all(path: str | Path, against: Any = None, *, mark: bool = True) -> list[Report]:
    """Verify every export in ``path``; see ``verify``."""
    return [verify(one, against, mark=mark) for one in artefacts(path)]


def verify(path: str | Path, against: Any = None, *, mark: bool = True) -> Report:
    """Compare one export with what it was made of.

    Args:
        path: A model folder, an adapter folder or a GGUF file.
        against: A run, adapter or model, or (model, tokenizer); None: what the export's
            ``verification.json`` names.
        mark: Write the result into that file.

    Raises:
        ExportError: FG-EXPORT-040 nothing to compare with, FG-EXPORT-041 xllamacpp is missing,
            FG-EXPORT-042 and FG-EXPORT-043 a GGUF file that cannot be read, FG-EXPORT-044 no
            export there.
        ModelError: what it is to be compared with cannot be opened.
    """
    path = Path(path)
    kind = next(iter(artefacts(path).values()))
    source = against if against is not None else report.noted_source(path)
    if source is None:
        raise ExportError(
            "FG-EXPORT-040",
            f"{path} does not say what it was made of",
            allowed="the run or model that was exported",
            fix=f"finegraft verify {path} --against RUN",
        )
    origin = open_origin(source)
    found = _Verification(path, kind, origin).run()
    if mark:
        folder = path if path.is_dir() else path.parent
        listed = report.read(folder / report.FILE).get("contents", {})
        report.mark(found)
        contents.refresh(folder, path, listed)
    return found


class _Verification:
    """One export beside one origin."""

    def __init__(self, path: Path, kind: str, origin: Origin):
        self.path, self.origin = path, origin
        self.gguf = gguf_files.read(path) if kind == "gguf" else None
        self.beside = self.gguf is not None and not self.gguf.is_model
        if self.gguf:
            kind = f"{'gguf_lora' if self.beside else 'gguf'}:{self.gguf.type}"
        self.format = kind
        self.known = {"format": self.format, "against": absolute(origin.name)}

    @functools.cached_property
    def model(self) -> Any:
        """The trained model."""
        return self.origin.exact

    @functools.cached_property
    def new_tokens(self) -> list[str]:
        """Tokens that training added."""
        ids = tokens.new_rows(swap.core(self.model))
        found = self.origin.tokenizer.convert_ids_to_tokens(ids)
        return [name for name in found if name is not None]

    def run(self) -> Report:
        """Make every check that can be made."""
        task = self.origin.task
        if self.gguf is not None and task != classifier.CAUSAL:
            checks, _ = gguf_files.checks(self.origin, self.path, self.gguf)
            cause = next((c.cause for c in checks if c.cause), None)
            where = "the file alone, llama.cpp was not asked"
            return Report(self.path, rows=where, checks=tuple(checks), cause=cause, **self.known)
        if task == ENCODER:
            return Report(
                self.path, missing="a model without a head has no answers to compare", **self.known
            )
        if task == classifier.CAUSAL:
            rows, where = prompts.rows_for(self.origin, self.new_tokens)
        else:
            rows, where = prompts.texts_for(self.origin)
        with contextlib.ExitStack() as stack:
            try:
                reader = self._reader(stack)
            except ModelError as error:  # what it lacks, transformers would make up
                cause = causes.HEAD_LOST if "lm_head" in error.found else error.found
                return Report(
                    self.path, rows=where, checks=(_failed("opens"),), cause=cause, **self.known
                )
            stack.callback(reader.close)
            checks, cause, worst = self._compared(reader, rows)
        return Report(
            self.path, rows=where, checks=tuple(checks), cause=cause, worst=worst, **self.known
        )

    def _compared(self, reader: Reader, rows: Sequence[Row]) -> tuple[list[Check], str | None, str]:
        """Every check, what is wrong, and the worst prompt."""
        texts, cause = self._texts(reader, rows)
        facts, reason = self._facts(reader)
        trained = measure.score_trained(self.model, rows)
        found = reader.score(rows)
        numbers, worst = measure.measure(rows, trained, found, self._allowed())
        checks = [*texts, *facts, *numbers]
        if all(check.ok for check in checks):
            return checks, None, worst
        cause = cause or reason
        if cause is None and not all(check.ok for check in numbers):
            cause = causes.of_numbers(
                self.model, rows, trained, found, merged=not (self.beside or self.format == "lora")
            )
        if cause in (None, causes.UNKNOWN):
            cause = next((check.cause for check in checks if check.cause), causes.UNKNOWN)
        return checks, cause, worst

    def _allowed(self) -> report.Tolerance:
        quantized = getattr(swap.core(self.model), "is_quantized", False)
        known = f"gguf:{self.base.type}" if self.beside else self.format
        allowed = TOLERANCES.get(known, TOLERANCES["merged_4bit"])
        if quantized and allowed.log_probs < TOLERANCES["merged_4bit"].log_probs:
            return TOLERANCES["merged_4bit"]  # merged into the weights before they were quantized
        return allowed

    def _reader(self, stack: contextlib.ExitStack) -> Reader:
        core = swap.core(self.model)
        if self.beside:
            file = stack.enter_context(gguf_files.base(self.path, self.origin))
            self.base_file, self.base = file, gguf_files.read(file)
            return llama_cpp.GgufReader(file, self.base.rows, self.path)
        if self.gguf is not None:
            return llama_cpp.GgufReader(self.path, self.gguf.rows)
        dtype = core.dtype if core.dtype.is_floating_point else torch.float32
        base = None
        if self.format == "lora":
            base = opening.base_of(open_origin(self.path).located).path
        return FolderReader(self.path, self.origin.task, dtype, base)

    def _texts(self, reader: Reader, rows: Sequence[Row]) -> tuple[list[Check], str | None]:
        """Checks of texts and ids, and what is wrong with them."""
        tokenizer = self.origin.tokenizer
        expected = Expected(tokenizer)
        plain = [*readers.PLAIN_TEXTS, *self.new_tokens]
        pairs = [(("", expected.text(t)), ("", reader.text(t))) for t in plain]
        checks = []
        if tokenizer.chat_template and self.origin.task == classifier.CAUSAL:
            chats = [r for r in rows if r.messages and r.messages[0].get("role") != "text"]
            talks = [(expected.prompt(row), reader.prompt(row)) for row in chats]
            wrong = sum(not causes.same_text(tokenizer, e[0], f[0]) for e, f in talks)
            checks.append(Check("template", wrong, 0, wrong == 0))
            pairs = [*talks, *pairs]
        wrong = sum(e[1] != f[1] for e, f in pairs)
        checks.append(Check("token_ids", wrong, 0, wrong == 0))
        if all(check.ok for check in checks):
            return checks, None
        return checks, causes.of_ids(tokenizer, reader, self.new_tokens, pairs)

    def _facts(self, reader: Any) -> tuple[list[Check], str | None]:
        """Checks of settings, for GGUF also of every tensor, and what is wrong with them."""
        rows, lost = self._new_rows(reader)
        if self.format == "lora":
            return rows, lost
        if self.beside:
            return gguf_files.adapter_checks(self.origin, self.path, self.base_file)
        own = causes.own_head(self.model)
        if self.gguf is not None:
            facts = causes.Facts(own_head=self._own_head_in_file(own))
            checks, rope = gguf_files.checks(self.origin, self.path, self.gguf)
            ids = tokens.new_rows(swap.core(self.model))
            if ids:
                row = gguf_files.new_rows(self.model, self.path, ids)
                checks, lost = [*checks, row], None if row.ok else causes.NEW_ROWS
            cause = rope or lost or causes.of_settings(self.model, facts, own)
            return checks, cause
        there = swap.core(reader.model)
        facts = causes.Facts(causes.rope_of(there.config), causes.own_head(there))
        cause = causes.of_settings(self.model, facts, own)
        return [*rows, Check("settings", int(cause is not None), 0, cause is None)], cause or lost

    def _own_head_in_file(self, wanted: bool | None) -> bool | None:
        """Whether the file has a head apart; a copy of a tied head is none."""
        if wanted and self.gguf is not None:
            return gguf_files.HEAD in self.gguf.tensors
        return gguf_files.own_head(self.path)

    def _new_rows(self, reader: Any) -> tuple[list[Check], str | None]:
        """A check of the embedding's rows of new tokens, where the export's can be read."""
        ids, other = tokens.new_rows(swap.core(self.model)), getattr(reader, "model", None)
        if not ids or other is None:
            return [], None
        off = causes.off_rows(self.model, other, ids)
        ok = off <= causes.ROWS_OFF
        return [Check("new_tokens", off, causes.ROWS_OFF, ok)], None if ok else causes.NEW_ROWS


def _failed(name: str) -> Check:
    return Check(name, float("inf"), 0, False)


def absolute(name: str) -> str:
    """A path that means the same from any folder; other names as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name

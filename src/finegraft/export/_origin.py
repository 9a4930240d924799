"""What an export is made of and compared with: a run, an adapter, a model, or one in memory.

What: ``Origin`` finds configuration, tokenizer and model when they are first asked for, and the
facts that a model card tells. How: names go through ``models.locate``; a run folder also gives
``config.yaml``, ``data.json`` and its measures. Constraint: opening an origin loads no weights.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finegraft import opening
from finegraft.core.errors import ExportError
from finegraft.core.schema import TrainConfig, from_file
from finegraft.models import classifier, swap, weights
from finegraft.models.locate import Located, locate

ENCODER = "encoder"
SMALL_BYTES = 4_000_000_000  # weights of a model that is compared in float32


@dataclass(frozen=True, eq=False)
class Origin:
    """A trained model.

    Attributes:
        name: What the user called it.
        located: Where it lies; None for a model in memory.
        in_memory: The model, where it was given.
        given_tokenizer: The tokenizer, where it was given.
    """

    name: str
    located: Any = None
    in_memory: Any = None
    given_tokenizer: Any = None

    @functools.cached_property
    def task(self) -> str:
        """``causal``, ``sequence-classification``, or ``encoder`` for a model without a head."""
        if self.in_memory is not None:
            kind = swap.stock_class(swap.core(self.in_memory)).__name__
            return classifier.SEQUENCE if "SequenceClassification" in kind else classifier.CAUSAL
        if self.located.kind == "adapter":
            return classifier.kind_of(self.located) or classifier.CAUSAL
        return classifier.kind_of(self.located) or ENCODER

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter beside the weights."""
        if self.in_memory is not None:
            return hasattr(self.in_memory, "peft_config")
        return bool(self.located.kind == "adapter")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """As it was trained."""
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self.in_memory is not None:
            return opening.open_tokenizer(locate(self.in_memory.config.name_or_path))
        if self.task == classifier.SEQUENCE:
            return opening.open_text_tokenizer(self.located)
        return opening.open_tokenizer(self.located)

    def model(self) -> Any:
        """The trained model, its adapter beside its base; loaded once."""
        return self.in_memory if self.in_memory is not None else self._loaded

    @functools.cached_property
    def _loaded(self) -> Any:
        how: dict[str, Any] = {} if self.task == classifier.CAUSAL else {"task": self.task}
        base = opening.base_of(self.located) if self.located.kind == "adapter" else self.located
        if sum(p.stat().st_size for p in weights.files(base.path)) < SMALL_BYTES:
            how["dtype"] = "float32"
        opened = opening.open_model(self.name, tokenizer=self.tokenizer, **how)
        return opened.model.eval()

    @functools.cached_property
    def exact(self) -> Any:
        """The model to compare with, in float32 where that is small, with stock classes.

        16-bit arithmetic alone moves log-probabilities by 0.1 nats, as much as a wrong scale may.
        """
        model = self.model()
        core = swap.core(model)
        size = sum(p.numel() * p.element_size() for p in core.parameters())
        plain = not getattr(core, "is_quantized", False) and size < SMALL_BYTES
        if self.in_memory is None or not plain or core.dtype == torch.float32:
            return model
        model = copy.deepcopy(model)
        swap.undo(model)
        return model.float().eval()

    @functools.cached_property
    def run(self) -> Path | None:
        """The run folder, where there is one."""
        if self.located is None:
            return None
        for folder in (self.located.path.parent, self.located.path):
            if (folder / "config.yaml").is_file() and (folder / "data.json").is_file():
                return folder
        return None

    @functools.cached_property
    def settings(self) -> TrainConfig | None:
        """The configuration of the run."""
        return from_file(self.run / "config.yaml") if self.run else None

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """What the run noted of its rows; empty without a run."""
        return _read(self.run / "data.json") if self.run else {}

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """What the run measured at its end; empty without a run."""
        if not self.run:
            return {}
        found = _read(self.run / "report" / "metrics.json")
        for line in _lines(self.run / "events.jsonl"):
            if line.get("type") == "end":
                found = {"loss": line.get("loss"), "steps": line.get("step"), **found}
            if line.get("type") == "eval":
                found["held_out_loss"] = line.get("loss")
        return {name: value for name, value in found.items() if value is not None}

    @functools.cached_property
    def base(self) -> str:
        """The name of the model that was trained, without the path where it lies here."""
        return Path(self.full_base).name if Path(self.full_base).is_absolute() else self.full_base

    @property
    def called(self) -> str:
        """The name for files: of the run, else of the model or folder."""
        return self.run.name if self.run else Path(self.name).name or "model"

    @functools.cached_property
    def base_origin(self) -> Origin:
        """The base as it was before training, with the tokenizer of what was trained."""
        if self.located is not None and self.located.kind == "adapter":
            found = opening.base_of(self.located)
        else:
            found = locate(self.full_base)
        return Origin(found.name, found, None, self.tokenizer)

    @property
    def full_base(self) -> str:
        """The same with its path, which opens on this machine."""
        if self.located is not None and self.located.kind == "adapter":
            return opening.base_of(self.located).name
        if self.in_memory is not None:
            return str(swap.core(self.in_memory).config.name_or_path)
        return str(self.settings.model) if self.settings else self.name


def open_origin(source: Any) -> Origin:
    """Return what ``source`` is.

    Args:
        source: A run, adapter or model folder, anything else that ``models.locate`` takes, or a
            pair (model, tokenizer).

    Raises:
        ModelError: codes of ``models.locate``.
        ExportError: FG-EXPORT-031, something else.
    """
    if isinstance(source, Origin):
        return source
    if isinstance(source, str | Path):
        located: Located = locate(source)
        return Origin(str(source), located)
    if isinstance(source, tuple | list) and len(source) == 2 and hasattr(source[0], "parameters"):
        model, tokenizer = source
        name = Path(str(swap.core(model).config.name_or_path or "")).name
        return Origin(name or "model", None, model, tokenizer)
    raise ExportError(
        "FG-EXPORT-031",
        f"a {type(source).__name__} cannot be exported",
        allowed="a run, adapter or model folder, a hub name, or a pair (model, tokenizer)",
        fix="pass the folder of the run",
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]

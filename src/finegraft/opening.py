"""Open a model or an adapter folder, and save an adapter that knows its base.

What: ``open_model`` turns any name that ``models.locate`` takes into a model with tokenizer,
adapter attached; ``save_adapter`` writes a plain peft folder plus tokenizer, template and
``finegraft.json`` with a sample of the base's embedding. Constraint: an adapter never meets a base
it was not trained on without an error. Trade-off: 64 numbers more in the folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn

from finegraft import adapters
from finegraft.adapters import _plugin, _tokens, _virtual
from finegraft.core.errors import AdapterError, ModelError
from finegraft.core.paths import cache_dir
from finegraft.models import causal_loss, classifier, load, packaged, swap, tokens
from finegraft.models.locate import Located, locate
from finegraft.models.tokenizer import agree
from finegraft.models.tokenizer import prepare as prepare_tokenizer

NOTE = "finegraft.json"
WEIGHTS = "adapter_model.safetensors"
# bfloat16 keeps 8 bits: two copies of one weight in two precisions differ by less than this.
_SAME = 2.0**-7


@dataclass(frozen=True)
class Opened:
    """A model in memory with its tokenizer and where it came from."""

    model: Any
    tokenizer: Any
    located: Located


def open_tokenizer(
    located: Located, *, max_seq_length: int | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer that belongs to a located model, the adapter's own before the base's."""
    path = located.path
    if located.kind == "adapter" and not (path / "tokenizer_config.json").is_file():
        path = base_of(located).path
    config_path = base_of(located).path if located.kind == "adapter" else path
    config = load.load_config(config_path, trust_remote_code=trust_remote_code)
    tokenizer = load.load_tokenizer(path, trust_remote_code=trust_remote_code)
    return prepare_tokenizer(tokenizer, config, max_seq_length)


def open_text_tokenizer(
    located: Located,
    *,
    max_seq_length: int | None = None,
    truncation_side: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A classifier's tokenizer, which cuts texts at the length that the model knows.

    Args:
        max_seq_length: In tokens, where that is less.
        truncation_side: The end that is cut, ``left`` or ``right``; None: as it was saved.
    """
    tokenizer = open_tokenizer(located, trust_remote_code=trust_remote_code)
    base = base_of(located) if located.kind == "adapter" else located
    config = load.load_config(base.path, trust_remote_code=trust_remote_code)
    longest = classifier.longest(config, tokenizer.model_max_length, max_seq_length)
    tokenizer.model_max_length = longest or tokenizer.model_max_length
    tokenizer.truncation_side = truncation_side or tokenizer.truncation_side
    return tokenizer


def base_of(located: Located, token: str | None = None) -> Located:
    """Locate the base of an adapter, by its saved name where its path is gone.

    Raises:
        AdapterError: FG-ADAPT-005, the adapter does not say what it was made for.
        ModelError: the base is nowhere.
    """
    noted = _note(located.path).get("base")
    name = located.base
    if not name and not noted:
        raise AdapterError(
            "FG-ADAPT-005",
            f"{located.path} does not name its base model",
            allowed="an adapter_config.json with base_model_name_or_path",
            fix="write the base's name or folder into that file",
        )
    if noted and (not name or (Path(name).is_absolute() and not Path(name).exists())):
        name = str(noted)
    return locate(str(name), revision=located.revision, token=token)


def open_model(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    max_seq_length: int | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    **load_settings: Any,
) -> Opened:
    """Load a model, or a base with its adapter attached.

    Args:
        name: Anything that ``models.locate`` takes.
        max_seq_length: In tokens; None keeps the model's own.
        trainable: Whether an adapter found there goes on training.
        tokenizer: One that was opened already.
        load_settings: Further arguments of ``models.load.load_model``.

    Raises:
        ModelError: codes of ``models``, FG-CLASS-014 and FG-CLASS-015 for a model or adapter of
            another task; AdapterError: FG-ADAPT-003 for another base.
    """
    located = locate(name, revision=revision, token=token)
    task = load_settings.get("task", classifier.CAUSAL)
    classifier.require_task(located, task)
    if task != classifier.CAUSAL:
        load_settings = classifier.loading(load_settings, saved_labels(located))
    base = base_of(located, token) if located.kind == "adapter" else located
    tokenizer = tokenizer or open_tokenizer(
        located, max_seq_length=max_seq_length, trust_remote_code=trust_remote_code
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what a checkpoint lacks is the same after every loading
        model: Any = load.load_model(
            base.path,
            max_seq_length=max_seq_length,
            trust_remote_code=trust_remote_code,
            **load_settings,
        )
    agree(model, tokenizer)
    if task == classifier.CAUSAL:
        causal_loss.apply(model)
    if located.kind == "adapter":
        model = attach_saved(model, located.path, trainable=trainable)
    return Opened(model, tokenizer, located)


def attach_saved(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Attach the adapter in ``folder`` to ``model``, which must be the base it was made for.

    Raises:
        AdapterError: FG-ADAPT-003 another base, FG-ADAPT-006 unreadable adapter weights.
    """
    _check_base(model, folder)
    _plugin.register_for(folder)
    config = _tokens.saved_config(folder)
    _tokens.make_room(model, config)
    try:
        virtual = trainable and _virtual.is_virtual(folder)
        wrapped = PeftModel.from_pretrained(
            model, str(folder), is_trainable=trainable and not virtual, config=config
        )
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise AdapterError(
            "FG-ADAPT-006", f"the adapter in {folder} cannot be read: {error}", fix="train it again"
        ) from error
    adapters.accelerate(wrapped)
    if virtual:
        _virtual.go_on(wrapped, folder)
    if config is not None:
        _tokens.finish(wrapped)
    return wrapped


def add_saved(model: Any, name: str, folder: str | Path, *, trainable: bool = False) -> Any:
    """Give a model that carries adapters another one, saved in ``folder``, and switch to it.

    Args:
        name: What the adapter is to be called, see ``adapters.named``.

    Raises:
        AdapterError: FG-ADAPT-003 another base, FG-ADAPT-006 unreadable weights, FG-ADAPT-046 a
            name that is taken, FG-ADAPT-047 an adapter of another kind.
    """
    folder = Path(folder)
    adapters.named.check_new(model, name)
    _check_base(swap.core(model), folder)
    _plugin.register_for(folder)
    adapters.named.check_kind(model, adapters.name_of(PeftConfig.from_pretrained(str(folder))))
    rows = _tokens.join(model, name, folder, trainable)
    try:
        model.load_adapter(str(folder), name, is_trainable=trainable)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise AdapterError(
            "FG-ADAPT-006", f"the adapter in {folder} cannot be read: {error}", fix="train it again"
        ) from error
    if rows:
        _tokens.finish(model)
    return adapters.named.switch(model, name)


def _check_base(model: nn.Module, folder: Path) -> None:
    problem = _shape_problem(model, folder / WEIGHTS) or _sample_problem(model, _note(folder))
    if problem:
        raise _other_base(folder, problem)


def _other_base(folder: Path, problem: str) -> AdapterError:
    made_for = _note(folder).get("base") or "its own base"
    return AdapterError(
        "FG-ADAPT-003",
        f"the adapter in {folder} was made for another base model: {problem}",
        allowed=f"the base it was trained on ({made_for})",
        fix="load the adapter folder by itself, which finds its base, or train a new adapter",
    )


def check_embedding(table: torch.Tensor, folder: Path) -> None:
    """Prove that the adapter in ``folder`` was made for a base with this input embedding.

    Raises:
        AdapterError: FG-ADAPT-003, another base.
    """
    layer = nn.Embedding.from_pretrained(table)
    holder: Any = SimpleNamespace(get_input_embeddings=lambda: layer)
    problem = _sample_problem(holder, _note(folder))
    if problem:
        raise _other_base(folder, problem)


def open_with_peft(folder: Path, base: nn.Module) -> nn.Module:
    """Attach a saved adapter with plain peft, as somebody without finegraft would.

    Raises:
        AdapterError: FG-ADAPT-006, peft cannot read it.
    """
    _plugin.register_for(folder)  # methods that peft lacks, see ``Method.in_peft``
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (RuntimeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise AdapterError(
            "FG-ADAPT-006", f"the adapter in {folder} cannot be read: {error}", fix="train it again"
        ) from error


def _shape_problem(model: nn.Module, weights: Path) -> str | None:
    """Compare the LoRA matrices on the disk with the layers they belong to."""
    if not weights.is_file():
        return None
    modules = dict(model.named_modules())
    try:
        with safe_open(str(weights), "pt") as saved:
            shapes = {key: saved.get_slice(key).get_shape() for key in saved.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "FG-MODEL-005",
            f"{weights} is corrupted: {error}",
            fix="copy or train the adapter again",
        ) from error
    for key, shape in shapes.items():
        for part, axis, attribute in (("A", 1, "in_features"), ("B", 0, "out_features")):
            if f".lora_{part}." not in key:
                continue
            name = key.removeprefix("base_model.model.").split(".lora_")[0]
            width = getattr(modules.get(name), attribute, None)
            if name not in modules:
                return f"this {type(model).__name__} has no layer {name}"
            if width is not None and width != shape[axis]:
                return f"{name} has {attribute} {width}, the adapter {shape[axis]}"
    return None


def sample(model: nn.Module) -> dict[str, list]:
    """Take 64 numbers of the base's input embedding, as its identity."""
    base = swap.core(model)
    table = base.get_input_embeddings()
    table = getattr(table, "original_module", getattr(table, "base_layer", table)).weight
    old = min([table.shape[0], *tokens.new_rows(base)])  # new rows are the adapter's
    rows = torch.linspace(0, old - 1, 16).long()
    columns = torch.linspace(0, table.shape[1] - 1, 4).long()
    values = table.detach()[rows.to(table.device)][:, columns.to(table.device)].float()
    return {"rows": rows.tolist(), "columns": columns.tolist(), "values": values.tolist()}


def _sample_problem(model: nn.Module, note: dict[str, Any]) -> str | None:
    saved = note.get("embedding_sample")
    if not saved:
        return None
    table = model.get_input_embeddings().weight.detach()
    rows, columns = saved["rows"], saved["columns"]
    if max(rows) >= table.shape[0] or max(columns) >= table.shape[1]:
        return f"its embedding is {tuple(table.shape)}"
    here = table[rows][:, columns].float().cpu()
    expected = torch.tensor(saved["values"])
    if not torch.allclose(here, expected, rtol=_SAME, atol=1e-6):
        return "the weights of its embedding are different"
    return None


def write_note(model: nn.Module, folder: Path) -> None:
    """Write ``finegraft.json``: the base's name, a sample of its embedding, names of labels."""
    base = swap.core(model)
    path = Path(base.config.name_or_path)
    name = path.name if path.parent == cache_dir() / "models" else str(path)
    if name not in packaged.names():
        name = str(path)
    note = {"base": name, "embedding_sample": sample(model), **classifier.note(base)}
    (folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")


def saved_labels(located: Located) -> dict[str, Any]:
    """Names of labels and kind of problem that an adapter was saved with; empty for a model."""
    return classifier.from_note(_note(located.path)) if located.kind == "adapter" else {}


def _note(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}

"""What classifiers have and causal models have not: label names, a head, a kind on the disk.

What: names and ids of labels from any of the ways people give them, what a located folder holds,
how long a text may be, and which parts of a loaded model are new. Constraint: nothing here loads a
weight. Trade-off: what a folder holds is read off the names in its configuration, so a model saved
under a class name of somebody's own counts as one without a head.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finegraft.core.errors import ConfigError, ModelError, did_you_mean
from finegraft.core.hardware import facts
from finegraft.data.labels import PROBLEMS
from finegraft.models import quantize
from finegraft.models.load import resolve_dtype
from finegraft.models.locate import ADAPTER_CONFIG, Located

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SEQUENCE = "sequence-classification"
TOKEN = "token-classification"
CAUSAL = "causal"

_ADAPTERS = {"SEQ_CLS": SEQUENCE, "TOKEN_CLS": TOKEN, "CAUSAL_LM": CAUSAL}
_ARCHITECTURES = {
    "ForSequenceClassification": SEQUENCE,
    "ForTokenClassification": TOKEN,
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
}
# Positions of these are counted from after the padding id.
_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
# What peft saves with an adapter by itself, and the last layers that must not be quantized.
_HEADS = ("classifier", "score")
# Ends of module paths or expressions for their beginning, which is how transformers reads them.
DENSE = ("classifier", "score", "pre_classifier", r".*pooler", "lm_head", "embed_out")
_UNBOUNDED = 1_000_000


def label_settings(
    num_labels: int | None = None,
    id2label: Mapping[Any, str] | Sequence[str] | None = None,
    label2id: Mapping[str, int] | None = None,
    problem_type: str | None = None,
) -> dict[str, Any]:
    """Return what transformers' configuration is given, made whole from any part of it.

    Args:
        num_labels: Outputs of the head.
        id2label: Names by id, or in the order of the ids.
        label2id: Ids by name.
        problem_type: As in transformers.

    Returns:
        ``id2label``, ``label2id`` and ``problem_type`` as far as they are known; empty when
        nothing was given.

    Raises:
        ConfigError: FG-CLASS-013, names, ids and number that contradict one another.
    """
    by_id: dict[int, str] = {}
    if id2label is not None:
        pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
        by_id = {int(i): str(name) for i, name in pairs}
    turned = {int(i): str(name) for name, i in (label2id or {}).items()}
    count = num_labels or len(by_id or turned)
    problems = []
    if by_id and turned and by_id != turned:
        problems.append("id2label and label2id name other labels")
    by_id = by_id or turned
    if by_id and sorted(by_id) != list(range(count)):
        problems.append(f"the ids are {sorted(by_id)}, and the labels are {count}")
    if len(set(by_id.values())) != len(by_id):
        problems.append("a name stands for two ids")
    if problems or (num_labels is not None and num_labels < 1):
        raise ConfigError(
            "FG-CLASS-013",
            "; ".join(problems) or f"num_labels is {num_labels}",
            allowed="ids 0 to num_labels - 1, each with a name of its own",
            fix="for example id2label={0: 'negative', 1: 'positive'}, and nothing else",
        )
    found: dict[str, Any] = {}
    if count:
        by_id = by_id or {i: f"LABEL_{i}" for i in range(count)}
        found["id2label"] = {i: by_id[i] for i in range(count)}
        found["label2id"] = {name: i for i, name in found["id2label"].items()}
    if problem_type is not None:
        found["problem_type"] = problem_type
    return found


def check_choices(problem_type: str | None, truncation_side: str | None) -> None:
    """Prove that both are words that transformers knows, or None.

    Raises:
        ConfigError: FG-CLASS-023.
    """
    for key, value, known in (
        ("problem_type", problem_type, PROBLEMS),
        ("truncation_side", truncation_side, ("left", "right")),
    ):
        if value is not None and value not in known:
            raise ConfigError(
                "FG-CLASS-023",
                f"{key} is {value!r}",
                allowed=", ".join(known),
                fix=did_you_mean(str(value), known),
            )


def names_of(config: PreTrainedConfig) -> list[str]:
    """The names of a model's labels in the order of their ids."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def kind_of(located: Located) -> str | None:
    """The task of a model or adapter on the disk, None where it names none."""
    if located.kind == "adapter":
        return _ADAPTERS.get(_read(located, ADAPTER_CONFIG).get("task_type"))
    for name in _read(located, "config.json").get("architectures") or ():
        for ending, kind in _ARCHITECTURES.items():
            if str(name).endswith(ending):
                return kind
    return None


def _read(located: Located, file: str) -> dict[str, Any]:
    try:
        values = json.loads((located.path / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads it says what is wrong
    return values if isinstance(values, dict) else {}


def require_task(located: Located, task: str) -> None:
    """Prove that what was located can be opened for ``task``.

    Args:
        task: As ``models.load.load_model`` takes it. A whole model of another kind may become a
            classifier with a new head; an adapter is for one task.

    Raises:
        ModelError: FG-CLASS-014, a classifier where text is to be generated; FG-CLASS-015, an
            adapter of another task.
    """
    kind = kind_of(located)
    if kind is None or kind == task:
        return
    if task == CAUSAL:
        raise ModelError(
            "FG-CLASS-014",
            f"{located.name} is a classifier ({kind}) and generates no text",
            allowed="a causal language model",
            fix=f'finegraft predict {located.name} "a text"; in Python '
            "FastClassifier.from_pretrained",
        )
    if located.kind == "adapter":
        raise ModelError(
            "FG-CLASS-015",
            f"the adapter {located.name} is for the task {kind}, not {task}",
            allowed=f"an adapter of {task}, or a model without one",
            fix=f'finegraft generate {located.name} "a question"'
            if kind == CAUSAL
            else "pass the base model to train a new adapter",
        )


def longest(config: PreTrainedConfig, tokenizer_limit: int | None, asked: int | None) -> int | None:
    """Tokens that a text may have: the least of what was asked for and what the model knows.

    Args:
        config: The model's.
        tokenizer_limit: ``model_max_length`` as the tokenizer was saved with.
        asked: None: as many as there are.

    Returns:
        None where nothing limits it.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and text.model_type in _OFFSET:
        positions -= (text.pad_token_id or 0) + 1
    known = [x for x in (positions, tokenizer_limit, asked) if x and 0 < x < _UNBOUNDED]
    return min(known, default=None)


def new_modules(model: PreTrainedModel) -> list[str]:
    """Whole modules that loading made new and that peft would not save as a classifier's head.

    A pooler that a checkpoint lacks, for instance: left frozen, it would be another one after
    every loading.
    """
    owners = [str(name).rpartition(".")[0] for name in getattr(model, "new_weights", ())]
    left = [o for o in owners if o and not any(h in part for part in o.split(".") for h in _HEADS)]
    return list(dict.fromkeys(left))


def takes_cache(core: PreTrainedModel) -> bool:
    """Whether this is a decoder, which would keep keys and values that no classifier asks for."""
    return "use_cache" in inspect.signature(core.forward).parameters


def note(model: PreTrainedModel) -> dict[str, Any]:
    """What ``finegraft.json`` says of a classifier, which an adapter's own files do not; or {}."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return {}
    return {"labels": names_of(model.config), "problem_type": model.config.problem_type}


def from_note(values: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: settings for loading."""
    names = values.get("labels")
    return label_settings(id2label=names, problem_type=values.get("problem_type")) if names else {}


def loading(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ``models.load.load_model`` for a classifier.

    Args:
        settings: What was asked for; label settings among them win over ``saved``.
        saved: From ``from_note``.

    Returns:
        With 4 or 8 bits, a quantization that leaves the head as it is: transformers leaves only
        the last module out, which in DistilBERT is a dropout.

    Raises:
        ConfigError: FG-CLASS-012, another number of labels than the adapter's head has.
    """
    out = {**saved, **{name: value for name, value in settings.items() if value is not None}}
    if saved.get("id2label") and len(out["id2label"]) != len(saved["id2label"]):
        raise ConfigError(
            "FG-CLASS-012",
            f"{len(out['id2label'])} labels for an adapter that was trained with "
            f"{len(saved['id2label'])}",
            allowed=", ".join(saved["id2label"].values()),
            fix="leave the labels out, or start from the base model to train other ones",
        )
    if (out.get("load_in_4bit") or out.get("load_in_8bit")) and not out.get("quantization_config"):
        computed = out.pop("bnb_4bit_compute_dtype", None)
        computed = out.get("dtype") if computed in (None, "auto") else computed
        config: Any = quantize.config_for(
            bool(out.pop("load_in_4bit", False)),
            bool(out.pop("load_in_8bit", False)),
            resolve_dtype(computed, facts().device),
            out.pop("bnb_4bit_quant_type", "nf4"),
            out.pop("bnb_4bit_use_double_quant", True),
        )
        config.llm_int8_skip_modules = list(DENSE)
        out["quantization_config"] = config
    return out

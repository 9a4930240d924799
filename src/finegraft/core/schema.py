"""One schema for a training run: YAML, flags, ``--set`` and docs all come from it.

What: ``TrainConfig``, whose keys carry the trainer's own names. How: pydantic with
``extra="forbid"``; every problem of a file is reported at once, unknown keys with a near name.
Constraint: a default stands here and nowhere else. Trade-off: one flat namespace instead of nested
sections, so that ``--set learning_rate=1e-4`` and ``--learning-rate 1e-4`` need no path.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from finegraft.core.errors import ConfigError, did_you_mean


def _field(
    default: Any,
    help: str,
    group: str,
    *,
    task: str | None = None,
    classification: Any = None,
    token_classification: Any = None,
    **limits: Any,
) -> Any:
    """One key.

    Args:
        task: Tasks that have it: those whose names end so. None: all.
        classification: Its default there, where that is another one.
        token_classification: The same, where that differs once more.
    """
    extra = {"group": group, "task": task, "classification": classification}
    extra["token_classification"] = token_classification
    if classification is not None:
        help += f"; default for classification: {classification}"
    if token_classification is not None:
        help += f", of tokens: {token_classification}"
    return Field(default, description=help, json_schema_extra=extra, **limits)


class TrainConfig(BaseModel):
    """Everything that decides a training run. Lengths are in tokens, steps are optimizer steps."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    task: str = _field(
        "causal", "what to train: causal, classification or token_classification", "model"
    )
    model: str = _field(..., "hub name, folder, GGUF file, adapter folder, or 'demo'", "model")
    revision: str | None = _field(None, "branch, tag or commit on the hub", "model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "precision of the frozen weights; auto: bfloat16 where it is native", "model"
    )
    load_in_4bit: bool = _field(False, "quantize the base to NF4 while loading (QLoRA)", "model")
    load_in_8bit: bool = _field(False, "quantize the base to 8 bits while loading", "model")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _field(
        "nf4", "the 16 values that 4 bits stand for", "model"
    )
    bnb_4bit_use_double_quant: bool = _field(
        True, "quantize the scales of 4-bit weights as well", "model"
    )
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "precision of the products of 4-bit weights; auto: that of dtype", "model"
    )
    trust_remote_code: bool = _field(False, "run Python code that comes with the model", "model")
    new_tokens: list[str] = _field(
        [], "tokens to add to the vocabulary; only their rows train", "model", task="causal"
    )
    chat_template: str | None = _field(
        None, "template to use instead of the model's", "model", task="causal"
    )

    data: str | dict[str, Any] | list[str | dict[str, Any]] = _field(
        ..., "rows: a file, a pattern, owner/name on the hub, or several, each with =weight", "data"
    )
    eval_data: str | dict[str, Any] | list[str | dict[str, Any]] | None = _field(
        None, "held-out rows, in the same words", "data"
    )
    eval_fraction: float = _field(
        0.0, "share of rows held out for evaluation", "data", classification=0.2, ge=0, lt=1
    )
    map: dict[str, str] = _field({}, "columns to rename, wanted=found", "data")
    streaming: Literal["auto", "true", "false"] = _field(
        "auto",
        "read rows while training instead of holding them; auto: what is larger than a quarter of "
        "the memory, and URLs",
        "data",
        task="causal",
    )
    max_length: int = _field(1024, "longest row; longer ones are cut and counted", "data", ge=8)
    data_check: bool = _field(
        True, "look for faults in the rows before training; never stops it", "data"
    )
    completion_only_loss: bool | None = _field(
        None, "learn the answers only; unset: yes where there is an answer", "data", task="causal"
    )
    packing: bool = _field(
        False, "several rows per sequence, never attending across", "data", task="causal"
    )
    share_prefix: bool = _field(
        True, "compute what all rows of a batch begin with once; same gradients", "data"
    )

    method: str = _field("lora", "how to tune: lora, dora, bottleneck, full, ...", "adapter")
    method_settings: dict[str, Any] = _field({}, "further settings of the method", "adapter")
    r: int = _field(16, "LoRA rank; 0 with full_finetuning", "adapter", ge=0)
    lora_alpha: int = _field(16, "LoRA scale is alpha / r", "adapter", gt=0)
    lora_dropout: float = _field(0.0, "dropout before the LoRA", "adapter", ge=0, lt=1)
    target_modules: list[str] | str = _field(
        "all-linear", "module names that get a LoRA, or all-linear", "adapter"
    )
    bias: Literal["none", "all", "lora_only"] = _field("none", "biases to train", "adapter")
    use_rslora: bool = _field(False, "scale by alpha / sqrt(r)", "adapter")
    use_dora: bool = _field(False, "learn the size of each weight's rows apart (DoRA)", "adapter")
    init_lora_weights: str | None = _field(
        None, "start of the LoRA: pissa, olora, eva, loftq, gaussian, ...; unset: zero", "adapter"
    )
    modules_to_save: list[str] | str = _field(
        [], "modules to train and save whole, lm_head say", "adapter"
    )
    full_finetuning: bool = _field(False, "train every weight, no adapter", "adapter")

    num_train_epochs: float = _field(3.0, "passes over the rows", "training", gt=0)
    max_steps: int = _field(-1, "steps to stop after; -1: by epochs", "training", ge=-1)
    per_device_train_batch_size: int = _field(
        8, "rows a micro-batch", "training", classification=16, ge=1
    )
    per_device_eval_batch_size: int = _field(
        8, "rows an evaluation batch", "training", classification=64, ge=1
    )
    gradient_accumulation_steps: int = _field(1, "micro-batches a step", "training", ge=1)
    auto_find_batch_size: bool = _field(False, "halve the batch when memory ends", "training")
    learning_rate: float = _field(
        2e-4,
        "peak learning rate",
        "training",
        classification=5e-4,
        token_classification=1e-3,
        gt=0,
    )
    lr_scheduler_type: str = _field("linear", "learning rate schedule", "training")
    warmup_steps: int = _field(5, "steps to the peak learning rate", "training", ge=0)
    weight_decay: float = _field(0.0, "decoupled weight decay", "training", ge=0)
    max_grad_norm: float = _field(1.0, "gradients are clipped to this norm", "training", ge=0)
    loraplus_lr_ratio: float | None = _field(
        None, "LoRA+: learning rate of every B, as a multiple of A's; 16 say", "training", gt=0
    )
    optim: str = _field("adamw_torch_fused", "optimizer, the trainer's names", "training")
    gradient_checkpointing: bool = _field(False, "recompute to save memory", "training")
    seed: int = _field(3407, "seed of adapter, order and dropout", "training")

    text_column: str | None = _field(
        None, "column of the text; unset: found by name", "classification", task="classification"
    )
    text_pair_column: str | None = _field(
        None, "column of a second text, for pairs", "classification", task="classification"
    )
    label_column: str | None = _field(
        None, "column of the label; unset: found by name", "classification", task="classification"
    )
    class_names: str | None = _field(
        None,
        "names of the labels 0, 1, ..., separated by commas; unset: as in the rows",
        "classification",
        task="classification",
    )
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = _field(None, "unset: found from the labels", "classification", task="classification")
    class_weights: Literal["none", "balanced"] = _field(
        "none",
        "balanced: rare classes weigh as much as frequent ones",
        "classification",
        task="classification",
    )
    truncation_side: Literal["left", "right"] = _field(
        "right",
        "which end of a text that is too long is cut",
        "classification",
        task="classification",
    )
    metric_for_best_model: str | None = _field(
        None,
        "what chooses the epoch that is kept; unset: f1, macro_f1, micro_f1 or mse",
        "classification",
        task="classification",
    )
    early_stopping_patience: int = _field(
        0,
        "evaluations without a better one before training stops; 0: never",
        "classification",
        task="classification",
        ge=0,
    )

    output: str = _field("runs/run", "the run folder", "run")
    logging_steps: int = _field(1, "steps between two logged lines", "run", ge=1)
    save_steps: int = _field(50, "steps between two checkpoints", "run", ge=1)
    save_total_limit: int = _field(2, "checkpoints kept", "run", ge=1)
    eval_steps: int = _field(0, "steps between evaluations; 0: each epoch", "run", ge=0)
    report_to: str = _field(
        "none", "trackers: tensorboard, wandb, trackio, mlflow, ..., separated by commas", "run"
    )
    report_rows: int | None = _field(
        None,
        "held-out rows that the report shows before and after; unset: up to 32, in a tenth of the "
        "training time; 0: none",
        "run",
        ge=0,
    )
    nproc: int = _field(1, "processes on this machine", "run", ge=1)
    nnodes: int = _field(1, "machines that train together", "run", ge=1)
    sharding: Literal["none", "fsdp2"] = _field(
        "none", "fsdp2: each process keeps a part of the frozen layers only", "run"
    )
    stop_on_nan: bool = _field(True, "stop when a loss or gradient is not a number", "run")
    overwrite: bool = _field(False, "replace an existing run folder", "run")

    @field_validator("streaming", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """YAML's true and false, as the words that flags take."""
        return str(value).lower() if isinstance(value, bool) else value

    @property
    def trains_all(self) -> bool:
        """Whether every weight trains: ``method: full``, or its older name full_finetuning."""
        return self.full_finetuning or self.method == "full"

    def to_yaml(self) -> str:
        """The complete, resolved configuration as YAML that ``from_file`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def groups() -> dict[str, list[str]]:
    """Field names by group, in order of the schema: for help texts and docs."""
    out: dict[str, list[str]] = {}
    for name, info in TrainConfig.model_fields.items():
        out.setdefault(str(_extra(info)["group"]), []).append(name)
    return out


def _extra(info: FieldInfo) -> dict[str, Any]:
    """What ``_field`` kept beside a key."""
    extra = info.json_schema_extra
    assert isinstance(extra, dict)  # every key is made by ``_field``
    return extra


def default_of(name: str, task: str) -> Any:
    """The default of a key in a task."""
    info = TrainConfig.model_fields[name]
    extra = _extra(info)
    own = extra["classification"] if task.endswith("classification") else None
    if task == "token_classification" and extra[task] is not None:
        own = extra[task]
    return info.default if own is None else own


def foreign(config: TrainConfig) -> list[str]:
    """Keys that are set and mean nothing in the configured task."""
    return [
        name
        for name, info in TrainConfig.model_fields.items()
        if (only := _extra(info)["task"]) is not None
        and not config.task.endswith(only)
        and getattr(config, name) != info.default
    ]


def build(values: dict[str, Any], source: str = "the arguments") -> TrainConfig:
    """Validate ``values`` and return the configuration.

    Raises:
        ConfigError: FG-CONF-001 with every problem found in ``source``, one a line.
    """
    task = str(values.get("task", ""))
    defaults = {
        name: default_of(name, task)
        for name, info in TrainConfig.model_fields.items()
        if not info.is_required()
    }
    try:
        config = TrainConfig.model_validate({**defaults, **values})
    except ValidationError as error:
        known = list(TrainConfig.model_fields)
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{key}', {did_you_mean(key, known)}")
            elif len(item["loc"]) > 1 and (name := str(item["loc"][0])) in known:
                told = TrainConfig.model_fields[name].description
                problems.append(f"'{name}' is {values[name]!r}, not: {told}")
            elif item["type"] == "missing":
                problems.append(f"'{key}' is missing ({TrainConfig.model_fields[key].description})")
            else:
                problems.append(f"'{key}' is {item['input']!r}: {item['msg']}")
        only_missing = all(item["type"] == "missing" for item in error.errors())
        raise ConfigError(
            "FG-CONF-001",
            f"{source}: " + "; ".join(dict.fromkeys(problems)),
            allowed="the keys that `finegraft train --help` lists",
            fix="for example: finegraft train --model demo --data rows.jsonl"
            if only_missing
            else "correct the keys named above",
        ) from None
    return _consistent(config, source)


def _consistent(config: TrainConfig, source: str) -> TrainConfig:
    """Rules between keys.

    Raises:
        ConfigError: FG-CONF-002 rank 0 without full fine-tuning, FG-CONF-003 two precisions,
            FG-ADAPT-040 an adapter and full fine-tuning, FG-ADAPT-041 all of a quantized base.
    """
    if config.full_finetuning and config.method not in ("full", "lora"):
        raise ConfigError(
            "FG-ADAPT-040",
            f"{source}: full_finetuning and method '{config.method}' are both set",
            allowed="one of the two",
            fix="remove full_finetuning to train the method's adapter only",
        )
    if config.trains_all and (config.load_in_4bit or config.load_in_8bit):
        raise ConfigError(
            "FG-ADAPT-041",
            f"{source}: every weight is to train, and the base is loaded quantized, whose weights "
            "are whole numbers without a gradient",
            allowed="a 16-bit or 32-bit base, or an adapter on a quantized one",
            fix="load_in_4bit=False and load_in_8bit=False, or method: lora (QLoRA)",
        )
    if config.r == 0 and not config.trains_all:
        raise ConfigError(
            "FG-CONF-002",
            f"{source}: r is 0, which leaves nothing to train",
            allowed="a rank of at least 1, usually 8, 16 or 32",
            fix="--r 16, or --full-finetuning to train every weight",
        )
    if config.load_in_4bit and config.load_in_8bit:
        raise ConfigError(
            "FG-CONF-003",
            f"{source}: load_in_4bit and load_in_8bit are both set",
            allowed="one of the two",
            fix="remove one of them",
        )
    return config


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read ``key=value`` as YAML reads the value; ``lr=1e-4`` gives a float.

    Raises:
        ConfigError: FG-CONF-004, no equals sign, or a value that YAML cannot read.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            "FG-CONF-004",
            f"--set got {text!r}",
            allowed="key=value",
            fix="for example --set learning_rate=1e-4",
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            "FG-CONF-004",
            f"--set got {text!r}, whose value is not YAML",
            allowed="key=value",
            fix=f"put it in quotes: --set {key.strip()}=\"'...'\"",
        ) from error
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)  # YAML 1.1 reads 1e-4 as text
    return key.strip().replace("-", "_"), parsed


def from_file(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file, apply ``overrides`` and validate.

    Raises:
        ConfigError: FG-CONF-001 to FG-CONF-003; FG-CONF-005 when the file is missing or not YAML.
    """
    source = f"{path} and the command line" if overrides else str(path)
    return build({**read_file(path), **(overrides or {})}, source)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the keys of a YAML file as they stand there.

    Raises:
        ConfigError: FG-CONF-005, the file is missing or not YAML.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "FG-CONF-005",
            f"cannot read {path}: {error.strerror}",
            fix="pass the path of a YAML file, or --model and --data instead",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            "FG-CONF-005", f"{path} is not YAML: {error}", fix="correct the line named above"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            "FG-CONF-005",
            f"{path} holds {type(values).__name__}, not keys with values",
            fix="write one 'key: value' a line, starting with model: and data:",
        )
    return values

"""Model, configuration and tokenizer from a folder.

What: ``load_config``, ``load_tokenizer`` and ``load_model``. How: the configuration and the weight
files are checked first, then ``from_pretrained`` does the work, then its report of missing weights
is read: a model that is partly random is an error, not a warning. Constraint: no code from a model
folder runs without ``trust_remote_code=True``. Trade-off: what transformers would have let pass
with a warning (an encoder loaded as a chat model, say) stops here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finegraft.core.errors import ConfigError, ModelError, did_you_mean, near
from finegraft.core.hardware import default_dtype, facts
from finegraft.models import _stream, quantize, rope, weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Task = Literal["causal", "sequence-classification", "token-classification"]
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}

# what transformers raises on files that hold something else than it expects
_LIBRARY_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError)


def _bad_config(path: Path, reason: str, fix: str) -> ModelError:
    return ModelError(
        "FG-MODEL-008",
        f"{path}: {reason}",
        allowed="a model folder with a config.json that names a model_type",
        fix=fix,
    )


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read ``config.json``.

    Args:
        path: The model folder.
        trust_remote_code: Allow Python files of the folder to be run.

    Raises:
        ModelError: FG-MODEL-008 missing, not JSON or of an unknown type; FG-MODEL-009 the model
            brings its own code and ``trust_remote_code`` is off.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(path) / "config.json"
    again = "fetch or save the model again"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _bad_config(file, "it is missing", "pass the folder that holds it") from error
    except (ValueError, OSError) as error:
        raise _bad_config(file, f"it is not readable JSON ({error})", again) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not kind:
        raise _bad_config(file, "it names no model_type", again)
    if kind not in CONFIG_MAPPING:
        if "auto_map" in values and not trust_remote_code:
            raise _needs_code(Path(path), kind)
        if "auto_map" not in values:
            close = near(kind, list(CONFIG_MAPPING.keys()))
            hint = f"did you mean '{close}'? Or: " if close else ""
            raise _bad_config(
                file, f"unknown model_type '{kind}'", hint + "pip install -U transformers"
            )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, *_LIBRARY_ERRORS) as error:
        raise _bad_config(file, " ".join(str(error).split()), again) from error


def _needs_code(path: Path, kind: str) -> ModelError:
    return ModelError(
        "FG-MODEL-009",
        f"{path} (model_type '{kind}') needs Python code that comes with it",
        allowed="models that transformers knows, or trust_remote_code=True after reading that code",
        fix="pass trust_remote_code=True (--trust-remote-code) if you trust its author",
    )


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Read a tokenizer; see ``models.tokenizer.prepare`` for its padding.

    Args:
        path: The model or adapter folder.
        trust_remote_code: Allow Python files of the folder to be run.
        **kwargs: Passed on to ``AutoTokenizer.from_pretrained``.

    Raises:
        ModelError: FG-MODEL-005, there is none in the folder or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    except _LIBRARY_ERRORS as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            "FG-MODEL-005",
            f"{path} holds no readable tokenizer: {reason[0]}",
            allowed="tokenizer.json, or the vocabulary files of a slow tokenizer",
            fix="copy the tokenizer files of the base model into the folder",
        ) from error


def resolve_dtype(dtype: str | torch.dtype | None, device: str) -> torch.dtype:
    """Return the dtype to load in.

    Args:
        dtype: None and ``auto`` mean ``core.hardware.default_dtype()``.
        device: ``cpu`` or ``cuda...``; float16 is replaced on a CPU, with a logged warning.

    Raises:
        ConfigError: FG-MODEL-010, not a floating-point dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return default_dtype()
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if found not in allowed:
        raise ConfigError(
            "FG-MODEL-010",
            f"dtype is {dtype!r}",
            allowed="auto, float32, bfloat16, float16",
            fix="leave dtype unset for the fastest one on this machine",
        )
    if found == torch.float16 and device == "cpu":
        log.warning("float16 is slow and unstable on a CPU: using %s", default_dtype())
        return default_dtype()
    return found


def resolve_device(device_map: Any) -> Any:
    """Return a device map that this machine can follow.

    CUDA devices that are not there are answered with one logged line and the nearest device that
    is, so that a script written for a GPU machine runs here.
    """
    count = len(facts().gpus)
    if device_map is None:
        return {"": facts().device}
    if isinstance(device_map, dict):
        if count == 0 and any(str(v) not in ("cpu", "disk") for v in device_map.values()):
            log.warning("no CUDA device here: the model goes to the cpu")
            return {"": "cpu"}
        return device_map
    wanted = f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)
    if not wanted.startswith("cuda"):
        # "auto", "balanced", ... share the model out over GPUs; without one they mean the CPU
        return {"": wanted} if wanted == "cpu" else ({"": "cpu"} if count == 0 else wanted)
    if count == 0:
        log.warning("device_map=%r, but there is no CUDA device here: using the cpu", device_map)
        return {"": "cpu"}
    index = wanted.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= count:
        log.warning("device_map=%r, but there are %d CUDA devices: using cuda:0", device_map, count)
        return {"": "cuda:0"}
    return {"": wanted}


def _single_device(device_map: Any) -> str:
    if isinstance(device_map, dict) and set(device_map) == {""}:
        return str(device_map[""])
    return "cuda"


def load_model(
    path: str | Path,
    *,
    task: Task = "causal",
    dtype: str | torch.dtype | None = None,
    quantization_config: Any = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = True,
    bnb_4bit_compute_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    rope_scaling: dict[str, Any] | None = None,
    max_seq_length: int | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Build a model from a folder, complete or not at all.

    Args:
        path: The model folder, ``Located.path`` of kind ``directory``.
        task: ``causal``, ``sequence-classification`` or ``token-classification``; classifiers may
            get a new head.
        dtype: Of the weights; unset, the fastest on this machine.
        quantization_config: Passed on as it is, instead of the flags and settings below.
        load_in_4bit: 4 bits a value in blocks of 64, quantised one tensor at a time. A folder whose
            weights are quantised already is loaded as it is, whatever the flags say.
        load_in_8bit: LLM.int8.
        bnb_4bit_quant_type: ``nf4`` or ``fp4``.
        bnb_4bit_use_double_quant: Quantise the scales of the blocks as well.
        bnb_4bit_compute_dtype: Of the products; unset, the dtype of the weights.
        device_map: As in transformers; unset, the first CUDA device or the CPU.
        rope_scaling: ``{"rope_type": "linear" | "dynamic" | "yarn", "factor": ...}``.
        max_seq_length: In tokens; longer than the model knows gives one logged warning.
        trust_remote_code: Run Python code that comes with the model.
        attn_implementation: As in transformers.
        **model_kwargs: Passed on, ``num_labels`` for instance.

    Returns:
        The model in eval mode.

    Raises:
        ModelError: FG-MODEL-005 weights missing or damaged, FG-MODEL-007 a pickle with code,
            FG-MODEL-008 configuration, FG-MODEL-009 needs ``trust_remote_code``.
        ConfigError: FG-CONF-003 both quantisation flags, FG-MODEL-010 dtype, FG-MODEL-011 rope,
            FG-MODEL-013 task, FG-MODEL-015 kind of 4 bits.
    """
    path = Path(path)
    if task not in _CLASSES:
        raise ConfigError(
            "FG-MODEL-013",
            f"task is {task!r}",
            allowed=", ".join(_CLASSES),
            fix=did_you_mean(str(task), _CLASSES),
        )
    config = load_config(path, trust_remote_code=trust_remote_code)
    rope.apply(config, rope_scaling, max_seq_length)
    weights.check(path)
    place = resolve_device(device_map)
    device = _single_device(place)
    loaded_dtype = resolve_dtype(dtype, device)
    stored_quantized = getattr(config, "quantization_config", None) is not None
    if quantization_config is None and not stored_quantized:
        computed = bnb_4bit_compute_dtype
        quantization_config = quantize.config_for(
            load_in_4bit,
            load_in_8bit,
            resolve_dtype(computed, device) if computed not in (None, "auto") else loaded_dtype,
            bnb_4bit_quant_type,
            bnb_4bit_use_double_quant,
        )
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config
    if quantization_config is not None or stored_quantized or device != "cpu":
        model_kwargs["device_map"] = place  # a plain model on the CPU needs no dispatching
    if attn_implementation is not None:
        model_kwargs["attn_implementation"] = attn_implementation
    model = _build(path, config, task, loaded_dtype, trust_remote_code, model_kwargs)
    if getattr(model, "is_quantized", False):
        quantize.protect(model)
    _share_frequencies(model)
    return model.eval()


def _share_frequencies(model: PreTrainedModel) -> None:
    """Hold the rotary frequencies once: transformers 5 keeps a second copy for scaled positions.

    ``get_memory_footprint`` then gives the figures that are known from transformers 4.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "default" and hasattr(module, "original_inv_freq"):
            module.original_inv_freq = module.inv_freq


def _build(
    path: Path,
    config: PreTrainedConfig,
    task: Task,
    dtype: torch.dtype,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    import transformers

    classify = task != "causal"
    # label names and counts belong to the configuration, which from_pretrained takes as given
    for key in ("num_labels", "id2label", "label2id", "problem_type"):
        if classify and kwargs.get(key) is not None:
            setattr(config, key, kwargs.pop(key))
    source: Path | None = path
    kind = getattr(transformers, _CLASSES[task])
    if kwargs.get("quantization_config") is not None:
        streamed = _stream.instead_of(path, config, kind)
        if streamed is not None:
            source, (kind, more) = None, streamed
            kwargs = {**kwargs, **more}
    try:
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            weights_only=True,
            # a head for another number of classes is replaced; anything else is caught below
            ignore_mismatched_sizes=classify,
            **kwargs,
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise _needs_code(path, str(config.model_type)) from error
        if "Unrecognized configuration class" in str(error):
            raise _bad_config(
                path / "config.json",
                f"model_type '{config.model_type}' has no model for the task '{task}'",
                "use a chat model; an encoder needs task='sequence-classification'",
            ) from error
        raise
    except RuntimeError as error:
        if "size" not in str(error) and "shape" not in str(error):
            raise
        raise weights.damaged(path, f"its weights do not fit config.json ({error})") from error
    _require_complete(path, model, report, classify)
    model.config.name_or_path = model.name_or_path = str(path)
    return model


def _require_complete(
    path: Path, model: PreTrainedModel, report: dict[str, Any], classify: bool
) -> None:
    """Refuse a model of which a part was initialised at random.

    A classifier's head may be new: whatever lies outside the base model, and its pooler.
    """
    inside = f"{model.base_model_prefix}."

    def may_be_new(name: str) -> bool:
        return classify and (not name.startswith(inside) or ".pooler." in name)

    mismatched = {
        item[0] if isinstance(item, tuple) else item for item in report["mismatched_keys"]
    }
    absent = sorted({*report["missing_keys"], *mismatched})
    lacking = [name for name in absent if not may_be_new(name)]
    if lacking:
        raise ModelError(
            "FG-MODEL-005",
            f"{path}: {len(lacking)} weights of {type(model).__name__} are not in it or of another "
            f"shape, {', '.join(lacking[:3])} for instance; they would have been random",
            allowed="weights for every layer of the model",
            fix="fetch or save the model again"
            + ("" if classify else "; encoders load with task='sequence-classification'"),
        )
    model.new_weights = tuple(absent)
    if absent:
        log.info("new, to be trained: %s", ", ".join(absent))
    if report["unexpected_keys"]:
        unused = sorted(report["unexpected_keys"])
        log.info("%d weights in %s are not used, %s ...", len(unused), path, unused[0])

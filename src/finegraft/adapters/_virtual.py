"""Virtual tokens: trained vectors in front of every row, shared by prefix, prompt and P-tuning.

What: peft makes, saves and opens the adapter; a subclass of peft's model, set on the instance, puts
right what peft leaves open. How: positions count a row's own tokens, so padding on the left changes
nothing; a decoder's classification head reads the last real token, which peft loses once rows are
embedded; the network that makes the virtual tokens (P-tuning, a projected prefix) is saved beside
the tokens, without which training could not go on. Constraint: on unpadded and right-padded rows of
a causal model the numbers are peft's. Trade-off: one more file for methods that have such a
network; plain peft ignores it and opens the folder for answering.

Shapes: b rows, t tokens of the padded batch, n virtual tokens, d hidden.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PeftType,
    TaskType,
    get_peft_model,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from finegraft.core.arguments import translate
from finegraft.core.errors import AdapterError
from finegraft.models import swap

ENCODER = "prompt_encoder.safetensors"
TASKS = ("CAUSAL_LM", "SEQ_CLS")
NOT_PACKED = "virtual tokens stand in front of every row, and packed rows have one front for many"
NOT_MERGEABLE = "virtual tokens are read beside the weights; no weight could hold them"
NOT_RECOMPUTED = "a recomputed layer reads no cache, and the prefix is one"


class _VirtualTokens:
    """Mixed into peft's models whose adapter is made of virtual tokens."""

    def _checked(self: Any, shaped: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """Refuse what cannot be right; return the active configuration."""
        config = self.active_peft_config
        positions = kwargs.pop("position_ids", None)
        if "seq_lengths" in kwargs or not _own_positions(positions, mask):
            raise packed_rows(str(config.peft_type.value).lower())
        if _is_prefix(config) and self.training and _recomputes(self):
            raise recomputed()
        rows, width = _position_rows(self), shaped.shape[1] + config.num_virtual_tokens
        if rows is not None and width > rows:
            raise AdapterError(
                "FG-ADAPT-033",
                f"{config.num_virtual_tokens} virtual tokens and {shaped.shape[1]} of the rows "
                f"make {width}, and the model has {rows} positions",
                allowed=f"rows of at most {rows - config.num_virtual_tokens} tokens",
                fix=f"truncate them to max_length={rows - config.num_virtual_tokens}",
            )
        return config

    def _joined(self: Any, config: Any, embedded: torch.Tensor, mask: Any) -> dict[str, Any]:
        """Virtual tokens and rows [b, n + t, d], with mask and positions."""
        virtual = self.get_prompt(batch_size=embedded.shape[0]).to(embedded)
        joined: dict[str, Any] = {"inputs_embeds": torch.cat([virtual, embedded], dim=1)}
        if mask is not None:
            joined["attention_mask"] = _in_front(mask, config.num_virtual_tokens, 1)
            joined.update(_positions(self, joined["attention_mask"]))
        return joined

    @contextlib.contextmanager
    def disable_adapter(self: Any) -> Iterator[None]:
        """The base answers inside the block, with its own head and rows.

        peft's own fails on models that cannot generate, and leaves a trained head in place.
        """
        was = self._adapters_disabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if not was:
                self.enable_adapter_layers()

    def disable_adapter_layers(self: Any) -> None:
        """Answer as the base does until ``enable_adapter_layers``."""
        self._adapters_disabled = True
        _use_trained_parts(self, False)

    def enable_adapter_layers(self: Any) -> None:
        """Take ``disable_adapter_layers`` back."""
        self._adapters_disabled = False
        _use_trained_parts(self, True)

    def _refuse_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Virtual tokens cannot be merged; FG-ADAPT-031."""
        raise AdapterError(
            "FG-ADAPT-031",
            f"merging {self.active_peft_config.peft_type.value}: {NOT_MERGEABLE}",
            allowed="lora and other methods that change weights",
            fix="deploy the base with the adapter folder, or train method='lora' and merge that",
        )

    merge_adapter = unmerge_adapter = merge_and_unload = _refuse_merge

    def save_pretrained(self: Any, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """peft's, and the network behind the virtual tokens where there is one."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            encoder = self.prompt_encoder[name]
            if _is_network(encoder) and kwargs.get("is_main_process", True):
                folder = Path(save_directory, "" if name == "default" else name)
                save_file(_state(encoder), str(folder / ENCODER))

    def load_adapter(
        self: Any, model_id: Any, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """peft's; an adapter that trains gets back the network behind its virtual tokens."""
        if adapter_name not in self.peft_config:
            out = super().load_adapter(model_id, adapter_name, **kwargs)  # type: ignore[misc]
            if is_trainable:
                go_on(self, Path(model_id), adapter_name)
            return out
        encoder = self.prompt_encoder[adapter_name]
        if not _is_network(encoder):
            return super().load_adapter(  # type: ignore[misc]
                model_id, adapter_name, is_trainable=is_trainable, **kwargs
            )
        state = _saved_network(Path(model_id))
        self.prompt_encoder[adapter_name] = _rebuilt(self, adapter_name, inference=True)
        try:  # peft has a place for the finished tokens only
            out = super().load_adapter(  # type: ignore[misc]
                model_id, adapter_name, is_trainable=is_trainable, **kwargs
            )
        finally:
            self.prompt_encoder[adapter_name] = encoder
        encoder.load_state_dict(state)
        return out


class VirtualCausal(_VirtualTokens):
    """For causal language models."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base's result with the virtual tokens in front; their logits come first."""
        if self._adapters_disabled:
            given = _named(input_ids, attention_mask, inputs_embeds, labels)
            return self.base_model(**given, **kwargs)
        shaped = inputs_embeds if input_ids is None else input_ids
        config = self._checked(shaped, attention_mask, kwargs)
        kwargs.pop("token_type_ids", None)
        if _is_prefix(config):
            if attention_mask is not None:
                kwargs.update(_positions(self, attention_mask))  # peft adds n to them
            return super().forward(  # type: ignore[misc]
                input_ids, attention_mask, inputs_embeds, labels=labels, **kwargs
            )
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        joined = self._joined(config, embedded, attention_mask)
        if labels is not None:
            labels = _in_front(labels, config.num_virtual_tokens, -100)
        return self.base_model(labels=labels, **joined, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """peft's, with positions that count the virtual and the row's own tokens."""
        if self._adapters_disabled:
            return self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        kwargs["position_ids"] = None
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        mask = inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            read = inputs.get("input_ids")
            read = inputs["inputs_embeds"] if read is None else read
            for name, value in _positions(self, mask).items():
                inputs[name] = value[:, -read.shape[1] :]
        return inputs


class VirtualSequence(_VirtualTokens):
    """For sequence classification, of encoders and decoders."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base's result; a decoder's head reads the last token that the mask shows."""
        if self._adapters_disabled:
            given = _named(input_ids, attention_mask, inputs_embeds, labels)
            return self.base_model(**given, **kwargs)
        shaped = inputs_embeds if input_ids is None else input_ids
        config = self._checked(shaped, attention_mask, kwargs)
        if not hasattr(self.get_base_model(), "score"):
            return super().forward(  # type: ignore[misc]
                input_ids, attention_mask, inputs_embeds, labels=labels, **kwargs
            )
        if _is_prefix(config):
            if attention_mask is not None:
                kwargs.update(_positions(self, attention_mask))
            return super().forward(  # type: ignore[misc]
                input_ids, attention_mask, inputs_embeds, labels=labels, **kwargs
            )
        kwargs.pop("token_type_ids", None)
        mask = _shown(self, input_ids, attention_mask, shaped)
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        # Without ids the head reads the last column, so every row is moved to end there.
        moved = mask.flip(1).argmax(1, keepdim=True)  # [b, 1]
        order = (torch.arange(mask.shape[1], device=mask.device)[None] - moved) % mask.shape[1]
        embedded = embedded.gather(1, order[..., None].expand_as(embedded))
        joined = self._joined(config, embedded, mask.gather(1, order))
        return self.base_model(labels=labels, **joined, **kwargs)


_MIXINS: dict[type, type] = {
    PeftModelForCausalLM: VirtualCausal,
    PeftModelForSequenceClassification: VirtualSequence,
}


def _named(ids: Any, mask: Any, embeds: Any, labels: Any) -> dict[str, Any]:
    given = {"input_ids": ids, "attention_mask": mask, "inputs_embeds": embeds, "labels": labels}
    return {name: value for name, value in given.items() if value is not None}


def packed_rows(method: str) -> AdapterError:
    """The error for packed rows: FG-ADAPT-030."""
    return AdapterError(
        "FG-ADAPT-030",
        f"packed rows with method '{method}': {NOT_PACKED}",
        allowed="one row a line of the batch, padded",
        fix="packing=False, or method='lora', which packs",
    )


def recomputed() -> AdapterError:
    """The error for gradient checkpointing under a prefix: FG-ADAPT-034."""
    return AdapterError(
        "FG-ADAPT-034",
        f"gradient checkpointing with method 'prefix': {NOT_RECOMPUTED}",
        allowed="gradient_checkpointing=False, use_gradient_checkpointing=False",
        fix="switch it off, or method='prompt', which allows it",
    )


def _is_prefix(config: Any) -> bool:
    return bool(config.peft_type == PeftType.PREFIX_TUNING)


def _recomputes(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _in_front(rows: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """[b, t] to [b, count + t]."""
    return torch.cat([rows.new_full((rows.shape[0], count), value), rows], dim=1)


def _counted(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _positions(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """``position_ids`` [b, t] that count what the mask shows, where the base takes them."""
    forward = swap.stock_class(model.get_base_model()).forward
    takes = "position_ids" in _parameters(forward)
    return {"position_ids": _counted(mask)} if takes else {}


@functools.cache
def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _own_positions(positions: Any, mask: Any) -> bool:
    """Whether given positions are those that every row's own tokens have anyway."""
    if positions is None:
        return True
    shown = torch.ones_like(positions) if mask is None else mask.expand_as(positions)
    return bool(torch.where(shown.bool(), positions == _counted(shown), True).all())


def _position_rows(model: Any) -> int | None:
    """Rows of a learned table of positions; None for models that compute them."""
    decoder = swap.decoder(model.get_base_model())
    embeddings = getattr(decoder, "embeddings", decoder)
    for name in ("position_embeddings", "wpe"):
        table = getattr(embeddings, name, None)
        if isinstance(table, nn.Embedding):
            skipped = 0 if table.padding_idx is None else table.padding_idx + 1
            return table.num_embeddings - skipped
    return None


def _shown(model: Any, ids: Any, mask: Any, shaped: torch.Tensor) -> torch.Tensor:
    """The mask [b, t]; one that was not given hides what is after the last token but pads."""
    if mask is not None:
        return mask
    shown = torch.ones(shaped.shape[:2], dtype=torch.long, device=shaped.device)
    pad = model.config.get_text_config().pad_token_id
    if ids is None or pad is None:
        return shown
    after = (ids != pad).long().flip(1).cummax(1).values.flip(1)
    return torch.where(after.any(1, keepdim=True), after, shown)


def _use_trained_parts(model: nn.Module, use: bool) -> None:
    """Put heads and rows that train beside the virtual tokens in their places, or take them out.

    What of them trains stays as it is, which peft would change.
    """
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            trains = [(p, p.requires_grad) for p in module.parameters()]
            module.enable_adapters(use)
            for parameter, flag in trains:
                parameter.requires_grad_(flag)


def _is_network(encoder: nn.Module) -> bool:
    return len(list(encoder.parameters())) > 1


def _state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}


def is_virtual(folder: Path) -> bool:
    """Whether the adapter in ``folder`` is made of virtual tokens."""
    return bool(PeftConfig.from_pretrained(str(folder)).is_prompt_learning)


def _has_network(config: Any) -> bool:
    return config.peft_type == PeftType.P_TUNING or (
        _is_prefix(config) and bool(getattr(config, "prefix_projection", False))
    )


def _saved_network(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / ENCODER).is_file():
        raise AdapterError(
            "FG-ADAPT-035",
            f"{folder} holds finished virtual tokens and no {ENCODER}, the network behind them",
            allowed="a folder that finegraft wrote while the adapter was training",
            fix="open it for answering (trainable=False), or train a new adapter",
        )
    return load_file(str(folder / ENCODER))


def _rebuilt(model: Any, name: str, *, inference: bool) -> nn.Module:
    """A new encoder of the adapter ``name``, for answering or for training."""
    config = copy.copy(model.peft_config[name])
    config.inference_mode = inference
    return type(model.prompt_encoder[name])(config).to(model.device)


def go_on(model: Any, folder: Path, name: str = "default") -> None:
    """Let an adapter that was opened for answering train on, with its network if it has one.

    peft opens virtual tokens for answering only.

    Raises:
        AdapterError: FG-ADAPT-035, the folder does not hold the network.
    """
    if _has_network(model.peft_config[name]):
        state = _saved_network(folder)
        model.prompt_encoder[name] = _rebuilt(model, name, inference=False)
        model.prompt_encoder[name].load_state_dict(state)
    model.prompt_encoder[name].requires_grad_(True)
    model.peft_config[name].inference_mode = False
    model.set_adapter(name)


def accelerate(kind: PeftType, model: nn.Module) -> int:
    """Give peft's model its subclass if its adapter is of ``kind``; return how many were."""
    if not isinstance(model, PeftModel) or not model.peft_config:
        return 0
    stock = swap.stock_class(model)
    if stock not in _MIXINS or next(iter(model.peft_config.values())).peft_type != kind:
        return 0
    return int(swap.swap(model, swap.fast_class(_MIXINS[stock], stock, shows_stock=True)))


def attach(
    config_class: type, model: nn.Module, task_type: str, adapter_name: str, **settings: Any
) -> nn.Module:
    """Return ``model`` with virtual tokens in front; only they train, and a new head.

    Raises:
        ArgumentError: FG-ARG-001, a setting that peft's configuration does not have.
        AdapterError: FG-ADAPT-034 a prefix and gradient checkpointing, FG-ADAPT-036 fewer than one
            token, FG-ADAPT-037 no cache to put a prefix into, FG-ADAPT-039 what peft refuses.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    translate(config_class.__name__, settings, known, {})
    count = settings.get("num_virtual_tokens", 0)
    if not isinstance(count, int) or count < 1:
        raise AdapterError(
            "FG-ADAPT-036",
            f"num_virtual_tokens={count!r}",
            allowed="a whole number of at least 1, usually 5 to 100",
            fix="num_virtual_tokens=20",
        )
    try:
        config = config_class(task_type=TaskType(task_type), **settings)
    except (ValueError, TypeError) as error:
        raise refused_by_peft(error) from error
    return wrap(model, config, adapter_name)


def wrap(model: nn.Module, config: Any, adapter_name: str) -> nn.Module:
    """``get_peft_model`` for a configuration of virtual tokens; see ``attach``."""
    core: Any = swap.core(model)
    if _is_prefix(config):
        if _recomputes(core):
            raise recomputed()
        if "past_key_values" not in _parameters(swap.stock_class(swap.decoder(core)).forward):
            raise AdapterError(
                "FG-ADAPT-037",
                f"method 'prefix' on {swap.stock_class(core).__name__}, which keeps no keys and "
                "values between calls that a prefix could stand in",
                allowed="decoders, and encoders with past_key_values (bert, roberta)",
                fix="method='prompt', which works with every model",
            )
    _sizes(config, core.config.get_text_config())
    try:
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    except (ValueError, TypeError, OSError) as error:
        raise refused_by_peft(error) from error
    accelerate(config.peft_type, wrapped)
    return wrapped


def _sizes(config: Any, found: Any) -> None:
    """Fill in sizes that peft looks up by names which some models (DistilBERT) do not use."""
    for wanted, name in (
        ("num_layers", "num_hidden_layers"),
        ("token_dim", "hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
    ):
        if getattr(config, wanted) is None:
            setattr(config, wanted, getattr(found, name, None))


def refused_by_peft(error: Exception) -> AdapterError:
    """The error for settings that peft does not take: FG-ADAPT-039."""
    return AdapterError(
        "FG-ADAPT-039",
        f"peft refuses these settings: {error}",
        fix="correct the setting that it names, or leave it out for its default",
    )

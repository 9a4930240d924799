"""Several named adapters on one model: add, switch, disable, combine, delete, list.

What: functions over a peft model, in use as ``finegraft.adapters.named``. How: peft's own methods;
after each of them the adapter layers are fast again, and new layers are in the mode that the model
is in. Constraint: one kind of adapter a model, which is peft's rule; a start that rewrites the base
(PiSSA, OLoRA, LoftQ) is refused for a second adapter, because the first one stands on that base.
Trade-off: a combination is a new adapter of its own, so it takes memory until it is deleted, and
training its parts later does not change it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType
from torch import nn

from finegraft.adapters import _configs, _methods, _plugin, _tokens, ia3, lora
from finegraft.adapters._task import task_of
from finegraft.core.errors import AdapterError, did_you_mean

COMBINATIONS = ("cat", "linear", "svd")
_REWRITES_BASE = ("pissa", "olora", "loftq", "corda", "eva", "mica")


@dataclass(frozen=True)
class NamedAdapter:
    """One row of ``listed``.

    Attributes:
        parameters: Numbers it holds, a classifier's own head included.
        trainable: How many of them train now.
    """

    name: str
    method: str
    active: bool
    parameters: int
    trainable: int


def listed(model: Any) -> list[NamedAdapter]:
    """Every adapter that ``model`` carries, in the order in which they came.

    Raises:
        AdapterError: FG-ADAPT-046, it carries none.
    """
    configs = _configs_of(model)
    active = set() if _is_disabled(model) else set(_active(model))
    rows = []
    for name, config in configs.items():
        own = {id(p): p for p in _parameters(model, name)}.values()
        rows.append(
            NamedAdapter(
                name=name,
                method=_methods.name_of(config) or str(config.peft_type.value).lower(),
                active=name in active,
                parameters=sum(p.numel() for p in own),
                trainable=sum(p.numel() for p in own if p.requires_grad),
            )
        )
    return rows


def add(
    model: Any, name: str, *, method: str | None = None, config: Any = None, **settings: Any
) -> Any:
    """Give ``model`` a new adapter, which becomes the active one; a bare model gets its first.

    A saved one is added by ``finegraft.opening.add_saved``, which knows whether it fits the base.

    Args:
        method: One of ``adapters.names()``; None: lora.
        config: A configuration of ``finegraft``'s or peft's instead of method and settings.
        settings: Of the method, as ``adapters.attach`` takes them.

    Returns:
        The model; a bare one comes back wrapped.

    Raises:
        AdapterError: FG-ADAPT-046 a name that is taken or cannot be one, FG-ADAPT-047 a second
            adapter of another kind, or one that rewrites the base; and those of the method.
    """
    if config is not None:
        found, task, settings = _configs.described(model, config)
        method = found or ""
    else:
        method, task = method or "lora", task_of(model)
    if not hasattr(model, "peft_config"):
        _check_name(name, {})
        if config is not None:
            return _configs.get_peft_model(model, config, adapter_name=name)
        return _methods.attach(model, method, task_type=task, adapter_name=name, **settings)
    _check_name(name, _configs_of(model))
    made = _second(model, method, task, settings) if method else config
    try:
        model.add_adapter(name, made)
    except (ValueError, TypeError) as error:
        raise _refused(error) from error
    _tokens.train_new_rows(model, name)
    return switch(model, name)


def switch(model: Any, name: str) -> Any:
    """Make ``name`` the one that answers and trains; return the model.

    One that was opened for answering stays frozen.

    Raises:
        AdapterError: FG-ADAPT-046, no such adapter.
    """
    config = _configs_of(model, name)[name]
    _switch_on(model)
    model.set_adapter(name, inference_mode=bool(config.inference_mode))
    for other, encoder in getattr(model, "prompt_encoder", {}).items():  # peft freezes none
        encoder.requires_grad_(other == name and not config.inference_mode)
    return _ready(model)


def disable(model: Any) -> Any:
    """Answer as the base does until ``enable``; ``disabled`` does it for a block.

    Raises:
        AdapterError: FG-ADAPT-046, the model carries no adapter.
    """
    _configs_of(model)
    _layers(model).disable_adapter_layers()
    return model


def enable(model: Any) -> Any:
    """Take ``disable`` back.

    Raises:
        AdapterError: FG-ADAPT-046, the model carries no adapter.
    """
    _configs_of(model)
    return switch(model, _active(model)[0])


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """The base answers inside the block; what trained before trains after it.

    Raises:
        AdapterError: FG-ADAPT-046, the model carries no adapter.
    """
    was = _is_disabled(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    disable(model)
    try:
        yield model
    finally:
        if not was:
            _switch_on(model)
        for parameters, trains in ((trained, True), (frozen, False)):
            for parameter in parameters:
                parameter.requires_grad_(trains)


def combine(
    model: Any, names: Sequence[str], weights: Sequence[float], name: str, how: str = "cat"
) -> Any:
    """Make a new LoRA out of several, weighted, and switch to it.

    Args:
        names: The adapters that go in.
        weights: One number each.
        name: Of the new one.
        how: "cat" is the exact sum, its rank the sum of ranks; "svd" the nearest of the largest
            rank; "linear" sums the matrices, not their products, and wants equal ranks.

    Raises:
        AdapterError: FG-ADAPT-046 unknown or taken names, FG-ADAPT-048 what cannot be combined.
    """
    configs = _configs_of(model, *names)
    _check_name(name, configs)
    reason = _uncombinable([(n, configs[n]) for n in names], weights, how)
    if reason is not None:
        raise AdapterError(
            "FG-ADAPT-048",
            f"combining {', '.join(names)}: {reason}",
            allowed=f"plain LoRA adapters, a weight for each, how={' or '.join(COMBINATIONS)}",
            fix="combine(model, ['a', 'b'], [0.5, 0.5], 'both', how='cat')",
        )
    kind = "cat" if how == "cat" else how
    model.base_model.add_weighted_adapter(
        list(names), [float(w) for w in weights], name, combination_type=kind
    )
    return switch(model, name)


def delete(model: Any, name: str) -> Any:
    """Remove an adapter; where it was active, the first of the others becomes so.

    Raises:
        AdapterError: FG-ADAPT-046 no such adapter, FG-ADAPT-049 it is the only one.
    """
    configs = _configs_of(model, name)
    if len(configs) == 1:
        raise AdapterError(
            "FG-ADAPT-049",
            f"'{name}' is the only adapter",
            allowed="deleting one of several",
            fix="disable(model) answers as the base; load the base anew to be rid of adapters",
        )
    active = _active(model)
    following = active[0] if active and active[0] != name else next(n for n in configs if n != name)
    was = _is_disabled(model)
    if active and active[0] == name:  # peft would warn, and leave the next one frozen
        switch(model, following)
    model.delete_adapter(name)
    return disable(model) if was else switch(model, following)


def _second(model: Any, method: str, task: str, settings: dict[str, Any]) -> Any:
    """The configuration of a further adapter on a model that carries some."""
    found, preset = _methods.find(method)
    _methods.check(model, method, task)
    settings = {**preset, **settings}
    check_kind(model, _methods.name_of(found))
    start = str(settings.get("init_lora_weights", "")).lower()
    if start.startswith(_REWRITES_BASE):
        raise AdapterError(
            "FG-ADAPT-047",
            f"init_lora_weights='{start}' for a second adapter: it takes its start out of the "
            "base's weights, which the first adapter stands on",
            allowed="True, 'gaussian' or 'orthogonal' here",
            fix="leave init_lora_weights out, or train this one on a base of its own",
        )
    if method == "lora" or found is lora.METHOD:
        settings = {"r": 16, "target_modules": lora.ALL_LINEAR, **settings}
        lora.check_targets(model.get_base_model(), settings["target_modules"])
    if found is ia3.METHOD:
        names = ("target_modules", "feedforward_modules")
        given = {name: settings[name] for name in names if name in settings}
        settings = {**settings, **ia3.targets(model.get_base_model(), **given)}
    if found.in_peft is False:
        _plugin.register()
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[found.peft_type]  # type: ignore[index]
    if issubclass(kind, tuple(_virtual_kinds())):
        settings.setdefault("num_virtual_tokens", 20)
        if method == "prefix":
            settings.setdefault("init_weights", "zero")
    try:
        return kind(task_type=TaskType(task), **settings)
    except (ValueError, TypeError) as error:
        raise _refused(error) from error


def check_new(model: Any, name: str) -> None:
    """Prove that ``model`` carries adapters and none of this name.

    Raises:
        AdapterError: FG-ADAPT-046.
    """
    _check_name(name, _configs_of(model))


def check_kind(model: Any, method: str | None) -> None:
    """Prove that a further adapter of ``method`` is of the kind that ``model`` carries.

    Raises:
        AdapterError: FG-ADAPT-047.
    """
    carried = _methods.name_of(next(iter(_configs_of(model).values())))
    if carried != method:
        raise AdapterError(
            "FG-ADAPT-047",
            f"an adapter of the method '{method}' beside one of '{carried}'",
            allowed=f"the method of the first one, '{carried}'",
            fix="load the base a second time for the other method",
        )


def _virtual_kinds() -> list[type]:
    names = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
    return [PEFT_TYPE_TO_CONFIG_MAPPING[name] for name in names]


def _refused(error: Exception) -> AdapterError:
    return AdapterError(
        "FG-ADAPT-047",
        f"peft does not add this adapter: {error}",
        allowed="an adapter of the kind that the model carries",
        fix="give it the settings of the first adapter, or load the base a second time for it",
    )


def _uncombinable(
    chosen: Sequence[tuple[str, Any]], weights: Sequence[float], how: str
) -> str | None:
    if how not in COMBINATIONS:
        return f"how='{how}' is unknown, {did_you_mean(how, COMBINATIONS)}"
    if not chosen or len(weights) != len(chosen):
        return f"{len(chosen)} adapters and {len(weights)} weights"
    for name, config in chosen:
        if _methods.name_of(config) != "lora":
            return f"'{name}' is no LoRA, and only low-rank products can be added up"
        for setting in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, setting, None):
                return f"'{name}' has {setting}, which a sum of low-rank products does not hold"
    ranks = {(config.r, str(config.rank_pattern)) for _, config in chosen}
    if how == "linear" and len(ranks) > 1:
        return "how='linear' sums matrices, and theirs have different ranks; 'cat' and 'svd' do not"
    return None


def _check_name(name: str, taken: Any) -> None:
    if not name or "." in name or name in taken or name != Path(name).name:
        raise AdapterError(
            "FG-ADAPT-046",
            f"an adapter cannot be called {name!r}"
            + (": there is one of that name" if name in taken else ""),
            allowed="a new name of letters, digits, - and _",
            fix="named.delete(model, name) makes a name free" if name in taken else "name='second'",
        )


def _configs_of(model: Any, *names: str) -> Any:
    """peft's configurations by name, once ``names`` are known to be among them."""
    configs = getattr(model, "peft_config", None) or {}
    missing = [name for name in names if name not in configs]
    if missing or not configs or not hasattr(model, "get_base_model"):
        raise AdapterError(
            "FG-ADAPT-046",
            f"no adapter is called '{missing[0]}'" if missing else "the model carries no adapter",
            allowed=", ".join(configs) or "a model with an adapter",
            fix=did_you_mean(missing[0], configs)
            if missing and configs
            else "named.add(model, 'first') gives it one",
        )
    return configs


def _active(model: Any) -> list[str]:
    active = model.active_adapter
    return list(active) if isinstance(active, list | tuple) else [active]


def _layers(model: Any) -> Any:
    """What switches all adapters off: peft's tuner, or the model itself for virtual tokens."""
    return model if hasattr(type(model), "disable_adapter_layers") else model.base_model


def _is_disabled(model: Any) -> bool:
    if hasattr(type(model), "disable_adapter_layers"):
        return bool(model._adapters_disabled)
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def _switch_on(model: Any) -> None:
    if _is_disabled(model):
        _layers(model).enable_adapter_layers()


def _parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and name in module:
            own = module[name]
            yield from own.parameters() if isinstance(own, nn.Module) else [own]


def _ready(model: Any) -> Any:
    """Fast layers, in the mode that the model is in."""
    _methods.accelerate(model)
    if not model.training:
        model.eval()
    return model

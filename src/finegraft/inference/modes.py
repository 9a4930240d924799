"""Switch one model between answering and learning.

What: ``for_inference`` and ``for_training``, the pair that Unsloth's scripts call, and
``answering``, eval mode for a block. How: what is changed is written down (training flag of every
module, ``use_cache`` of every configuration, checkpointing of every block) and put back from that
record, so a module that somebody froze in eval mode stays there; ``decode`` gives ``generate`` its
fast loop and takes it away again. Constraint: no weight of the model is touched; adapters are
merged into a copy. Trade-off: the record lives beside the model, not on it, so a deep copy starts
without one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from finegraft.inference import decode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """What ``for_inference`` changed, in the order in which it is put back."""

    was_training: bool
    resting: list[nn.Module]  # in eval mode before; layers that come later are not among them
    checkpointed: list[nn.Module]
    use_cache: list[tuple[Any, bool]]


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


def _configs(model: nn.Module) -> list[Any]:
    """Every distinct configuration that carries ``use_cache``, the generation one included."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            if isinstance(getattr(config, "use_cache", None), bool):
                found[id(config)] = config
    return list(found.values())


def _start_training(modules: list[nn.Module]) -> None:
    for module in modules:  # module.train() would reach into the children, whose flags may differ
        module.training = True


def for_inference(model: nn.Module) -> nn.Module:
    """Put ``model`` in eval mode, cache on, checkpointing off, fast ``generate``. Twice is fine.

    A model whose ``generate`` stays as it is (an unknown family, say) is told in one logged line.

    Args:
        model: Any ``nn.Module``; an adapter may be attached.

    Returns:
        The same model.
    """
    if model in _records:
        model.eval()
        return model
    modules = list(model.modules())
    configs = _configs(model)
    _records[model] = _Record(
        was_training=model.training,
        resting=[m for m in modules if not m.training],
        checkpointed=[m for m in modules if getattr(m, "gradient_checkpointing", None) is True],
        use_cache=[(config, config.use_cache) for config in configs],
    )
    for module in _records[model].checkpointed:
        module.gradient_checkpointing = False
    for config in configs:
        config.use_cache = True
    model.eval()
    reason = decode.attach(model)
    if reason is not None:
        logger.info("generate stays transformers': %s", reason)
    return model


def for_training(model: nn.Module) -> nn.Module:
    """Put back what ``for_inference`` changed and leave ``model`` in training mode. Twice is fine.

    A model that was already in eval mode as a whole has no training flags worth restoring: every
    module of it is put in training mode.

    Args:
        model: The model that was given to ``for_inference``, or any other.

    Returns:
        The same model.
    """
    decode.detach(model)
    record = _records.pop(model, None)
    if record is not None:
        for module in record.checkpointed:
            module.gradient_checkpointing = True
        for config, value in record.use_cache:
            config.use_cache = value
        if record.was_training:
            resting = set(map(id, record.resting))
            _start_training([m for m in model.modules() if id(m) not in resting])
    if not model.training:
        model.train()
    return model


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode for a block; every module's own training flag is back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        _start_training(training)

"""``Trainer``: transformers' trainer, called with the keyword names of any year.

What: classification and everything else that ``SFTTrainer`` is not for. How: keywords are
translated, the stock constructor takes over, then the model's modules are swapped for fast ones,
which the log says. Constraint: nothing but names and speed is changed, so what transformers
documents is what happens. Trade-off: no loss of our own here, and no batching of our own: encoders
drop the padding of a batch themselves, so rows may stay shuffled.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import transformers
from torch import nn

from finegraft import adapters
from finegraft.core.arguments import Rename, translate
from finegraft.models import families, quantize, swap
from finegraft.training import heads
from finegraft.training.optimizer import LoraPlus
from finegraft.training.start import start_from_data

logger = logging.getLogger(__name__)

LEGACY = {"tokenizer": Rename("processing_class")}


class Trainer(LoraPlus, transformers.Trainer):
    """transformers' ``Trainer``; the arguments are its own, of any year.

    Args:
        positional: In transformers' order.
        keywords: Under today's names or older ones, which are translated with a warning.

    Raises:
        ArgumentError: FG-ARG-001 a name that no version has, FG-ARG-002 a setting given twice.
    """

    def __init__(self, *positional: Any, **keywords: Any):
        known = {*inspect.signature(transformers.Trainer.__init__).parameters} - {"self"}
        super().__init__(*positional, **translate("Trainer", keywords, known, LEGACY))
        _accelerate(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method; an adapter that starts from data sees some of the rows first."""
        start_from_data(self.model, lambda: self.get_eval_dataloader(self.train_dataset))
        return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """The stock method; a model made anew for every trial is accelerated anew."""
        model = super().call_model_init(trial)
        _accelerate(model)
        return model


def _accelerate(model: nn.Module) -> None:
    """Swap what is known; models that transformers does not know stay as they are."""
    core = swap.core(model)
    if not isinstance(core, transformers.PreTrainedModel):
        return
    if getattr(core, "is_quantized", False):
        quantize.protect(core)
    families.apply(model)
    adapters.accelerate(model)
    adapters.train_new_rows(model)
    heads.keep_precise(model)
    logger.info("model: %s", swap.summary(model))

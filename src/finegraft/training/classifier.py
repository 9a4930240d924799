"""``ClassifierTrainer``: our ``Trainer`` with what a run folder asks of it.

What: tokens are counted, checkpoints are whole or not there, labels are saved with an adapter, and
evaluations keep their tables. How: transformers does the training; ``loss_of`` is given to it as
``compute_loss_func``, so that a weighted loss is averaged over the whole step, whatever the
micro-batches. Constraint: a head's logits are made float32 before the loss. Trade-off: checkpoints
are written between evaluations too, every ``save_steps``, so that a crash costs less than an epoch;
those at evaluations are the ones that can be the best.

Shapes: b rows, c labels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from finegraft import opening
from finegraft.data.labels import CLASSES, SEVERAL
from finegraft.models import classifier, swap
from finegraft.training import checkpoint, metrics
from finegraft.training.distributed.batches import is_blank
from finegraft.training.distributed.trainer import Together
from finegraft.training.trainer import Trainer
from finegraft.training.watch import Watched


def loss_of(problem_type: str, weights: list[float] | None = None) -> Callable[..., torch.Tensor]:
    """Return the loss of a problem as transformers' ``compute_loss_func`` takes it.

    Args:
        problem_type: Cross-entropy for one class a row, binary cross-entropy for several labels,
            squared error for values.
        weights: Of the classes, or of the presence of each of several labels, [c].
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()  # [b, c]
        weight = None if weights is None else torch.tensor(weights, device=logits.device)
        if problem_type == CLASSES:
            total = F.cross_entropy(logits, labels.view(-1), weight=weight, reduction="sum")
        elif problem_type == SEVERAL:
            total = F.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=weight, reduction="sum"
            )
        else:
            total = F.mse_loss(logits.view(-1), labels.view(-1).float(), reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    return loss


class Measure:
    """Transformers' ``compute_metrics``, which keeps the tables of the last evaluation.

    Args:
        problem_type: As in ``data.labels``.
        names: Of the labels.

    Attributes:
        last: Everything that ``metrics.measure`` returned last; empty before.
    """

    def __init__(self, problem_type: str, names: list[str]):
        self.problem_type = problem_type
        self.names = names
        self.last: dict[str, Any] = {}

    def __call__(self, predicted: Any) -> dict[str, float]:
        logits, labels = np.asarray(predicted.predictions), np.asarray(predicted.label_ids)
        self.last = metrics.measure(self.problem_type, self.names, logits, labels)
        return metrics.numbers(self.last)


class SaveOften(TrainerCallback):
    """Also saves every ``steps`` steps, beside the saves at evaluations."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        if state.global_step % self.steps == 0:
            control.should_save = True


class ClassifierTrainer(Watched, checkpoint.WholeCheckpoints, Together, Trainer):
    """Trainer of heads that give one answer a row or a token; the arguments are transformers'.

    Attributes:
        tokens_seen: Real tokens trained on in this process.
    """

    tokens_seen = 0

    @property
    def measured(self) -> dict[str, Any]:
        """Measures and tables of the last evaluation; empty where there is no ``Measure``."""
        return dict(getattr(self.compute_metrics, "last", {}))

    def measure(self) -> dict[str, Any]:
        """Measures and loss of the model as it is now; tells no callback.

        Empty without held-out rows.
        """
        if self.eval_dataset is None:
            return {}
        rows = self.get_eval_dataloader(self.eval_dataset)
        output = self.evaluation_loop(rows, "measuring", prediction_loss_only=False)
        return {"loss": output.metrics["eval_loss"], **self.measured}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stock method; tokens are counted, and a decoder makes no cache."""
        if self.model.training and self.args.world_size == 1:
            self.tokens_seen += self.real_tokens(inputs)
        if classifier.takes_cache(swap.core(self.model)):
            inputs = {**inputs, "use_cache": False}
        blank = self.args.world_size > 1 and self.model.training and is_blank(inputs["labels"])
        found = super().compute_loss(model, inputs, *args, **kwargs)
        return found * 0.0 if blank else found  # no row was left for this process

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return  # another process does
        output_dir = output_dir or self.args.output_dir
        with checkpoint.full_disk_named(Path(output_dir)), swap.stock(swap.core(self.model)):
            super()._save(output_dir, state_dict)
        if hasattr(self.model, "get_base_model"):
            opening.write_note(self.model, Path(output_dir))

"""What a trainer does differently when it is one of several.

What: ``Together`` is mixed into trainers; with one process it changes nothing. How: rows of a step
are shared out (``batches``), tokens and the wish to stop are added up once a step, DDP averages the
gradients. Constraint: losses and gradients are those of one process that takes as many rows a step:
the sum over all labelled tokens, divided by their number on all processes. Trade-off: one small
message more a step, so that all of them stop after the same step.

Shapes: b rows of a micro-batch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
import transformers
from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer import SCHEDULER_NAME

from finegraft.training.collate import IGNORED
from finegraft.training.distributed import sharding, world
from finegraft.training.distributed.batches import Blanks, SharedBatches, is_blank

SPLIT_OPTIMIZER = "optimizer"


class Together(transformers.Trainer):
    """Mixed into trainers that may be one of several.

    Attributes:
        tokens_seen: Real tokens trained on, by all processes.
        stop_wanted: Set in any process to make all of them stop after the same step.
        sharding: ``none`` or ``fsdp2``, set before training.
        stop_agreed: Whether one of them wanted that when this step began; None: not asked yet.
    """

    tokens_seen = 0
    stop_wanted = False
    stop_agreed: bool | None = None
    fills_up_evaluation = False
    sharding = "none"
    _is_split = _splits_trained = False

    def create_accelerator_and_postprocess(self) -> None:
        """Every trained weight gets a gradient in each step, so DDP need not look for others."""
        if self.args.world_size > 1 and self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method; layers are split first, where that was asked for."""
        if self.sharding != "none" and not self._is_split:
            self._is_split = True
            self._splits_trained = sharding.shard(self.model, self.args.device)
            # accelerate would wrap it in DDP, which holds every weight whole
            self.accelerator.prepare_model = functools.partial(
                self.accelerator.prepare_model, evaluation_mode=True
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._splits_trained:
            sharding.separate(optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The stock method; split weights are put together by all processes, for the first one."""
        if not self._splits_trained:
            super().save_model(output_dir, _internal_call)
            return
        state = sharding.whole_state(self.model, self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The stock method; of split weights each process writes its part."""
        if not self._splits_trained:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        inner = self.optimizer.optimizer
        sharding.save_optimizer(self.model, inner, Path(output_dir) / SPLIT_OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The stock method, or what ``_save_optimizer_and_scheduler`` wrote."""
        if checkpoint is None or not (Path(checkpoint) / SPLIT_OPTIMIZER).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        inner = self.optimizer.optimizer
        sharding.load_optimizer(self.model, inner, Path(checkpoint) / SPLIT_OPTIMIZER)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(sharding.for_groups(schedule, len(inner.param_groups)))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method; without DDP the gradients are averaged here, once a step."""
        loss = super().training_step(*args, **kwargs)
        if self._is_split and self.accelerator.sync_gradients:
            sharding.average_gradients(self.model.parameters())
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method; dropout draws other numbers in each process."""
        if self.args.world_size > 1:
            torch.manual_seed(self.args.seed + self.args.process_index)
            skip_frozen(self.model)
        return super().train(*args, **kwargs)

    def real_tokens(self, inputs: dict[str, Any]) -> int:
        """Tokens of the rows of a batch, padding left out."""
        return int(inputs["attention_mask"].sum())

    def get_train_dataloader(self) -> Any:
        """Batches of this process; see ``batches``. Streams and other orders are accelerate's."""
        rows, args = self.train_dataset, self.args
        order = str(getattr(args, "train_sampling_strategy", "random"))
        plain = "random" in order and not args.dataloader_drop_last
        if args.world_size == 1 or not isinstance(rows, Dataset) or not plain:
            return super().get_train_dataloader()
        lengths = row_lengths(rows)
        rows = self._remove_unused_columns(rows, description="Training")
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        batches = SharedBatches(
            # the order that accelerate gives one process
            SeedableRandomSampler(
                rows, data_seed=args.seed if args.data_seed is None else args.data_seed
            ),
            lengths,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
        )
        return DataLoaderShard(
            rows,
            device=self.accelerator.device,
            batch_sampler=batches,
            collate_fn=Blanks(self.data_collator, rows[shortest]),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The stock method, after which all processes know of all tokens and of a wish to stop."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.args.world_size > 1:
            real = sum(self.real_tokens(b) for b in batches if not is_blank(b["labels"]))
            sums = world.total([real, float(self.stop_wanted)], self.args.device)
            self.tokens_seen += int(sums[0])
            self.stop_agreed = sums[1] > 0
        return batches, items

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The stock one, whose rows are filled up with rows without a label to equal shares."""
        if self.args.world_size > 1 and self.fills_up_evaluation:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
            if isinstance(rows, Dataset):
                eval_dataset = filled_up(rows, self.args.eval_batch_size * self.args.world_size)
        return super().get_eval_dataloader(eval_dataset)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The stock method; a process that was not there before starts with numbers of its own."""
        rank = self.args.process_index
        name = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{rank}.pth"
        if checkpoint is not None and not (Path(checkpoint) / name).is_file():
            transformers.set_seed(self.args.seed + rank + 7919 * self.state.global_step)
            return
        super()._load_rng_state(checkpoint)


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row; 1 where rows have no ids yet."""
    if "input_ids" not in rows.column_names:
        return [1] * len(rows)
    return [len(row) for row in rows["input_ids"]] if rows._indices is not None else _lengths(rows)


def _lengths(rows: Dataset) -> list[int]:
    return pc.list_value_length(rows.data.column("input_ids")).to_pylist()


def filled_up(rows: Dataset, multiple: int) -> Dataset:
    """Add rows without a label until their number is a multiple."""
    missing = -len(rows) % multiple
    if not missing:
        return rows
    lengths = row_lengths(rows)
    blank = dict(rows[min(range(len(lengths)), key=lengths.__getitem__)])
    blank["labels"] = [IGNORED] * len(blank["input_ids"])
    columns = {name: [blank[name]] * missing for name in rows.column_names}
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])


def skip_frozen(model: torch.nn.Module) -> None:
    """Tell DDP to send no frozen weight around: every process has read the same file."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)

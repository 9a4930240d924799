"""``SFTTrainer``: trl's trainer with our data path, our loss and whole checkpoints.

What: a subclass of ``trl.SFTTrainer``, so that callbacks, resume and accelerate work as documented
there. How: rows are rendered by ``data``, the loss comes from the swapped model, keyword arguments
of 2024 are translated. Constraint: trl's constructor replaces ``model.forward`` on the instance and
sends telemetry; both are undone. Trade-off: trl's entropy and token-accuracy columns are not
logged, because on a CPU they cost half of the step.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from finegraft import adapters, opening
from finegraft.core.arguments import Drop, Rename, translate
from finegraft.core.errors import AdapterError
from finegraft.kernels.document_attention.layout import SHORT
from finegraft.models import causal_loss, families, quantize, swap
from finegraft.models.locate import locate
from finegraft.models.tokenizer import prepare
from finegraft.training import checkpoint, heads, memory
from finegraft.training.arguments import LEGACY, SFTConfig
from finegraft.training.collate import IGNORED, Collator
from finegraft.training.dataset import Rendering, encode, longest_rows
from finegraft.training.distributed.trainer import Together
from finegraft.training.optimizer import LoraPlus
from finegraft.training.start import padded, start_from_data
from finegraft.training.watch import Watched

logger = logging.getLogger(__name__)

# Settings that older scripts pass to the trainer and that are the configuration's today.
_MOVED = (
    "dataset_text_field",
    "max_length",
    "packing",
    "eval_packing",
    "dataset_num_proc",
    "dataset_kwargs",
    "model_init_kwargs",
    "neftune_noise_alpha",
    "completion_only_loss",
)
_LEGACY = {
    "tokenizer": Rename("processing_class"),
    "max_seq_length": LEGACY["max_seq_length"],
    "dataset_batch_size": LEGACY["dataset_batch_size"],
    "num_of_sequences": LEGACY["num_of_sequences"],
    "chars_per_token": LEGACY["chars_per_token"],
    "infinite": Drop("epochs and max_steps decide the length"),
}


class SFTTrainer(Watched, checkpoint.WholeCheckpoints, Together, LoraPlus, trl.SFTTrainer):
    """Supervised fine-tuning; the arguments are trl's, of any year.

    Args:
        model: A model (finegraft's, transformers' or peft's), or a name that ``from_pretrained``
            of ``FastLanguageModel`` takes.
        args: ``SFTConfig`` or ``TrainingArguments``, finegraft's or stock.
        train_dataset: Rows: prompt/completion, messages, conversations, alpaca columns, text, or
            ``input_ids``; a ``datasets.Dataset``, a stream, or a list of dictionaries.
        peft_config: What ``finegraft.get_peft_model`` takes, to attach an adapter here.
        formatting_func: Row to string, or batch to list of strings.
        legacy: Names of older versions, translated with one warning each.

    Raises:
        ArgumentError: FG-ARG-001 unknown name, FG-ARG-002 a setting given twice.
        AdapterError: FG-ADAPT-030, FG-ADAPT-034 what the method cannot; with ``peft_config`` those
            of ``finegraft.get_peft_model``.
        DataError: rows that cannot be trained on; see ``data``.
    """

    _tag_names = ("finegraft", "sft")
    fills_up_evaluation = True

    def __init__(
        self,
        model: Any,
        args: transformers.TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        **legacy: Any,
    ):
        known = {*inspect.signature(trl.SFTTrainer.__init__).parameters, *_MOVED} - {"self"}
        given = translate("SFTTrainer", legacy, known, _LEGACY)
        processing_class = given.pop("processing_class", processing_class)
        moved = {name: given.pop(name) for name in _MOVED if name in given}
        args = SFTConfig.from_arguments(args or SFTConfig("outputs"), **moved)
        model, processing_class = _loaded(model, processing_class)
        self.method = _method_for(peft_config) or adapters.method_of(model)
        _require_possible(args, self.method)
        if peft_config is not None:
            model = adapters.get_peft_model(model, peft_config)
        quantize.protect(model)  # an eval forward of a stock 4-bit model would repack its weights
        self.rendering = _rendering(args, processing_class, formatting_func)
        self.fast_loss = causal_loss.apply(model)
        families.apply(model)
        collator = Collator(
            processing_class.pad_token_id or 0,
            flat=families.is_padding_free(model) and not _refusal(self.method, "not_packed"),
            share_prefix=args.share_prefix and _may_share(model),
        )
        self._pad_token = processing_class.pad_token_id or 0
        self.tokens_seen = 0
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        with _own_forward(model), _own_dtypes(model), _plain_head(model):
            super().__init__(
                model=model,
                args=_without_preparation(args, model),
                data_collator=data_collator or collator,
                train_dataset=encode(train_dataset, self.rendering),
                eval_dataset=self._encode_eval(eval_dataset),
                processing_class=processing_class,
                **given,
            )
        adapters.accelerate(self.model)
        adapters.train_new_rows(self.model)
        heads.keep_precise(self.model)
        logger.info("%s", swap.summary(self.model))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """trl's ``train``, after deciding which layers must be recomputed to fit the memory."""
        rows = Collator(self._pad_token)
        start_from_data(self.model, lambda: padded(self.train_dataset, rows))
        chosen = self.args.gradient_checkpointing or self.model.is_gradient_checkpointing
        if not chosen and not _refusal(self.method, "not_recomputed"):
            self._plan_memory()
        return super().train(*args, **kwargs)

    def _plan_memory(self) -> None:
        longest = longest_rows(self.train_dataset, self.args.per_device_train_batch_size)
        if not longest:
            return
        length = min(longest[0], SHORT)
        ids = (list(next(iter(self.train_dataset))["input_ids"]) * length)[:length]
        batch = self.data_collator([{"input_ids": ids, "labels": ids}])
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        self.model.train()
        with torch.random.fork_rng():
            chosen = memory.plan(self.model, {**batch, "use_cache": False}, sum(longest))
        if chosen is not None:
            memory.apply(self.model, memory.agreed(chosen))

    def _encode_eval(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: self._encode_eval(part) for name, part in dataset.items()}
        return None if dataset is None else encode(dataset, self.rendering)

    def _send_telemetry(self) -> None:
        """Send nothing: finegraft opens no connection that was not asked for."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "seq_lengths", "attention_mask"]

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:
        """Loss on the held-out rows, raw or prepared; computes no logits."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._encode_eval(eval_dataset)
        return super(trl.SFTTrainer, self).evaluate(eval_dataset, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Token-weighted cross-entropy over the whole step, from the swapped model.

        Args:
            num_items_in_batch: Labelled tokens of all micro-batches (and ranks) of the step.
        """
        if self.model.training and self.args.world_size == 1:
            self.tokens_seen += _real_tokens(inputs)
        extra = {"loss_only": not return_outputs} if self.fast_loss else {}
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch, **extra)
        loss = outputs.loss
        if not self.model.training:
            labelled = (inputs["labels"][..., 1:] != IGNORED).sum()
            weighed = torch.where(labelled > 0, loss.detach().double() * labelled, 0.0)
            self._evaluated += torch.stack([weighed, labelled.double()])
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over the ranks
        return (loss, outputs) if return_outputs else loss

    def real_tokens(self, inputs: dict[str, Any]) -> int:
        """Tokens of the rows of a batch, a shared beginning counted for each of them."""
        return _real_tokens(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop, with a loss that weighs tokens alike whatever the batch size."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        total, labelled = self.accelerator.gather(self._evaluated[None]).sum(0).tolist()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if labelled and name in output.metrics:
            output.metrics[name] = total / labelled
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return  # another process does
        output_dir = output_dir or self.args.output_dir
        with checkpoint.full_disk_named(Path(output_dir)):
            super()._save(output_dir, state_dict)
            save_special_tokens(self.processing_class, Path(output_dir))
            if hasattr(self.model, "get_base_model"):
                opening.write_note(self.model, Path(output_dir))


def save_special_tokens(tokenizer: Any, folder: Path) -> None:
    """Write ``special_tokens_map.json``, which readers older than transformers 5 look for."""
    values = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    (folder / "special_tokens_map.json").write_text(
        json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Load a model given by name, and find the tokenizer of one given without."""
    if isinstance(model, str):
        opened = opening.open_model(model, trainable=True)
        return opened.model, tokenizer or opened.tokenizer
    if tokenizer is None:
        tokenizer = opening.open_tokenizer(locate(model.config.name_or_path))
    elif tokenizer.pad_token_id is None:
        prepare(tokenizer, model.config, None)
    return model, tokenizer


def _method_for(peft_config: Any) -> adapters.Method | None:
    name = getattr(peft_config, "method", None) or adapters.name_of(peft_config)
    return None if name is None else adapters.METHODS.get(name)


def _refusal(method: adapters.Method | None, what: str) -> str | None:
    return getattr(method, what, None)


def require_packable(method: adapters.Method | None) -> None:
    """Prove that rows may be packed for this method.

    Raises:
        AdapterError: FG-ADAPT-030.
    """
    reason = _refusal(method, "not_packed")
    if reason:
        raise AdapterError(
            "FG-ADAPT-030",
            f"packing=True with method '{adapters.name_of(method)}': {reason}",
            allowed="packing=False with this method",
            fix="packing=False, or method='lora', which packs",
        )


def _require_possible(args: SFTConfig, method: adapters.Method | None) -> None:
    """Raises AdapterError FG-ADAPT-030 for packing and FG-ADAPT-034 for checkpointing."""
    if args.packing or args.eval_packing:
        require_packable(method)
    reason = _refusal(method, "not_recomputed")
    if reason and args.gradient_checkpointing:
        raise AdapterError(
            "FG-ADAPT-034",
            f"gradient_checkpointing=True with method '{adapters.name_of(method)}': {reason}",
            allowed="gradient_checkpointing=False with this method",
            fix="gradient_checkpointing=False, or method='lora', which allows it",
        )


def _rendering(args: SFTConfig, tokenizer: Any, formatting_func: Any) -> Rendering:
    if args.packing and args.packing_strategy == "wrapped":
        logger.warning(
            "SFTTrainer: packing_strategy='wrapped' would let documents attend to each other and "
            "cut them; packing whole rows side by side instead"
        )
    return Rendering(
        tokenizer=tokenizer,
        max_length=args.max_length or 1 << 30,
        completion_only=True if args.assistant_only_loss else args.completion_only_loss,
        truncation=args.truncation_mode,
        packing=args.packing,
        text_field=args.dataset_text_field or "text",
        formatting_func=formatting_func,
    )


def _without_preparation(args: SFTConfig, model: Any) -> SFTConfig:
    """The same arguments, told that rows are ready and that bf16 weights need no autocast."""
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.packing = args.padding_free = False  # done already, by our own collator
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if args.use_cpu and args.bf16 and weights == torch.bfloat16:
        args.bf16, args.mixed_precision = False, "no"
    return args


@contextlib.contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Leave the instance's ``forward`` as it was, whatever the block sets on it."""
    core = swap.core(model)
    missing = object()
    before = vars(core).get("forward", missing)
    yield
    if before is missing:
        vars(core).pop("forward", None)
    else:
        core.forward = before


@contextlib.contextmanager
def _plain_head(model: Any) -> Iterator[None]:
    """Show the layer under an adapted head: trl refuses the adapter, which its loss would miss.

    Ours calls the head itself, adapter included.
    """
    core = swap.core(model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    if not hasattr(head, "base_layer"):
        yield
        return
    core.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del core.get_output_embeddings


@contextlib.contextmanager
def _own_dtypes(model: Any) -> Iterator[None]:
    """Keep float32 master weights: trl rounds the adapters of quantized models to bfloat16."""
    before = {p: p.data for p in model.parameters() if p.requires_grad}
    yield
    for parameter, data in before.items():
        if parameter.data.dtype != data.dtype:
            parameter.data = data


def _real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of the rows themselves, a shared beginning counted for each of them."""
    if "seq_lengths" in inputs:
        tokens = inputs["seq_lengths"][:-1].sum()  # the last one is the filling
        if "prefix_length" in inputs:
            tokens += inputs["prefix_length"] * (inputs["seq_lengths"].numel() - 3)
        return int(tokens)
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def _may_share(model: Any) -> bool:
    """Whether a beginning computed once is the same as in every row.

    It is not with dropout, whose mask every row draws for itself, nor where a sliding window may
    not reach it.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and window < 2 * SHORT:
        return False
    return not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())

"""Which difference between two runs usually changes a result, and why.

What: for each setting a weight from 0 (never) to 100 (almost surely) and a sentence. How: a
table, which is house knowledge and no measurement; settings that it lacks get the weight of their
group. Constraint: a key that changes how training begins is marked, so that the first loss of two
runs can speak for it or against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from finegraft.core.schema import groups


@dataclass(frozen=True)
class Reason:
    """What a setting does to a result.

    Attributes:
        weight: 0 to 100.
        words: Why it matters, or why not.
        at_start: Whether it changes the loss of the very first step; None: it may or may not.
    """

    weight: int
    words: str
    at_start: bool | None = None


SETTINGS = {
    "model": Reason(98, "another base model", True),
    "revision": Reason(90, "another revision of the base model", True),
    "task": Reason(99, "another kind of training", True),
    "full_finetuning": Reason(88, "every weight trains instead of an adapter", False),
    "method": Reason(88, "another method trains other parameters", None),
    "method_settings": Reason(60, "the method is set up otherwise", None),
    "chat_template": Reason(86, "prompts and answers are wrapped otherwise", True),
    "completion_only_loss": Reason(84, "other tokens are learnt", True),
    "map": Reason(80, "other columns are read", True),
    "learning_rate": Reason(80, "the size of every step", False),
    "max_steps": Reason(78, "another number of steps", False),
    "num_train_epochs": Reason(78, "the rows are seen another number of times", False),
    "max_length": Reason(70, "rows are cut at another length", True),
    "new_tokens": Reason(70, "other tokens are in the vocabulary", True),
    "eval_fraction": Reason(60, "other rows are held out, so held-out losses do not compare", True),
    "per_device_train_batch_size": Reason(62, "another number of rows a step", True),
    "gradient_accumulation_steps": Reason(62, "another number of rows a step", True),
    "r": Reason(56, "the adapter has another number of parameters", False),
    "lora_alpha": Reason(55, "the adapter's output is scaled otherwise", False),
    "use_rslora": Reason(54, "the adapter's output is scaled otherwise", False),
    "target_modules": Reason(54, "other modules are adapted", False),
    "init_lora_weights": Reason(45, "the adapter starts elsewhere", None),
    "modules_to_save": Reason(54, "other modules train whole", False),
    "lora_dropout": Reason(35, "dropout in the adapter", True),
    "bias": Reason(30, "other biases train", False),
    "use_dora": Reason(40, "weights are split into size and direction", False),
    "loraplus_lr_ratio": Reason(50, "the two halves of the adapter step differently", False),
    "lr_scheduler_type": Reason(48, "another course of the learning rate", False),
    "warmup_steps": Reason(38, "another start of the learning rate", False),
    "weight_decay": Reason(28, "weights are pulled to zero otherwise", False),
    "max_grad_norm": Reason(34, "gradients are clipped otherwise", False),
    "optim": Reason(50, "another optimizer", False),
    "load_in_4bit": Reason(45, "the base is rounded to 4 bits", True),
    "load_in_8bit": Reason(40, "the base is rounded to 8 bits", True),
    "bnb_4bit_quant_type": Reason(35, "4-bit weights stand for other values", True),
    "bnb_4bit_use_double_quant": Reason(15, "scales of 4-bit weights are rounded otherwise", True),
    "bnb_4bit_compute_dtype": Reason(24, "products are rounded otherwise", True),
    "dtype": Reason(40, "the base is rounded otherwise", True),
    "packing": Reason(52, "other rows share a step", True),
    "seed": Reason(32, "another start of the adapter and another order of the rows", True),
    "class_weights": Reason(60, "classes weigh otherwise", True),
    "problem_type": Reason(90, "another loss", True),
    "class_names": Reason(60, "labels are read otherwise", True),
    "label_column": Reason(85, "another column is learnt", True),
    "text_column": Reason(85, "another column is read", True),
    "text_pair_column": Reason(80, "another column is read", True),
    "truncation_side": Reason(40, "the other end of long texts is cut", True),
    "metric_for_best_model": Reason(30, "another epoch may be kept", False),
    "early_stopping_patience": Reason(40, "training may end earlier", False),
    "auto_find_batch_size": Reason(20, "the batch may have been halved", None),
    "gradient_checkpointing": Reason(4, "the same sums, computed again to save memory", False),
    "share_prefix": Reason(4, "the same gradients, computed once", None),
    "eval_data": Reason(58, "other rows are held out, so held-out losses do not compare", False),
    "trust_remote_code": Reason(10, "code that comes with the model may differ", None),
    "per_device_eval_batch_size": Reason(3, "only how held-out rows are batched", False),
    "logging_steps": Reason(2, "only how often a line is written", False),
    "save_steps": Reason(2, "only how often a checkpoint is written", False),
    "save_total_limit": Reason(1, "only how many checkpoints stay", False),
    "eval_steps": Reason(3, "only how often held-out rows are looked at", False),
    "report_to": Reason(0, "only who is told", False),
    "report_rows": Reason(0, "only what the report shows", False),
    "nproc": Reason(60, "another number of rows a step, unless the batch makes up for it", True),
    "nnodes": Reason(60, "another number of rows a step, unless the batch makes up for it", True),
    "sharding": Reason(4, "the same sums; where the frozen layers are kept", False),
    "stop_on_nan": Reason(2, "only what happens when a loss is not a number", False),
    "overwrite": Reason(0, "only whether a folder may be replaced", False),
    "output": Reason(0, "only where the run lies", False),
}
_BY_GROUP = {"model": 50, "data": 40, "adapter": 40, "training": 30, "classification": 40, "run": 2}

# Version, as far as it differs: the first part, or a later one. Weights below SETTINGS that matter.
LIBRARIES = {
    "torch": (30, 22),
    "transformers": (30, 22),
    "finegraft": (30, 24),
    "peft": (26, 16),
    "trl": (20, 12),
    "bitsandbytes": (22, 14),
    "tokenizers": (22, 12),
    "accelerate": (14, 8),
    "datasets": (12, 6),
    "numpy": (8, 4),
    "safetensors": (4, 2),
    "python": (6, 3),
}
HARDWARE = {
    "gpus": Reason(26, "another device rounds and sums in another order"),
    "cpu": Reason(20, "another processor rounds and sums in another order"),
    "threads": Reason(12, "sums are split otherwise, which changes their last bits"),
    "cores": Reason(6, "speed, and how sums are split"),
    "memory_bytes": Reason(3, "what fits, not what is computed"),
    "system": Reason(6, "another operating system"),
}
MATTERS = 20  # weight from which a difference is called likely


def of_setting(name: str) -> Reason:
    """The reason of a setting; one that the table lacks gets the weight of its group."""
    if name in SETTINGS:
        return SETTINGS[name]
    group = next((g for g, names in groups().items() if name in names), "")
    return Reason(_BY_GROUP.get(group, 20), "it is set otherwise")

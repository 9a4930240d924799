"""One rung of a ladder, in a process of its own.

What: ``python -m finegraft.training.rung SETTINGS.yaml RESULT.json base|new|resume [PID]`` trains
one configuration with ``run.train`` (``base``: nothing is trained), measures it on the held-out
rows and writes what came out. How: the rows are checked once more after training, which gives every
rung the same held-out rows. Constraint: a fresh process, so that peak memory is this rung's alone;
no result is written when training was interrupted. Trade-off: libraries are imported for each rung
anew, about 6 s.

Shapes: n held-out rows, c labels.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding

from finegraft import adapters, opening
from finegraft.core.errors import FinegraftError
from finegraft.core.paths import write_whole
from finegraft.core.process import keep_freed_memory
from finegraft.core.schema import TrainConfig, from_file
from finegraft.data.labels import SEVERAL, VALUES
from finegraft.models import causal_loss, classifier, families, swap
from finegraft.training import metrics, run
from finegraft.training.collate import Collator
from finegraft.training.events import EventLog, read_events
from finegraft.training.tasks import TASKS
from finegraft.training.tasks._contract import quantization

STATUS_INTERRUPTED = 130
DRAWS = 2000
_Z = 1.959964  # standard deviations around the mean that hold 95% of a normal distribution
Result = dict[str, Any]


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share that was found in ``count`` rows.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    square = _Z * _Z / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """95% interval of sum(sums) / sum(weights), rows drawn anew 2,000 times.

    Args:
        sums: What each row adds above the line, [n].
        weights: What it adds below, [n]; all above 0.
    """
    above, below = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    dice = np.random.default_rng(0)  # the same rows give the same interval
    means = []
    for _ in range(DRAWS):
        drawn = dice.integers(len(above), size=len(above))
        means.append(above[drawn].sum() / below[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def climb(config: TrainConfig, how: str, orphan: Orphan) -> Result | None:
    """Train and measure one configuration.

    Args:
        config: Of the run; with ``base`` its method is not attached.
        how: ``base``, ``new`` or ``resume``.
        orphan: Ends it when nobody waits for it any more.

    Returns:
        What ``ladder`` keeps of a rung, ``rows`` with what each held-out row adds to the quality;
        None when training was interrupted.

    Raises:
        FinegraftError: of the part that found the problem.
    """
    task = TASKS.get(config.task)
    if how == "base":
        data = task.check(config, EventLog())
        model, trained = _untrained(config, data), {"seconds": 0.0, "steps": 0, "adapter_bytes": 0}
        trainable, every = 0, sum(p.numel() for p in model.parameters())
    else:
        result = run.train(config, listener=orphan, resume=how == "resume")
        if result.interrupted:
            return None
        data, model = task.check(config, EventLog()), result.model
        trained = {
            "seconds": training_seconds(read_events(result.run / "events.jsonl")),
            "steps": result.steps,
            "adapter_bytes": weight_bytes(Path(result.adapter)) if result.adapter else 0,
        }
        trainable, every = _parameters(model)
    return {
        **trained,
        "trainable_parameters": trainable,
        "parameters": every,
        "peak_memory_bytes": peak_bytes(),  # of training: measuring comes later
        **MEASURES[config.task](config, data, model),
        "fingerprint": data.record["fingerprint"],
    }


class Orphan:
    """Ends the run, saved if it has trained, when the process that started this one is gone.

    Args:
        parent: Number of that process; None: the one that is there now.
    """

    def __init__(self, parent: int | None = None) -> None:
        self.parent = os.getppid() if parent is None else parent
        self.training = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Look for the parent at every event."""
        self.training = self.training or event["type"] == "start"
        if os.getppid() == self.parent:
            return
        if not self.training:
            raise KeyboardInterrupt
        if event["type"] == "step":
            self.parent = os.getppid()
            signal.raise_signal(signal.SIGTERM)


def _untrained(config: TrainConfig, data: Any) -> Any:
    """The model as training would start from it, without any adapter."""
    more: dict[str, Any] = {"max_seq_length": config.max_length}
    if config.task != "causal":
        names = data.labels
        labels = (names.count, names.names or None)
        more = classifier.label_settings(*labels, problem_type=names.problem_type)
        more["task"] = classifier.SEQUENCE
    opened = opening.open_model(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        tokenizer=data.tokenizer,
        dtype=config.dtype,
        **quantization(config),
        **more,
    )
    if getattr(data, "added", None):
        adapters.make_rows(opened.model, data.tokenizer, data.added)
    families.apply(opened.model)
    return opened.model


def _parameters(model: Any) -> tuple[int, int]:
    """Parameters that train, and all of them; packed 4-bit weights count as what they stand for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, every = model.get_nb_trainable_parameters()
        return int(trainable), int(every)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def training_seconds(events: Sequence[dict[str, Any]]) -> float:
    """Seconds from the first step to the last one, without the pauses of a resumed run."""
    return max((float(e["seconds"]) for e in events if e["type"] == "step"), default=0.0)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights in ``folder``; tokenizer and configuration are not counted."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_bytes() -> int:
    """The most memory that this process has held: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's memory, inherited at the fork
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _causal(config: TrainConfig, data: Any, model: Any) -> Result:
    """Held-out loss in nats a token, each token counting the same; rows are drawn for the
    interval."""
    rows, pad = data.held_out, data.tokenizer.pad_token_id or 0
    collate = Collator(pad)
    fast = isinstance(swap.core(model), causal_loss.CompactLoss)
    more = {"loss_only": True} if fast else {}
    sums, tokens = [], []
    model.eval()
    with torch.no_grad():
        for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
            batch = collate([{"input_ids": ids, "labels": labels}])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labelled = sum(label >= 0 for label in labels[1:])
            loss = model(**batch, use_cache=False, **more).loss
            sums.append(float(loss) * labelled)
            tokens.append(labelled)
    mean = sum(sums) / sum(tokens)
    low, high = bootstrap(sums, tokens)
    numbers = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": sum(tokens)}
    rows_of = {"sums": sums, "weights": tokens}
    return {"quality": mean, "interval": [low, high], "metrics": numbers, "rows": rows_of}


def _classes(config: TrainConfig, data: Any, model: Any) -> Result:
    """Accuracy with Wilson's interval; of values the squared error, rows drawn for the interval."""
    logits, labels = _answers(config, data, model)
    names = data.labels
    measured = metrics.measure(names.problem_type, list(names.names), logits, labels)
    if names.problem_type == VALUES:
        each = np.square(logits.reshape(-1) - labels.reshape(-1))
    elif names.problem_type == SEVERAL:
        each = ((logits >= 0) == (labels > 0)).all(1)
    else:
        each = logits.argmax(-1) == labels
    sums, ones = each.astype(float).tolist(), [1.0] * len(labels)
    quality = sum(sums) / len(sums)
    values = names.problem_type == VALUES
    interval = bootstrap(sums, ones) if values else wilson(quality, len(sums))
    return {
        "quality": quality,
        "interval": list(interval),
        "metrics": metrics.numbers(measured),
        "rows": {"sums": sums, "weights": ones},
    }


def _answers(config: TrainConfig, data: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the model says of the held-out rows, [n, c], and their labels."""
    collate = DataCollatorWithPadding(data.tokenizer, pad_to_multiple_of=8)
    size = config.per_device_eval_batch_size
    rows = [data.held_out[i] for i in range(len(data.held_out))]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # little padding
    logits: list[Any] = [None] * len(rows)
    more = {"use_cache": False} if classifier.takes_cache(swap.core(model)) else {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = collate([{k: v for k, v in rows[i].items() if k != "labels"} for i in places])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            said = model(**batch, **more).logits.float().cpu().numpy()
            for place, row in zip(places, said, strict=True):
                logits[place] = row
    return np.stack(logits), np.asarray([row["labels"] for row in rows])


# How each task is measured; a task that is not here has no ladder.
MEASURES: dict[str, Callable[[TrainConfig, Any, Any], Result]] = {
    "causal": _causal,
    "classification": _classes,
}


def main(
    words: Sequence[str], do: Callable[[TrainConfig, str, Orphan], Result | None] = climb
) -> int:
    """Do what the command line says and return the exit status.

    Args:
        words: Settings, result, how, and the number of the process that waits for it.
        do: What is done; None of it means that it was interrupted.
    """
    settings, target, how, *parent = words
    keep_freed_memory()
    try:
        result = do(from_file(settings), how, Orphan(int(parent[0]) if parent else None))
    except FinegraftError as error:
        result = {"error": error.as_dict()}
    except KeyboardInterrupt:
        result = None
    if result is None:
        return STATUS_INTERRUPTED
    write_whole(Path(target), json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

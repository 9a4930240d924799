"""Memory, time and disk of a run, from counts.

What: ``memory_parts``, ``seconds_parts`` and ``disk_parts`` turn an ``Anatomy`` and a ``Workload``
into bytes and seconds. How: sizes that follow from shapes are computed; what does not follow from
them (allocator, compiled kernels, efficiency of products) is a constant times a count, fitted on 18
measured runs of one machine, none of which is in the table of docs/plan.md. Constraint: one line a
part, so that every figure of a forecast can be traced. Trade-off: the constants are of CPUs with
oneDNN and glibc. On a GPU the same parts are computed with the device's own rate and free memory;
no run on a GPU was compared with it.

Shapes: t tokens, d hidden, v vocabulary. Units: bytes, seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from finegraft.core.schema import TrainConfig
from finegraft.training.plan.anatomy import Anatomy
from finegraft.training.plan.workload import Workload

_CHUNK_LOGITS = 1 << 23  # of kernels.linear_cross_entropy
_FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """What a forecast takes as given.

    Attributes:
        device: ``cpu`` or ``cuda``.
        available: Bytes that this process may take beyond what it holds.
        resident: Bytes that it holds, rows included.
        flops: Of products in the precision of the base, a second.
    """

    device: str
    available: int
    resident: int
    flops: float


@dataclass(frozen=True)
class Constants:
    """Fitted figures; see the module.

    Attributes:
        late: Libraries and tables that training loads, bytes.
        kept: Of the bytes that autograd keeps, the share that adds to the peak: freed blocks of
            loading are used again.
        product: A compiled kernel and its tables, bytes, for each different bfloat16 product.
        backward: Temporaries of backward, in units of what one layer keeps.
        loading: Share of plain weights that stays with the allocator after loading.
        quantizing: The same for quantised ones, bytes a parameter.
        products: Seconds of the layers' products, in units of the machine's best rate.
        attention: The same for the scores of attention.
        layer: A layer's forward and backward beside its arithmetic, seconds.
        read: Reading the weights for a pass of a few tokens, seconds a byte.
        update: Optimizer, seconds a trained parameter.
        dense: Making a quantised weight dense for its products, seconds a parameter and pass.
        compiled: Compiling one product, seconds.
        started: Before the first step and at the first one, seconds.
        ended: Saving and drawing at the end, seconds.
        written: Bytes a second of a checkpoint.
    """

    late: float = 1.1e8
    kept: float = 0.907
    product: float = 0.835e6
    backward: float = 4.5
    loading: float = 0.21
    quantizing: float = 0.80
    products: float = 1.77
    attention: float = 4.74
    layer: float = 6.9e-3
    read: float = 0.9e-10
    update: float = 1.07e-9
    dense: float = 0.95e-9
    compiled: float = 3.34e-3
    started: float = 1.2
    ended: float = 1.0
    written: float = 2.5e8


CPU = Constants()
# Not measured: a GPU starts kernels in microseconds, and its allocator rounds little.
GPU = Constants(
    late=5e8,
    kept=1.0,
    product=0.0,
    loading=0.0,
    quantizing=0.0,
    layer=1.5e-3,
    read=1e-12,
    compiled=0.0,
)

Parts = dict[str, int]


def kept_bytes(config: TrainConfig, model: Anatomy, work: Workload, machine: Machine) -> float:
    """What the largest micro-batch keeps for backward, recomputed layers considered.

    As ``training.memory`` does it: without a word about checkpointing as many layers are recomputed
    as memory asks for.
    """
    if not model.reaches_down:
        return float(work.largest * model.kept_once)
    layer = work.largest * model.kept_layer
    inputs = 2 * work.largest * model.hidden * model.itemsize
    outside = work.largest * model.kept_once
    if config.gradient_checkpointing:
        return outside + model.layers * inputs + layer
    return outside + model.layers * layer


def memory_parts(
    config: TrainConfig, model: Anatomy, work: Workload, machine: Machine, c: Constants
) -> Parts:
    """Bytes of each part at the peak of the run."""
    copies = 1 if model.trains_all else 2  # weights of an adapter stand beside those of the base
    own = model.trained_bytes if copies == 2 else 0
    rows = min(work.largest_labelled, max(32, _CHUNK_LOGITS // max(model.vocabulary, 1)))
    logits = rows * model.vocabulary * (_FLOAT + model.itemsize)
    if model.trains_all:  # the head's gradient is summed up in float32
        logits += model.vocabulary * model.hidden * 2 * _FLOAT
    half = model.itemsize < _FLOAT
    cache = c.late + c.backward * work.largest * model.kept_layer
    cache += c.product * work.products if half else 0
    if model.quantized:
        cache += c.quantizing * model.quantized
    else:
        cache += c.loading * model.parameters * model.itemsize
    parts = {
        "interpreter and libraries": machine.resident if machine.device == "cpu" else 0,
        "weights": model.weight_bytes + model.stacked_bytes,
        "adapter": own,
        "gradients": model.trained_bytes,
        "optimizer": int(model.trained_bytes * _moments(config)),
        "activations": int(c.kept * kept_bytes(config, model, work, machine)),
        "logits": logits,
        "workspace and cache": int(cache),
    }
    return parts


def _moments(config: TrainConfig) -> float:
    """Numbers that the optimizer keeps for each trained one."""
    name = config.optim
    if "8bit" in name:
        return 0.5
    if name.startswith("sgd"):
        return 0.0
    if "adafactor" in name:
        return 0.05
    return 1.0 if name.startswith(("lion", "rmsprop", "adagrad")) else 2.0


def step_seconds(
    config: TrainConfig, model: Anatomy, work: Workload, machine: Machine, c: Constants
) -> float:
    """Seconds of all steps, without saving and evaluating."""
    down = 1 if model.reaches_down else 0
    again = 1 if config.gradient_checkpointing and down else 0
    each = model.linear * (2 + 2 * down + 2 * again)
    each += 2 * model.linear if model.trains_all else 6 * down * model.trained
    head = work.labelled * model.vocabulary * model.hidden * (6 if model.trains_all else 4)
    scores = 12 * work.pairs * model.hidden * model.layers
    arithmetic = c.products * (work.tokens * each + head) + c.attention * scores
    seconds = arithmetic / machine.flops
    seconds += c.layer * work.micro_batches * model.layers * (1 + 2 * down) / 3
    passes = (1 + down + again) * work.micro_batches
    seconds += c.read * passes * model.linear * model.itemsize
    seconds += c.update * work.steps * model.trained
    seconds += c.dense * work.micro_batches * model.quantized
    if model.itemsize < _FLOAT:
        seconds += c.compiled * work.products
    return seconds


def evaluation_seconds(model: Anatomy, work: Workload, machine: Machine, c: Constants) -> float:
    """Seconds of one evaluation, which has no backward."""
    tokens = work.eval_tokens
    flops = tokens * 2 * model.linear + tokens * 2 * model.vocabulary * model.hidden
    scores = 4 * tokens * work.pairs / max(work.tokens, 1) * model.hidden * model.layers
    return (c.products * flops + c.attention * scores) / machine.flops


def checkpoint_bytes(config: TrainConfig, model: Anatomy) -> int:
    """One checkpoint: what trains, and the optimizer's numbers for it."""
    numbers = int(model.trained_bytes * (1 + _moments(config)))
    return numbers + model.tokenizer_bytes + _STATE_BYTES


# Schedule, random states, log and manifest of one checkpoint.
_STATE_BYTES = 100_000


def seconds_parts(
    config: TrainConfig, model: Anatomy, work: Workload, machine: Machine, c: Constants
) -> dict[str, float]:
    """Seconds of each part, as the ``end`` event of a run counts them."""
    measured = work.evaluations + (1 if work.eval_tokens and config.task != "causal" else 0)
    written = work.saves * checkpoint_bytes(config, model) + model.trained_bytes
    return {
        "starting": c.started,
        "steps": step_seconds(config, model, work, machine, c),
        "evaluations": measured * evaluation_seconds(model, work, machine, c),
        "saving": c.ended + written / c.written,
    }


def disk_parts(config: TrainConfig, model: Anatomy, work: Workload) -> Parts:
    """Bytes of the run folder at most, and of the largest export of it (merged, 16 bits).

    The best checkpoint stays beside the last ones; whether it is one of them is not known before.
    """
    kept = min(work.saves, config.save_total_limit + (work.evaluations > 0))
    return {
        "checkpoints": kept * checkpoint_bytes(config, model),
        "model" if config.trains_all else "adapter": model.trained_bytes + model.tokenizer_bytes,
        "export": model.parameters * 2 + model.tokenizer_bytes,
    }

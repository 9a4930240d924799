"""What is wrong with an export that does not answer like the trained model.

What: each function names a fault, or None. How: what can be read is compared first (text, ids,
settings, rows of new tokens); then the trained model is made wrong in each known way, and the way
whose numbers are the export's is the cause. Constraint: the trained model is put back as it
was. Trade-off: a fault nobody has thought of is reported as numbers that differ.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finegraft.export._verify import measure, readers
from finegraft.export._verify.measure import Trained
from finegraft.export._verify.prompts import Row
from finegraft.models import swap

# A candidate explains the export when it is this much nearer to it than the trained model is.
_NEARER = 0.35
_ASKED = 3  # rows, the shortest ones
_SCALES = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)  # of a LoRA, times the trained one
_STEPS = 8
ROWS_OFF = 0.02  # bfloat16 rounds to 0.004

MISSING_BOS = "missing BOS: the export's prompts lack the token that training began with"
DOUBLED_BOS = "doubled BOS: the export's prompts begin with the token twice"
TEMPLATE = "wrong template: the export renders conversations as another text"
TOKENS = "dropped new tokens: {0} of the tokens that training added are not in the export"
NEW_ROWS = "dropped new tokens: their rows in the export's embedding are not the trained ones"
TOKENIZER = "another tokenizer: the export makes other ids of the same text"
ROPE = "wrong rope scaling: {0}"
HEAD_TIED = "untied head: the trained head is a matrix of its own, the export uses the embedding"
HEAD_OWN = "untied head: the trained head is the embedding, the export has another matrix"
HEAD_LOST = "untied head: the export's settings say that it has a head of its own, and it has none"
NOT_MERGED = "adapter not merged: the export answers like the base model"
TWICE = "adapter merged twice: the export answers like the base with twice the adapter"
SCALE = "wrong LoRA scale: the export answers as if the scale were {0:.2g} times the trained one"
ALPHA = "wrong LoRA scale: the file's alpha is not the adapter's"
ROUNDED = (
    "wrong LoRA scale, or small updates lost in rounding: the export answers as if the scale were "
    "{0:.2g} times the trained one; dtype float16 keeps more than bfloat16"
)
PERMUTED = "q/k permutation: the rows of the query and key weights are in another order"
UNKNOWN = "the export gives other probabilities, and none of the known faults explains it"


@dataclass(frozen=True)
class Facts:
    """What an export says of itself, as far as it can be read.

    Attributes:
        rope: Settings of the rotary embedding; None: unknown.
        own_head: Whether it has a head apart from the embedding; None: unknown.
    """

    rope: dict[str, Any] | None = None
    own_head: bool | None = None


def of_ids(
    tokenizer: Any, reader: Any, new_tokens: Sequence[str], pairs: Sequence[tuple[Any, Any]]
) -> str | None:
    """What is wrong with texts or ids.

    Args:
        tokenizer: Of the trained model.
        reader: The export.
        new_tokens: That training added.
        pairs: (text, ids) as expected and as found; the text is empty for plain text.
    """
    lost = [t for t in new_tokens if len(_inside(reader.text(t), tokenizer)) > 1]
    if lost:
        return TOKENS.format(len(lost))
    bos = tokenizer.bos_token_id
    for (text, wanted), (other, found) in pairs:
        if wanted == found:
            continue
        if bos is not None and found == [bos, *wanted]:
            return DOUBLED_BOS
        if bos is not None and [bos, *found] == wanted:
            return MISSING_BOS
        if text and same_text(tokenizer, text, other) is False:
            return TEMPLATE
    if any(same_text(tokenizer, e[0], f[0]) is False for e, f in pairs if e[0]):
        return TEMPLATE
    return TOKENIZER if any(e[1] != f[1] for e, f in pairs) else None


def _inside(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Ids without what a tokenizer puts around a text."""
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id}
    return [i for i in ids if i not in {*around, tokenizer.sep_token_id}]


def same_text(tokenizer: Any, one: str, two: str) -> bool:
    """Whether two prompts are equal but for the BOS, which llama.cpp adds as an id."""
    bos = tokenizer.bos_token or ""
    return one.removeprefix(bos) == two.removeprefix(bos)


def of_settings(model: Any, facts: Facts, own_head: bool | None) -> str | None:
    """What is wrong with the settings of an export.

    Args:
        model: The trained model.
        own_head: Whether its head is another matrix than its embedding.
    """
    wanted = rope_of(swap.core(model).config)
    if facts.rope is not None and wanted is not None:
        wrong = [k for k in sorted({*facts.rope, *wanted}) if facts.rope.get(k) != wanted.get(k)]
        if wrong:
            told = ", ".join(f"{k} is {facts.rope.get(k)}, not {wanted.get(k)}" for k in wrong)
            return ROPE.format(told)
    if own_head is True and facts.own_head is False:
        return HEAD_TIED
    if own_head is False and facts.own_head is True:
        return HEAD_OWN
    return None


def rope_of(config: Any) -> dict[str, Any] | None:
    """Settings of the rotary embedding."""
    found = getattr(config.get_text_config(), "rope_parameters", None)
    return None if found is None else {k: v for k, v in found.items() if v is not None}


def own_head(model: Any) -> bool | None:
    """Whether the head gives other numbers than the embedding matrix would; None without a head."""
    core = swap.core(model)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    table = core.get_input_embeddings() if head is not None else None
    if head is None or table is None:
        return None
    ids = torch.arange(min(16, core.config.get_text_config().vocab_size), device=core.device)
    with torch.no_grad():
        rows = table(ids)  # [16, d], whatever wraps the matrix
        width = rows.shape[-1]
        dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), rows.dtype)
        columns = head(torch.eye(width, dtype=dtype, device=core.device))  # [d, v]
    bias = getattr(head, "bias", None)
    if bias is not None:
        columns = columns - bias
    there = columns[:, ids].T.float()
    return bool((there - rows.float()).norm() > 0.02 * rows.float().norm())


def off_rows(model: Any, other: Any, ids: Sequence[int]) -> float:
    """Relative difference of embedding rows of the trained model and of an export, ``other``."""
    core, there = swap.core(model), swap.core(other)
    if there.get_input_embeddings().weight.shape[0] <= max(ids):
        return math.inf
    with torch.no_grad():
        wanted, found = (
            m.get_input_embeddings()(torch.tensor(list(ids), device=m.device)).float().cpu()
            for m in (core, there)
        )
    return float((wanted - found).norm() / wanted.norm())


def of_numbers(
    model: Any,
    rows: Sequence[Row],
    trained: Trained,
    found: Sequence[torch.Tensor],
    *,
    merged: bool,
) -> str:
    """Which fault, made in the trained model, gives the numbers of the export.

    Args:
        merged: Whether the export should have the adapter in its weights.
    """
    short = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))[:_ASKED]
    rows, there = [rows[i] for i in short], [found[i] for i in short]
    off = measure.distance(rows, [trained.scores[i] for i in short], there)
    tried: dict[str, float] = {}
    if trained.base is not None:
        tried[NOT_MERGED] = measure.distance(rows, [trained.base[i] for i in short], there)
    with _stock(model):
        factor, distance = _scale(model, rows, there) if trained.base is not None else (1, off)
        words = SCALE.format(factor)
        if merged:
            words = TWICE if abs(factor - 2) < 0.05 else words
            words = ROUNDED.format(factor) if 0.7 < factor < 1 else words
        tried[words] = distance
        for backwards in (False, True):
            with _permuted(model, backwards) as possible:
                if possible:
                    distance = measure.distance(rows, readers.score(model, rows), there)
                    tried[PERMUTED] = min(distance, tried.get(PERMUTED, math.inf))
    best = min(tried, key=lambda cause: tried[cause])
    return best if tried[best] < _NEARER * off else UNKNOWN


def _scale(model: Any, rows: Sequence[Row], found: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The factor of the LoRA that comes nearest to the export, and how near it comes."""
    layers = [m for m in model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
    if not layers:
        return 1.0, math.inf
    name = next(iter(layers[0].scaling))
    root = math.sqrt(layers[0].r[name])
    known = {*_SCALES, root, 1 / root, 1 / (layers[0].scaling[name] or 1.0)}

    def distance(factor: float) -> float:
        with measure.scaled(model, factor):
            return measure.distance(rows, readers.score(model, rows), found)

    tried = {factor: distance(factor) for factor in known if abs(factor - 1) > 0.02}
    nearest = min(tried, key=lambda f: tried[f])
    step = 1.25
    for _ in range(_STEPS):
        for factor in (nearest * step, nearest / step):
            tried.setdefault(factor, distance(factor))
        better = min(tried, key=lambda f: tried[f])
        step = step if better != nearest else math.sqrt(step)
        nearest = better
    return nearest, tried[nearest]


@contextlib.contextmanager
def _stock(model: Any) -> Iterator[None]:
    """Run the block with stock classes, which call every layer that a hook sits on."""
    fast = [(module, type(module)) for module in model.modules() if swap.is_swapped(module)]
    swap.undo(model)
    try:
        yield
    finally:
        for module, kind in fast:
            module.__class__ = kind


@contextlib.contextmanager
def _permuted(model: Any, backwards: bool) -> Iterator[bool]:
    """Run the block with the query and key rows in the order of the other kind of file."""
    config = swap.core(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    keys = getattr(config, "num_key_value_heads", None) or heads
    hooks = []
    for name, module in model.named_modules():
        count = {"q_proj": heads, "k_proj": keys}.get(name.rpartition(".")[2])
        if count:
            hooks.append(module.register_forward_hook(_reorder(count, backwards)))
    try:
        yield bool(hooks)
    finally:
        for hook in hooks:
            hook.remove()


def _reorder(heads: int, backwards: bool) -> Any:
    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        shape = out.shape
        inner = (-1, 2) if backwards else (2, -1)
        halves = out.reshape(*shape[:-1], heads, *inner)
        return halves.transpose(-1, -2).reshape(shape)

    return hook

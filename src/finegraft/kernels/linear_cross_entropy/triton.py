"""Cross-entropy of a linear head with Triton between the products.

What: the chunked computation, where one kernel turns a chunk's logits into the loss of each row
and, in place, into their gradient. How: the products stay torch's; a program owns a row, walks it
in blocks with a running maximum and sum in each lane, then walks it again to write. Backward only
scales. Constraint: no atomics, so every run gives the same bits; gradients only for inputs that
ask for one, none in evaluation. Trade-off: the work of backward happens in forward, which a caller
that never calls backward pays.

Source: online softmax, https://arxiv.org/abs/1805.02867; soft-cap, https://arxiv.org/abs/2408.00118.
Shapes: n labelled rows, c rows of a chunk, d hidden, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from finegraft.kernels import _gpu

__all__ = ["linear_cross_entropy", "tanh"]

# 1,024 rows at a vocabulary of 128k: 256 MB of bfloat16 logits, and enough rows for the products to
# be bound by arithmetic and not by reading the head once a chunk.
_CHUNK_ELEMENTS = 1 << 27
_ROW_MULTIPLE = 128  # rows of a tensor-core tile: ragged chunks would waste part of one

# 16 elements a thread on 8 warps.
_COLUMNS = 4096


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: float | torch.Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    row_ids: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``sum(-log softmax(cap(scale * hidden @ weight.T))[labels]) / num_items``.

    Args:
        hidden: [n, d], the rows that carry a label and no others.
        weight: [v, d], in the dtype of ``hidden``.
        labels: [n], ids below v; the loss is NaN if one is outside, since looking at them first
            would make the CPU wait for the GPU.
        num_items: Labelled tokens of the whole optimizer step, over all its micro-batches.
        softcap: Logits become ``softcap * tanh(logits / softcap)``.
        logit_scale: Factor on the logits before the cap.
        row_ids: [k], rows of ``weight`` that ``rows`` stand for, in a copy made for it.
        rows: [k, d] in the dtype of ``weight``.

    Returns:
        Scalar in float32, differentiable once in ``hidden``, ``weight`` and ``rows``.

    Raises:
        ConfigError: FG-KERNEL-001, a dtype or device that Triton cannot take; FG-KERNEL-002,
            shapes or dtypes that do not belong together.

    Source:
        https://arxiv.org/abs/1805.02867
    """
    _gpu.require("linear_cross_entropy", hidden, weight, labels)
    _gpu.require_shape(
        "linear_cross_entropy",
        hidden.dim() == weight.dim() == 2
        and hidden.shape[1] == weight.shape[1]
        and labels.shape == hidden.shape[:1]
        and hidden.dtype == weight.dtype,
        f"hidden is {tuple(hidden.shape)} in {hidden.dtype}, the head {tuple(weight.shape)} in "
        f"{weight.dtype}, labels {tuple(labels.shape)}",
        "[n, d] and [v, d] in one dtype, [n]",
    )
    if row_ids is not None and rows is not None:
        weight = weight.index_copy(0, row_ids, rows)
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, num_items, softcap, logit_scale
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        num_items: float | torch.Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> torch.Tensor:
        n, v = hidden.shape[0], weight.shape[0]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = hidden.new_empty(hidden.shape) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        losses = hidden.new_empty(n, dtype=torch.float32)
        c = _CHUNK_ELEMENTS // v // _ROW_MULTIPLE * _ROW_MULTIPLE or _ROW_MULTIPLE
        buffer = hidden.new_empty(min(c, n), v)
        for start in range(0, n, c):
            rows = slice(start, min(start + c, n))
            logits = buffer[: rows.stop - start]  # [c, v]
            # ``out=`` keeps autocast out: the logits have the dtype of the inputs.
            torch.mm(hidden[rows], weight.t(), out=logits)
            _losses(
                logits, labels[rows], losses[rows], softcap, logit_scale, want_hidden or want_weight
            )
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.add_(_transposed_product(logits, hidden[rows]))
        ctx.num_items = num_items
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum() / num_items

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0] / ctx.num_items
        if d_hidden is not None:
            d_hidden = d_hidden * scale
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def _transposed_product(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``logits.T @ hidden`` [v, d] in the inputs' dtype, summed in float32 inside the product."""
    out = hidden.new_empty(logits.shape[1], hidden.shape[1])
    return torch.mm(logits.t(), hidden, out=out)


def _losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    want_gradient: bool,
) -> None:
    """Write each row's loss; if wanted, overwrite ``logits`` by d losses / d logits."""
    c, v = logits.shape
    with torch.cuda.device_of(logits):
        _kernel[(c,)](
            logits, labels.contiguous(), losses, v, logits.stride(0), softcap or 1.0, logit_scale,
            CAPPED=softcap is not None, WANT_GRADIENT=want_gradient,
            COLUMNS=min(_gpu.power_of_2(v), _COLUMNS), num_warps=8, **_gpu.COMPILER,
        )  # fmt: skip


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, from exp alone; relative error below 2e-7 everywhere.

    Below 0.6, where 1 - exp(-2x) cancels, a continued fraction of five terms (error 1e-9).
    """
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.36, near, tl.where(x < 0, -far, far))


@triton.jit
def _logits(base, col, v, softcap, scale, CAPPED: tl.constexpr):
    """Scaled and capped logits of these columns, -inf beyond the vocabulary."""
    z = tl.load(base + col, mask=col < v, other=0.0).to(tl.float32) * scale
    if CAPPED:
        z = softcap * tanh(z / softcap)
    return tl.where(col < v, z, float("-inf"))


@triton.jit
def _kernel(
    logits, labels, losses, v, stride, softcap, scale,
    CAPPED: tl.constexpr, WANT_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, COLUMNS)
    # Each lane keeps its own maximum and sum: no exchange between warps until the row is read.
    # The lowest finite number and not -inf, whose difference with itself is NaN.
    top = tl.full((COLUMNS,), -3.0e38, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    own = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, v, COLUMNS):
        z = _logits(base, start + lanes, v, softcap, scale, CAPPED)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
        own += tl.where(start + lanes == label, z, 0.0)
    # Maximum and sum stay apart: their log-sum-exp, rounded at the size of the logits, would cost
    # the probabilities two digits when logits are around 100.
    highest = tl.max(top, 0)
    mass = tl.sum(total * tl.exp(top - highest), 0)
    loss = (highest - tl.sum(own, 0)) + tl.log(mass)
    known = (label >= 0) & (label < v)
    tl.store(losses + row, tl.where(known, loss, float("nan")))
    if WANT_GRADIENT:
        for start in range(0, v, COLUMNS):
            col = start + lanes
            z = _logits(base, col, v, softcap, scale, CAPPED)
            grad = tl.exp(z - highest) / mass - tl.where(col == label, 1.0, 0.0)
            if CAPPED:
                grad *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(base + col, (grad * scale).to(logits.dtype.element_ty), mask=col < v)

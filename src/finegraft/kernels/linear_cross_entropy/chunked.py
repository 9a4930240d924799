"""Cross-entropy of a linear head without its logits.

What: loss and gradients chunk by chunk, so that the [n, v] logits never exist. How: each chunk's
softmax is turned into its gradient in place and multiplied back at once; backward only scales.
Constraint: gradients are computed only for inputs that ask for one, none in evaluation.
Trade-off: the work of backward happens in forward, which a caller that never calls backward pays.

Shapes: n labelled rows, c rows of a chunk, d hidden, v vocabulary, k trained rows of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from finegraft.kernels import _gpu, _loops

# 2**23 float32 logits are 32 MB: small enough to stay near the cache, large enough that reading
# the head's weights once a chunk (57 MB for 49k x 576 in bf16) is a third of the product's time.
_CHUNK_ELEMENTS = 1 << 23

# Rows are filled up to a multiple of this before they meet the head: oneDNN compiles and keeps a
# kernel for every new row count, and ragged counts cost 25 MB of memory a step for hundreds of
# steps.
_ROW_MULTIPLE = 32

_SOFTMAX = _loops.Kernel("linear_cross_entropy", "softmax_gradient")


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
    """Same contract as the reference; differentiable in ``hidden``, ``weight`` and ``rows``."""
    on_gpu = _gpu.kernel("linear_cross_entropy", hidden, weight)
    if on_gpu is not None:
        return on_gpu(hidden, weight, labels, num_items, softcap, logit_scale, row_ids, rows)
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, num_items, softcap, logit_scale, row_ids, rows
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
        row_ids: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=accumulate) if want_weight else None
        trained = None if row_ids is None or rows is None else _TrainedRows(ctx, row_ids, rows)
        wanted = want_hidden or want_weight or trained is not None
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        compiled = not want_weight and _loops.refusal(hidden, weight) is None
        step = _CHUNK_ELEMENTS // weight.shape[0] // _ROW_MULTIPLE * _ROW_MULTIPLE or _ROW_MULTIPLE
        for start in range(0, hidden.shape[0], step):
            h, y = hidden[start : start + step], labels[start : start + step]
            logits = _filled(h) @ weight.t()
            if trained is not None:
                trained.score(h, logits)
            chunk_loss = _compiled if compiled else _composed
            loss, d_logits = chunk_loss(logits, y, softcap, logit_scale, wanted, h.dtype)
            total += loss
            extra = None if trained is None else trained.take(h, d_logits)
            if d_hidden is not None:
                d_h = d_logits.mm(weight)
                d_hidden[start : start + step] = (d_h if extra is None else d_h + extra)[
                    : h.shape[0]
                ]
            if d_weight is not None:
                d_weight.addmm_(d_logits[: h.shape[0]].t().to(accumulate), h.to(accumulate))
        ctx.num_items = num_items
        d_rows = None if trained is None else trained.gradient
        ctx.save_for_backward(d_hidden, d_weight, d_rows)
        ctx.weight_dtype = weight.dtype
        return total / num_items

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_loss,) = grads
        d_hidden, d_weight, d_rows = ctx.saved_tensors
        scale = d_loss / ctx.num_items
        if d_hidden is not None:
            d_hidden = (d_hidden * scale).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.weight_dtype)
        if d_rows is not None:
            d_rows = (d_rows * scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, d_rows


class _TrainedRows:
    """A few rows of the head that are trained while the rest is frozen.

    Their logits replace columns of the product, and their gradient is a product of these columns
    alone: no copy of the head (57 MB for 49k x 576 in bf16) and no gradient of its size.
    """

    def __init__(self, ctx: Any, ids: torch.Tensor, rows: torch.Tensor):
        self.ids, self.rows = ids, rows
        accumulate = torch.promote_types(rows.dtype, torch.float32)
        wanted = ctx.needs_input_grad[7]
        self.gradient = torch.zeros_like(rows, dtype=accumulate) if wanted else None

    def score(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Put their logits into ``logits`` [c filled up, v]."""
        logits[: hidden.shape[0]].index_copy_(1, self.ids, hidden @ self.rows.t())

    def take(self, hidden: torch.Tensor, d_logits: torch.Tensor) -> torch.Tensor:
        """Take their columns out of ``d_logits``; return what these give d_hidden [c, d]."""
        part = d_logits.index_select(1, self.ids)  # [c filled up, k]
        d_logits.index_fill_(1, self.ids, 0)
        if self.gradient is not None:
            kind = self.gradient.dtype
            self.gradient.addmm_(part[: hidden.shape[0]].t().to(kind), hidden.to(kind))
        return part @ self.rows


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """Append zero rows up to the next multiple of ``_ROW_MULTIPLE``."""
    missing = -rows.shape[0] % _ROW_MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _compiled(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    wanted: bool,
    _dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a chunk and its logits' gradient [c filled up, v], in one pass over the logits."""
    (c, v), losses = (labels.shape[0], logits.shape[1]), torch.empty(labels.shape[0])
    cap, scale = float(softcap or 0.0), float(logit_scale)
    _SOFTMAX(c * v, logits, labels.contiguous(), losses, c, v, cap, scale, wanted)
    return losses.sum(), logits


def _composed(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    wanted: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same out of torch's operations, any dtype."""
    logits = logits[: labels.shape[0]].to(torch.promote_types(dtype, torch.float32))  # [c, v]
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    lse = torch.logsumexp(logits, -1, keepdim=True)  # [c, 1]
    loss = (lse.squeeze(-1) - logits.gather(1, labels[:, None]).squeeze(-1)).sum()
    if not wanted:
        return loss, logits
    grad = _softmax_gradient(logits, lse, labels, softcap, logit_scale)
    return loss, _filled(grad.to(dtype))


def _softmax_gradient(
    logits: torch.Tensor,
    lse: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """Turn ``logits`` [c, v] into d loss / d (hidden @ weight.T), in place where it can be."""
    slope = None
    if softcap is not None:
        slope = 1.0 - (logits / softcap).square_()  # d tanh
    grad = logits.sub_(lse).exp_()
    grad.scatter_add_(1, labels[:, None], grad.new_full((labels.shape[0], 1), -1.0))
    if slope is not None:
        grad.mul_(slope)
    if logit_scale != 1.0:
        grad.mul_(logit_scale)
    return grad

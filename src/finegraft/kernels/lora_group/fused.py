"""Products over all layers of a group at once, in one autograd function.

How: in half precision the updates are computed first and the base product is added into them, so
that a small update is rounded together with the sum and not after it, where bfloat16 would lose it;
the same in backward. Only x and the [t, R] product are kept. Constraint: the base gets no gradient;
master weights of the adapters may be float32 while x is bfloat16, and are cast once a call (they
are small). Trade-off: all B_j stand in one block-diagonal matrix, whose zeros cost less than a
product each; the scale is folded into it before the cast, one rounding instead of two.

peft's layer costs 34 us of Python a call against 7 us for the base linear, upcasts x to float32 and
runs the side products at a quarter of the bf16 rate.

Shapes: t tokens, i in, O sum of all out, R sum of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from finegraft.kernels import nf4
from finegraft.kernels._loops import joined


class Part(NamedTuple):
    """One layer of a group.

    Attributes:
        weight: [o, i], frozen; or a 4-bit parameter of bitsandbytes, made dense for each product
            and never kept.
        bias: [o] or None, frozen.
        lora_a: [r, i] or None.
        lora_b: [o, r] or None.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float


def stack(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views with the values of ``weights`` [o_j, i] that lie behind one another."""
    return list(torch.cat(list(weights)).split([w.shape[0] for w in weights]))


def lora_group(x: torch.Tensor, parts: Sequence[Part]) -> tuple[torch.Tensor, ...]:
    """Same contract as the reference; differentiable in ``x`` and every adapter.

    The outputs are columns of one tensor, and backward takes their gradients without a copy when
    they are, too.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    shape = _Shape(tuple(parts))
    adapters = [part for part in parts if part.lora_a is not None]
    outs = _LoraGroup.apply(
        flat, shape, *(p.lora_a for p in adapters), *(p.lora_b for p in adapters)
    )
    if x.dim() == 2:
        return tuple(outs)
    return tuple(out.unflatten(0, x.shape[:-1]) for out in outs)


class _Shape:
    """What a group's parts are besides the adapters' tensors."""

    def __init__(self, parts: tuple[Part, ...]):
        self.weights = [part.weight for part in parts]
        self.biases = [part.bias for part in parts]
        self.widths = [_state(part.weight).shape[0] for part in parts]
        starts = [sum(self.widths[:j]) for j in range(len(parts))]
        self.adapted = [
            (slice(start, start + width), part.lora_b.shape[1], part.scaling)
            for start, width, part in zip(starts, self.widths, parts, strict=True)
            if part.lora_b is not None
        ]
        self.rank = sum(rank for _, rank, _ in self.adapted)

    def dense(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The weights, as one [O, i] where they lie behind one another."""
        first = self.weights[0]
        quantized = sum(_state(weight) is not weight for weight in self.weights)
        if quantized == len(self.weights):
            out = first.new_empty(sum(self.widths), _state(first).shape[1], dtype=dtype)
            for weight, rows in zip(self.weights, out.split(self.widths), strict=True):
                nf4.dense(weight, dtype=dtype, out=rows)
            return [out]
        if quantized:
            return [w if _state(w) is w else nf4.dense(w, dtype=dtype) for w in self.weights]
        at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
        for weight in self.weights:  # separate allocations may lie behind one another by chance
            one = weight.untyped_storage().data_ptr() == storage
            if weight.data_ptr() != at or not one or not weight.is_contiguous():
                return self.weights
            at += weight.numel() * weight.element_size()
        return [first.as_strided((sum(self.widths), first.shape[1]), (first.shape[1], 1))]

    def blocks(self) -> list[tuple[slice, slice, float]]:
        """Output columns, rank columns and scale of each adapter."""
        found, at = [], 0
        for columns, rank, scaling in self.adapted:
            found.append((columns, slice(at, at + rank), scaling))
            at += rank
        return found


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, shape: _Shape, *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.shape = shape
        if not adapters:
            ctx.save_for_backward()
            return _outputs(_base(x, shape, None), shape)
        lora_a, lora_b = adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]
        a = _cat(lora_a).to(x.dtype)  # [R, i]
        if len(lora_b) == 1 and lora_b[0].shape[0] == sum(shape.widths):
            b = (lora_b[0] * shape.adapted[0][2]).to(x.dtype)
        else:
            b = x.new_zeros(sum(shape.widths), shape.rank)  # block-diagonal [O, R]
            for part, (columns, ranks, scaling) in zip(lora_b, shape.blocks(), strict=True):
                b[columns, ranks] = part * scaling
        xa = x @ a.t()  # [t, R]
        if x.dtype.itemsize >= 4:  # peft's order of summation, and so its bits or nearly
            y = _base(x, shape, None).addmm_(xa, b.t())
        else:
            y = _base(x, shape, xa @ b.t())
        ctx.save_for_backward(x, a, b, xa)
        ctx.adapter_dtype = lora_a[0].dtype
        return _outputs(y, shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape: _Shape = ctx.shape
        dy = joined(grads)  # [t, O]
        saved = ctx.saved_tensors  # once: checkpointing recomputes them for one look
        if not saved:
            return _base_gradient(dy, shape, None), None
        x, a, b, xa = saved
        dyb = dy @ b  # [t, R]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _base_gradient(dy, shape, dyb @ a)
        da = (dyb.t() @ x).to(ctx.adapter_dtype)  # [R, i]
        db = xa.t() @ dy  # [R, O]
        blocks = shape.blocks()
        d_a = [da[ranks] for _, ranks, _ in blocks]
        d_b = [
            db[ranks, columns].t().to(ctx.adapter_dtype, copy=True).mul_(scaling)
            for columns, ranks, scaling in blocks
        ]
        return (dx, None, *d_a, *d_b)


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _outputs(y: torch.Tensor, shape: _Shape) -> tuple[torch.Tensor, ...]:
    return (y,) if len(shape.widths) == 1 else tuple(y.split(shape.widths, -1))


def _state(weight: torch.Tensor) -> Any:
    """What knows the shape of a weight: itself, or the state of a quantised one."""
    return getattr(weight, "quant_state", None) or weight


def _base(x: torch.Tensor, shape: _Shape, update: torch.Tensor | None) -> torch.Tensor:
    """[t, O] of the frozen layers, added into ``update``."""
    weights = shape.dense(x.dtype)
    if len(weights) == 1:
        y = _product(x, weights[0].t(), update)
    else:
        y = x.new_zeros(x.shape[0], sum(shape.widths)) if update is None else update
        for weight, part in zip(weights, y.split(shape.widths, -1), strict=True):
            _product(x, weight.t(), part)
    for bias, part in zip(shape.biases, y.split(shape.widths, -1), strict=True):
        if bias is not None:
            part.add_(bias)
    return y


def _base_gradient(dy: torch.Tensor, shape: _Shape, update: torch.Tensor | None) -> torch.Tensor:
    """d x [t, i] of the frozen layers, added into ``update``."""
    weights = shape.dense(dy.dtype)
    if len(weights) == 1:
        return _product(dy, weights[0], update)
    dx = dy.new_zeros(dy.shape[0], weights[0].shape[1]) if update is None else update
    for part, weight in zip(dy.split(shape.widths, -1), weights, strict=True):
        dx.addmm_(part, weight)
    return dx


def _product(x: torch.Tensor, w: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    """``update + x @ w``, in place where there is an update."""
    if update is None:
        return x @ w
    if not _halved(x, w):
        return update.addmm_(x, w)
    half = w.shape[1] // 64 * 32
    update[:, :half].addmm_(x, w[:, :half])
    update[:, half:].addmm_(x, w[:, half:])
    return update


def _halved(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether oneDNN would leave one of two threads without work.

    On two cores with AMX, bfloat16, products of 640 to 1,440 rows and 512 to 768 columns ran at 1.1
    to 1.4 TFLOP/s whole and at 1.9 to 2.2 as two halves; outside of these sizes whole ones were as
    fast or faster. A rule and not a timing, so that a run gives the same bits every time.
    """
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and 640 <= x.shape[0] < 1440
        and 512 <= w.shape[1] <= 768
        and torch.get_num_threads() == 2
        and _has_amx()
    )


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())

"""Dense weights from 4-bit ones: NF4 and FP4, as bitsandbytes stores them.

What: each byte holds two positions in a table of 16 values, the earlier value in the high half;
a value times its block's absolute maximum is the weight. How: on CUDA one Triton kernel, on CPUs a
table of the 256 possible pairs; ``dense`` reads a bitsandbytes parameter. Constraint: products in
float32, rounded once, so that the result is bit-equal to bitsandbytes' own. Trade-off: nothing is
cached; a weight is made dense for one product and forgotten.

Source: QLoRA, https://arxiv.org/abs/2305.14314. Shapes: n values, packed [n / 2] bytes, m blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from finegraft.core.errors import ConfigError, ModelError
from finegraft.kernels import _gpu, _loops
from finegraft.kernels._contract import Case, Op

__all__ = ["OP", "dense", "dequantize", "scales", "table"]

_LOOP = _loops.Kernel("nf4", "dense")

# NF4: the QLoRA paper's appendix E, values of equal probability under a normal distribution.
# FP4: sign, two bits of exponent, one of mantissa, divided by the largest, 12.
_FP4 = tuple(v / 12.0 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": _FP4 + tuple(-v for v in _FP4),
}  # fmt: skip


@functools.lru_cache(maxsize=64)
def table(quant_type: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the 16 values of ``quant_type``.

    Raises:
        ConfigError: FG-KERNEL-003, no such type.
    """
    if quant_type not in TABLES:
        raise ConfigError(
            "FG-KERNEL-003",
            f"4-bit type {quant_type!r}",
            allowed=", ".join(TABLES),
            fix="load the model with bnb_4bit_quant_type='nf4'",
        )
    # Through float32: in any dtype the table holds the values that the packed weights mean.
    return torch.tensor(TABLES[quant_type], dtype=torch.float32, device=device).to(dtype)


@functools.lru_cache(maxsize=64)
def _pairs(quant_type: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The two values of every byte, [256, 2]."""
    values = table(quant_type, device, dtype)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], -1)


def reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Return the dense weight.

    Args:
        packed: [(n + 1) / 2] bytes, any shape.
        absmax: [m], float32, one for each block of values; itself already dequantised.
        blocksize: Values of a block; even.
        shape: Of the result, n values; an odd n leaves half of the last byte unused.
        dtype: Of the result.
        quant_type: ``nf4`` or ``fp4``.

    Returns:
        Tensor of ``shape``.
    """
    n = math.prod(shape)
    wide = torch.promote_types(absmax.dtype, torch.float32)
    byte = packed.reshape(-1).long()
    index = torch.stack([byte >> 4, byte & 15], -1).reshape(-1)[:n]
    block = torch.arange(n, device=packed.device) // blocksize
    values = table(quant_type, packed.device, wide)[index] * absmax.to(wide)[block]
    return values.to(dtype).reshape(tuple(shape))


def _paired(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Same contract as ``reference``; one look-up a byte, and whole blocks at once."""
    n = math.prod(shape)
    wide = torch.promote_types(absmax.dtype, torch.float32)
    values = F.embedding(packed.reshape(-1).int(), _pairs(quant_type, packed.device, wide))
    flat, scale = values.reshape(-1)[:n], absmax.to(wide)
    full = n // blocksize
    head = flat[: full * blocksize].view(full, blocksize) * scale[:full, None]
    if n % blocksize == 0:
        return head.to(dtype).view(tuple(shape))
    tail = flat[full * blocksize :] * scale[full]
    return torch.cat([head.reshape(-1), tail]).to(dtype).view(tuple(shape))


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Same contract as ``reference``: Triton on CUDA where it can, else torch."""
    trained = torch.is_grad_enabled() and absmax.requires_grad
    if packed.is_cuda and not trained and _gpu.unsupported(packed, absmax) is None:
        from finegraft.kernels.nf4 import triton

        return triton.dequantize(packed, absmax, blocksize, shape, dtype, quant_type)
    return _paired(packed, absmax, blocksize, shape, dtype, quant_type)


def dense(
    weight: torch.Tensor,
    quant_state: Any = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the dense weight of a bitsandbytes 4-bit parameter; carries no gradient.

    Args:
        weight: ``Params4bit``, or its packed tensor together with ``quant_state``. Not transposed.
        quant_state: Its ``QuantState``; by default the parameter's own.
        dtype: Of the result; by default the one it was quantised from.
        out: Dense rows [out, in] of that dtype to write into.

    Returns:
        [out, in], bit-equal to ``bitsandbytes.functional.dequantize_4bit`` where that is right.

    Raises:
        ModelError: FG-MODEL-014, an evaluation on the CPU has repacked the weights;
            FG-KERNEL-004, the parameter is not quantised yet.
        ConfigError: FG-KERNEL-003, a 4-bit type other than NF4 and FP4.

    Source:
        https://arxiv.org/abs/2305.14314
    """
    state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError(
            "FG-KERNEL-004",
            f"a 4-bit weight without its scales, {tuple(weight.shape)} in {weight.dtype}",
            allowed="a Params4bit that was moved to its device, or a tensor with its QuantState",
            fix="move the layer to its device first; bitsandbytes quantises it there",
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "FG-MODEL-014",
            "this 4-bit weight was repacked by an evaluation on the CPU",
            allowed="weights as bitsandbytes quantised them",
            fix="load the model again and call finegraft.models.quantize.protect(model) first",
        )
    # Other storage dtypes (FSDP's) hold the same bytes.
    packed = weight.detach().contiguous().view(torch.uint8).reshape(-1)
    dtype = dtype or state.dtype
    if dtype == torch.bfloat16 and packed.device.type == "cpu" and _loops.missing() is None:
        return _looped(packed, state, out)
    found = _dense(packed, state, dtype)
    return found if out is None else out.copy_(found)


def _dense(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    if packed.device.type == "cpu" and state.shape[-1] % state.blocksize == 0:
        # Its compiled loop takes 0.33 ms where torch's look-ups take 1.6 (1,536 x 576, 1 thread).
        # Rows that end inside a block it gets wrong (0.50.2): values take a neighbour's scale.
        return _compiled(packed, state, dtype)
    if state.nested and _gpu.unsupported(packed, state.absmax, state.state2.absmax) is None:
        from finegraft.kernels.nf4 import triton

        outer = state.state2
        nested = triton.Nested(
            outer.code.to(packed.device),
            outer.absmax,
            state.offset.to(packed.device),
            outer.blocksize,
        )
        rest = state.blocksize, state.shape, dtype, state.quant_type
        return triton.dequantize_nested(packed, state.absmax, nested, *rest)
    return dequantize(packed, scales(state), state.blocksize, state.shape, dtype, state.quant_type)


def _looped(packed: torch.Tensor, state: Any, out: torch.Tensor | None) -> torch.Tensor:
    """One compiled pass, double quantisation included; its tensors are known to be dense."""
    values = table(state.quant_type, packed.device, torch.float32)
    if out is None:
        out = packed.new_empty(tuple(state.shape), dtype=torch.bfloat16)
    scratch = packed.new_empty(32 * torch.get_num_threads(), dtype=torch.bfloat16)
    code = outer = offset = None
    scales, outer_size = state.absmax, 1
    if state.nested:
        code, outer, offset = state.state2.code, state.state2.absmax, state.offset
        outer_size = state.state2.blocksize
    n = out.numel()
    operands = (packed, scales, code, outer, offset, values, scratch, out)
    _LOOP(n, *operands, state.blocksize, outer_size, n)
    return out


def _compiled(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own dequantising on the CPU, in any output dtype."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    table(state.quant_type, packed.device, torch.float32)  # refuses unknown types
    plain = QuantState(scales(state), state.shape, None, state.blocksize, state.quant_type, dtype)
    return dequantize_4bit(packed[:, None], plain)


def scales(state: Any) -> torch.Tensor:
    """Return the absolute maxima [m] of a ``QuantState`` in float32, undoing double quantisation.

    Args:
        state: With ``absmax``, and if ``nested`` also ``offset`` and ``state2`` (``absmax``,
            ``code``, ``blocksize``): position in the code times the outer maximum, plus the offset.
    """
    if not state.nested:
        return state.absmax.float()
    outer = state.state2
    inner = outer.code.to(state.absmax.device)[state.absmax.int()]  # [m]
    whole = inner.shape[0] // outer.blocksize * outer.blocksize
    found = torch.empty_like(inner)
    torch.mul(
        inner[:whole].view(-1, outer.blocksize),
        outer.absmax[: whole // outer.blocksize, None],
        out=found[:whole].view(-1, outer.blocksize),
    )
    if whole < inner.shape[0]:
        torch.mul(inner[whole:], outer.absmax[-1], out=found[whole:])
    return found.add_(state.offset).float()


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(12)
    for shape, blocksize, quant_type in (
        ((1, 1), 64, "nf4"),
        ((3, 7), 32, "nf4"),
        ((5, 64), 64, "fp4"),
        ((33, 129), 64, "nf4"),
        ((64, 96), 128, "fp4"),
    ):
        n = math.prod(shape)
        inputs = {
            "packed": torch.randint(
                0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, generator=generator
            ),
            "absmax": torch.rand(-(-n // blocksize), dtype=torch.float64, generator=generator),
            "blocksize": blocksize,
            "shape": shape,
            "dtype": torch.float64,
            "quant_type": quant_type,
        }
        yield Case(f"{quant_type}-{shape[0]}x{shape[1]}-blocks{blocksize}", inputs, ("absmax",))


OP = Op(
    reference=reference,
    implementations={"paired": _paired},
    unsupported=lambda **_: None,
    mutates=(),
    cases=_cases,
)

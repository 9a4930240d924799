"""Kernels inside autocast: float32 inputs, as quantized layers give them, train in one dtype."""

import pytest
import torch

from finegraft.kernels.document_attention import Documents, document_attention, reference

LENGTHS = [(16, 16), (5, 1, 7), (300, 20)]


def run(function, lengths, dtype, autocast):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(sum(lengths), h, 8, generator=generator) for h in (4, 2, 2)]
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = function(*inputs, Documents(lengths), 0.35)
    out.float().square().mean().backward()
    return [out.float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_document_attention(lengths):
    exact = run(reference, lengths, torch.float64, False)
    ours = run(document_attention, lengths, torch.float32, True)
    stock = run(reference, lengths, torch.bfloat16, False)
    for want, mine, theirs in zip(exact, ours, stock, strict=True):
        assert (mine - want).norm() <= 2 * (theirs - want).norm()

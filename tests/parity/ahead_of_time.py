"""The elementwise and loss kernels through the real compiler, down to machine code, without a GPU.

The interpreter takes Python that the compiler refuses (a variable that changes its type in a loop,
say) and knows nothing of registers. Here each launch is caught and compiled for T4, A100 and H100
with the types and alignments it would have on the GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") != "1", "compiled kernels: run without TRITON_INTERPRET"

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from finegraft.kernels import _gpu  # noqa: E402
from finegraft.kernels.add_rms_norm.triton import add_rms_norm  # noqa: E402
from finegraft.kernels.geglu.triton import geglu  # noqa: E402
from finegraft.kernels.linear_cross_entropy.triton import linear_cross_entropy  # noqa: E402
from finegraft.kernels.nf4.triton import Nested, dequantize, dequantize_nested  # noqa: E402
from finegraft.kernels.rms_norm.triton import rms_norm  # noqa: E402
from finegraft.kernels.rotary.triton import rotary  # noqa: E402
from finegraft.kernels.swiglu.triton import swiglu  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.int64: "*i64", torch.uint8: "*u8"}
CAPABILITIES = {"T4": 75, "A100": 80, "H100": 90}


def source(function: JITFunction, values: dict[str, object]) -> ASTSource:
    """The kernel with the types, constants and alignments of this launch."""
    signature, constants, aligned = {}, {}, {}
    for p in function.params:
        value = values[p.name]
        if p.is_constexpr:
            signature[p.name], constants[(p.num,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = TYPES[value.dtype]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
        whole = type(value) is int and value % 16 == 0
        if not p.is_constexpr and (whole or isinstance(value, torch.Tensor)):
            aligned[(p.num,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)


@pytest.fixture(params=CAPABILITIES.values(), ids=CAPABILITIES.keys())
def compiled(request, monkeypatch):
    """Kernels compiled instead of launched, in order."""
    found, known = [], {}

    def run(self, *args, grid, warmup, **named):
        values = dict(zip([p.name for p in self.params], args, strict=False))
        options = {k: v for k, v in named.items() if k not in self.arg_names}
        values |= {k: v for k, v in named.items() if k in self.arg_names}
        assert all(1 <= n < 2**31 for n in grid[:1]) and all(n < 2**16 for n in grid[1:])
        made = source(self, values)
        key = made.hash()
        if key not in known:
            target = GPUTarget("cuda", request.param, 32)
            known[key] = triton.compile(made, target=target, options=options)
        found.append(known[key])

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(_gpu, "unsupported", lambda *_: None)
    return found


def norms(t, dtype):
    for d in (128, 4096, 5000):
        for trained in (True, False):
            w = torch.ones(d, dtype=dtype, requires_grad=trained)
            rms_norm(t(3, d), w, 1e-5).sum().backward()
    for d in (960, 8192):
        total, out = add_rms_norm(t(3, d), t(3, d), torch.ones(d, dtype=dtype), 1e-6, 1.0)
        (total + out).sum().backward()
    return 3 * 2 * 2 + 4


def gated(t, dtype):
    for activation in (swiglu, geglu):
        activation(t(3, 2 * 14336)).sum().backward()
        activation(t(3, 33), t(3, 33)).sum().backward()
    return 8


def rotated(t, dtype):
    for f, r in ((128, 64), (96, 48), (80, 16)):
        rotary(t(3, 40, f), torch.ones(3, r), torch.ones(3, r)).sum().backward()
    return 6


def losses(t, dtype):
    labels, head = torch.tensor([1, 2, 3]), torch.zeros(32_000, 8, dtype=dtype)
    for softcap in (None, 30.0):
        linear_cross_entropy(t(3, 8), head, labels, 3.0, softcap, 0.5)
        linear_cross_entropy(t(3, 8).detach(), head, labels, 3.0, softcap)
    return 4


def dequantized(t, dtype):
    for blocksize in (64, 4096):
        packed = torch.zeros(2048, dtype=torch.uint8)
        m = 4096 // blocksize
        dequantize(packed, torch.ones(m), blocksize, (64, 64), dtype)
        nested = Nested(torch.ones(256), torch.ones(1), torch.ones(()), 256)
        whole = torch.zeros(m, dtype=torch.uint8)
        dequantize_nested(packed, whole, nested, blocksize, (64, 64), dtype)
    return 4


def stack_bytes(kernel, folder: Path) -> int:
    """Bytes of memory that each thread needs because its registers do not suffice."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("launches", [norms, gated, rotated, losses, dequantized])
def test_compiles_into_the_registers(launches, dtype, compiled, tmp_path):
    def t(*shape):
        return torch.ones(*shape, dtype=dtype, requires_grad=True)

    assert launches(t, dtype) == len(compiled)
    for kernel in compiled:
        assert stack_bytes(kernel, tmp_path) == 0, kernel.name


def test_scales_round_as_those_of_bitsandbytes_do(compiled):
    dequantized(torch.ones, torch.bfloat16)
    assert all("fma" not in kernel.asm["ptx"] for kernel in compiled)


def test_wide_vector_accesses_are_kept(compiled):
    """16 bytes a load and store at the widths of real models: what the memory's rate needs."""
    for call in (
        lambda t: rms_norm(t(3, 4096), torch.ones(4096, dtype=torch.bfloat16), 1e-5),
        lambda t: swiglu(t(3, 2 * 14336)),
        lambda t: rotary(t(3, 32, 128), torch.ones(3, 64), torch.ones(3, 64)),
    ):
        call(lambda *shape: torch.ones(*shape, dtype=torch.bfloat16))
        ptx = compiled[-1].asm["ptx"]
        assert ptx.count("ld.global.v4") >= ptx.count("ld.global") - 1
        assert ptx.count("st.global.v4") >= ptx.count("st.global") - 1

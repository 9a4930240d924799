"""Judge a kernel by float64: what every parity test of a Triton kernel needs.

What: one input, three runs (the truth in float64, the stock composition and ours in the judged
dtype), the output and every gradient compared. How: the truth sees the inputs as the judged dtype
rounded them, so that only arithmetic is judged. Constraint: our error is at most twice the stock
same-dtype error, plus one rounding step. Trade-off: Triton's interpreter must be switched on
before triton is imported, so these tests have a process of their own, which ``run_file`` starts
and whose tests it counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
DTYPES = (torch.float32, torch.bfloat16)


def require_triton() -> None:
    """Stop the collection of a file whose kernels cannot run in this process."""
    if not INTERPRETED and DEVICE != "cuda":
        raise RuntimeError(
            "without a GPU, Triton kernels run in its interpreter only: "
            "TRITON_INTERPRET=1 pytest tests/parity/triton_elementwise.py, "
            "or tests/parity/test_triton.py, which does that"
        )


def run_file(path: Path, folder: Path, interpreted: bool) -> None:
    """Run one file of tests in a process of its own; fail unless all of its tests ran and passed.

    Args:
        path: The test file.
        folder: Where the report is written.
        interpreted: In Triton's interpreter; else compiled, on the GPU.
    """
    report = folder / "report.xml"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) > 0, "no test was collected"
    assert int(suite.attrib["skipped"]) == 0, done.stdout[-20_000:]


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    """Make the interpreter round float32 to bfloat16 as a GPU does, to the nearest even.

    Triton 3.9's interpreter cuts the low bits off instead, which alone is twice the error allowed.
    A test file imports this fixture to have it.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return stock(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in a buffer that is wider and longer, none of whose strides fit the shape."""
    wide = x.new_full([n + 3 for n in x.shape], float("nan"))
    view = wide[tuple(slice(2, 2 + n) for n in x.shape)]
    view.copy_(x)
    return view


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions exchanged in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def run(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    grads: tuple[str, ...],
    dtype: torch.dtype,
    layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Call ``function`` in ``dtype`` and return its outputs and the gradients of ``grads``.

    Args:
        function: Called with ``inputs`` by name; returns a tensor or a tuple of tensors.
        inputs: Floating tensors are cast to ``dtype``.
        grads: Names of the inputs that are differentiated.
        dtype: Of the floating inputs.
        layout: Applied to the differentiated inputs and to the gradients of the outputs:
            ``strided`` or ``transposed``.
    """
    leaves, call = {}, {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.to(DEVICE, dtype if value.is_floating_point() else None)
        if name in grads:
            value = leaves[name] = value.clone().requires_grad_()
            value = layout(value) if layout else value
        call[name] = value
    outputs = function(**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads:
        seed = torch.Generator().manual_seed(3)
        # Rounded to bfloat16 first: the same direction in every precision.
        towards = [torch.randn(out.shape, generator=seed).bfloat16() for out in outputs]
        towards = [d.to(DEVICE, out.dtype) for d, out in zip(towards, outputs, strict=True)]
        if layout:
            towards = [layout(d) if d.dim() > 1 else d for d in towards]
        pairs = [(o, d) for o, d in zip(outputs, towards, strict=True) if o.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient for {name}"
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        found[f"gradient of {name}"] = leaf.grad
    return found


def judge(
    truth: Mapping[str, torch.Tensor],
    stock: Mapping[str, torch.Tensor],
    ours: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Assert that no error of ``ours`` is above twice that of ``stock`` plus one rounding step."""
    eps = torch.finfo(dtype).eps
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        mine, theirs = ours[name].double() - exact, stock[name].double() - exact
        assert ours[name].shape == exact.shape, name
        assert not mine.isnan().any(), name
        if mine.numel() == 0:
            continue
        # The norm is the measure; one element may stray further, which the maximum bounds.
        bound = 2 * theirs.norm() + eps * exact.norm()
        assert mine.norm() <= bound, f"{name}: {mine.norm():.3g} above {bound:.3g}"
        bound = 3 * theirs.abs().max() + eps * exact.abs().max()
        assert mine.abs().max() <= bound, f"{name}: {mine.abs().max():.3g} above {bound:.3g}"


def check(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    grads: tuple[str, ...],
    dtype: torch.dtype,
    layout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Compare ``ours`` with ``reference`` in ``dtype``, both judged by it in float64."""
    seen = {
        name: value.to(dtype).double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    truth = run(reference, seen, grads, torch.float64)
    stock = run(reference, seen, grads, dtype)
    judge(truth, stock, run(ours, seen, grads, dtype, layout), dtype)

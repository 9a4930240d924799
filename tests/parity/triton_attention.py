"""Document attention in Triton against the reference in float64: the output and every gradient.

Needs a GPU or ``TRITON_INTERPRET=1``; ``test_triton.py`` runs this file that way.
"""

from __future__ import annotations

import pytest
import torch
from _compare import DEVICE, DTYPES, INTERPRETED, check, require_triton, run, strided
from _compare import round_to_nearest as _round_to_nearest  # noqa: F401 - a fixture

from finegraft.core.errors import ConfigError
from finegraft.kernels.document_attention import OP, Documents, reference
from finegraft.kernels.document_attention import tiles as tile_module
from finegraft.kernels.document_attention.tiles import Tile

require_triton()

from finegraft.kernels.document_attention.triton import _tanh, document_attention  # noqa: E402


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Make the interpreter multiply bfloat16 numbers, as a GPU does.

    Triton 3.9's interpreter holds them as 16-bit integers and multiplies those.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(bits.float().numpy(), tl.float32)

    def create_dot(self, a, b, *rest):
        return stock(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def inputs(lengths, h, k, f, window=None, softcap=None, factor=1.0):
    generator = torch.Generator().manual_seed(sum(lengths) + f)

    def normal(heads):
        return torch.randn(sum(lengths), heads, f, dtype=torch.float64, generator=generator)

    return {
        "query": normal(h) * factor,
        "key": normal(k),
        "value": normal(k),
        "documents": Documents(lengths),
        "scale": f**-0.5,
        "window": window,
        "softcap": softcap,
    }


GRADS = ("query", "key", "value")
CASES = {
    "one token": ((1,), 1, 1, 2),
    "shorter than a tile": ((5, 1, 7), 4, 2, 8),
    "documents of one token": ((1, 1, 1, 34, 1), 2, 2, 16),
    "ragged, one key head": ((40, 3, 70, 33, 3), 4, 1, 8),
    "as long as tiles": ((32, 64, 16), 3, 3, 16),
    "64 features": ((65, 12), 3, 1, 64),
    "80 features": ((37, 50), 2, 1, 80),
    "96 features": ((49, 30), 2, 2, 96),
    "128 features": ((61, 1), 4, 2, 128),
    "256 features": ((50, 17), 2, 1, 256),
    "odd width": ((41, 22), 2, 1, 7),
    "window of two": ((20, 40), 2, 1, 8, 2),
    "window below a tile": ((50, 9, 120), 4, 2, 8, 7),
    "window above a tile": ((150, 33), 2, 1, 16, 45),
    "window that a document reaches": ((45, 46, 44), 2, 1, 16, 45),
    "window that nothing reaches": ((70, 9), 2, 1, 8, 500),
    "soft cap": ((70, 9, 40), 4, 2, 16, None, 50.0),
    "soft cap that bites": ((70, 9), 2, 1, 16, None, 2.0, 4.0),
    "window and soft cap": ((90, 9), 4, 2, 20, 33, 5.0),
    "large scores": ((66, 20), 2, 1, 32, None, None, 40.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_every_gradient(case, dtype):
    check(document_attention, reference, inputs(*case), GRADS, dtype)


def with_angles(function):
    """The same function of cos and sin by name, which the comparison casts like other tensors."""
    return lambda cos, sin, **rest: function(**rest, angles=None if cos is None else (cos, sin))


# Longer ones take the interpreter 8 seconds each and cross no border that these do not.
SHORT = [case for case in OP.cases() if case.inputs["documents"].tokens < 400]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.label)
def test_cases_of_the_operation(case, dtype):
    cos, sin = case.inputs["angles"] or (None, None)
    given = {name: value for name, value in case.inputs.items() if name != "angles"}
    given |= {"cos": cos, "sin": sin}
    check(with_angles(document_attention), with_angles(reference), given, case.grads, dtype)


def test_a_token_that_sees_only_itself():
    """Its scores get no gradient; rounding of do * value - do * output is all that may be left."""
    case = inputs((20, 40), 2, 1, 8, 1)
    found = run(document_attention, case, GRADS, torch.float32)
    assert torch.equal(found["output 0"].cpu(), case["value"].float().repeat(1, 2, 1))
    assert found["gradient of query"].abs().max() < 1e-5
    assert found["gradient of key"].abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input_as_split_from_one_projection(dtype):
    check(document_attention, reference, inputs((50, 3, 20), 4, 2, 24), GRADS, dtype, strided)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("lengths", [(1, 40, 1), (33, 9, 70, 1), (64, 32, 16), (90, 3)])
def test_shared_beginning(lengths, softcap, dtype):
    case = inputs(lengths, 4, 2, 16, 500, softcap)
    case["documents"] = Documents(lengths, shared=True)
    check(document_attention, reference, case, GRADS, dtype)


@pytest.mark.parametrize("tile", [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 1)])
def test_tiles_as_large_as_on_a_gpu(monkeypatch, tile):
    monkeypatch.setattr(tile_module, "tile", lambda *_: tile)
    case = inputs((300, 5, 140), 2, 1, 16, 100, 20.0)
    check(document_attention, reference, case, GRADS, torch.float32)
    check(document_attention, reference, {**case, "window": None}, GRADS, torch.float32)


def test_same_bits_on_every_run():
    case = inputs((90, 9, 40), 4, 2, 20, 33)
    first, again = (run(document_attention, case, GRADS, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_no_document_sees_another():
    case = inputs((70, 40), 2, 1, 16)
    plain = run(document_attention, case, GRADS, torch.float32)
    for name in GRADS:
        changed = case[name].clone()
        changed[:70] = 1e4  # of the first document
        found = run(document_attention, {**case, name: changed}, GRADS, torch.float32)
        assert all(torch.equal(found[key][70:], plain[key][70:]) for key in plain), name


def test_only_the_gradients_that_are_asked_for():
    case = inputs((33, 4), 2, 1, 8)
    for name in GRADS:
        alone = run(document_attention, case, (name,), torch.float32)
        together = run(document_attention, case, GRADS, torch.float32)
        key = f"gradient of {name}"
        assert torch.equal(alone[key], together[key])


def test_no_tokens():
    case = inputs((), 2, 1, 8)
    found = run(document_attention, case, GRADS, torch.float32)
    assert found["output 0"].shape == (0, 2, 8)
    assert found["gradient of key"].shape == (0, 1, 8)


def test_memory_is_linear_in_length():
    """What is kept for backward: three inputs, the output and one float32 a row and head."""
    case = inputs((400,), 2, 1, 16)
    q, k, v = (case[name].float().to(DEVICE).requires_grad_() for name in GRADS)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        document_attention(q, k, v, case["documents"], 0.25)
    assert sum(saved) == 400 * (2 * 16 + 16 + 16 + 2 * 16 + 2)


def test_autocast_computes_in_its_dtype():
    case = inputs((40, 9), 2, 1, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run(document_attention, case, GRADS, torch.float32)
    cast = run(document_attention, case, GRADS, torch.bfloat16)
    assert inside["output 0"].dtype == torch.bfloat16
    for name, found in inside.items():
        assert torch.equal(found.bfloat16(), cast[name]), name


def test_tanh_is_exact_to_three_rounding_steps():
    import triton
    import triton.language as tl

    @triton.jit
    def apply(x_ptr, y_ptr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(y_ptr + at, _tanh(tl.load(x_ptr + at)))

    x = torch.cat([torch.linspace(-30, 30, 2048), torch.linspace(-0.7, 0.7, 2048)]).to(DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, 4096)
    exact = torch.tanh(x.double())
    steps = ((y.double() - exact).abs() / exact.abs().clamp_min(1e-30)).max() / 2**-24
    assert steps <= 3.5


def test_wrong_input_is_refused():
    case = inputs((20, 4), 4, 2, 8)
    with pytest.raises(ConfigError, match="FG-KERNEL-001"):
        document_attention(**case)  # float64
    case = {k: v.float().to(DEVICE) if k in GRADS else v for k, v in case.items()}
    for change in (
        {"documents": Documents((20, 3))},
        {"key": case["key"][:, :1].repeat(1, 3, 1)},
        {"value": case["value"][..., :4]},
        {"value": case["value"].bfloat16()},
        {"documents": Documents((20, 4), shared=True), "window": 23},
    ):
        with pytest.raises(ConfigError, match="FG-KERNEL-002"):
            document_attention(**{**case, **change})


@pytest.mark.parametrize("shared_memory", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("filled", [16, 64, 128, 256])
@pytest.mark.parametrize(("sums", "own"), [(1, 1), (1, 2), (2, 2)])
def test_chosen_tiles_fit_the_device(filled, sums, own, shared_memory):
    for itemsize in (2, 4) if shared_memory > 64 << 10 else (2,):
        tile = tile_module.choose(filled, itemsize, sums, own, shared_memory, itemsize == 2)
        operands = own * tile.owned * filled + 2 * tile.stages * tile.read * filled
        assert operands * itemsize < shared_memory
        assert sums * tile.owned * filled <= 16_384


def test_the_table_names_every_row_once_and_heavy_tiles_first():
    table = tile_module.table((70, 1, 33), 32, True, False, torch.device("cpu")).tolist()
    rows = sorted(r for _, end, first in table for r in range(first, min(first + 32, end)))
    assert rows == list(range(104))
    late = [first - start for start, _, first in table]
    assert late == sorted(late, reverse=True)
    by_key = tile_module.table((33, 70, 90), 32, False, True, torch.device("cpu")).tolist()
    assert [first for *_, first in by_key[:3]] == [0, 32, 103]

"""LoRA through peft with fused layers: same numbers, same files, refusals that say why."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from training_tiny import llama, tokenizer

from finegraft import opening
from finegraft.adapters import lora
from finegraft.core.errors import AdapterError
from finegraft.models import swap

IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 300, 4, 2]])


def nonzero(model):
    """Give every LoRA B some values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def pair(**settings):
    """The same adapter, once on peft's own layers and once on ours."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    stock = nonzero(peft.get_peft_model(llama(), config))
    torch.manual_seed(3)
    ours = nonzero(lora.attach(llama(), r=4, **settings))
    return stock, ours


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"lora_alpha": 32}],
    ids=str,
)
def test_output_and_gradients_equal_peft(settings):
    stock, ours = pair(**settings)
    for model in (stock, ours):
        model.train()
        model(input_ids=IDS).logits.square().mean().backward()
    torch.testing.assert_close(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_layers_say_whether_they_are_fused():
    plain = lora.attach(llama(), r=4)
    assert "14 x FastLoraLinear" in swap.summary(plain)
    assert "fused=True" in repr(plain)
    dora = lora.attach(llama(), r=4, use_dora=True)
    assert "fused=a LoRA variant" in repr(dora)


def test_dropout_disable_merge_and_a_second_adapter_take_pefts_path():
    stock, ours = pair(lora_dropout=0.5)
    for model in (stock, ours):
        model.train()
        torch.manual_seed(9)
        model.drawn = model(input_ids=IDS).logits
        model.eval()
    torch.testing.assert_close(ours.drawn, stock.drawn)
    with stock.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    expected = ours(input_ids=IDS).logits
    ours.merge_adapter()
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    ours.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ours.set_adapter("second")
    base = llama()
    torch.testing.assert_close(ours(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_starts_as_the_identity_and_only_the_adapter_trains():
    model = lora.attach(llama(), r=4)
    torch.testing.assert_close(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)


def test_unknown_target_lists_the_models_layers():
    with pytest.raises(
        AdapterError, match=r"(?s)FG-ADAPT-001.*'qproj'.*q_proj \(2\).*did you mean"
    ):
        lora.attach(llama(), target_modules=["qproj"])


def test_rank_zero_is_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-002.*r=0.*at least 1"):
        lora.attach(llama(), r=0)


def test_what_peft_refuses_is_named():
    with pytest.raises(AdapterError, match="FG-ADAPT-004"):
        lora.attach(llama(), init_lora_weights="gaussian", lora_bias=True)


@pytest.fixture
def saved(tmp_path):
    """A base on the disk and an adapter that was trained on it."""
    base = tmp_path / "base"
    llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    opened = opening.open_model(base, dtype="float32")
    model = nonzero(lora.attach(opened.model, r=4))
    model.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    return tmp_path, model(input_ids=IDS).logits


def test_adapter_folder_finds_its_base_and_gives_the_same_logits(saved):
    folder, expected = saved
    opened = opening.open_model(folder / "adapter", dtype="float32")
    torch.testing.assert_close(opened.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    assert opened.tokenizer.pad_token_id != opened.tokenizer.eos_token_id
    assert "FastLoraLinear" in swap.summary(opened.model)


def test_adapter_on_a_base_of_another_shape_is_refused(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-003.*another base model.*features 64"):
        opening.attach_saved(llama(hidden_size=64), folder / "adapter")
    with pytest.raises(AdapterError, match=r"FG-ADAPT-003.*no layer"):
        opening.attach_saved(llama(num_hidden_layers=1), folder / "adapter")


def test_adapter_on_a_base_with_other_weights_is_refused(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match="weights of its embedding are different"):
        opening.attach_saved(llama(seed=8), folder / "adapter")
    # The same base in another precision is the same base.
    opening.attach_saved(llama(torch.bfloat16), folder / "adapter")


def test_adapter_without_a_base_says_so(saved):
    folder, _ = saved
    (folder / "adapter" / opening.NOTE).unlink()
    path = folder / "adapter" / "adapter_config.json"
    values = {**json.loads(path.read_text()), "base_model_name_or_path": None}
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="FG-ADAPT-005"):
        opening.open_model(folder / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_four_bit_base_gives_the_gradients_of_its_dense_weights(tmp_path, dtype):
    """The truth is float64 on the dequantised base; the yardstick is peft's own 4-bit layer."""
    from finegraft.kernels import nf4
    from finegraft.models.load import load_model

    llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    model = load_model(tmp_path, load_in_4bit=True, dtype=names[dtype], device_map="cpu")
    model = lora.attach(model, r=4, init_lora_weights=False)
    layers = [m for m in model.modules() if type(m).__name__ == "FastLoraLinear4bit"]
    assert len(layers) == 14
    layer = layers[0].train()
    weight = nf4.dense(layer.base_layer.weight, dtype=dtype).double()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = torch.randn(7, 64, generator=torch.Generator().manual_seed(2)).to(dtype)

    def run(function, x):
        x = x.clone().requires_grad_()
        a.grad = b.grad = None
        y = function(x)
        y.backward(dy.to(y.dtype))
        return [y.detach(), x.grad, a.grad.clone(), b.grad.clone()]

    scale = layer.scaling["default"]
    truth = run(lambda x: x @ weight.t() + x @ a.double().t() @ b.double().t() * scale, x.double())
    ours = run(layer, x)
    with swap.stock(layer):
        stock = run(layer, x)
    for exact, mine, theirs in zip(truth, ours, stock, strict=True):
        eps = torch.finfo(dtype).eps
        error = (mine.double() - exact).norm()
        assert error <= 2 * (theirs.double() - exact).norm() + eps * exact.norm()

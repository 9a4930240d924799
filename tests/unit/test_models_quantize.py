"""A 4-bit base survives evaluation: same outputs, same bits, gradients as before."""

import pytest
import torch
from test_models_load import tiny

from finegraft.core.errors import ConfigError, ModelError
from finegraft.models import quantize
from finegraft.models.load import load_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}


@pytest.fixture
def folder(tmp_path):
    tiny(**WIDE).save_pretrained(tmp_path)
    return tmp_path


def run(model, ids):
    """Logits, and the gradient that reaches the embeddings through every quantised layer."""
    seen = {}
    hook = model.model.embed_tokens.register_forward_hook(
        lambda *a: seen.setdefault("x", a[2].detach().requires_grad_())
    )
    logits = model(ids).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.float().square().mean(), seen["x"])
    return logits.detach(), gradient


def test_eval_train_eval_changes_nothing(folder):
    model = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    layer = model.model.layers[0].mlp.up_proj
    assert quantize.protect(model) == 14
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
    trained, gradient = run(model.train(), ids)
    assert gradient.abs().sum() > 0
    for mode in (False, True, False):
        model.train(mode)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, trained)
    again, gradient_again = run(model.train(), ids)
    assert torch.equal(again, trained)
    assert torch.equal(gradient_again, gradient)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert layer.support_avx512bf16_for_cpu is False


def test_4bit_is_nf4_with_double_quantisation_and_close_to_the_weights(folder):
    import bitsandbytes.functional as bnb

    model = load_model(folder, load_in_4bit=True, dtype="float32", device_map="cpu")
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested
    real = tiny(**WIDE).model.layers[1].mlp.down_proj.weight
    error = (bnb.dequantize_4bit(weight.data, weight.quant_state) - real).norm() / real.norm()
    assert 0.01 < error < 0.15


def test_8bit_loads_and_answers(folder):
    model = load_model(folder, load_in_8bit=True, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_saved_4bit_model_loads_again_protected(folder, tmp_path):
    first = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    first.save_pretrained(tmp_path / "q")
    again = load_model(tmp_path / "q", dtype="bfloat16", device_map="cpu")
    assert again.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu is False
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(first(ids).logits, again(ids).logits)


def test_both_flags_are_refused(folder):
    with pytest.raises(ConfigError, match="FG-CONF-003: load_in_4bit and load_in_8bit"):
        load_model(folder, load_in_4bit=True, load_in_8bit=True)


def test_neither_flag_is_no_quantisation():
    assert quantize.config_for(False, False, torch.float32) is None


def test_weights_that_an_evaluation_repacked_are_refused(folder):
    model = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks them
    with pytest.raises(ModelError, match="FG-MODEL-014: this 4-bit model was evaluated before"):
        quantize.protect(model)

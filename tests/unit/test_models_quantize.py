"""A 4-bit base survives evaluation: same outputs, same bits, gradients as before."""

import pytest
import torch
from test_models_load import tiny

import finegraft
from finegraft.core.errors import ConfigError, ModelError
from finegraft.kernels import nf4
from finegraft.models import _stream, load, quantize
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


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_kind_and_double_quantisation_are_chosen(folder, kind, double):
    how = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    model = load_model(
        folder, load_in_4bit=True, device_map="cpu", bnb_4bit_compute_dtype="float32", **how
    )
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested is double
    assert layer.compute_dtype == torch.float32


def test_another_kind_is_refused(folder):
    with pytest.raises(ConfigError, match="FG-MODEL-015: bnb_4bit_quant_type is 'int4'"):
        load_model(folder, load_in_4bit=True, bnb_4bit_quant_type="int4")


def test_a_whole_configuration_is_taken_as_it_is(folder):
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head", "q_proj"]
    )
    model = load_model(folder, quantization_config=how, device_map="cpu")
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is type(model.lm_head) is torch.nn.Linear
    assert attention.k_proj.weight.quant_state.quant_type == "fp4"


def test_settings_without_4_bits_are_refused():
    from finegraft.core import schema
    from finegraft.training.tasks._contract import quantization

    given = {"model": "demo", "data": "rows.jsonl", "bnb_4bit_quant_type": "fp4"}
    with pytest.raises(ConfigError, match="FG-MODEL-016: bnb_4bit_quant_type without load_in_4bit"):
        quantization(schema.build(given))
    how = quantization(schema.build({**given, "load_in_4bit": True}))
    assert how["load_in_4bit"] and how["bnb_4bit_quant_type"] == "fp4"


@pytest.mark.parametrize("width", [32, 96, 160])
def test_rows_that_end_inside_a_block_are_read_right(tmp_path, width):
    tiny(hidden_size=width, intermediate_size=width + 16, vocab_size=256).save_pretrained(tmp_path)
    model = load_model(tmp_path, load_in_4bit=True, dtype="float32", device_map="cpu")
    layer = model.model.layers[0].mlp.up_proj
    assert quantize.misread(layer.weight)
    state = layer.weight.quant_state
    weight = nf4.reference(
        layer.weight.data, nf4.scales(state), 64, state.shape, torch.float32, "nf4"
    )
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ weight.T)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_preparing_is_float32_frozen_and_recomputed_until_switched_off(folder):
    model = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    before = model.get_memory_footprint()
    assert not model.is_gradient_checkpointing  # nothing is prepared unasked
    made = finegraft.prepare_model_for_kbit_training(model)
    assert made is model and model.is_gradient_checkpointing
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {torch.float32, torch.uint8}
    plain = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert model.get_memory_footprint() == before + 2 * plain
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert model.train()(ids).logits.requires_grad  # the input does
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_preparing_equals_what_peft_does(folder):
    import peft

    ours = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    theirs = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    finegraft.prepare_model_for_kbit_training(ours, use_gradient_checkpointing=False)
    theirs = peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    assert not ours.is_gradient_checkpointing
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert p.dtype == expected[name].dtype and torch.equal(p, expected[name]), name


def test_preparing_a_plain_model_is_refused(folder):
    with pytest.raises(ModelError, match=r"FG-MODEL-017: .* got a LlamaForCausalLM that is not"):
        finegraft.prepare_model_for_kbit_training(load_model(folder))


def test_a_streamed_model_equals_what_transformers_loads(folder, monkeypatch):
    """Same bits, generation settings and name, quantized from one tensor after the other."""
    import json

    settings = {"temperature": 0.25, "do_sample": True, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    streamed = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    monkeypatch.setattr(_stream, "instead_of", lambda *a: None)
    whole = load_model(folder, load_in_4bit=True, dtype="bfloat16", device_map="cpu")
    for name, value in whole.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], value), name
    assert streamed.generation_config.to_dict() == whole.generation_config.to_dict()
    assert streamed.config.to_dict() == whole.config.to_dict()
    assert streamed.config.name_or_path == whole.config.name_or_path == str(folder)


def test_a_file_that_shrinks_while_it_is_read_is_named(folder):
    entry = next(iter(_stream.open_files([folder / "model.safetensors"]).values()))
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.truncate(entry.start)
    with pytest.raises(ModelError, match=r"FG-MODEL-005: .*ended while it was being read"):
        entry[...]


def test_the_space_of_phi_3_mini_is_the_known_one():
    """Exact arithmetic on the real configuration, without a weight."""
    from transformers import BitsAndBytesConfig, Phi3Config, Phi3ForCausalLM
    from transformers.integrations import replace_with_bnb_linear

    from finegraft import adapters

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM._from_config(Phi3Config(), dtype=torch.bfloat16)
        model = replace_with_bnb_linear(model, ["lm_head"], how)
    model.is_loaded_in_4bit = model.is_quantized = True
    load._share_frequencies(model)
    layers = quantize.quantized_layers(model)
    assert len(layers) == 4 * 32
    for layer in layers.values():  # two values a byte, as bitsandbytes packs them
        count = layer.weight.numel()
        packed = torch.empty(count // 2, 1, dtype=torch.uint8, device="meta")
        layer.weight.data = packed
    assert model.get_memory_footprint() == 2_206_341_312
    model = finegraft.prepare_model_for_kbit_training(model)
    targets = ["qkv_proj", "gate_up_proj", "down_proj", "o_proj"]
    with torch.device("meta"):
        model = adapters.attach(model, r=8, target_modules=targets)
    assert f"{model.get_memory_footprint() / 1e6:.2f}" == "2651.07"
    trained, every = model.get_nb_trainable_parameters()
    assert f"{trained / 1e6:.2f} of {every / 1e6:.2f}" == "12.58 of 3833.66"
    assert f"{100 * trained / every:.2f}" == "0.33"
    shown = str(model)
    assert "(o_proj): lora.Linear4bit(" in shown or "(o_proj): lora.FastLoraLinear4bit(" in shown
    assert "(base_layer): Linear4bit(in_features=3072, out_features=9216, bias=False)" in shown


def test_the_trainer_protects_a_stock_model(folder, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    how = quantize.config_for(True, False, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    args = finegraft.TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    trainer = finegraft.Trainer(model=model, args=args)
    layers = quantize.quantized_layers(trainer.model)
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers.values())

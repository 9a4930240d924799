"""Any order of training, asking, merging and saving on a 4-bit base agrees with float32."""

import logging
import random

import pytest
import torch
from training_tiny import llama
from training_tiny import tokenizer as tiny_tokenizer

from finegraft import adapters, opening
from finegraft.adapters import merge_to_16bit
from finegraft.core.errors import AdapterError
from finegraft.kernels import nf4
from finegraft.models import quantize
from finegraft.models.load import load_model

# Widths of whole blocks and not, a bias on some layers.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
STEPS = 10
IDS = torch.randint(3, 600, (3, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    original().save_pretrained(path)
    return path


def original():
    model = llama(**SIZES, attention_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def four_bit(folder, **how):
    return load_model(folder, dtype="float32", load_in_4bit=True, device_map="cpu", **how)


def with_lora(model):
    torch.manual_seed(5)
    return adapters.attach(model, r=4, lora_alpha=8, target_modules="all-linear")


def reference(quantized):
    """The stock model in float32 with the dequantised weights, by the specification of NF4."""
    plain = original()
    layers = quantize.quantized_layers(quantized)
    with torch.no_grad():
        for name, layer in layers.items():
            state, weight = layer.weight.quant_state, plain.get_submodule(name).weight
            blocks = nf4.scales(state)
            kind = state.quant_type
            weight.copy_(
                nf4.reference(layer.weight.data, blocks, 64, state.shape, torch.float32, kind)
            )
    assert len(layers) == 14
    return plain


def close(ours, expected, tolerance=2e-4):
    error = (ours.detach() - expected.detach()).norm() / expected.detach().norm()
    assert error < tolerance, f"{error:.1e}"


class Pair:
    """A 4-bit model and its float32 counterpart, taken through the same."""

    def __init__(self, folder, place):
        self.folder, self.place = folder, place
        base = four_bit(folder)
        self.bits = {k: v.clone() for k, v in base.state_dict().items()}
        self.truth = with_lora(reference(base))
        self.model = with_lora(base)

    def gradients(self, model):
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    def train(self):
        for model in (self.model, self.truth):
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.3)
            for step in range(STEPS):
                optimizer.zero_grad()
                ids = IDS.roll(step, 1)
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        expected = self.gradients(self.truth)
        for name, gradient in self.gradients(self.model).items():
            close(gradient, expected[name], 2e-3)

    def eval(self):
        with torch.no_grad():
            close(self.model.eval()(IDS).logits, self.truth.eval()(IDS).logits)
            # Without the adapter bitsandbytes' own forward runs, the one that repacks weights.
            with self.model.disable_adapter(), self.truth.disable_adapter():
                close(self.model(IDS).logits, self.truth(IDS).logits)

    def generate(self):
        how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        answers = [m.eval().generate(input_ids=IDS, **how) for m in (self.model, self.truth)]
        assert torch.equal(*answers)

    def merge(self):
        merged = merge_to_16bit(self.model, base="dequantized", dtype=torch.float32).model
        expected = merge_to_16bit(self.truth).model
        for name, weight in expected.state_dict().items():
            close(merged.state_dict()[name], weight, 1e-4)
        with torch.no_grad():
            close(merged(IDS).logits, self.truth.eval()(IDS).logits)

    def save(self):
        self.model.save_pretrained(self.place)
        layers = quantize.quantized_layers(self.model.get_base_model())
        for name, layer in layers.items():
            plain = name.replace(".base_layer", "") + ".weight"
            assert torch.equal(layer.weight.data, self.bits[plain])

    def reload(self):
        self.save()
        self.model = opening.attach_saved(four_bit(self.folder), self.place, trainable=True)
        self.eval()


@pytest.mark.parametrize("seed", range(12))
def test_any_order_agrees_with_float32(folder, tmp_path, seed):
    pair = Pair(folder, tmp_path)
    order = ["train", "eval", "train", "generate", "merge", "save", "reload"]
    random.Random(seed).shuffle(order)
    for step in order:
        getattr(pair, step)()
    pair.eval()
    pair.train()


def moved(model):
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def test_original_weights_are_used_where_they_are_and_named(folder, caplog):
    plain, model = moved(with_lora(load_model(folder, dtype="float32"))), four_bit(folder)
    model = moved(with_lora(model))
    with caplog.at_level(logging.INFO, "finegraft"):
        merged = merge_to_16bit(model)
    assert (merged.base, merged.folder, merged.reason) == ("original", folder, None)
    assert f"merged into the original weights in {folder}" in caplog.text
    assert not getattr(merged.model, "is_quantized", False)
    expected = merge_to_16bit(plain)
    assert expected.base == "loaded"
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(merged.model.state_dict()[name], weight), name


def test_dequantised_weights_are_used_where_the_originals_are_gone(folder, tmp_path, caplog):
    four_bit(folder).save_pretrained(tmp_path / "q")
    model = moved(with_lora(load_model(tmp_path / "q", dtype="float32", device_map="cpu")))
    with caplog.at_level(logging.INFO, "finegraft"):
        merged = merge_to_16bit(model)
    assert merged.base == "dequantized"
    assert "q_proj.weight" in merged.reason and merged.reason in caplog.text
    with torch.no_grad():
        close(merged.model(IDS).logits, model(IDS).logits)
    merged.model.save_pretrained(tmp_path / "out")
    again = load_model(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, merged.model(IDS).logits)


def test_a_result_in_16_bits_and_a_model_that_goes_on(folder):
    model = moved(with_lora(four_bit(folder)))
    before = model(IDS).logits.detach()
    assert merge_to_16bit(model, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert torch.equal(model(IDS).logits, before)


def test_heads_of_classifiers_and_other_methods_are_kept(folder):
    for method in ("lora", "ia3"):
        load = {"task": "sequence-classification", "num_labels": 3, "dtype": "float32"}
        model = load_model(folder, load_in_4bit=True, device_map="cpu", **load)
        model = moved(adapters.attach(model, method, task_type="SEQ_CLS"))
        merged = merge_to_16bit(model, base="dequantized").model
        with torch.no_grad():
            close(merged(IDS).logits, model(IDS).logits)


def test_eight_bits_learn_merge_and_reload(folder, tmp_path):
    load = {"dtype": "float32", "load_in_8bit": True, "device_map": "cpu"}
    model = with_lora(load_model(folder, **load)).train()
    plain = merge_to_16bit(model, base="dequantized").model
    truth = with_lora(plain).train()
    losses = []
    for one in (model, truth):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.3)
        for _ in range(5):
            optimizer.zero_grad()
            loss = one(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    expected = {n: p.grad for n, p in truth.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad, expected[name], 0.1)  # activations are rounded to 8 bits as well
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    with torch.no_grad():
        logits = model.eval()(IDS).logits
        close(merge_to_16bit(model, base="dequantized").model(IDS).logits, logits, 0.03)
    model.save_pretrained(tmp_path)
    again = opening.attach_saved(load_model(folder, **load), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, logits)


def test_merging_in_place_is_right_or_refused(folder, tmp_path):
    model = moved(with_lora(four_bit(folder)))
    with pytest.raises(AdapterError, match=r"FG-ADAPT-074: merging into a 4-bit layer \(64, 96\)"):
        model.merge_and_unload()
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = moved(with_lora(four_bit(tmp_path)))
    with torch.no_grad():
        before = model(IDS).logits
        close(model.merge_and_unload()(IDS).logits, before, 0.3)  # rounded to 4 bits again


def test_weights_of_transposed_layers_are_turned_back(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=640, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for base, expected in (("dequantized", 2e-4), (None, 0.3)):
        model = moved(with_lora(four_bit(tmp_path)))
        merged = merge_to_16bit(model, base=base)
        assert merged.base == (base or "original")
        with torch.no_grad():
            close(merged.model(IDS).logits, model(IDS).logits, expected)


def test_new_tokens_are_kept(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    model, _ = adapters.add_new_tokens(four_bit(folder), tokenizer, ["<order>", "<customer>"])
    model = moved(with_lora(model))
    for base in ("dequantized", None):
        merged = merge_to_16bit(model, base=base)
        ids = torch.tensor([[5, before, 9, before + 1]])
        with torch.no_grad():
            close(merged.model(ids).logits, model(ids).logits, 0.3 if base is None else 2e-4)


def test_a_model_without_some_of_its_weights_is_refused(folder):
    model = with_lora(four_bit(folder))
    del model.get_base_model().model.norm.weight
    with pytest.raises(AdapterError, match=r"FG-ADAPT-075: LlamaForCausalLM .* model.norm.weight"):
        merge_to_16bit(model)


def test_what_cannot_be_merged_is_refused(folder, tmp_path):
    model = four_bit(folder)
    with pytest.raises(AdapterError, match="FG-ADAPT-070: merge_to_16bit got a LlamaForCausalLM"):
        merge_to_16bit(model)
    prompt = adapters.attach(four_bit(folder), "prompt")
    with pytest.raises(AdapterError, match="FG-ADAPT-071: this adapter cannot be merged"):
        merge_to_16bit(prompt)
    model = with_lora(model)
    llama(**SIZES, attention_bias=True, seed=9).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"FG-ADAPT-072: (.|\n)*is of another model"):
        merge_to_16bit(model, base=tmp_path)
    with pytest.raises(AdapterError, match=r"FG-ADAPT-072: .* is not a folder"):
        merge_to_16bit(model, base=tmp_path / "nowhere")
    model.base_model.set_adapter([*model.peft_config])
    adapters.named.add(model, "second", r=2)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="FG-ADAPT-073: 2 adapters are active"):
        merge_to_16bit(model)

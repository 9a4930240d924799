"""Every option of LoRA against stock peft: logits, gradients, saving, disabling, merging."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from training_tiny import llama
from transformers import BertConfig, BertForSequenceClassification

import finegraft
from finegraft import adapters
from finegraft.adapters import lora
from finegraft.core.errors import AdapterError
from finegraft.models import causal_loss, families, swap

IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 300, 4, 2]])
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bert():
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=640,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        max_position_embeddings=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def shake(model):
    """Move every trained weight, the same way in equal models."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise.to(parameter.dtype))
    return model


OPTIONS = {
    "rslora": ({"use_rslora": True}, True),
    "patterns": ({"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
                  "alpha_pattern": {"down_proj": 3}}, True),
    "some layers": ({"layers_to_transform": [1], "target_modules": SEVEN}, True),
    "dropout 0": ({"lora_dropout": 0.0}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "mica": ({"init_lora_weights": "mica"}, False),
    "dora": ({"use_dora": True}, False),
    "lora bias": ({"lora_bias": True}, False),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, True),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    "both ends": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
    "tied ends": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"],
                   "ensure_weight_tying": True}, True),
    "whole head": ({"modules_to_save": ["lm_head"]}, True),
    "whole ends": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "whole ends tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "dora embedding": ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, False),
}  # fmt: skip


def causal_pair(tied, settings):
    """Stock peft on stock transformers, and ours with every swap, with equal weights."""
    config = {"r": 4, "target_modules": "all-linear", **copy.deepcopy(settings)}
    torch.manual_seed(3)
    stock = peft.get_peft_model(
        llama(tie_word_embeddings=tied), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    torch.manual_seed(3)
    ours = lora.attach(llama(tie_word_embeddings=tied), **copy.deepcopy(config))
    families.apply(ours)
    assert causal_loss.apply(ours)
    return shake(stock), shake(ours)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_logits_and_gradients_equal_stock_peft(name, tied):
    settings, fused = OPTIONS[name]
    stock, ours = causal_pair(tied, settings)
    labels = IDS.clone()
    labels[0, :3] = -100
    losses = []
    for model in (stock, ours):
        model.train()
        losses.append(model(input_ids=IDS, labels=labels).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    for parameter_name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                grads[parameter_name], parameter.grad, rtol=1e-4, atol=1e-6, msg=parameter_name
            )
    for model in (stock, ours):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    layers = [m for m in ours.modules() if isinstance(m, lora.FastLoraLinear)]
    reasons = {m.refusal() for m in layers}
    assert layers and reasons == {None} if fused else None not in reasons


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_saved_reopened_disabled_and_merged(name, tied, tmp_path):
    settings, _ = OPTIONS[name]
    _, model = causal_pair(tied, settings)
    model.eval()
    base = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        model.save_pretrained(tmp_path / "a")
        plain = peft.PeftModel.from_pretrained(
            llama(tie_word_embeddings=tied), str(tmp_path / "a")
        ).eval()
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected)
        families.apply(plain)
        adapters.accelerate(plain)
        assert torch.equal(plain(input_ids=IDS).logits, expected)
        if "lora_bias" in settings:
            return  # peft cannot merge it into a layer without a bias
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "m")
        again = type(base).from_pretrained(tmp_path / "m", dtype=torch.float32)
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_unmerging_a_tied_head_gives_the_shared_weight_back():
    model = lora.attach(llama(), r=4, target_modules=["lm_head"])
    shake(model)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    model.merge_adapter()
    assert torch.equal(weight, before)
    assert model.get_output_embeddings().base_layer.weight is not weight
    model.unmerge_adapter()
    assert model.get_output_embeddings().base_layer.weight is weight


@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa", "olora"])
def test_a_classifier_keeps_its_head(kind, tmp_path):
    model = adapters.attach(bert(), kind, task_type="SEQ_CLS", r=4)
    families.apply(model)
    head = [n for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    assert len(head) == 2
    shake(model).eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_are_saved_and_equal_peft(bias, tmp_path):
    config = {"r": 4, "target_modules": ["query", "value"], "bias": bias}
    torch.manual_seed(3)
    stock = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", **config))
    torch.manual_seed(3)
    ours = lora.attach(bert(), task_type="SEQ_CLS", **config)
    families.apply(ours)
    for model in (stock, ours):
        shake(model).train()
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    names = {n for n, p in stock.named_parameters() if p.requires_grad}
    assert set(grads) == names and any(n.endswith(".bias") and "classifier" not in n for n in names)
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    ours.eval().save_pretrained(tmp_path)
    expected = ours(input_ids=IDS).logits
    plain = peft.PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected)
    torch.testing.assert_close(ours.merge_and_unload()(input_ids=IDS).logits, expected)


def moe():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("targets", [["q_proj"], []], ids=["with attention", "experts alone"])
def test_experts_by_parameter_equal_peft(targets, tmp_path):
    config = {"r": 2, "target_parameters": EXPERTS, "target_modules": targets}
    torch.manual_seed(3)
    stock = peft.get_peft_model(moe(), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(3)
    ours = lora.attach(moe(), **config)
    for model in (stock, ours):
        shake(model).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert sum("experts" in name for name in grads) == 8
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    ours.eval()
    expected = ours(input_ids=IDS).logits
    with ours.disable_adapter():
        torch.testing.assert_close(ours(input_ids=IDS).logits, moe()(input_ids=IDS).logits)
    ours.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(moe(), str(tmp_path)).eval()
    assert torch.equal(plain(input_ids=IDS).logits, expected)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_can_be_chosen_with_the_default_targets():
    model = finegraft.FastLanguageModel.get_peft_model(llama(), r=4, layers_to_transform=[1])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 14 and all(".layers.1." in name for name in names)


def test_the_report_says_what_is_not_fused():
    assert "fused=a LoRA variant" in repr(lora.attach(llama(), r=4, use_dora=True))
    assert "fused=True" in repr(lora.attach(llama(), r=4, use_rslora=True))
    assert "FastLoraEmbedding" in swap.summary(
        lora.attach(llama(), r=4, target_modules=["embed_tokens"])
    )


MISUSE = {
    "unknown start": ({"init_lora_weights": "pisa"}, r"(?s)FG-ADAPT-050.*'pisa'.*mean 'pissa'"),
    "bad niter": ({"init_lora_weights": "pissa_niter_x"}, "FG-ADAPT-050"),
    "corda": ({"init_lora_weights": "corda"}, r"(?s)FG-ADAPT-051.*covariances.*eva"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, r"(?s)FG-ADAPT-051.*gradients"),
    "pissa on an embedding": (
        {"init_lora_weights": "pissa", "target_modules": ["embed_tokens"]},
        r"FG-ADAPT-051.*embed_tokens",
    ),
    "pissa with a large rank": ({"init_lora_weights": "pissa", "r": 33}, "FG-ADAPT-051.*rank 33"),
    "orthogonal with an odd rank": (
        {"init_lora_weights": "orthogonal", "r": 3},
        "FG-ADAPT-051.*odd rank",
    ),
    "loftq, 8 bits": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
        "FG-ADAPT-052.*8 bits",
    ),
    "loftq, 2 bits": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}},
        "FG-ADAPT-052.*loftq_bits=2",
    ),
    "loftq, two rounds": (
        {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_iter=2)},
        "FG-ADAPT-052.*loftq_iter=2",
    ),
    "pattern": ({"rank_pattern": {"qproj": 4}}, r"(?s)FG-ADAPT-053.*'qproj'.*mean 'q_proj'"),
    "alpha pattern": ({"alpha_pattern": {"lm_head": 4}}, r"(?s)FG-ADAPT-053.*'lm_head'"),
    "rank 0 in a pattern": ({"rank_pattern": {"q_proj": 0}}, r"FG-ADAPT-053.*'q_proj': 0"),
    "layer": ({"layers_to_transform": [0, 2]}, r"(?s)FG-ADAPT-054.*no layer 2.*0 to 1"),
    "layer below 0": ({"layers_to_transform": -1}, r"(?s)FG-ADAPT-054.*no layer -1"),
    "layer list": (
        {"layers_to_transform": 0, "layers_pattern": "blocks"},
        r"(?s)FG-ADAPT-054.*'blocks'",
    ),
    "dora with a bias": ({"use_dora": True, "lora_bias": True}, "FG-ADAPT-004|FG-ADAPT-055"),
    "bias that is not there": ({"bias": "all"}, "FG-ADAPT-056.*no biases at all"),
    "bias of the layers": ({"bias": "lora_only"}, "FG-ADAPT-056.*no bias on the adapted"),
    "bias": ({"bias": "lora"}, r"(?s)FG-ADAPT-056.*did you mean 'lora_only'"),
    "saved module": (
        {"modules_to_save": ["lmhead"]},
        r"(?s)FG-ADAPT-058.*'lmhead'.*did you mean 'lm_head'",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_answered_and_leaves_the_model_alone(name):
    settings, message = MISUSE[name]
    model = llama()
    with pytest.raises(AdapterError, match=message):
        lora.attach(model, **settings)
    assert not any("lora" in key for key in model.state_dict())


def test_misuse_of_experts_is_answered():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-057.*'experts.up'.*experts.down_proj"):
        lora.attach(moe(), target_parameters=["experts.up"], target_modules=[])
    with pytest.raises(AdapterError, match=r"FG-ADAPT-057.*lora_dropout=0.1"):
        lora.attach(moe(), target_parameters=EXPERTS, lora_dropout=0.1)
    with pytest.raises(AdapterError, match=r"FG-ADAPT-055.*every expert"):
        lora.attach(moe(), target_parameters=EXPERTS, use_dora=True)

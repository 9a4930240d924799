"""The facade: Unsloth's names, order and defaults, and an answer to every other name."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from training_tiny import llama, tokenizer

import finegraft
from finegraft import FastLanguageModel
from finegraft.core.errors import ArgumentError
from finegraft.core.hardware import facts

IDS = torch.tensor([[5, 9, 33, 2, 77, 8]])


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_signatures_have_unsloths_names_in_unsloths_order():
    loading = list(inspect.signature(FastLanguageModel.from_pretrained).parameters)
    assert " ".join(loading[:10]) == (
        "model_name max_seq_length dtype load_in_4bit load_in_8bit load_in_16bit full_finetuning "
        "token device_map rope_scaling"
    )
    adapting = list(inspect.signature(FastLanguageModel.get_peft_model).parameters)
    assert " ".join(adapting[:9]) == (
        "model r target_modules lora_alpha lora_dropout bias layers_to_transform layers_pattern "
        "use_gradient_checkpointing"
    )


def test_load_adapt_switch(base):
    model, tok = FastLanguageModel.from_pretrained(base, max_seq_length=64, dtype="float32")
    assert not any(p.requires_grad for p in model.parameters())
    assert tok.model_max_length == 64 and tok.padding_side == "right"
    assert tok.pad_token_id != tok.eos_token_id
    model = FastLanguageModel.get_peft_model(model, r=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    FastLanguageModel.for_inference(model)
    assert not model.training
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    FastLanguageModel.for_training(model)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_adapter_starts_from_random_state_and_leaves_the_global_one(base):
    starts = []
    for seed in (1, 1, 2):
        model, _ = FastLanguageModel.from_pretrained(base, dtype="float32")
        torch.manual_seed(40)
        expected = torch.rand(3)
        torch.manual_seed(40)
        model = FastLanguageModel.get_peft_model(model, r=4, random_state=seed)
        assert torch.equal(torch.rand(3), expected)
        starts.append(next(p for n, p in model.named_parameters() if "lora_A" in n).clone())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_default_targets_are_all_linear_layers_of_any_family(base):
    from transformers import Phi3Config, Phi3ForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    model = FastLanguageModel.get_peft_model(Phi3ForCausalLM(Phi3Config(**size, **heads)), r=2)
    names = {
        n.split(".lora_")[0].split(".")[-1] for n, p in model.named_parameters() if p.requires_grad
    }
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_names_without_meaning_are_answered_once_and_unknown_ones_refused(base, caplog):
    with caplog.at_level(logging.WARNING, "finegraft"):
        FastLanguageModel.from_pretrained(
            base, dtype="float32", fast_inference=True, max_lora_rank=64
        )
    said = [r.message for r in caplog.records]
    assert sum("'fast_inference' is ignored" in line for line in said) == 1
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*'load_in_4bits'.*'load_in_4bit'"):
        FastLanguageModel.from_pretrained(base, load_in_4bits=True)
    with pytest.raises(ArgumentError, match=r"(?s)get_peft_model has no argument 'lora_alfa'"):
        FastLanguageModel.get_peft_model(llama(), lora_alfa=1)


def test_checkpointing_follows_the_request(base):
    model, _ = FastLanguageModel.from_pretrained(base, dtype="float32")
    assert model.is_gradient_checkpointing == bool(facts().gpus)
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_full_finetuning_trains_every_weight(base):
    model, _ = FastLanguageModel.from_pretrained(base, dtype="float32", full_finetuning=True)
    assert all(p.requires_grad for p in model.parameters())


def test_a_four_bit_base_learns_and_keeps_its_weights(base, tmp_path):
    model, tok = FastLanguageModel.from_pretrained(base, load_in_4bit=True, max_seq_length=64)
    assert model.is_loaded_in_4bit
    before = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    model = FastLanguageModel.get_peft_model(model, r=4)
    made = finegraft.SFTTrainer(
        model=model,
        tokenizer=tok,
        train_dataset=[{"prompt": "hello world", "completion": "bye now"}] * 4,
        args=finegraft.SFTConfig(
            str(tmp_path), max_steps=8, learning_rate=1e-2, logging_steps=1, save_strategy="no"
        ),
    )
    made.train()
    losses = [e["loss"] for e in made.state.log_history if "loss" in e]
    assert losses[-1] < losses[0] - 0.3
    after = dict(made.model.get_base_model().named_parameters())
    kept = [
        torch.equal(p, after[n.replace("_proj.", "_proj.base_layer.")]) for n, p in before.items()
    ]
    assert len(kept) == 14 and all(kept)


def test_native_bfloat16_is_what_the_machine_has():
    assert finegraft.is_bfloat16_supported() == facts().native_bf16

"""Configurations by any name, the task read off the model, and the front door for all methods."""

from __future__ import annotations

import peft
import pytest
import torch
from training_tiny import llama
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import finegraft
from finegraft import adapters
from finegraft.adapters import _configs
from finegraft.core.errors import AdapterError, ArgumentError

IDS = torch.tensor([[5, 9, 33, 2, 77, 8]])


def distilbert(kind=DistilBertForSequenceClassification):
    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4}
    return kind(DistilBertConfig(**sizes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4)).eval()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


GUIDE = {
    "lora": (distilbert, lambda: finegraft.LoRAConfig(r=8, lora_alpha=32, lora_dropout=0.1)),
    "bottleneck": (
        distilbert,
        lambda: finegraft.AdapterConfig(reduction_factor=2, non_linearity="relu"),
    ),
    "prefix": (
        gpt2,
        lambda: finegraft.PrefixTuningConfig(prefix_length=10, task_type="text-generation"),
    ),
    "prompt": (
        distilbert,
        lambda: finegraft.PromptTuningConfig(prompt_length=5, task_type="classification"),
    ),
    "bitfit": (distilbert, lambda: finegraft.BitFitConfig()),
}


@pytest.mark.parametrize("method", GUIDE)
def test_the_snippets_of_the_guide_run(method):
    make, config = GUIDE[method]
    model = finegraft.get_peft_model(make(), config())
    assert adapters.method_of(model) is adapters.METHODS.get(method)
    head = {name for name in trainable(model) if "classifier" in name}
    assert bool(head) == (make is distilbert)
    assert trainable(model) - head
    model.train()
    out = model(input_ids=IDS, labels=IDS if make is gpt2 else torch.tensor([1]))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_names_of_the_guide_are_translated():
    prefix = finegraft.PrefixTuningConfig(prefix_length=10, task_type="text-generation")
    assert isinstance(prefix, peft.PrefixTuningConfig)
    assert prefix.num_virtual_tokens == 10 and prefix.task_type == "CAUSAL_LM"
    prompt = finegraft.PromptTuningConfig(prompt_length=5, task_type="classification")
    assert prompt.num_virtual_tokens == 5 and prompt.task_type == "SEQ_CLS"
    coded = finegraft.PromptEncoderConfig(prompt_length=5, task_type=finegraft.TaskType.SEQ_CLS)
    assert coded.num_virtual_tokens == 5 and coded.task_type == "SEQ_CLS"
    assert finegraft.LoRAConfig is finegraft.LoraConfig
    assert finegraft.IA3Config(task_type="ner").task_type == "TOKEN_CLS"
    assert repr(finegraft.AdapterConfig(reduction_factor=2)) == (
        "AdapterConfig(task_type=None, reduction_factor=2)"
    )


def test_unknown_names_are_answered():
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*prefix_lenght.*prefix_length"):
        finegraft.PrefixTuningConfig(prefix_lenght=10)
    with pytest.raises(ArgumentError, match="FG-ARG-002"):
        finegraft.PrefixTuningConfig(prefix_length=10, num_virtual_tokens=5)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-043.*'clasification'.*classification"):
        finegraft.LoraConfig(task_type="clasification")
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-044.*a dict.*LoraConfig"):
        finegraft.get_peft_model(llama(), {"r": 8})


def test_the_task_is_read_off_the_class():
    for make, task in ((llama, "CAUSAL_LM"), (gpt2, "CAUSAL_LM"), (distilbert, "SEQ_CLS")):
        assert _configs.task_of(make()) == task
        model = finegraft.get_peft_model(make(), finegraft.LoraConfig(r=2))
        assert model.peft_config["default"].task_type == task
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-042.*DistilBertModel.*task_type"):
        finegraft.get_peft_model(distilbert(DistilBertModel), finegraft.LoraConfig(r=2))


def test_stock_configurations_give_pefts_numbers_and_are_not_changed():
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    ours = finegraft.get_peft_model(llama(), config, adapter_name="first")
    assert config.task_type is None and list(ours.peft_config) == ["first"]
    torch.manual_seed(3)
    stock = peft.get_peft_model(llama(), peft.LoraConfig(**{**config.to_dict(), "peft_type": None}))
    for (_, a), (name, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, name


def test_targets_may_be_left_out_and_are_pefts_where_it_knows_the_model():
    model = finegraft.get_peft_model(gpt2(), finegraft.LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == {"c_attn"}
    model = finegraft.get_peft_model(distilbert(), finegraft.LoraConfig(r=2))
    lora = {name for name in trainable(model) if "lora_" in name}
    assert len(lora) == 2 * 2 * 6 and not any("classifier" in name for name in lora)
    whole = {name for name in trainable(model) if "classifier" in name}
    assert len(whole) == 4 and trainable(model) == lora | whole
    torch.manual_seed(0)
    strange = llama()
    strange.config.model_type = "strange"
    model = finegraft.get_peft_model(strange, finegraft.LoraConfig(r=2))
    assert any("down_proj" in name for name in trainable(model))


def test_methods_of_peft_without_a_file_here_work():
    model = finegraft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    assert trainable(model) and all("hada_" in name for name in trainable(model))
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-039.*nowhere"):
        finegraft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["nowhere"]))


def test_a_model_that_carries_an_adapter_is_refused():
    model = finegraft.get_peft_model(llama(), finegraft.LoraConfig(r=2))
    for config in (finegraft.LoraConfig(r=2), finegraft.BitFitConfig(), peft.LoHaConfig(r=2)):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-045.*default.*named\.add"):
            finegraft.get_peft_model(model, config)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prefix", {"num_virtual_tokens": 4}),
        ("prompt", {"num_virtual_tokens": 4}),
        ("ptuning", {"encoder_hidden_size": 8}),
        ("ia3", {}),
        ("dora", {"r": 2}),
        ("rslora", {"r": 2}),
        ("full", {}),
    ],
)
def test_the_front_door_takes_every_method(method, settings):
    model = finegraft.FastLanguageModel.get_peft_model(llama(), method=method, **settings)
    found, preset = adapters.find(method)
    assert adapters.method_of(model) is (found if method != "full" else None)
    for name, value in preset.items():
        assert getattr(model.peft_config["default"], name) == value
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_the_front_door_answers_what_a_method_does_not_have():
    front = finegraft.FastLanguageModel.get_peft_model
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*'r'"):
        front(llama(), method="prompt", r=8)
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*num_virtual_token'.*num_virtual_t"):
        front(llama(), method="prompt", num_virtual_token=8)
    with pytest.raises(ArgumentError, match="FG-ARG-001"):
        front(llama(), lora_alfa=8)
    with pytest.raises(AdapterError, match="FG-ADAPT-010"):
        front(llama(), method="lorra")
    model = front(distilbert(), r=2)
    assert model.peft_config["default"].task_type == "SEQ_CLS"


def test_a_prefix_switches_checkpointing_off_unless_it_was_asked_for():
    base = llama()
    base.gradient_checkpointing_enable()
    finegraft.FastLanguageModel.get_peft_model(base, method="prefix")
    assert not base.is_gradient_checkpointing
    asked = llama()
    asked.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="FG-ADAPT-034"):
        finegraft.FastLanguageModel.get_peft_model(
            asked, method="prefix", use_gradient_checkpointing=True
        )

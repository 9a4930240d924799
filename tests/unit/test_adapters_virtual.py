"""Prefix, prompt and P-tuning: peft's numbers, positions that padding does not move, refusals."""

from __future__ import annotations

import json
import warnings

import bitsandbytes
import peft
import pytest
import torch
from training_tiny import llama, rows, tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

import finegraft
from finegraft import adapters, opening
from finegraft.adapters import _virtual
from finegraft.core.errors import AdapterError, ArgumentError, ConfigError
from finegraft.core.schema import build
from finegraft.inference import modes
from finegraft.inference.generate import complete
from finegraft.models import causal_loss, families, swap
from finegraft.models.families import FAMILIES
from finegraft.training.arguments import SFTConfig, TrainingArguments
from finegraft.training.collate import Collator
from finegraft.training.run import train
from finegraft.training.sft import SFTTrainer
from finegraft.training.trainer import Trainer

WIDE = {"initializer_range": 0.2}
LONG, SHORT = [5, 9, 33, 3, 77, 8, 41], [7, 12, 300]
METHODS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "prefix": (peft.PrefixTuningConfig, {"init_weights": None}),
    "prefix, projected": (
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 16, "init_weights": None},
    ),
    "ptuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
}
NETWORKS = ("prefix, projected", "ptuning")


def stock(model, name, task="CAUSAL_LM"):
    torch.manual_seed(3)
    config, settings = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            model, config(task_type=task, num_virtual_tokens=5, **settings)
        ).eval()


def ours(model, name, task="CAUSAL_LM"):
    torch.manual_seed(3)
    method, settings = name.split(",")[0], METHODS[name][1]
    made = adapters.attach(model, method, task_type=task, num_virtual_tokens=5, **settings).eval()
    families.apply(made)
    if task == "CAUSAL_LM":
        causal_loss.apply(made)
    return made


def padded(side="right"):
    """Two rows of different lengths with mask and labels."""
    gap = [0] * (len(LONG) - len(SHORT))
    shown = [1] * len(SHORT)
    short, mask = (SHORT + gap, shown + gap) if side == "right" else (gap + SHORT, gap + shown)
    return {
        "input_ids": torch.tensor([LONG, short]),
        "attention_mask": torch.tensor([[1] * len(LONG), mask]),
    }


def alone(ids):
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_equal_stock_peft(name, family):
    make = FAMILIES.get(family).tiny
    torch.manual_seed(0)
    base = make()
    twin = type(base)(base.config)
    twin.load_state_dict(base.state_dict())
    one, two = stock(base, name).train(), ours(twin, name).train()
    batch = {k: v % 131 for k, v in padded().items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :2] = -100
    losses = [model(**batch, use_cache=False).loss for model in (one, two)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    found = {n: p.grad for n, p in two.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and all("prompt_encoder" in n for n in found)
    for key, gradient in expected.items():
        assert gradient.norm() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_labels_are_shifted_past_the_virtual_tokens(name):
    model = ours(llama(**WIDE), name)
    batch = alone(LONG)
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    logits = model(**batch).logits[0, -len(LONG) :]
    expected = -logits.log_softmax(-1)[range(2, 6), LONG[3:]].mean()
    model.train()
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)


@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_no_logit(name):
    model = ours(llama(**WIDE), name)
    single = model(**alone(SHORT)).logits[0, -1]
    for side, place in (("right", len(SHORT) - len(LONG) - 1), ("left", -1)):
        logits = model(**padded(side)).logits[1, place]
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-4, msg=side)


@pytest.mark.parametrize("name", METHODS)
def test_generate_in_batches_padded_left_equals_one_by_one_and_the_plain_loop(name):
    model = ours(llama(**WIDE), name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def plainly(ids):
        ids = list(ids)
        for _ in range(6):
            ids.append(int(model(**alone(ids)).logits[0, -1].argmax()))
        return ids[-6:]

    expected = [plainly(LONG), plainly(SHORT)]
    assert expected[0] != expected[1]
    for switch in (lambda m: m, modes.for_inference):
        switch(model)
        assert model.generate(**padded("left"), **options)[:, -6:].tolist() == expected
        for ids, answer in zip((LONG, SHORT), expected, strict=True):
            assert model.generate(**alone(ids), **options)[0, -6:].tolist() == answer
    with model.disable_adapter():
        base = model.get_base_model().generate(**alone(LONG), **options)
        torch.testing.assert_close(model.generate(**alone(LONG), **options), base)
        torch.testing.assert_close(base, llama(**WIDE).generate(**alone(LONG), **options))


def test_complete_answers_alike_alone_and_in_a_batch():
    model = ours(llama(**WIDE), "prompt")
    talks = [[{"role": "user", "content": "hello " * n}] for n in (1, 6, 3)]
    together = complete(model, tokenizer(), talks, max_new_tokens=8)
    assert together == [complete(model, tokenizer(), [talk], max_new_tokens=8)[0] for talk in talks]


@pytest.mark.parametrize("name", METHODS)
def test_saved_folder_opens_here_and_in_plain_peft_and_trains_on(name, tmp_path):
    model = ours(llama(**WIDE), name)
    model.save_pretrained(str(tmp_path))
    opening.write_note(model, tmp_path)
    expected = model(**alone(LONG)).logits
    reopened = opening.attach_saved(llama(**WIDE), tmp_path).eval()
    torch.testing.assert_close(reopened(**alone(LONG)).logits, expected)
    plain = peft.PeftModel.from_pretrained(llama(**WIDE), str(tmp_path)).eval()
    torch.testing.assert_close(plain(**alone(LONG)).logits, expected)
    trains = opening.attach_saved(llama(**WIDE), tmp_path, trainable=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trains.named_parameters() if p.requires_grad} == names
    wanted = dict(model.named_parameters())
    for key, value in trains.named_parameters():
        assert torch.equal(value, wanted[key]), key
    assert (tmp_path / _virtual.ENCODER).is_file() == (name in NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_gives_the_network_back(name, tmp_path):
    model = ours(llama(**WIDE), name)
    model.save_pretrained(str(tmp_path))
    wanted = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for key in wanted:
        model.get_parameter(key).data.add_(1.0)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    for key, value in wanted.items():
        assert torch.equal(model.get_parameter(key), value), key
        assert model.get_parameter(key).requires_grad


@pytest.mark.parametrize("name", NETWORKS)
def test_training_on_without_the_network_is_refused(name, tmp_path):
    stock(llama(), name).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-035.*trainable=False"):
        opening.attach_saved(llama(), tmp_path, trainable=True)
    model = ours(llama(), name)
    with pytest.raises(AdapterError, match="FG-ADAPT-035"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_encoders_classify_as_in_stock_peft(name, family):
    if family == "distilbert" and "prefix" in name:
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-037.*DistilBert.*method='prompt'"):
            ours(FAMILIES.get(family).tiny(), name, "SEQ_CLS")
        return
    torch.manual_seed(0)
    base = FAMILIES.get(family).tiny().eval()
    twin = type(base)(base.config)
    twin.load_state_dict(base.state_dict())
    if family == "distilbert":  # peft does not find its sizes
        base.config.__dict__.update(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    two = ours(twin, name, "SEQ_CLS")
    batch = {k: torch.where(v > 130, 130, v) for k, v in padded().items()}
    if family != "distilbert":
        one = stock(base, name, "SEQ_CLS")
        found = two(**batch, labels=torch.tensor([0, 2]))
        expected = one(**batch, labels=torch.tensor([0, 2]))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    single = two(**{k: v[1:, : len(SHORT)] for k, v in batch.items()}).logits
    torch.testing.assert_close(two(**batch).logits[1:], single, rtol=1e-4, atol=1e-5)
    trainable = [n for n, p in two.named_parameters() if p.requires_grad]
    assert all("prompt_encoder" in n or "classifier" in n for n in trainable)
    assert any("classifier" in n for n in trainable)


def classifier(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**llama(**WIDE).config.to_dict(), "num_labels": 3, "id2label": None, **changes}
    )
    return LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("name", METHODS)
def test_decoders_classify_by_the_last_real_token(name):
    model = ours(classifier(), name, "SEQ_CLS")
    single = model(**alone(SHORT)).logits
    expected = stock(classifier(), name, "SEQ_CLS")
    with torch.no_grad():
        head = dict(model.named_parameters())
        for key, value in expected.named_parameters():
            value.copy_(head[key])
    torch.testing.assert_close(expected(**alone(SHORT)).logits, single, rtol=1e-4, atol=1e-5)
    for side in ("left", "right"):
        logits = model(**padded(side)).logits[1:]
        torch.testing.assert_close(logits, single, rtol=1e-4, atol=1e-4, msg=side)
    if "prefix" not in name:
        unmasked = model(input_ids=padded()["input_ids"]).logits
        torch.testing.assert_close(unmasked[1:], single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_trains_with_the_trainer_and_resumes_bit_for_bit(name, tmp_path):
    def trainer(where, steps):
        made = ours(llama(**WIDE), name)
        args = SFTConfig(
            str(tmp_path / where),
            max_steps=steps,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            seed=1,
        )
        return SFTTrainer(made, args, train_dataset=rows(), processing_class=tokenizer())

    whole = trainer("whole", 4)
    assert not whole.data_collator.flat
    whole.train()
    start = dict(ours(llama(**WIDE), name).named_parameters())
    for key, value in whole.model.named_parameters():
        assert torch.equal(value, start[key]) != value.requires_grad, key
    trainer("parts", 2).train()
    resumed = trainer("parts", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for key, value in resumed.model.named_parameters():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_the_trainers_loss_is_that_of_stock_peft_on_the_same_batch(name, tmp_path):
    made = ours(llama(**WIDE), name)
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=4, max_steps=1)
    trainer = SFTTrainer(made, args, train_dataset=rows(), processing_class=tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    expected = stock(llama(**WIDE), name).train()
    reference = expected(**batch).loss
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    gradients = {n: p.grad for n, p in expected.named_parameters() if p.requires_grad}
    for key, value in made.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(value.grad, gradients[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning"])
def test_packing_is_refused(name, tmp_path):
    model = ours(llama(), name)
    given = {"train_dataset": rows(), "processing_class": tokenizer()}
    with pytest.raises(AdapterError, match=rf"(?s)FG-ADAPT-030.*'{name}'.*packing=False"):
        SFTTrainer(model, SFTConfig(str(tmp_path), packing=True, max_length=64), **given)
    config = METHODS[name][0](task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(AdapterError, match="FG-ADAPT-030"):
        SFTTrainer(llama(), SFTConfig(str(tmp_path), packing=True), peft_config=config, **given)
    flat = Collator(0, flat=True)([{"input_ids": LONG, "labels": LONG}] * 2)
    with pytest.raises(AdapterError, match="FG-ADAPT-030"):
        model(**flat)
    restarting = {
        "input_ids": torch.tensor([LONG]),
        "position_ids": torch.tensor([[0, 1, 2] * 2 + [3]]),
    }
    with pytest.raises(AdapterError, match="FG-ADAPT-030"):
        model(**restarting)


def test_recomputation_and_a_prefix_exclude_each_other(tmp_path):
    model = ours(llama(), "prefix")
    with pytest.raises(AdapterError, match="FG-ADAPT-034"):
        SFTTrainer(
            model,
            SFTConfig(str(tmp_path), gradient_checkpointing=True),
            train_dataset=rows(),
            processing_class=tokenizer(),
        )
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-034.*method='prompt'"):
        model.train()(**alone(LONG))
    base = llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(AdapterError, match="FG-ADAPT-034"):
        adapters.attach(base, "prefix")
    prompt = adapters.attach(base, "prompt").train()
    prompt(**alone(LONG), labels=torch.tensor([LONG])).loss.backward()


@pytest.mark.parametrize("name", ["prompt", "prefix", "ptuning"])
def test_merging_is_refused_in_plain_words(name):
    model = ours(llama(), name)
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-031.*beside the weights.*lora"):
            call()
    assert adapters.METHODS.get(name).not_mergeable


def test_rows_longer_than_the_models_positions_are_refused():
    model = ours(FAMILIES.get("bert").tiny(), "prompt", "SEQ_CLS")
    limit = model.config.max_position_embeddings - 5
    assert model(**alone([3] * limit)).logits.shape == (1, 3)
    with pytest.raises(AdapterError, match=rf"(?s)FG-ADAPT-033.*max_length={limit}"):
        model(**alone([3] * (limit + 1)))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-036.*num_virtual_tokens=0"):
        adapters.attach(llama(), "prefix", num_virtual_tokens=0)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-039.*MLP .* or LSTM"):
        adapters.attach(llama(), "ptuning", encoder_reparameterization_type="GRU")
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*num_tokens.*num_virtual_tokens"):
        adapters.attach(llama(), "prompt", num_tokens=5)
    with pytest.raises(AdapterError, match="FG-ADAPT-011"):
        adapters.attach(llama(), "prompt", task_type="TOKEN_CLS")
    for start in ({"prompt_tuning_init": "TEXT"}, {"prompt_tuning_init": "WORDS"}):
        with pytest.raises(AdapterError, match="FG-ADAPT-038"):
            adapters.attach(llama(), "prompt", **start)


def test_a_prompt_starts_as_its_text_and_asks_for_the_tokenizer_once(tmp_path):
    tokenizer().save_pretrained(tmp_path / "words")
    text = "you are so very kind"
    where = str(tmp_path / "words")
    model = adapters.attach(
        llama(),
        "prompt",
        num_virtual_tokens=7,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=where,
    )
    ids = (tokenizer()(text)["input_ids"] * 7)[:7]
    expected = llama().get_input_embeddings().weight[ids]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["prompt_tuning_init"] == "RANDOM" and config["prompt_tuning_init_text"] == text
    (tmp_path / "words").rename(tmp_path / "elsewhere")
    opening.attach_saved(llama(), tmp_path / "adapter", trainable=True)
    with pytest.raises(AdapterError, match="FG-ADAPT-039"):
        adapters.attach(
            llama(), "prompt", prompt_tuning_init_text=text, tokenizer_name_or_path=where
        )


def test_the_report_shows_the_swap_and_undo_gives_peft_back():
    model = adapters.attach(llama(), "prefix")
    assert type(model).__name__ == "FastPeftModelForCausalLM"
    assert adapters.method_of(model) is adapters.METHODS.get("prefix")
    swap.undo(model)
    assert type(model) is peft.PeftModelForCausalLM


def test_full_trains_every_weight_and_refuses_adapters_and_quantized_bases(tmp_path):
    model = llama().requires_grad_(False)
    assert adapters.attach(model, "full") is model
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(AdapterError, match="FG-ADAPT-045"):
        adapters.attach(adapters.attach(llama(), "lora", r=2), "full")
    given = {"model": "demo", "data": "rows.jsonl"}
    for way in ({"method": "full"}, {"full_finetuning": True}):
        assert build({**given, **way}).trains_all
        assert build({**given, **way, "r": 0}).trains_all
        with pytest.raises(ConfigError, match=r"(?s)FG-ADAPT-041.*method: lora"):
            build({**given, **way, "load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"(?s)FG-ADAPT-040.*'prefix'"):
        build({**given, "full_finetuning": True, "method": "prefix"})
    assert not build(given).trains_all
    quantized = llama()
    quantized.is_quantized = True
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-012.*full"):
        adapters.attach(quantized, "full")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base on the disk, wide enough for 4-bit blocks."""
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128, **WIDE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_on_a_4bit_base_loss_and_gradients_are_those_of_its_dequantized_twin(name, base):
    quantized = opening.open_model(base, load_in_4bit=True, dtype="float32").model
    plain = llama(hidden_size=64, intermediate_size=128, **WIDE)
    modules = dict(quantized.named_modules())
    for key, module in plain.named_modules():
        state = getattr(getattr(modules[key], "weight", None), "quant_state", None)
        if state is not None:
            weight = bitsandbytes.functional.dequantize_4bit(modules[key].weight.data, state)
            module.weight.data = weight.view_as(module.weight)
    batch = padded()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients, losses = [], []
    for model in (ours(quantized, name), stock(plain, name)):
        model.eval()(**batch)  # an evaluation must leave the weights as they are
        losses.append(model.train()(**batch, use_cache=False).loss)
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for key, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_a_prefix_starts_at_zero_and_stock_configurations_start_as_in_peft():
    made = adapters.attach(llama(), "prefix", num_virtual_tokens=3)
    assert made.prompt_encoder["default"].embedding.weight.abs().max() == 0
    for config, zero in ((finegraft.PrefixTuningConfig, True), (peft.PrefixTuningConfig, False)):
        model = finegraft.get_peft_model(llama(), config(num_virtual_tokens=3))
        weight = model.prompt_encoder["default"].embedding.weight
        assert (weight.abs().max() == 0) == zero


@pytest.mark.parametrize(
    ("method", "folder"), [("prompt", "adapter"), ("ptuning", "adapter"), ("full", "model")]
)
def test_a_run_saves_what_opens_again(method, folder, base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    settings = {"num_virtual_tokens": 4} if method != "full" else {}
    result = train(
        build(
            {
                "model": str(base),
                "data": str(data),
                "output": str(tmp_path / "run"),
                "method": method,
                "method_settings": settings,
                "dtype": "float32",
                "max_steps": 2,
            }
        )
    )
    assert result.adapter == tmp_path / "run" / folder
    expected = result.model.eval()(**alone(LONG)).logits
    opened = opening.open_model(result.adapter, dtype="float32").model.eval()
    torch.testing.assert_close(opened(**alone(LONG)).logits, expected)


def test_the_stock_trainer_classifies_with_virtual_tokens(tmp_path):
    model = adapters.attach(FAMILIES.get("distilbert").tiny(), "prompt", num_virtual_tokens=4)
    before = model.prompt_encoder["default"].embedding.weight.clone()
    data = [{**{k: v[i] for k, v in padded().items()}, "labels": i} for i in range(2)] * 4
    for row in data:
        row["input_ids"] = row["input_ids"].clamp(max=130)
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2)
    Trainer(model=model, args=args, train_dataset=data).train()
    assert not torch.equal(model.prompt_encoder["default"].embedding.weight, before)

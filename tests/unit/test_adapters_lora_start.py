"""Starts of a LoRA: PiSSA, OLoRA, LoftQ and EVA; LoRA+ while it trains."""

from __future__ import annotations

import json

import datasets
import peft
import pytest
import torch
import transformers
from training_tiny import llama, rows, tokenizer

import finegraft
from finegraft import adapters, opening
from finegraft.adapters import lora
from finegraft.core.errors import AdapterError, ConfigError
from finegraft.kernels import nf4
from finegraft.models import causal_loss, families, quantize
from finegraft.training.optimizer import raise_lora_b
from finegraft.training.trainer import Trainer

IDS = torch.tensor([[5, 9, 33, 2, 77, 8], [7, 7, 12, 300, 4, 2]])
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def steps(model, count=3, decay=0.0):
    """Train on one batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=decay)
    model.train()
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def four_bit(folder):
    config = quantize.config_for(True, False, torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    quantize.protect(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    llama(**SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def base_of(kind, folder):
    return llama(**SIZES) if kind == "dense" else four_bit(folder)


def effective(layer):
    """What the layer multiplies with, in float64."""
    weight = layer.base_layer.weight
    dense = nf4.dense(weight, dtype=torch.float32) if hasattr(weight, "quant_state") else weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return (dense.double() + layer.scaling["default"] * b.double() @ a.double()).detach()


@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora"])
def test_a_start_from_the_weights_leaves_the_base_alone(start, base, folder, tmp_path):
    untouched = logits(base_of(base, folder))
    model = lora.attach(base_of(base, folder), r=4, init_lora_weights=start)
    families.apply(model)
    causal_loss.apply(model)
    layers = [m for m in model.modules() if hasattr(m, "lora_part")]
    assert len(layers) == 14 and all(m.refusal() is None for m in layers)
    torch.testing.assert_close(logits(model), untouched, rtol=1e-4, atol=1e-5)
    steps(model, decay=0.0)
    trained = logits(model)
    assert (trained - untouched).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), untouched, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "a")
    plain = peft.PeftModel.from_pretrained(base_of(base, folder), str(tmp_path / "a"))
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-5)
    opened = opening.attach_saved(base_of(base, folder), tmp_path / "a")
    families.apply(opened)
    assert torch.equal(logits(opened), trained)
    if base == "dense":
        torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_training_moves_the_weights_as_pefts_own_start_does(start, rslora):
    """Same effective weights after some steps; peft takes the part out of the base instead."""
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": rslora, "rank_pattern": {"q_proj": 2}}
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=start, **settings)
    stock = steps(peft.get_peft_model(llama(**SIZES), config))
    ours = steps(lora.attach(llama(**SIZES), init_lora_weights=start, **settings))
    theirs = dict(stock.named_modules())
    for name, layer in ours.named_modules():
        if hasattr(layer, "lora_part"):
            expected = effective(theirs[name])
            moved = (expected - layer.base_layer.weight.double()).norm()
            assert (effective(layer) - expected).norm() < 0.02 * moved, name


def test_the_beginning_does_not_move():
    model = lora.attach(llama(), r=4, init_lora_weights="pissa")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a = layer.lora_A["default"].weight
    assert a.shape[0] == 8 and torch.equal(a[:4], a[4:])
    before = a[4:].detach().clone()
    steps(model)
    assert torch.equal(a[4:], before) and not torch.equal(a[:4], before)


def error_of(model, folder):
    """How far the effective weights are from the unquantized ones."""
    whole = dict(llama(**SIZES).named_modules())
    total = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_part"):
            exact = whole[name.removeprefix("base_model.model.")].weight.double()
            total += float((effective(layer) - exact).norm() ** 2)
    return total**0.5


def test_loftq_takes_back_part_of_the_quantization_error(folder, tmp_path):
    plain = lora.attach(four_bit(folder), r=8)
    started = lora.attach(four_bit(folder), r=8, lora_alpha=32, init_lora_weights="loftq")
    assert error_of(started, folder) < 0.85 * error_of(plain, folder)
    expected = logits(started)
    started.save_pretrained(tmp_path / "a")
    reopened = peft.PeftModel.from_pretrained(four_bit(folder), str(tmp_path / "a"))
    torch.testing.assert_close(logits(reopened), expected, rtol=1e-4, atol=1e-5)


def test_loftq_on_an_unquantized_base_fits_the_quantized_one(folder, tmp_path, caplog):
    settings = {"loftq_config": peft.LoftQConfig(loftq_bits=4)}
    model = lora.attach(llama(**SIZES), r=8, init_lora_weights="loftq", **settings)
    assert "load_in_4bit=True" in caplog.text
    steps(model)
    model.save_pretrained(tmp_path / "a")
    reopened = peft.PeftModel.from_pretrained(four_bit(folder), str(tmp_path / "a"))
    torch.testing.assert_close(logits(reopened), logits(model), rtol=1e-4, atol=1e-4)


def test_loftq_without_the_unquantized_weights_is_refused(folder, tmp_path):
    four_bit(folder).save_pretrained(tmp_path / "packed")
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", device_map={"": "cpu"}
    )
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-052.*no unquantized weights"):
        lora.attach(packed, init_lora_weights="loftq")
    gone = four_bit(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"FG-ADAPT-052.*no weights are in"):
        lora.attach(gone, init_lora_weights="loftq")
    assert not any("lora" in key for key in gone.state_dict())


@pytest.mark.parametrize("start", ["orthogonal", "mica"])
def test_a_start_that_a_quantized_base_cannot_have_is_refused(start, folder):
    with pytest.raises(AdapterError, match=r"FG-ADAPT-051.*quantized base"):
        lora.attach(four_bit(folder), init_lora_weights=start)


@pytest.mark.parametrize(
    ("start", "message"),
    [("pissa", "FG-ADAPT-051.*8-bit base"), ("loftq", "FG-ADAPT-052.*LoftQ on 8 bits")],
)
def test_a_start_that_an_eight_bit_base_cannot_have_is_refused(start, message, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    with pytest.raises(AdapterError, match=message):
        lora.attach(model, init_lora_weights=start)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}],
    ids=str,
)
def test_options_on_a_four_bit_base(settings, folder, tmp_path):
    base = logits(four_bit(folder))
    model = lora.attach(four_bit(folder), r=4, **settings)
    families.apply(model)
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    trained = logits(steps(model))
    assert (trained - base).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "a")
    opened = opening.attach_saved(four_bit(folder), tmp_path / "a")
    families.apply(opened)
    assert torch.equal(logits(opened), trained)


BATCHES = [{"input_ids": (IDS * k) % 600 + 1, "attention_mask": torch.ones_like(IDS)}
           for k in (1, 3, 7, 11)]  # fmt: skip


def test_eva_sets_directions_and_ranks_and_not_the_output(tmp_path):
    targets = ["q_proj", "o_proj", "down_proj"]
    model = adapters.attach(llama(torch.bfloat16), "eva", r=2, target_modules=targets)
    families.apply(model)
    causal_loss.apply(model)
    before = logits(model)
    assert lora.wants_data(model)
    assert lora.initialize_eva(model, BATCHES) is model
    assert torch.equal(logits(model), before)
    adapted = [m for m in model.modules() if hasattr(m, "lora_part")]
    ranks = {m.r["default"] for m in adapted}
    assert len(ranks) > 1 and sum(m.r["default"] for m in adapted) == 2 * 6
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert all(m.refusal() is None for m in adapted)
    steps(model)
    assert not lora.wants_data(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(llama(torch.bfloat16), str(tmp_path))
    torch.testing.assert_close(logits(plain), trained, rtol=0.1, atol=0.05)


def test_eva_with_too_few_tokens_or_another_adapter_is_refused():
    model = adapters.attach(llama(), "eva", r=16)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-059.*wants 32 tokens.*has 12"):
        lora.initialize_eva(model, BATCHES)
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-059.*not made for it"):
        lora.initialize_eva(lora.attach(llama()), BATCHES)


def trainer(folder, model, **settings):
    return finegraft.SFTTrainer(
        model=model,
        args=finegraft.SFTConfig(
            str(folder),
            per_device_train_batch_size=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            **{"max_steps": 4, "save_strategy": "steps", **settings},
        ),
        train_dataset=datasets.Dataset.from_list(rows(16)),
        processing_class=tokenizer(),
    )


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "ratio"), [("pissa", None), ("eva", None), ("lora", 16.0), ("dora", None)]
)
def test_a_resumed_run_equals_the_whole_one(name, ratio, tmp_path):
    def fresh():
        torch.manual_seed(5)
        return adapters.attach(llama(), name, r=2)

    whole = trainer(tmp_path / "a", fresh(), loraplus_lr_ratio=ratio)
    whole.train()
    resumed = trainer(tmp_path / "a", fresh(), loraplus_lr_ratio=ratio)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected, found = adapter(whole.model), adapter(resumed.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"q_proj": 1}, "use_rslora": True},
    ],
    ids=str,
)
def test_every_kind_trains_with_the_trainer_and_generates(settings, tmp_path):
    model = lora.attach(llama(), **{"r": 2, **settings})
    before = adapter(model)
    run = trainer(tmp_path, model, max_steps=2, save_strategy="no")
    run.train()
    still = [name for name, p in adapter(model).items() if torch.equal(p, before[name])]
    assert not still
    finegraft.FastLanguageModel.for_inference(model)
    made = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    finegraft.FastLanguageModel.for_training(model)
    model.eval()
    ids = IDS[:1]
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids[:, : made.shape[1]])


def test_lora_plus_gives_b_its_own_learning_rate(tmp_path):
    model = lora.attach(llama(), r=2)
    run = trainer(tmp_path, model, loraplus_lr_ratio=16, lr_scheduler_type="constant", max_steps=1)
    before = adapter(model)
    run.train()
    moved = {name: (p - before[name]).abs().max() for name, p in adapter(model).items()}
    b = [step for name, step in moved.items() if "lora_B" in name]
    # Adam's first step is the learning rate, whatever the gradient; A's gradient is 0 while B is.
    assert len(b) == 14 and all(abs(float(step) - 0.16) < 1e-3 for step in b)
    groups = run.optimizer.param_groups
    assert {round(g["lr"], 6) for g in groups if g["params"]} == {0.01, 0.16}
    assert groups[0]["lr"] == 0.01
    assert sum(len(g["params"]) for g in groups) == 28


def test_lora_plus_in_the_stock_shaped_trainer(tmp_path):
    made = Trainer(
        model=lora.attach(llama(), r=2),
        args=finegraft.TrainingArguments(str(tmp_path), loraplus_lr_ratio=4, learning_rate=1e-3),
        train_dataset=datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
    )
    made.create_optimizer()
    assert {round(g["lr"], 6) for g in made.optimizer.param_groups if g["params"]} == {0.001, 0.004}


def test_lora_plus_misuse_is_answered(tmp_path):
    optimizer = torch.optim.AdamW(llama().parameters())
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-060.*trains no LoRA.*loraplus_lr_ratio"):
        raise_lora_b(optimizer, llama(), 16)
    for make in (finegraft.SFTConfig, finegraft.TrainingArguments):
        with pytest.raises(ConfigError, match=r"(?s)FG-ADAPT-061.*loraplus_lr_ratio=0"):
            make(str(tmp_path), loraplus_lr_ratio=0)


def test_a_configured_run_with_eva_and_lora_plus_opens_again(folder, tmp_path):
    from finegraft.core.schema import build
    from finegraft.training.run import train

    tokenizer().save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows(16)), encoding="utf-8")
    config = build(
        {
            "model": str(folder),
            "data": str(data),
            "output": str(tmp_path / "run"),
            "dtype": "float32",
            "method": "eva",
            "r": 2,
            "modules_to_save": "lm_head",
            "loraplus_lr_ratio": 8.0,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
        }
    )
    result = train(config)
    ranks = {m.r["default"] for m in result.model.modules() if hasattr(m, "lora_part")}
    assert len(ranks) > 1
    opened = opening.open_model(result.adapter, dtype="float32").model
    families.apply(opened)
    saved = result.model.state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in opened.state_dict().items())
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=1e-5, atol=1e-6)


def encoder():
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=640,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=3,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config)


def test_eva_starts_a_classifier_from_its_rows(tmp_path):
    generator = torch.Generator().manual_seed(3)
    made = [
        {
            "input_ids": torch.randint(5, 600, (12,), generator=generator).tolist(),
            "attention_mask": [1] * 12,
            "labels": i % 3,
            "text": "not for the model",
        }
        for i in range(32)
    ]
    model = adapters.attach(encoder(), "eva", task_type="SEQ_CLS", r=2)
    run = Trainer(
        model=model,
        args=finegraft.TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no"),
        train_dataset=datasets.Dataset.from_list(made),
    )
    run.train()
    assert len({m.r["default"] for m in model.modules() if hasattr(m, "lora_part")}) > 1
    assert not lora.wants_data(model)
    pooler = model.base_model.model.bert.pooler.dense
    assert pooler.r["default"] == 2  # it sees one vector a row, and starts like any LoRA


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_on_a_four_bit_base(bias, tmp_path):
    encoder().save_pretrained(tmp_path / "base")

    def base():
        model = transformers.BertForSequenceClassification.from_pretrained(
            tmp_path / "base",
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True, llm_int8_skip_modules=["classifier"]
            ),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )
        quantize.protect(model)
        return model.eval()

    config = {"r": 2, "target_modules": ["query", "value"], "bias": bias}
    model = lora.attach(base(), task_type="SEQ_CLS", **config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "bias" in n}
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if "bias" in n and not p.equal(before[n])}
    assert any(".query." in name for name in moved)
    assert (bias == "all") == any(".dense." in name for name in moved)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    plain = peft.PeftModel.from_pretrained(base(), str(tmp_path / "a"))
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)

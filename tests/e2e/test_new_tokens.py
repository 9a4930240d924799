"""The real demo model learns new tokens: it says them where the data does, and nothing else moves.

The rows are made by a rule. A message is a question of a customer or a matter of an order, calm or
embarrassed; the answer names the subject by a new token and ends with an emoticon, itself a token,
where the writer is embarrassed.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from finegraft import FastLanguageModel, SFTConfig, SFTTrainer, add_new_tokens, opening
from finegraft.inference.generate import complete
from finegraft.models import tokens

CUSTOMER, ORDER, SHY = "<customer>", "<order>", "(⁄ ⁄•⁄ω⁄•⁄ ⁄)"
PEOPLE = [
    "Ada", "Bo", "Chen", "Dina", "Emil", "Fay", "Gus", "Hana",
    "Ivo", "June", "Kai", "Lea", "Mo", "Nina", "Omar", "Pia",
]  # fmt: skip
GOODS = [
    "lamp", "chair", "kettle", "bicycle", "coat", "printer", "guitar", "tent",
    "clock", "sofa", "mirror", "drill", "desk", "radio", "rug", "pan",
]  # fmt: skip
FIELDS = ["address", "name", "phone number", "language"]
STATES = ["shipped", "paid", "packed", "returned"]


def data():
    """Prompts and answers, 512 different ones, in an order that never changes."""
    rows = []
    for shy, person, field in itertools.product((0, 1), PEOPLE, FIELDS):
        opening_words = "Oh dear, I blush to ask. " if shy else ""
        for wish in ("has a new", "wants to change the"):
            rows.append((f"{opening_words}{person} {wish} {field}.", [CUSTOMER] + [SHY] * shy))
    for shy, good, state in itertools.product((0, 1), GOODS, STATES):
        opening_words = "Oh dear, I blush to ask. " if shy else ""
        for words in ("The {} is {}.", "Has the {} been {}?"):
            rows.append((opening_words + words.format(good, state), [ORDER] + [SHY] * shy))
    random.Random(7).shuffle(rows)
    return [{"prompt": prompt, "completion": " ".join(["About", *said])} for prompt, said in rows]


def said(model, tokenizer, rows):
    """The new tokens in the answers, in order."""
    new = set(tokens.new_rows(model))
    talks = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = complete(model, tokenizer, talks, max_new_tokens=12, batch_size=16)
    ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
    return [[i for i in answer if i in new] for answer in ids]


@pytest.mark.slow
def test_new_tokens_are_said_where_the_data_says_them(tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained("demo", dtype=torch.bfloat16)
    before = model.get_input_embeddings().weight.detach().clone()
    # Not special: an emoticon that a reader is to see must survive decoding.
    add_new_tokens(model, tokenizer, [CUSTOMER, ORDER, SHY], special_tokens=False)
    model = FastLanguageModel.get_peft_model(model, r=8)
    rows = data()
    train, held_out = rows[:300], rows[-64:]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=60, per_device_train_batch_size=16,
        learning_rate=2e-3, logging_steps=20, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=train, processing_class=tokenizer)
    trainer.train()

    model = FastLanguageModel.for_inference(trainer.model)
    wanted = [
        [i for i in tokenizer.encode(row["completion"]) if i in tokens.new_rows(model)]
        for row in held_out
    ]
    found = said(model, tokenizer, held_out)
    right = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(held_out)
    assert right >= 0.95, right
    assert {len(answer) for answer in wanted} == {1, 2}

    layer = model.get_base_model().get_input_embeddings()
    assert torch.equal(layer.original_module.weight[: len(before)], before)

    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 30e6
    fresh = opening.open_model(tmp_path / "adapter", dtype=torch.bfloat16)
    assert fresh.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert said(fresh.model.eval(), fresh.tokenizer, held_out[:16]) == found[:16]


def test_a_saved_adapter_gives_a_fresh_float32_base_the_same_logits(tmp_path):
    opened = opening.open_model("demo", dtype=torch.float32)
    model, tokenizer = add_new_tokens(opened.model, opened.tokenizer, [CUSTOMER, ORDER, SHY])
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    fresh = opening.open_model(tmp_path, dtype=torch.float32)
    ids = torch.tensor([fresh.tokenizer.encode(f"The {ORDER} of {CUSTOMER} is here {SHY}")])
    assert (ids >= 49152).sum() == 3
    with torch.no_grad():
        expected, found = (m.eval()(ids, use_cache=False).logits for m in (model, fresh.model))
    assert torch.equal(expected, found)
    assert not torch.equal(expected[..., -3], expected[..., -1])


@pytest.mark.parametrize("method", ["mean", "interpolation", "random"])
def test_every_start_leaves_the_answers_of_the_base_alone(method):
    opened = opening.open_model("demo", dtype=torch.float32)
    ids = torch.tensor([opened.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        before = opened.model(ids).logits[0, -1].log_softmax(-1)
        add_new_tokens(opened.model, opened.tokenizer, [CUSTOMER, SHY], method=method)
        after = opened.model(ids).logits[0, -1].log_softmax(-1)
    assert after.argmax() == before.argmax()
    torch.testing.assert_close(after[: len(before)], before, rtol=0, atol=1e-2)

"""The trainer: any year's arguments, exact gradients, whole checkpoints, resume bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from training_tiny import llama, rows, tokenizer

import finegraft
from finegraft import adapters, opening
from finegraft.adapters import lora
from finegraft.core.errors import AdapterError, ArgumentError, DataError, StorageError
from finegraft.inference.score import heldout_loss
from finegraft.training import checkpoint
from finegraft.training.collate import Collator

SETTINGS = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_length": 64}


def config(folder, **changes):
    return finegraft.SFTConfig(str(folder), **{**SETTINGS, "max_steps": 2, **changes})


def trainer(folder, model=None, data=None, more=None, **changes):
    model = model or lora.attach(llama(), r=4)
    return finegraft.SFTTrainer(
        model=model,
        args=config(folder, **changes),
        train_dataset=Dataset.from_list(rows()) if data is None else data,
        processing_class=tokenizer(),
        **(more or {}),
    )


def gradients(folder, batch, accumulate):
    """Gradients of the one optimizer step over eight ragged rows."""
    taken = {}

    class Take(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            taken.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

    made = trainer(
        folder,
        data=Dataset.from_list(rows(8)),
        more={"callbacks": [Take()]},
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
    )
    made.train()
    return taken


def test_accumulation_is_token_exact(tmp_path):
    whole = gradients(tmp_path / "a", 8, 1)
    parts = gradients(tmp_path / "b", 1, 8)
    assert whole and whole.keys() == parts.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-8, msg=name)


def test_packed_loss_equals_unpacked(tmp_path):
    model = llama()
    plain = trainer(tmp_path / "a", model, per_device_train_batch_size=12)
    unpacked = plain.evaluate(Dataset.from_list(rows()))["eval_loss"]
    packing = trainer(tmp_path / "b", model, packing=True, max_length=48)
    assert max(len(lengths) for lengths in packing.train_dataset["seq_lengths"]) > 1
    packed = packing.evaluate(packing.train_dataset)["eval_loss"]
    assert packed == pytest.approx(unpacked, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_held_out_loss_weighs_tokens_alike_at_every_batch_size(tmp_path, batch):
    made = trainer(tmp_path, llama(), per_device_eval_batch_size=batch)
    data = made.train_dataset
    expected = heldout_loss(llama(), data["input_ids"], data["labels"])
    assert made.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_packed_documents_do_not_see_each_other(tmp_path):
    made = trainer(tmp_path, packing=True, max_length=64)
    batch = made.data_collator([made.train_dataset[0]])
    first = made.train_dataset[0]["seq_lengths"][0]
    model = llama()
    # As the trainer calls it: with a cache transformers forgets where documents begin.
    how = {"position_ids": batch["position_ids"], "use_cache": False}
    before = model(input_ids=batch["input_ids"], **how).logits
    changed = batch["input_ids"].clone()
    changed[0, :first] = 7
    after = model(input_ids=changed, **how).logits
    torch.testing.assert_close(after[0, first:], before[0, first:])
    assert not torch.allclose(after[0, :first], before[0, :first])


def test_collator_never_labels_a_documents_first_token():
    rows_ = [{"input_ids": [4, 5, 6, 7, 8], "labels": [4, 5, 6, 7, 8], "seq_lengths": [2, 3]}]
    batch = Collator(0)(rows_)
    assert batch["labels"][0].tolist() == [-100, 5, -100, 7, 8, -100, -100, -100]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert "attention_mask" not in batch
    plain = Collator(0)([{"input_ids": [4, 5], "labels": [4, 5]}])
    assert plain["attention_mask"][0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_only_completions_are_learnt_and_eos_always_is(tmp_path):
    made = trainer(tmp_path)
    tok = made.processing_class
    for row, source in zip(made.train_dataset, rows(), strict=True):
        learnt = [i for i in row["labels"] if i != -100]
        assert tok.decode(learnt) == source["completion"] + tok.eos_token


def test_scripts_of_2024_train(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "finegraft"):
        made = finegraft.SFTTrainer(
            model=lora.attach(llama(), r=4),
            tokenizer=tokenizer(),
            train_dataset=Dataset.from_list([{"words": "hello world bye"}] * 4),
            dataset_text_field="words",
            max_seq_length=32,
            dataset_num_proc=2,
            packing=False,
            args=finegraft.TrainingArguments(
                str(tmp_path),
                max_steps=1,
                evaluation_strategy="no",
                logging_dir="logs",
                warmup_ratio=0.1,
                group_by_length=True,
                no_cuda=True,
                overwrite_output_dir=True,
                save_safetensors=True,
                gradient_checkpointing=True,
                optim="paged_adamw_8bit",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        made.train()
    assert made.args.max_length == 32 and made.state.global_step == 1
    said = [record.message for record in caplog.records]
    for name in ("tokenizer", "max_seq_length", "evaluation_strategy", "logging_dir", "no_cuda"):
        assert sum(f"'{name}'" in line for line in said) == 1, name
    assert any("paged_adamw_8bit" in line for line in said)


def test_unknown_arguments_are_refused_with_a_near_name(tmp_path):
    with pytest.raises(ArgumentError, match=r"(?s)FG-ARG-001.*'learning_rte'.*'learning_rate'"):
        finegraft.SFTConfig(str(tmp_path), learning_rte=1e-4)
    with pytest.raises(ArgumentError, match=r"(?s)SFTTrainer has no argument 'datasett'"):
        trainer(tmp_path, more={"datasett": 1})
    with pytest.raises(ArgumentError, match="FG-ARG-002"):
        finegraft.SFTConfig(str(tmp_path), max_seq_length=3, max_length=4)


@pytest.mark.parametrize("stock", [transformers.TrainingArguments, trl.SFTConfig])
def test_plain_arguments_are_taken(tmp_path, stock):
    made = finegraft.SFTTrainer(
        model=llama(),
        args=stock(str(tmp_path), max_steps=1, learning_rate=3e-3, use_cpu=True, bf16=False),
        train_dataset=rows(),
        processing_class=tokenizer(),
    )
    assert made.args.learning_rate == 3e-3 and made.args.use_cpu
    made.train()


def one(row):
    return f"{row['prompt']} -> {row['completion']}"


def many(batch):
    return [
        f"{batch['prompt'][i]} -> {batch['completion'][i]}" for i in range(len(batch["prompt"]))
    ]


@pytest.mark.parametrize("function", [one, many, lambda batch: {"text": many(batch)}])
def test_formatting_functions_of_every_kind(tmp_path, function):
    made = trainer(tmp_path, more={"formatting_func": function})
    tok = made.processing_class
    texts = [tok.decode(ids) for ids in made.train_dataset["input_ids"]]
    assert texts == [one(row) + tok.eos_token for row in rows()]


def test_a_text_column_made_beside_others_is_what_is_learnt(tmp_path):
    talk = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye"}]
    made = trainer(tmp_path, data=[{"conversations": talk, "text": "hello world bye"}])
    tok = made.processing_class
    assert tok.decode(made.train_dataset[0]["input_ids"]) == "hello world bye" + tok.eos_token


def test_a_formatting_function_that_loses_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="FG-DATA-020"):
        trainer(tmp_path, more={"formatting_func": lambda batch: ["one"]})


@pytest.mark.parametrize(
    "data",
    [
        rows(4),
        [
            {
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "bye"},
                ]
            }
        ],
        [{"instruction": "hello", "input": "world", "output": "bye"}],
        [{"text": "hello world bye"}],
        [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}],
        [{"input_ids": [4, 5, 6]}],
    ],
    ids=["prompt", "messages", "alpaca", "text", "ids", "ids-only"],
)
def test_every_layout_trains(tmp_path, data):
    made = trainer(tmp_path, data=data, max_steps=1)
    made.train()
    assert made.state.global_step == 1


def test_a_stream_trains_with_and_without_packing(tmp_path):
    stream = IterableDataset.from_generator(rows)
    for packing in (False, True):
        made = trainer(tmp_path, data=stream, packing=packing)
        made.train()
        assert made.state.global_step == 2


def test_auto_find_batch_size_halves_until_it_fits(tmp_path):
    model = llama()

    class Small(type(model.model)):
        def forward(self, input_ids=None, **kwargs):
            if input_ids.shape[0] > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
            return super().forward(input_ids=input_ids, **kwargs)

    model.model.__class__ = Small
    made = trainer(
        tmp_path, model, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=1
    )
    made.train()
    assert made.state.train_batch_size == 2


def test_trl_leaves_no_forward_and_no_rounded_adapter(tmp_path):
    model = lora.attach(llama(), r=4)
    trainer(tmp_path, model)
    assert "forward" not in vars(model.get_base_model())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_resume_equals_the_run_that_never_stopped(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine", "seed": 5}
    through = trainer(tmp_path / "a", lora.attach(llama(), r=4, lora_dropout=0.1), **settings)
    through.train()
    again = trainer(tmp_path / "b", lora.attach(llama(), r=4, lora_dropout=0.1), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    first = load_file(tmp_path / "a" / "checkpoint-6" / "adapter_model.safetensors")
    second = load_file(tmp_path / "b" / "checkpoint-6" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (through, again)]
    assert losses[0][3:] == losses[1][-3:]


def test_checkpoints_are_whole_rotated_and_name_the_best_where_it_lies(tmp_path):
    made = trainer(
        tmp_path,
        more={"eval_dataset": rows(3)},
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=4,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    made.train()
    kept = checkpoint.checkpoints(tmp_path)
    assert len(kept) == 2 and not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.saving"))
    for path in kept:
        names = {file.name for file in path.iterdir()}
        assert {
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        } <= names
        best = json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert ".saving" not in best and Path(best).parent == tmp_path


def test_a_failed_save_leaves_nothing_and_keeps_the_older_one(tmp_path, monkeypatch):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)

    def full(self, output_dir):
        if self.state.global_step == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return original(self, output_dir)

    original = type(made)._save_optimizer_and_scheduler
    monkeypatch.setattr(type(made), "_save_optimizer_and_scheduler", full)
    with pytest.raises(StorageError, match="FG-DISK-001"):
        made.train()
    assert [p.name for p in tmp_path.iterdir() if "check" in p.name] == ["checkpoint-1"]


def test_train_on_responses_only_masks_the_rest(tmp_path):
    text = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nbye now<|im_end|>\n"
    made = trainer(tmp_path, data=[{"text": text}] * 3)
    finegraft.train_on_responses_only(
        made, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    learnt = [i for i in made.train_dataset[0]["labels"] if i != -100]
    assert made.processing_class.decode(learnt).startswith("bye now<|im_end|>")
    assert "hello" not in made.processing_class.decode(learnt)
    with pytest.raises(DataError, match="FG-DATA-021"):
        finegraft.train_on_responses_only(made, "<|user|>", "### nothing like it ###")


def test_saved_folder_opens_in_plain_peft(tmp_path):
    import peft

    model = llama()
    model.save_pretrained(tmp_path / "base")
    made = trainer(tmp_path / "run", lora.attach(model, r=4), learning_rate=1e-2)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "special_tokens_map.json").is_file()
    assert (tmp_path / "saved" / "finegraft.json").is_file()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = torch.tensor([[5, 9, 33, 2, 77, 8]])
    made.model.eval()
    difference = (plain(input_ids=ids).logits - made.model(input_ids=ids).logits).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("columns", "text_is_learnt"),
    [
        ({"instruction": "bye", "input": "", "output": "bye"}, True),
        ({"conversations": [{"from": "human", "value": "bye"}]}, True),
        ({"prompt": "bye", "completion": "bye"}, False),
        ({"messages": [{"role": r, "content": "bye"} for r in ("user", "assistant")]}, False),
    ],
)
def test_a_text_made_from_other_columns_is_what_is_learnt(tmp_path, columns, text_is_learnt):
    made = trainer(tmp_path, data=Dataset.from_list([{**columns, "text": "hello world"}] * 2))
    text = made.processing_class.decode(made.train_dataset[0]["input_ids"])
    assert ("hello world" in text) is text_is_learnt


@pytest.mark.parametrize("named", ["peft", "finegraft", "bottleneck"])
def test_peft_config_goes_through_our_own_attaching(named, tmp_path):
    """PiSSA then leaves the base as it is; trl's way rewrites it and the saved adapter is wrong."""
    config = {
        "peft": peft.LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM"),
        "finegraft": finegraft.LoraConfig(
            r=4, init_lora_weights="pissa", target_modules=["q_proj"]
        ),
        "bottleneck": finegraft.AdapterConfig(reduction_factor=4),
    }[named]
    model = llama()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    made = trainer(tmp_path, model, more={"peft_config": config})
    made.train()
    after = {n.replace(".base_layer", ""): p for n, p in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    method = "bottleneck" if named == "bottleneck" else "lora"
    assert made.method is adapters.METHODS.get(method) is adapters.method_of(made.model)
    fresh = {n: p.clone() for n, p in made.model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"(?s)FG-ADAPT-045.*carries an adapter already"):
        trainer(tmp_path, made.model, more={"peft_config": config})
    assert made.model.state_dict().keys() == fresh.keys()


def test_a_trained_head_keeps_float32_weights(tmp_path):
    """A bfloat16 copy would lose every update of this size; the loss is still the model's."""
    model = adapters.attach(llama(torch.bfloat16), "head")
    made = trainer(tmp_path, model, learning_rate=1e-6, lr_scheduler_type="constant")
    head = model.get_base_model().lm_head.modules_to_save["default"]
    start = head.weight.detach().clone()
    assert start.dtype == torch.float32
    rounded = adapters.attach(llama(torch.bfloat16), "head")
    other = heldout_loss(rounded, made.train_dataset["input_ids"], made.train_dataset["labels"])
    assert made.evaluate(made.train_dataset)["eval_loss"] == pytest.approx(other, rel=5e-3)
    made.train()
    large = start.abs() > 1e-2
    assert not torch.equal(head.weight[large], start[large])
    assert torch.equal(head.weight[large].bfloat16(), start[large].bfloat16())
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[0] == 1
    made.save_model(str(tmp_path / "saved"))
    again = opening.attach_saved(llama(torch.bfloat16), tmp_path / "saved")
    assert torch.equal(
        again.get_base_model().lm_head.modules_to_save["default"].weight, head.weight.bfloat16()
    )

"""New rows train beside an adapter: the same as in peft, and nothing else of the embedding."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import training_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import finegraft
from finegraft import FastLanguageModel, SFTConfig, SFTTrainer, adapters, opening
from finegraft.core.errors import AdapterError
from finegraft.models import causal_loss, families, swap, tokens

NEW = ["<customer>", "<order>", "(⁄ ⁄•⁄ω⁄•⁄ ⁄)"]
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture
def base(tmp_path):
    """A function that saves a tiny model with its tokenizer and returns the folder."""

    def save(tied=True, **changes):
        folder = tmp_path / "base"
        tok = training_tiny.tokenizer()
        settings = {"vocab_size": len(tok), "tie_word_embeddings": tied, **changes}
        training_tiny.llama(**settings).save_pretrained(folder)
        tok.save_pretrained(folder)
        return folder

    return save


def opened(folder, **settings):
    found = opening.open_model(folder, dtype="float32", **settings)
    found.model.requires_grad_(False)
    return found.model, found.tokenizer


def moved(model):
    """Give the adapter weights that matter."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "tokens" in name else 0.05))
    return model


def text(tok):
    line = "hello <order> world (⁄ ⁄•⁄ω⁄•⁄ ⁄) bye <customer> now <order>"
    return torch.tensor([tok.encode(line), tok.encode(line[::1].replace("bye", "now"))])


def gradients(model, **inputs):
    model.train()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), {
        name.replace("._fast", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def table(model):
    layer = swap.core(model).get_input_embeddings()
    return getattr(layer, "original_module", layer).weight


@BOTH
def test_loss_and_every_gradient_are_those_of_plain_peft(base, tied):
    folder = base(tied)
    model, tok = opened(folder)
    families.apply(model)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4))
    ids = text(tok)

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock.resize_token_embeddings(len(tok))
    rows = tokens.new_rows(model)
    wanted = {"model.embed_tokens": rows} if tied else {"model.embed_tokens": rows, "lm_head": rows}
    config = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=wanted
    )
    stock = get_peft_model(stock, config)
    found = stock.load_state_dict(model.state_dict(), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    labels = ids.clone()
    labels[:, :2] = -100
    model.eval(), stock.eval()
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels[1, 6:] = -100
    for inputs in ({}, {"attention_mask": mask}):
        model.zero_grad(), stock.zero_grad()
        ours, mine = gradients(model, input_ids=ids, labels=labels, **inputs)
        theirs, truth = gradients(stock, input_ids=ids, labels=labels, **inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert mine.keys() == truth.keys()
        assert sum("trainable_tokens_delta" in name for name in mine) == (1 if tied else 2)
        for name, gradient in truth.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
            assert "tokens_delta" not in name or gradient.abs().sum(1).min() > 0


def test_the_compact_loss_reads_the_trained_rows_without_a_copy_of_the_head(base, monkeypatch):
    model, tok = opened(base())
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4))
    called = []

    def counted(*args):
        called.append(args[6:])
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(causal_loss, "linear_cross_entropy", counted)
    ids = text(tok)
    model.train()
    model(input_ids=ids, labels=ids)
    assert len(called) == 1 and called[0][0].tolist() == tokens.new_rows(model)


@BOTH
@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_only_the_new_rows_train_beside_lora(base, tied, when):
    model, tok = opened(base(tied))
    old = {n: p.clone() for n, p in model.named_parameters() if "embed" in n or "head" in n}
    if when != "after":
        finegraft.add_new_tokens(model, tok, NEW[:1] if when == "both" else NEW, verbose=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    if when != "before":
        again = finegraft.add_new_tokens(model, tok, NEW[1:] if when == "both" else NEW)
        assert again == (model, tok)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = [n for n in trained if "lora_" not in n]
    assert len(rows) == (1 if tied else 2)
    assert all(trained[n].shape == (3, 32) and trained[n].dtype == torch.float32 for n in rows)
    args = SFTConfig(
        output_dir="unused", max_steps=3, learning_rate=0.05, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, per_device_train_batch_size=4, logging_steps=1,
    )  # fmt: skip
    data = [{"prompt": "hello you", "completion": f"world {token} now"} for token in NEW * 4]
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tok).train()
    for name, value in old.items():
        plain = name.replace("model.embed_tokens", "model.embed_tokens.token_adapter.base_layer")
        plain = plain.replace("lm_head", "lm_head.token_adapter.base_layer")
        now = dict(model.named_parameters(remove_duplicate=False))[f"base_model.model.{plain}"]
        assert torch.equal(now[: len(value)], value)
    for name in rows:
        start = table(model)[tokens.new_rows(model)]
        assert (trained[name] - start).abs().amax(1).min() > 1e-3


@BOTH
@pytest.mark.parametrize("spare", [0, 2, 40])
def test_a_saved_adapter_reloads_into_a_fresh_base_with_the_same_bits(base, tied, spare, tmp_path):
    folder = base(tied, vocab_size=len(training_tiny.tokenizer()) + spare)
    model, tok = opened(folder)
    finegraft.add_new_tokens(model, tok, NEW, method="random", verbose=False)
    model = moved(adapters.attach(model, r=4)).eval()
    saved = tmp_path / "adapter"
    model.save_pretrained(saved)
    tok.save_pretrained(saved)
    opening.write_note(model, saved)
    size = (saved / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) + 20_000

    fresh, other = opened(saved)
    assert len(other) == len(tok) and fresh.config.vocab_size == model.config.vocab_size
    ids = text(tok)
    assert torch.equal(fresh.eval()(ids).logits, model(ids).logits)
    again = tmp_path / "again"
    fresh.save_pretrained(again)
    assert (again / "adapter_model.safetensors").stat().st_size == size

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain_tok = AutoTokenizer.from_pretrained(saved)
    plain.resize_token_embeddings(max(len(plain_tok), plain.config.vocab_size))
    plain = PeftModel.from_pretrained(plain, saved).eval()
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_merged_model_reopens_in_plain_transformers(base, tied, tmp_path):
    model, tok = opened(base(tied))
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4)).eval()
    ids = text(tok)
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    tok.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert plain.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    swap.undo(merged)
    assert torch.equal(plain(ids).logits, merged(ids).logits)


@BOTH
def test_generation_is_fast_and_reads_the_trained_rows(base, tied):
    model, tok = opened(base(tied, eos_token_id=None))
    families.apply(model)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4)).eval()
    ids = text(tok)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    slow = model.generate(input_ids=ids, **settings)
    FastLanguageModel.for_inference(model)
    from finegraft.inference import decode

    assert decode.merged_weights(swap.core(model))[1] is None
    assert torch.equal(model.generate(input_ids=ids, **settings), slow)
    with torch.no_grad():  # trained on: the merged copy is made anew
        for name, parameter in model.named_parameters():
            if "tokens_delta" in name:
                parameter.mul_(-3.0)
    changed = model.generate(input_ids=ids, **settings)
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **settings)
    FastLanguageModel.for_training(model)
    model.eval()
    assert torch.equal(changed, model.generate(input_ids=ids, **settings))
    with model.disable_adapter():
        assert torch.equal(plain, model.generate(input_ids=ids, **settings))


def methods():
    """Methods that make an adapter; eva starts from data, and head trains the head itself."""
    for name in adapters.names():
        method, _ = adapters.find(name)
        if method.peft_type and adapters.CAUSAL in method.tasks and name not in ("eva", "head"):
            yield name


@pytest.mark.parametrize("name", methods())
def test_every_method_trains_saves_and_reloads_the_rows(base, name, tmp_path):
    settings = {"reduction_factor": 4} if name in ("bottleneck", "houlsby", "pfeiffer") else {}
    model, tok = opened(base(attention_bias=True, mlp_bias=True))
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = adapters.attach(model, name, **settings)
    assert any("tokens_delta" in n and p.requires_grad for n, p in model.named_parameters())
    model = moved(model).eval()
    ids = text(tok)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    tok.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    fresh, _ = opened(tmp_path / "adapter")
    assert torch.equal(fresh.eval()(input_ids=ids).logits, expected)


def test_half_precision_keeps_float32_rows_also_after_reloading(base, tmp_path):
    folder = base()
    found = opening.open_model(folder, dtype="bfloat16")
    finegraft.add_new_tokens(found.model, found.tokenizer, NEW, verbose=False)
    model = moved(adapters.attach(found.model, r=4)).eval()
    model.save_pretrained(tmp_path / "adapter")
    found.tokenizer.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    fresh = opening.open_model(tmp_path / "adapter", dtype="bfloat16", trainable=True).model.eval()
    rows = {n: p for n, p in model.named_parameters() if "tokens_delta" in n}
    assert rows
    for name, parameter in rows.items():
        again = fresh.get_parameter(name)
        assert parameter.dtype == again.dtype == torch.float32 and again.requires_grad
        assert torch.equal(parameter, again)
    ids = text(found.tokenizer)
    assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_a_four_bit_base(base, tmp_path):
    model, tok = opened(base(hidden_size=64), load_in_4bit=True)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    old = table(model).clone()
    model = moved(adapters.attach(model, r=4))
    ids = text(tok)
    loss, found = gradients(model, input_ids=ids, labels=ids)
    assert loss.isfinite()
    assert all(g.abs().sum() > 0 for n, g in found.items() if "tokens_delta" in n or "lora_B" in n)
    assert torch.equal(table(model), old)
    model.eval().save_pretrained(tmp_path / "adapter")
    tok.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    fresh, _ = opened(tmp_path / "adapter", load_in_4bit=True)
    assert torch.equal(fresh.eval()(ids).logits, model(ids).logits)


def test_an_adapter_of_plain_peft_gets_the_rows_from_the_trainer(base, tmp_path):
    model, tok = opened(base())
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True,
                     bf16=False, save_strategy="no")  # fmt: skip
    data = [{"prompt": "hello", "completion": f"{token} now"} for token in NEW * 3]
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tok, peft_config=config
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    fresh, _ = opened(tmp_path / "saved")
    families.apply(fresh)
    ids = text(tok)
    here, there = (m.eval()(input_ids=ids, use_cache=False).logits for m in (trainer.model, fresh))
    assert torch.equal(here, there)
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == {"model.embed_tokens": tokens.new_rows(model)}


def test_two_adapters_each_train_their_rows(base):
    model, tok = opened(base())
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = adapters.attach(model, r=4)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert adapters.train_new_rows(model, "second") == 3
    model.set_adapter("second")
    moved(model)
    ids = text(tok)
    second = model.eval()(ids).logits
    model.set_adapter("default")
    assert not torch.equal(model(ids).logits, second)
    with model.disable_adapter():
        base_logits = model(ids).logits
    assert torch.equal(model(ids).logits, base_logits)  # a fresh LoRA on rows as they began


@BOTH
def test_whole_matrices_that_train_need_no_rows(base, tied):
    model, tok = opened(base(tied))
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = adapters.attach(model, r=4, modules_to_save=["embed_tokens", "lm_head"])
    assert model.peft_config["default"].trainable_token_indices is None
    assert not any("tokens_delta" in name for name, _ in model.named_parameters())


def test_models_without_an_adapter_and_models_without_new_rows_are_left_alone(base):
    model, _ = opened(base())
    assert adapters.train_new_rows(model) == 0
    model = adapters.attach(model, r=4)
    assert adapters.train_new_rows(model) == 0
    assert type(model).__name__ == "PeftModelForCausalLM"


def test_heads_whose_rows_peft_cannot_train_are_refused(base):
    from transformers import PhiConfig, PhiForCausalLM

    tok = training_tiny.tokenizer()
    model = PhiForCausalLM(
        PhiConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=40, num_hidden_layers=1)
    )
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    with pytest.raises(AdapterError, match=r"FG-TOKEN-007: the head of this .* has a bias"):
        adapters.attach(model, r=4)


def test_a_lora_on_the_embedding_is_refused(base):
    model, tok = opened(base())
    with_adapter = adapters.attach(model, r=4, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match="FG-TOKEN-006: the embedding of this"):
        finegraft.add_new_tokens(with_adapter, tok, NEW)
    assert NEW[0] not in tok.get_vocab()
    model, tok = opened(base())
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    with pytest.raises(AdapterError, match=r"FG-TOKEN-008: model\.embed_tokens"):
        adapters.attach(model, r=4, target_modules=["q_proj", "embed_tokens"])


def test_the_head_method_trains_the_head_whole_and_is_refused(base):
    model, tok = opened(base())
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    with pytest.raises(AdapterError, match="FG-TOKEN-008: lm_head, whose new rows"):
        adapters.attach(model, "head")


def test_bad_arguments_change_nothing(base):
    model, tok = opened(base())
    size = len(tok)
    with pytest.raises(ValueError, match="FG-TOKEN-004"):
        finegraft.add_new_tokens(model, tok, NEW, method="zero")
    assert len(tok) == size == model.config.vocab_size


def test_verbose_reports_one_line_even_without_logging(base, capsys, caplog):
    model, tok = opened(base())
    root = logging.getLogger()
    with caplog.at_level(logging.INFO, logger="finegraft"):
        finegraft.add_new_tokens(model, tok, ["<a>"])
        assert "1 new tokens, 0 known already" in caplog.text
    caplog.clear()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        capsys.readouterr()
        finegraft.add_new_tokens(model, tok, ["<b>"])
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        assert f"the tokenizer has {len(tok)} tokens" in shown.err
        finegraft.add_new_tokens(model, tok, ["<c>"], verbose=False)
        assert capsys.readouterr().err == ""
    finally:
        root.setLevel(level)


def test_a_configured_run_adds_trains_saves_and_resumes_the_tokens(base, tmp_path):
    from finegraft.core import schema
    from finegraft.training import run

    rows = [{"prompt": "hello you", "completion": f"{token} now"} for token in NEW * 4]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {
        "model": str(base()), "data": str(tmp_path / "rows.jsonl"), "new_tokens": NEW, "r": 4,
        "dtype": "float32", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    }  # fmt: skip
    whole = run.train(schema.build({**values, "output": str(tmp_path / "whole")}))
    halved = schema.build({**values, "output": str(tmp_path / "halved"), "save_total_limit": 4})
    run.train(halved)
    import shutil

    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "checkpoint-4")
    resumed = run.train(halved, resume=True)
    ids = text(whole.tokenizer)
    reopened = [opened(found.adapter) for found in (whole, resumed)]
    first, second = (model.eval()(ids).logits for model, _ in reopened)
    assert torch.equal(first, second)
    tok = reopened[0][1]
    assert len(tok) == first.shape[-1] and tok.convert_tokens_to_ids(NEW[2]) == len(tok) - 1
    # a reader sees them: they are not special
    assert NEW[2] in tok.decode([len(tok) - 1], skip_special_tokens=True)
    again = schema.build({**values, "model": str(whole.adapter), "output": str(tmp_path / "on")})
    further = run.train(again)
    assert tokens.new_rows(further.model) == tokens.new_rows(reopened[0][0])


def test_the_flag_is_given_once_for_each_token():
    from finegraft.cli import flags

    option = next(p for p in flags.parameters() if p.name == "new_tokens")
    assert "list[str]" in str(option.annotation)
    assert flags.given({"new_tokens": ["a, b", "<c>"]}) == {"new_tokens": ["a, b", "<c>"]}


def test_plain_peft_says_that_it_ignores_the_rows_of_other_methods(base, tmp_path):
    folder = base()
    model, tok = opened(folder)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    moved(adapters.attach(model, "ia3")).save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.resize_token_embeddings(len(tok))
    with pytest.warns(UserWarning, match="trainable_token_indices.*are ignored"):
        plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert not any("tokens_delta" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_saved_adapter_with_new_rows_joins_another(base, name, tmp_path):
    folder = base()
    model, tok = opened(folder)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, name)).eval()
    model.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    host, _ = opened(folder)
    host = adapters.attach(host, name)
    ids = text(tok)
    opening.add_saved(host, "second", tmp_path / "adapter")
    assert torch.equal(host.eval()(ids).logits, model(ids).logits)
    host.set_adapter("default")
    old = ids.clamp_max(tokens.new_rows(model)[0] - 1)
    with host.disable_adapter():
        expected = host(old).logits
    assert torch.equal(host(old).logits, expected)


def test_virtual_tokens_with_new_rows_do_not_join_another(base, tmp_path):
    folder = base()
    model, tok = opened(folder)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = adapters.attach(model, "prompt", num_virtual_tokens=4)
    model.save_pretrained(tmp_path / "adapter")
    host = adapters.attach(opened(folder)[0], "prompt", num_virtual_tokens=4)
    with pytest.raises(AdapterError, match="FG-TOKEN-009"):
        opening.add_saved(host, "second", tmp_path / "adapter")


def test_an_encoder_with_a_classification_head(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tok = training_tiny.tokenizer()
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tok), intermediate_size=48, num_labels=3, **settings)

    def fresh():
        torch.manual_seed(0)
        return BertForSequenceClassification(copy.deepcopy(config)).eval()

    model = fresh()
    families.apply(model)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4, task_type="SEQ_CLS"))
    ids, labels = text(tok), torch.tensor([0, 2])
    loss, found = gradients(model.eval(), input_ids=ids, labels=labels)
    rows = [n for n in found if "tokens_delta" in n]
    assert len(rows) == 1 and found[rows[0]].abs().sum(1).min() > 0 and loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with torch.no_grad():
        again = opening.attach_saved(fresh(), tmp_path).eval()
        families.apply(again)
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        stock = fresh()
        stock.resize_token_embeddings(len(tok))
        stock = PeftModel.from_pretrained(stock, tmp_path).eval()
        torch.testing.assert_close(
            stock(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
        )


def test_a_four_bit_base_merges_with_the_rows(base):
    model, tok = opened(base(hidden_size=64, intermediate_size=64), load_in_4bit=True)
    finegraft.add_new_tokens(model, tok, NEW, verbose=False)
    model = moved(adapters.attach(model, r=4)).eval()
    ids = text(tok)
    rows = tokens.new_rows(model)
    values = next(p for n, p in model.named_parameters() if "tokens_delta" in n).detach().clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight[rows], values)
    assert merged(ids).logits.shape[-1] == len(tok)

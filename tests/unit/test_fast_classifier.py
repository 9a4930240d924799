"""``FastClassifier``: label names arrive, heads are whole, pooling is right, and figures agree."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from classifier_tiny import base
from transformers import BertModel, DistilBertConfig, DistilBertForSequenceClassification

from finegraft import FastClassifier, FastLanguageModel, opening
from finegraft.core.errors import AdapterError, ArgumentError, ConfigError, DataError, ModelError
from finegraft.models import classifier

KINDS = ["bert", "distilbert", "roberta", "llama"]
TEXTS = ["hello world", "bye now you are so very kind today", "hello", "are you so kind now 7 8 9"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: str(base(folder / kind, kind)) for kind in KINDS}


def load(name, **settings):
    return FastClassifier.from_pretrained(name, dtype="float32", **settings)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["LABEL_0", "LABEL_1"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {0: "no", 1: "yes", 2: "?"}}, ["no", "yes", "?"]),
        ({"id2label": {"0": "no", "1": "yes"}, "num_labels": 2}, ["no", "yes"]),
        ({"id2label": ["no", "yes"], "label2id": {"no": 0, "yes": 1}}, ["no", "yes"]),
        ({"label2id": {"yes": 1, "no": 0}}, ["no", "yes"]),
    ],
)
def test_labels_arrive_in_any_form(bases, settings, names):
    model, tokenizer = load(bases["bert"], **settings)
    assert classifier.names_of(model.config) == names
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert model(**tokenizer("hello", return_tensors="pt")).logits.shape == (1, len(names))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 3, "id2label": {0: "a", 1: "b"}},
        {"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0, "a": 1}},
        {"id2label": {1: "a", 2: "b"}},
        {"id2label": {0: "a", 1: "a"}},
        {"num_labels": -1},
    ],
)
def test_labels_that_contradict(bases, settings):
    with pytest.raises(ConfigError, match=r"(?s)FG-CLASS-013: .*ids 0 to num_labels - 1"):
        load(bases["bert"], **settings)


def test_words_that_are_not_known(bases):
    with pytest.raises(ConfigError, match=r"FG-CLASS-023: problem_type is 'regresion'"):
        load(bases["bert"], problem_type="regresion")
    with pytest.raises(ConfigError, match=r"(?s)FG-CLASS-023: truncation_side.*left, right"):
        load(bases["bert"], truncation_side="middle")
    with pytest.raises(ArgumentError, match=r"FG-ARG-001: from_pretrained .*'num_label'"):
        load(bases["bert"], num_label=2)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_open_again(bases, kind, tmp_path):
    names = ["cold", "mild", "warm"]
    model, tokenizer = load(bases[kind], id2label=names)
    model = FastClassifier.get_peft_model(model, r=4, lora_alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    opening.write_note(model, tmp_path / "adapter")
    before = FastClassifier.predict(model, tokenizer, TEXTS)
    again, again_tokenizer = load(str(tmp_path / "adapter"))
    after = FastClassifier.predict(again, again_tokenizer, TEXTS)
    assert [one.label for one in before] == [one.label for one in after]
    assert {one.label for one in after} <= set(names)
    for old, new in zip(before, after, strict=True):
        assert old.probabilities == pytest.approx(new.probabilities, abs=1e-6)
        assert sum(new.probabilities.values()) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ConfigError, match=r"(?s)FG-CLASS-012: 2 labels .* 3.*cold, mild, warm"):
        load(str(tmp_path / "adapter"), num_labels=2)


def test_a_classifier_through_the_other_front_door(bases):
    model, _ = load(bases["llama"], num_labels=2)
    model = FastLanguageModel.get_peft_model(model, r=4, task_type="SEQ_CLS")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_reads_the_last_token_whatever_the_padding(bases, side):
    model, tokenizer = load(bases["llama"], num_labels=3)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    alone = [FastClassifier.predict(model, tokenizer, text)[0].probabilities for text in TEXTS]
    tokenizer.padding_side = side
    together = FastClassifier.predict(model, tokenizer, TEXTS)
    for one, expected in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(expected, abs=1e-5)
    assert len({round(one.probability, 5) for one in together}) > 1


def test_predicting_keeps_order_flags_and_batches(bases):
    model, tokenizer = load(bases["bert"], num_labels=3)
    FastClassifier.for_training(model)
    seen = []
    small = FastClassifier.predict(
        model, tokenizer, TEXTS, batch_size=3, on_progress=lambda *n: seen.append(n)
    )
    assert seen == [(3, 4), (4, 4)] and model.training
    assert [one.text for one in small] == TEXTS
    whole = FastClassifier.predict(FastClassifier.for_inference(model), tokenizer, TEXTS)
    assert not model.training
    for a, b in zip(small, whole, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_a_text_longer_than_the_model(bases):
    model, tokenizer = load(bases["roberta"], num_labels=2, truncation_side="left")
    assert tokenizer.model_max_length == 96 and tokenizer.truncation_side == "left"
    end = FastClassifier.predict(model, tokenizer, ["bye " * 300 + "hello", "bye " * 300])
    assert end[0].probability != end[1].probability
    assert load(bases["bert"], max_seq_length=16)[1].model_max_length == 16


def test_what_cannot_be_predicted(bases):
    model, tokenizer = load(bases["bert"], num_labels=2)
    with pytest.raises(DataError, match=r"FG-CLASS-020: text 2 is ' '"):
        FastClassifier.predict(model, tokenizer, ["a", " "])
    with pytest.raises(DataError, match=r"FG-CLASS-020: 2 texts and 1 pairs"):
        FastClassifier.predict(model, tokenizer, ["a", "b"], pairs=["c"])
    for wrong in ({"batch_size": 0}, {"threshold": 1.0}):
        with pytest.raises(ConfigError, match=r"FG-CLASS-021"):
            FastClassifier.predict(model, tokenizer, "a", **wrong)
    causal, words = FastLanguageModel.from_pretrained(bases["llama"], dtype="float32")
    with pytest.raises(ConfigError, match=r"(?s)FG-CLASS-022: LlamaForCausalLM.*generate"):
        FastClassifier.predict(causal, words, "a")


def test_an_adapter_that_generates_is_no_classifier(bases, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(bases["llama"], dtype="float32")
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match=r"(?s)FG-CLASS-015.*finegraft generate"):
        load(str(tmp_path / "a"))


def test_an_unknown_method_and_full_fine_tuning(bases):
    model, _ = load(bases["bert"], full_finetuning=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(AdapterError, match=r"FG-ADAPT-010: unknown method 'lroa'"):
        FastClassifier.get_peft_model(model, "lroa")


@pytest.mark.parametrize("kind", ["distilbert", "llama"])
def test_four_bits_leave_the_head_whole(bases, kind):
    from bitsandbytes.nn import Linear4bit

    model, tokenizer = FastClassifier.from_pretrained(bases[kind], 2, load_in_4bit=True)
    small = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert small and not any("classifier" in name or "score" in name for name in small)
    model = FastClassifier.get_peft_model(model, r=2)
    FastClassifier.for_training(model)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_figures_of_the_document(capsys):
    config = DistilBertConfig(num_labels=2)
    sizes = (config.vocab_size, config.dim, config.n_layers, config.hidden_dim)
    assert sizes == (30522, 768, 6, 3072)
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(config)
    model = FastClassifier.get_peft_model(
        model, r=1, lora_alpha=32, lora_dropout=0.01, target_modules=["q_lin"]
    )
    model.print_trainable_parameters()
    expected = "trainable params: 601,346 || all params: 67,556,356 || trainable%: 0.8901"
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("method", ["lora", "ia3", "head"])
def test_a_new_pooler_of_a_four_bit_base_trains_whole(bases, method, tmp_path):
    """It is one of the last layers, left as it is: 4-bit weights could not train."""
    BertModel.from_pretrained(bases["bert"], add_pooling_layer=False).save_pretrained(tmp_path)
    for file in Path(bases["bert"]).glob("token*"):
        shutil.copy(file, tmp_path)
    model, _ = load(str(tmp_path), load_in_4bit=True)
    model = FastClassifier.get_peft_model(model, method)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("pooler" in name for name in trained) and any("classifier" in n for n in trained)

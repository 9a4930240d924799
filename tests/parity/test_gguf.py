"""GGUF against llama.cpp: bytes of every tensor, token ids, and log-probabilities.

Bytes are compared with hashes that llama.cpp's own converter and quantizer made once
(``tools/make_gguf_hashes.py``); ids and log-probabilities with llama.cpp itself, through xllamacpp.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf_models
import gguf_tokenizers
import pytest
import torch
from gguf import GGUFReader
from gguf_engine import LlamaCpp

from finegraft.export import gguf
from finegraft.export.gguf import pretokenizers

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gguf_hashes.json"
UPSTREAM = json.loads(FIXTURE.read_text(encoding="utf-8"))["models"]
DECODERS = [name for name in gguf_models.MODELS if name != "bert"]


def tokenizer_for(name: str):
    """One that fits the model's 320 rows."""
    if name == "bert":
        return gguf_tokenizers.wordpiece()
    if name.startswith(("gemma", "mistral", "phi3")):
        return gguf_tokenizers.sentencepiece(prefix=not name.startswith("gemma"))
    return gguf_tokenizers.byte_level(adds_bos=name == "llama")


def hashes(file: Path) -> dict[str, str]:
    return {
        tensor.name: f"{tensor.tensor_type.name} "
        + hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16]
        for tensor in GGUFReader(file).tensors
    }


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_every_tensor_is_llama_cpps_byte_for_byte(name, tmp_path):
    folder = gguf_models.save(name, tmp_path / name)
    tokenizer_for(name).save_pretrained(folder)
    types = list(UPSTREAM[name])
    for record in gguf.write(folder, tmp_path, types):
        assert hashes(record.file) == UPSTREAM[name][record.type], record.type
        record.file.unlink()


def test_an_adapter_is_llama_cpps_byte_for_byte(tmp_path):
    base = gguf_models.save("llama", tmp_path / "llama")
    adapter = gguf_models.save_lora(tmp_path / "adapter")
    record = gguf.write_lora(adapter, tmp_path / "lora.gguf", base=base)
    assert hashes(record.file) == UPSTREAM["lora"]["f32"]


def check_log_probabilities(model, engine: LlamaCpp, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    for length in lengths:
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert (engine.next_logprobs(ids, 320) - wanted).abs().max() < 0.05, length
        assert wanted.std() > 0.2, "logits too flat to show a fault"


@pytest.mark.parametrize("name", DECODERS)
def test_log_probabilities_equal_transformers(name, tmp_path):
    """A model in memory; prompts of several lengths, some longer than a sliding window."""
    model, tokenizer = gguf_models.model(name).float(), tokenizer_for(name)
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    # a context above 256 would make llama.cpp use the factors for long texts
    context = 256 if name == "phi3_long" else 1024
    check_log_probabilities(model, LlamaCpp(record.file, n_ctx=context), (1, 7, 40, 100))


def test_factors_for_long_texts(tmp_path):
    model, tokenizer = gguf_models.model("phi3_long"), tokenizer_for("phi3_long")
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    check_log_probabilities(model, LlamaCpp(record.file, n_ctx=512), (290,))


def test_rotation_settings_that_stretch(tmp_path):
    """Linear and YaRN, whose numbers are all in the configuration."""
    for rope in (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
         "original_max_position_embeddings": 128},
    ):  # fmt: skip
        model = gguf_models.model("qwen3", rope_parameters=rope)
        record = gguf.write((model, tokenizer_for("qwen3")), tmp_path / "m.gguf", "f32")[0]
        check_log_probabilities(model, LlamaCpp(record.file), (7, 100, 200))


def test_an_adapter_gives_the_log_probabilities_of_peft(tmp_path):
    """rsLoRA, whose scale differs from LoRA's; the base is written apart."""
    from peft import PeftModel

    model, tokenizer = gguf_models.model("llama").float(), tokenizer_for("llama")
    base = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    folder = gguf_models.save_lora(tmp_path / "adapter", use_rslora=True, lora_alpha=4)
    record = gguf.write_lora(folder, tmp_path / "lora.gguf", base=model.config)
    ids = [5, 17, 200, 31, 8]
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        tuned = PeftModel.from_pretrained(model, folder).eval()
        wanted = tuned(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = LlamaCpp(base.file, adapter=record.file).next_logprobs(ids, 320)
    assert (wanted - plain).abs().max() > 0.5
    assert (found - wanted).abs().max() < 0.05


def test_an_encoder_gives_the_same_vector(tmp_path):
    model, tokenizer = gguf_models.model("bert"), tokenizer_for("bert")
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32", pooling="mean")[0]
    engine = LlamaCpp(record.file, embedding=True)
    text = "hello there, other world!"
    with torch.no_grad():
        wanted = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
    found = engine.embedding(text)
    assert torch.cosine_similarity(found, wanted, 0) > 0.9999


def test_a_classifier_gives_the_same_scores(tmp_path):
    """BERT's pooler and classifier are llama.cpp's ranking head."""
    from transformers import BertConfig, BertForSequenceClassification

    _, settings, _ = gguf_models.MODELS["bert"]
    shape = {key: gguf_models._COMMON[key] for key in ("vocab_size", "hidden_size")}
    config = BertConfig(
        **shape, **settings, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_labels=3, hidden_act="gelu",
    )  # fmt: skip
    model = gguf_models.fill(BertForSequenceClassification(config)).eval()
    tokenizer = tokenizer_for("bert")
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    assert GGUFReader(record.file).get_field("bert.classifier.output_labels").contents() == [
        "LABEL_0",
        "LABEL_1",
        "LABEL_2",
    ]
    text = "hello there, other world!"
    with torch.no_grad():
        wanted = model(**tokenizer(text, return_tensors="pt")).logits[0]
    engine = LlamaCpp(record.file, embedding=True)
    out = engine.post("/embedding", content=text, embd_normalize=-1)  # scores, then noise
    assert torch.allclose(torch.tensor(out[0]["embedding"][0][:3]), wanted, atol=0.01)


def same_ids(engine: LlamaCpp, tokenizer, texts) -> None:
    for text in texts:
        assert engine.tokenize(text) == tokenizer(text)["input_ids"], repr(text)


@pytest.mark.parametrize("pre", pretokenizers.names())
def test_every_splitting_rule_gives_the_same_ids(pre, tmp_path):
    split, ignore_merges = pretokenizers._references()[pre]
    tokenizer = gguf_tokenizers.byte_level(split, size=420, ignore_merges=ignore_merges)
    model = gguf_models.model("qwen2", vocab_size=420, hidden_size=32, intermediate_size=32)
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    assert GGUFReader(record.file).get_field("tokenizer.ggml.pre").contents() == pre
    same_ids(LlamaCpp(record.file), tokenizer, [*gguf_tokenizers.TEXTS, pretokenizers.PROBE])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_same_ids(prefix, tmp_path):
    tokenizer = gguf_tokenizers.sentencepiece(prefix=prefix)
    model = gguf_models.model("qwen2", hidden_size=32, intermediate_size=32)
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    texts = [*gguf_tokenizers.TEXTS, "the other thing, <tool>in the inner theory</tool>"]
    same_ids(LlamaCpp(record.file), tokenizer, texts)


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_gives_the_same_ids(lowercase, tmp_path):
    tokenizer = gguf_tokenizers.wordpiece(lowercase=lowercase)
    model = gguf_models.model("bert", hidden_size=32, intermediate_size=32)
    record = gguf.write((model, tokenizer), tmp_path / "m.gguf", "f32")[0]
    engine = LlamaCpp(record.file, embedding=True)
    texts = ["hello world", "Hello, there others!", "Café 中文 it's 1234", "  blanks\tand\nlines "]
    same_ids(engine, tokenizer, texts)

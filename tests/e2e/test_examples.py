"""The examples as people start them, with few steps; and what they made, opened without us."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finegraft

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
# What a tutorial on trl shows after save_model.
SAVED = {
    "README.md",
    "training_args.bin",
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
SENTENCES = ["The hungry cat walked around the dark road.", "You must find the lamp."]
PLAIN = """
import sys
import numpy as np, torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, *sentences = sys.argv[1:]
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = [model(**tokenizer(s, return_tensors="pt")).logits[0].numpy() for s in sentences]
np.savez(out, *logits)
assert not any(name.startswith("finegraft") for name in sys.modules)
"""


def run(*command, status=0):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def example(name, *arguments, status=0):
    done = run(EXAMPLES / name, *arguments, status=status)
    return done.stdout if status == 0 else done.stderr


def losses(stdout):
    return [float(value) for value in re.findall(r"'loss': '?([0-9.]+)", stdout)]


@pytest.fixture(scope="module")
def yoda(tmp_path_factory):
    """Folder and output of a short run over a 4-bit base."""
    folder = tmp_path_factory.mktemp("yoda") / "adapter"
    return folder, example("yoda_peft.py", "--steps", 10, "--ask", 1, "--output", folder)


def test_yoda_learns_and_says_what_it_does(yoda):
    _, stdout = yoda
    first, last = losses(stdout)[0], losses(stdout)[-1]
    assert last < 0.8 * first
    memory = float(re.search(r"Memory of the model: ([0-9.]+) MB", stdout)[1])
    assert memory < 120  # 270 in 16 bits; embeddings are not quantized
    assert "Linear4bit" in stdout
    assert "% of trainable parameters: 1.78%" in stdout
    assert (
        "<|im_start|>user\nThe Force is strong in you!<|im_end|>\n<|im_start|>assistant" in stdout
    )
    assert re.search(r"Exactly right: [01] of 1 held-out", stdout)


def test_yoda_saves_what_the_tutorials_list(yoda):
    folder, stdout = yoda
    names = {path.name for path in folder.iterdir()}
    assert names >= SAVED
    assert all(name in stdout for name in SAVED)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 16, "LORA")


def test_plain_peft_gives_the_same_logits(yoda, tmp_path):
    folder, _ = yoda
    run("-c", PLAIN, folder, tmp_path / "plain.npz", *SENTENCES)
    model, tokenizer = finegraft.FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.float32, load_in_4bit=False
    )
    model.eval()
    plain = np.load(tmp_path / "plain.npz")
    for sentence, name in zip(SENTENCES, plain.files, strict=True):
        with torch.no_grad():
            ours = model(**tokenizer(sentence, return_tensors="pt")).logits[0].numpy()
            with model.disable_adapter():
                base = model(**tokenizer(sentence, return_tensors="pt")).logits[0].numpy()
        assert np.abs(ours - plain[name]).max() < 1e-5
        assert np.abs(ours - base).max() > 0.5  # and the adapter is what was compared


def test_alpaca_learns_saves_and_answers_when_reloaded(tmp_path):
    folder = tmp_path / "lora_model"
    stdout = example("alpaca_unsloth.py", "--steps", 8, "--output", folder)
    before, after = stdout.split("--- after, reloaded")
    every = losses(before)
    assert len(every) == 8
    assert sum(every[-2:]) < 0.7 * sum(every[:2])
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert after.split("### Response:")[1].strip()
    assert after.split("### Response:")[1] != before.split("### Response:")[1].split("{'loss'")[0]


@pytest.mark.slow
def test_from_rows_to_an_answer_of_the_api(tmp_path):
    stdout = example("train_to_api.py", "--steps", 40, "--output", tmp_path / "o")
    assert stdout.count("MB, verified") == 2
    assert "FROM ./" in stdout and 'PARAMETER stop "<|im_end|>"' in stdout
    _, answer = stdout.strip().splitlines()[-2:]
    assert answer.strip() == "The heavy basket, the young farmer carried. Yes, hrrrm."


def test_reviews_are_learnt_and_every_sentence_gets_a_label(tmp_path):
    folder = tmp_path / "classifier"
    stdout = example(
        "classify_reviews.py",
        *("--train-rows", 640, "--validation-rows", 200, "--epochs", 2, "--output", folder),
    )
    accuracies = [float(x) for x in re.findall(r"'eval_accuracy': '?([0-9.]+)", stdout)]
    reached = float(re.search(r"Held-out accuracy: ([0-9.]+)", stdout)[1])
    assert len(accuracies) == 2
    assert reached == pytest.approx(max(accuracies), abs=1e-3)  # the best epoch was loaded
    assert reached > 0.65
    for title in ("Untrained", "Trained"):
        shown = stdout.split(f"{title} model predictions:\n")[1].splitlines()[1:6]
        assert [line.rsplit(" - ", 1)[1] in ("Positive", "Negative") for line in shown] == [
            True
        ] * 5
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "0"), "argument --steps: 0 is not above 0"),
        (("--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--learning-rate", "-1"), "argument --learning-rate: -1 is not above 0"),
        (("--learning-rate", "nan"), "argument --learning-rate: nan is not above 0"),
        (("--stepz", "3"), "unrecognized arguments: --stepz"),
    ],
)
def test_wrong_arguments_are_named_at_once(name, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:  # in this process: each start takes seconds
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_more_reviews_than_there_are(tmp_path):
    stderr = example(
        "classify_reviews.py", "--train-rows", 10_000, "--output", tmp_path / "o", status=1
    )
    assert "FG-DATA-013: train is 10000" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_output_in_the_way_is_named_before_any_training(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    stderr = example(name, "--output", tmp_path / "file" / "adapter", status=1)
    assert "FG-DISK-" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "file").read_text() == "mine"

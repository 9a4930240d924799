"""Checkpoints that lost a byte, runs that are no longer the same, and replays that prove one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from classifier_tiny import base as classifier_base
from classifier_tiny import rows as labelled
from classifier_tiny import write
from safetensors.torch import load_file, save_file
from training_tiny import llama, rows, tokenizer
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core import alone, journal
from finegraft.core.errors import ConfigError, DataError, ModelError
from finegraft.core.schema import build, from_file
from finegraft.training import checkpoint, manifest, replay
from finegraft.training.run import train

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {
    "model": "base",
    "data": "rows.jsonl",
    "max_length": 64,
    "max_steps": 12,
    "save_steps": 4,
    "save_total_limit": 9,
    "per_device_train_batch_size": 4,
    "eval_fraction": 0.2,  # 16 rows are trained: 4 steps an epoch, so saves fall on their ends
    "lora_dropout": 0.2,
    "r": 4,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, rows and a whole run; copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    write(folder / "rows.jsonl", rows(20))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(build({**SETTINGS, "output": "runs/whole"}))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    config = yaml.safe_load((tmp_path / "here/runs/whole/config.yaml").read_text())
    for name in ("model", "data"):
        config[name] = str(tmp_path / "here" / SETTINGS[name])
    (tmp_path / "here/runs/whole/config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "here"


def stopped(place, step=8, name="stopped"):
    """A copy of the whole run as a kill after ``step`` would have left it."""
    run = place / "runs" / name
    shutil.copytree(place / "runs" / "whole", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "output": str(run)}))
    shutil.rmtree(run / "adapter")
    for path in checkpoint.checkpoints(run / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    events = journal.read_events(run / "events.jsonl")
    kept = [e for e in events if e.get("step", 0) <= step and e["type"] != "end"]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    return run


def resume(run, heard=None):
    listener = heard.append if heard is not None else None
    return train(from_file(run / "config.yaml"), listener=listener, resume=True)


def edit(run, **changes):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))


def same_bits(run, whole):
    ends = [r / "checkpoints" / "checkpoint-12" for r in (run, whole)]
    assert replay._compared(*ends, [])[1] == []
    assert (run / "adapter" / WEIGHTS).read_bytes() == (whole / "adapter" / WEIGHTS).read_bytes()


# --- bytes -------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("optimizer.pt", cut, "optimizer.pt has"),
        (WEIGHTS, flip, f"{WEIGHTS} is not what was written"),
        ("rng_state.pth", lambda path: path.unlink(), "rng_state.pth is missing"),
        ("manifest.json", cut, "manifest.json is cut off"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_left_for_an_older_one(place, file, damage, said):
    run = stopped(place)
    damage(run / "checkpoints" / "checkpoint-8" / file)
    found, damaged = checkpoint.newest(run / "checkpoints")
    assert found.name == "checkpoint-4"
    assert said in next(iter(damaged.values()))


def test_a_resumed_run_tells_of_damage_and_leftovers_and_ends_the_same(place):
    run = stopped(place)
    flip(run / "checkpoints" / "checkpoint-8" / "optimizer.pt")
    for left in (
        ".checkpoint-12.partial/checkpoint-12",
        "checkpoint-12.saving",
        ".checkpoint-1.old",
    ):
        (run / "checkpoints" / left).mkdir(parents=True)
    (run / ".adapter.12345678.partial").mkdir()
    heard = []
    result = resume(run, heard)
    notices = [e["message"] for e in heard if e["type"] == "notice"]
    assert (
        "checkpoint-8 is damaged (optimizer.pt is not what was written); it is removed" in notices
    )
    assert next(e for e in heard if e["type"] == "start")["step"] == 4
    same_bits(run, place / "runs" / "whole")
    assert not list(run.rglob(".*")) and not list(run.rglob("*.saving"))
    whole = journal.read_events(place / "runs/whole/events.jsonl")[-1]
    assert result.tokens == whole["tokens"]


def test_nothing_whole_starts_with_the_first_step(place):
    run = stopped(place, step=4)
    cut(run / "checkpoints" / "checkpoint-4" / WEIGHTS)
    heard = []
    resume(run, heard)
    assert any("starts with its first step" in e.get("message", "") for e in heard)
    same_bits(run, place / "runs" / "whole")


def test_a_checkpoint_at_the_end_of_an_epoch_holds_the_evaluation(place):
    """Evaluating draws a random number: without this, dropout goes on differently."""
    run = stopped(place, step=4)
    resume(run)
    same_bits(run, place / "runs" / "whole")
    told = journal.by_step(journal.read_events(run / "events.jsonl"), "eval")
    assert [e["step"] for e in told] == [4, 8, 12]


def test_losses_between_two_logged_lines_are_not_forgotten(place):
    config = build({**SETTINGS, "output": "runs/a", "logging_steps": 6, "eval_fraction": 0.0})
    whole = train(config)
    for step in (8, 12):
        shutil.rmtree(place / f"runs/a/checkpoints/checkpoint-{step}")
    again = resume(place / "runs" / "a")
    assert again.loss == whole.loss
    losses = [e["loss"] for e in journal.read_events(place / "runs/a/events.jsonl") if "loss" in e]
    assert losses.count(losses[0]) == 2  # the line of step 6, told twice and the same


def test_seconds_and_tokens_go_on(place):
    def stop(event):
        if event["type"] == "step" and event["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    half = train(build({**SETTINGS, "output": "runs/b"}), listener=stop)
    assert half.interrupted and half.steps == 7
    heard = []
    result = resume(place / "runs" / "b", heard)
    start = next(e for e in heard if e["type"] == "start")
    steps = [e for e in heard if e["type"] == "step"]
    saved = manifest.read(place / "runs/b/checkpoints/checkpoint-8")
    assert start["seconds"] > 0 and steps[0]["seconds"] > start["seconds"]
    assert result.seconds > half.seconds * 0.5 and saved["seconds"] > start["seconds"]
    whole = journal.read_events(place / "runs/whole/events.jsonl")[-1]
    assert result.tokens == whole["tokens"] > half.tokens
    assert steps[0]["tokens_per_second"] < 100 * steps[-1]["tokens_per_second"]


def test_only_the_newest_and_the_best_are_kept(place):
    folder = place / "runs" / "whole" / "checkpoints"
    kept = [folder / "checkpoint-12", folder / "checkpoint-4"]
    checkpoint.rotate(folder, 1, kept)
    assert checkpoint.checkpoints(folder) == kept[::-1]
    checkpoint.rotate(folder, None, [])
    assert len(checkpoint.checkpoints(folder)) == 2


# --- the same run ------------------------------------------------------------------------------


def test_changed_settings_are_told_old_and_new(place):
    run = stopped(place)
    edit(run, learning_rate=0.5, r=8, max_steps=6)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="FG-RUN-005") as caught:
        resume(run)
    assert "learning_rate: 0.0002 -> 0.5" in caught.value.found
    assert "r: 4 -> 8" in caught.value.found and "max_steps: 12 -> 6" in caught.value.found
    assert "save_steps" in caught.value.allowed
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_free_settings_are_taken_and_change_no_bit(place):
    run = stopped(place)
    free = {"save_steps": 3, "logging_steps": 2, "gradient_checkpointing": True}
    edit(run, **free, per_device_eval_batch_size=1, save_total_limit=5)
    heard = []
    resume(run, heard)
    said = " ".join(e["message"] for e in heard if e["type"] == "notice")
    assert "gradient_checkpointing was changed: false -> true" in said
    assert (run / "checkpoints" / "checkpoint-9").is_dir()
    same_bits(run, place / "runs" / "whole")
    saved = manifest.read(run / "checkpoints" / "checkpoint-12")["config"]
    assert {key: saved[key] for key in free} == free


def test_a_longer_run_is_taken_with_a_word_about_the_learning_rate(place):
    run = stopped(place)
    edit(run, max_steps=14)
    heard = []
    assert resume(run, heard).steps == 14
    assert any("learning rate follows the new length" in e.get("message", "") for e in heard)


def test_a_step_of_as_many_rows_in_smaller_portions_is_taken(place):
    run = stopped(place)
    edit(run, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    heard = []
    assert resume(run, heard).steps == 12
    assert sum("as many rows a step" in e.get("message", "") for e in heard) == 2
    edit(stopped(place, name="other"), per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match=r"FG-RUN-005.*per_device_train_batch_size: 4 -> 2"):
        resume(place / "runs" / "other")


def test_changed_rows_are_named(place):
    run = stopped(place)
    file = place / "rows.jsonl"
    given = [json.loads(line) for line in file.read_text().splitlines()]
    given[2]["completion"] = "today today"
    given.insert(6, {"prompt": "hello", "completion": "world"})
    write(file, given)
    with pytest.raises(DataError, match="FG-RUN-003") as caught:
        resume(run)
    assert "rows.jsonl: row 3: " in caught.value.found and "today today" in caught.value.found
    assert "nothing -> row 7" in caught.value.found


def test_the_same_rows_in_another_place_and_writing_are_the_same(place):
    run = stopped(place)
    given = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    (place / "rows.jsonl").unlink()
    (place / "moved.json").write_text(json.dumps(given, indent=1))
    edit(run, data=str(place / "moved.json"))
    resume(run)
    same_bits(run, place / "runs" / "whole")


def test_another_base_is_refused_and_a_moved_one_is_not(place):
    run = stopped(place)
    (place / "base").rename(place / "elsewhere")
    llama(seed=5).save_pretrained(place / "base")
    tokenizer().save_pretrained(place / "base")
    with pytest.raises(ModelError, match="FG-RUN-006"):
        resume(run)
    edit(run, model=str(place / "elsewhere"))
    resume(run)
    same_bits(run, place / "runs" / "whole")


def test_other_versions_are_told(place):
    run = stopped(place)
    file = run / "checkpoints" / "checkpoint-8" / "manifest.json"
    values = json.loads(file.read_text())
    values["machine"] |= {"torch": "2.1.0", "threads": "64"}
    file.write_text(json.dumps(values))
    heard = []
    resume(run, heard)
    said = " ".join(e.get("message", "") for e in heard)
    assert f"torch 2.1.0 -> {torch.__version__.split('+')[0]}" in said and "threads 64 -> 1" in said


HOLD = """
import sys, time
from pathlib import Path
from finegraft.core.alone import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_a_run_folder_and_a_kill_frees_it(place):
    run = stopped(place)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    assert alone.in_use(run)
    with pytest.raises(ConfigError, match=r"(?s)FG-RUN-004.*another process"):
        resume(run)
    config = from_file(run / "config.yaml").model_copy(update={"overwrite": True})
    with pytest.raises(ConfigError, match="FG-RUN-004"):
        train(config)
    assert len(checkpoint.checkpoints(run / "checkpoints")) == 2
    process.kill()
    process.wait()
    assert (run / alone.NAME).exists() and not alone.in_use(run)
    resume(run)
    assert not (run / alone.NAME).exists()


def test_a_cut_line_of_events_stays_alone(tmp_path):
    file = tmp_path / "events.jsonl"
    journal.heal(file)
    file.write_bytes(b'{"type": "a"}\n{"type": "b", "text": "\xc3')
    journal.heal(file)
    journal.heal(file)
    with open(file, "a") as lines:
        lines.write('{"type": "c"}\n')
    assert [e["type"] for e in journal.read_events(file)] == ["a", "c"]


# --- classification ----------------------------------------------------------------------------


def test_patience_and_the_best_epoch_survive_a_move(tmp_path, monkeypatch):
    """The best epoch is found by its step, and evaluations without a better one are counted on."""
    monkeypatch.chdir(tmp_path)
    classifier_base(tmp_path / "base", "bert")
    write(tmp_path / "rows.jsonl", labelled())
    values = {"task": "classification", "model": "base", "data": "rows.jsonl", "output": "a/run"}
    values |= {"dtype": "float32", "num_train_epochs": 30, "learning_rate": 1e-7, "save_steps": 2}
    values |= {"early_stopping_patience": 3, "save_total_limit": 20}
    whole = train(build(values))
    ends = [
        e["step"]
        for e in journal.read_events(tmp_path / "a/run/events.jsonl")
        if e["type"] == "eval"
    ]
    assert 4 <= len(ends) < 30
    weights = (whole.adapter / WEIGHTS).read_bytes()
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "b").mkdir()
    for last in (ends[-2], ends[-1]):  # before the evaluation that ends it, and after
        run = tmp_path / "b" / f"run-{last}"
        shutil.copytree(tmp_path / "moved" / "run", run)
        for path in checkpoint.checkpoints(run / "checkpoints"):
            if checkpoint.step_of(path) > last:
                shutil.rmtree(path)
        shutil.rmtree(run / "adapter")
        config = from_file(run / "config.yaml").model_copy(update={"output": str(run)})
        again = train(config, resume=True)
        assert (again.steps, again.metrics) == (whole.steps, whole.metrics)
        assert (run / "adapter" / WEIGHTS).read_bytes() == weights
        state = json.loads(
            (run / f"checkpoints/checkpoint-{again.steps}/trainer_state.json").read_text()
        )
        assert state["best_global_step"] == ends[0]


# --- the command -------------------------------------------------------------------------------


def command(*words):
    done = CliRunner().invoke(app, ["resume", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def contents(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_verify_says_equal_and_changes_nothing(place):
    run = stopped(place)
    edit(run, max_steps=99, logging_steps=3)  # what the checkpoint was made with counts
    before = contents(run)
    status, out, err = command(run, "--verify", "--json")
    values = json.loads(out)
    assert status == 0, err
    assert values["equal"] and (values["from_step"], values["to_step"]) == (4, 8)
    assert values["compared"] > 100 and values["differences"] == []
    assert contents(run) == before
    status, out, _ = command(run, "--verify", "--steps", "8")
    assert status == 0 and "Replayed 8 steps from the first step" in out
    assert "equal to checkpoint-8, bit for bit" in out


def test_verify_names_what_differs(place):
    run = stopped(place)
    folder = run / "checkpoints" / "checkpoint-8"
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[0]
    bits = weights[name].view(torch.int32)
    bits[0, 0] ^= 1  # the last bit of one number
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    state = torch.load(folder / "optimizer.pt")
    state["state"][3]["exp_avg"][0, 0] += 1
    torch.save(state, folder / "optimizer.pt")
    values = manifest.read(folder)
    del values["files"]
    manifest.write(folder, values)
    status, out, _ = command(run, "--verify", "--json")
    assert status == 1
    found = {(d["part"], d["name"]): d["found"] for d in json.loads(out)["differences"]}
    assert len(found) == 2
    assert found.pop(("weights", name)).startswith("1 of ")
    (part, tensor), words = found.popitem()
    assert part == "optimizer" and "lora_" in tensor and tensor.endswith("exp_avg")
    assert "by up to 1" in words
    status, out, _ = command(run, "--verify")
    assert status == 1 and "differ from checkpoint-8" in out and name in out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--verify", "--steps", "9"], "FG-RUN-008"),
        (["--verify", "--steps", "0"], "FG-RUN-008"),
        (["--steps", "4"], "FG-RUN-008"),
    ],
)
def test_steps_that_cannot_be_replayed(place, words, code):
    status, out, _ = command(stopped(place), *words, "--json")
    assert status == 2 and json.loads(out)["error"]["code"] == code


def test_verify_needs_a_whole_checkpoint(place):
    run = stopped(place, step=4)
    cut(run / "checkpoints" / "checkpoint-4" / WEIGHTS)
    status, out, _ = command(run, "--verify", "--json")
    error = json.loads(out)["error"]
    assert status == 2 and error["code"] == "FG-RUN-007" and "checkpoint-4" in error["found"]


def test_without_a_name_the_newest_unfinished_run_goes_on(place):
    stopped(place, name="older")
    run = stopped(place, name="newer")
    status, out, err = command("--json")
    assert status == 0, err
    assert json.loads(out)["run"] == str(run) and "going on with runs/newer" in err
    assert json.loads(command("--json")[1])["run"].endswith("older")
    status, out, _ = command("--json")
    error = json.loads(out)["error"]
    assert status == 2 and error["code"] == "FG-RUN-009"
    assert all(f"runs/{name}" in error["found"] for name in ("whole", "newer", "older"))
    with alone.alone(stopped(place, name="busy")):
        assert "still at work: runs/busy" in json.loads(command("--json")[1])["error"]["found"]


def test_folders_that_are_no_run(place):
    for name, said in {
        "runs/whole/checkpoints": "inside a run",
        "nowhere": "no such folder",
    }.items():
        status, out, _ = command(name, "--json")
        error = json.loads(out)["error"]
        assert status == 2 and error["code"] == "FG-RUN-001" and said in error["found"]

"""A ladder: what is planned, what is measured, what is kept, and what is recommended."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import classifier_tiny
import numpy as np
import pytest
import yaml
from training_tiny import llama, rows, tokenizer

from finegraft import adapters
from finegraft.core.errors import AdapterError, ConfigError, DataError, StorageError
from finegraft.core.schema import TrainConfig, build
from finegraft.data.prepare import prepare
from finegraft.data.rows import conversations, detect
from finegraft.inference.score import heldout_loss
from finegraft.training import ladder, ladder_choice, ladder_report, ladder_worker, rung
from finegraft.training import run as training_run
from finegraft.training.tasks import TASKS


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    llama().save_pretrained(folder / "causal")
    tokenizer().save_pretrained(folder / "causal")
    classifier_tiny.base(folder / "classification", "bert")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with rows, and rungs that are climbed in this process."""
    write(tmp_path / "rows.jsonl", rows(20))
    write(tmp_path / "texts.jsonl", classifier_tiny.rows(30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rung, "keep_freed_memory", lambda: True)
    return tmp_path


@pytest.fixture
def here(monkeypatch):
    """Climb in this process; collects which rungs were climbed, and how."""
    climbed = []

    def work(settings, target, how, events, listener):
        climbed.append((settings.stem, how))
        if rung.main([str(settings), str(target), how]) == rung.STATUS_INTERRUPTED:
            raise KeyboardInterrupt
        for line in events.read_text().splitlines() if events.exists() else ():
            listener(json.loads(line))
        return json.loads(target.read_text())

    monkeypatch.setattr(ladder, "work", work)
    return climbed


def values(bases, **changes):
    common = {"model": str(bases / "causal"), "data": "rows.jsonl", "output": "steps"}
    return {**common, "max_steps": 2, "warmup_steps": 0, "dtype": "float32", **changes}


def texts(bases, **changes):
    base, data = str(bases / "classification"), "texts.jsonl"
    return values(bases, task="classification", model=base, data=data, **changes)


# --- planning ---------------------------------------------------------------------------------


def test_rungs_share_everything_but_method_and_rate(place, bases):
    planned = ladder.plan(values(bases), ["dora", "ia3"], {"dora": {"r": 4}})
    base, dora, ia3 = (r.config for r in planned.rungs)
    assert [r.name for r in planned.rungs] == ["base", "dora", "ia3"]
    assert (dora.r, dora.learning_rate) == (4, adapters.find("dora")[0].learning_rates["causal"])
    assert ia3.learning_rate == 1e-2 and ia3.method == "ia3"
    varied = {"method", "r", "learning_rate", "output"}
    for config in (dora, ia3):
        same = config.model_dump(exclude=varied)
        assert same == base.model_dump(exclude=varied)
    assert planned.data["eval_counts"]["rows"] == 4  # a fifth is held out unasked
    assert planned.folder.name == "steps" and dora.output == "steps/dora"


def test_settings_of_an_adapter_reach_the_methods_that_have_them(place, bases):
    given = values(bases, r=4, lora_alpha=9, learning_rate=1e-4, loraplus_lr_ratio=4)
    _, lora, ia3 = (r.config for r in ladder.plan(given, ["lora", "ia3"]).rungs)
    assert (lora.r, lora.lora_alpha, lora.loraplus_lr_ratio) == (4, 9, 4)
    assert (ia3.r, ia3.loraplus_lr_ratio) == (TrainConfig.model_fields["r"].default, None)
    assert lora.learning_rate == ia3.learning_rate == 1e-4


def test_further_settings_of_a_method(place, bases):
    own = {"prompt": {"num_virtual_tokens": 7, "learning_rate": 0.5}}
    prompt = ladder.plan(values(bases), ["prompt"], own).rungs[1].config
    assert prompt.method_settings == {"num_virtual_tokens": 7} and prompt.learning_rate == 0.5


@pytest.mark.parametrize("task", list(ladder.METHODS))
def test_six_methods_unasked_that_exist_for_the_task(place, bases, task):
    given = values(bases) if task == "causal" else texts(bases)
    planned = ladder.plan(given)
    assert len(planned.rungs) == 7 and all(r.refused is None for r in planned.rungs)


def test_every_method_has_a_rate_for_every_task():
    for _, method in adapters.METHODS.items():
        assert set(method.learning_rates) == set(rung.MEASURES)


def test_the_table_of_rates_in_the_docs_is_the_one_in_use():
    text = (Path(__file__).parents[2] / "docs" / "ladder.md").read_text()
    listed = {
        name: {"causal": float(causal), "classification": float(classes)}
        for name, causal, classes in re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", text, re.M)
    }
    assert listed == {name: dict(m.learning_rates) for name, m in adapters.METHODS.items()}


def test_long_files_are_not_read_to_their_end(place, bases, monkeypatch):
    monkeypatch.setattr(ladder, "STEPS", 3)
    given = values(bases, per_device_train_batch_size=4)  # 16 rows: 8 steps
    del given["max_steps"]
    assert ladder.plan(given, ["lora"]).config.max_steps == 3
    assert ladder.plan({**given, "num_train_epochs": 2}, ["lora"]).config.max_steps == -1
    short = {**given, "per_device_train_batch_size": 16}
    assert ladder.plan(short, ["lora"]).config.max_steps == -1


def test_a_method_that_the_settings_rule_out_keeps_its_reason(place, bases):
    planned = ladder.plan(values(bases, load_in_4bit=True), ["lora", "full"])
    assert planned.rungs[1].refused is None
    assert planned.rungs[2].refused["code"] == "FG-ADAPT-041"


@pytest.mark.parametrize(
    ("changes", "methods", "per_method", "error", "match"),
    [
        ({"task": "poetry"}, None, None, ConfigError, "FG-LADDER-001: a ladder for the task 'poe"),
        ({"method": "lora"}, None, None, ConfigError, "FG-LADDER-002: method: this is what"),
        ({"full_finetuning": True}, None, None, ConfigError, "FG-LADDER-002: full_finetuning"),
        ({}, [], None, ConfigError, "FG-LADDER-003: no method"),
        ({}, ["lora", "ia3", "lora"], None, ConfigError, "FG-LADDER-003: lora more than once"),
        ({}, ["dora"], {"dorra": {"r": 8}}, ConfigError, "did you mean 'dora'"),
        ({}, ["lorra"], None, AdapterError, "FG-ADAPT-010: unknown method 'lorra'"),
        ({"eval_fraction": 0.0}, None, None, ConfigError, "FG-LADDER-004: no rows are held out"),
        ({"max_steps": 0.5}, None, None, ConfigError, "FG-CONF-001"),
        ({"class_weights": "balanced"}, ["lora"], None, ConfigError, "FG-CLASS-001"),
        ({}, ["ia3"], {"ia3": {"r": 8}}, ConfigError, "FG-CONF-006: r with method 'ia3'"),
        ({"data": "none.jsonl"}, None, None, DataError, "none.jsonl"),
    ],
)
def test_mistakes_are_answered_before_anything_is_made(
    place, bases, changes, methods, per_method, error, match
):
    with pytest.raises(error, match=match):
        ladder.plan(values(bases, **changes), methods, per_method)
    assert not (place / "steps").exists()


def test_a_model_with_an_adapter_is_refused(place, bases):
    training_run.train(build(values(bases, output="run", max_steps=1)))
    with pytest.raises(ConfigError, match=r"FG-LADDER-005: .*run carries an adapter already"):
        ladder.plan(values(bases, model="run"), ["lora"])


# --- climbing ---------------------------------------------------------------------------------


def test_a_causal_ladder(place, bases, here):
    heard = []
    planned = ladder.plan(values(bases), ["lora", "bitfit", "prompt"])
    found = ladder.climb(planned, listener=heard.append)
    base, lora, bitfit, prompt = found["rungs"]
    assert here == [("base", "base"), ("lora", "new"), ("bitfit", "new"), ("prompt", "new")]
    assert (base["trainable_parameters"], base["steps"], base["run"]) == (0, 0, None)
    assert bitfit["error"]["code"] == "FG-ADAPT-023" and bitfit["quality"] is None
    for one in (lora, prompt):
        assert one["error"] is None and one["steps"] == 2 and one["seconds"] > 0
        assert one["interval"][0] <= one["quality"] <= one["interval"][1]
        assert math.isclose(one["metrics"]["perplexity"], math.exp(one["quality"]))
        weights = place / one["run"] / "adapter" / "adapter_model.safetensors"
        assert one["adapter_bytes"] == weights.stat().st_size
        assert one["peak_memory_bytes"] > 1e8 and (place / one["run"] / "config.yaml").is_file()
    assert prompt["trainable_parameters"] == 20 * 32 < lora["trainable_parameters"]
    assert (found["measure"], found["better"], found["held_out_rows"]) == ("loss", "lower", 4)
    assert json.loads((place / "steps" / "ladder.json").read_text()) == found
    assert all("rows" not in one for one in found["rungs"])  # they are in rungs/lora.json
    assert len(json.loads((place / "steps/rungs/lora.json").read_text())["rows"]["sums"]) == 4
    assert (place / "steps" / "ladder.png").read_bytes().startswith(b"\x89PNG")
    report = (place / "steps" / "report.md").read_text()
    assert "| lora |" in report and "FG-ADAPT-023" in report and "ladder.png" in report
    assert found["recommendation"]["reason"] in report
    rungs = [(e["method"], e["number"], e["of"]) for e in heard if e["type"] == "rung"]
    assert rungs == [("base", 1, 4), ("lora", 2, 4), ("bitfit", 3, 4), ("prompt", 4, 4)]
    steps = [e for e in heard if e["type"] == "step"]
    assert len(steps) == 4 and all(e["ladder_seconds"] >= 0 for e in steps)


def test_the_held_out_loss_is_that_of_the_scorer(place, bases, here):
    found = ladder.climb(ladder.plan(values(bases), ["lora"]))
    held = rows(20)[-4:]
    words = tokenizer()
    made = prepare(conversations(held, detect(held)[1]), words, max_length=1024)
    expected = heldout_loss(llama(), made.input_ids, made.labels)
    base = found["rungs"][0]
    assert math.isclose(base["quality"], expected, rel_tol=1e-5)
    assert base["metrics"]["tokens"] == made.counts.trained_tokens


def test_a_ladder_of_classifiers(place, bases, here):
    found = ladder.climb(ladder.plan(texts(bases), ["lora", "head"]))
    assert (found["measure"], found["better"]) == ("accuracy", "higher")
    for one in found["rungs"][1:]:
        saved = json.loads((place / one["run"] / "report" / "metrics.json").read_text())
        assert one["metrics"]["accuracy"] == one["quality"] == saved["accuracy"]
        assert one["metrics"]["macro_f1"] == saved["macro_f1"]
        assert one["interval"] == list(rung.wilson(one["quality"], found["held_out_rows"]))
    assert found["rungs"][0]["trainable_parameters"] == 0


def test_a_ladder_of_values(place, bases, here):
    write(place / "texts.jsonl", [{**r, "label": i / 7} for i, r in enumerate(texts_only(30))])
    found = ladder.climb(ladder.plan(texts(bases), ["head"]))
    assert (found["measure"], found["better"]) == ("mse", "lower")
    head = found["rungs"][1]
    assert math.isclose(head["quality"], head["metrics"]["mse"])
    assert head["interval"][0] <= head["quality"] <= head["interval"][1]


def texts_only(count):
    return classifier_tiny.rows(count)


def test_full_fine_tuning_counts_the_model_on_the_disk(place, bases, here):
    full = ladder.climb(ladder.plan(values(bases), ["full"]))["rungs"][1]
    assert full["trainable_parameters"] == full["parameters"]
    assert full["adapter_bytes"] == rung.weight_bytes(place / "steps" / "full" / "model") > 0


def test_what_is_done_is_not_done_again(place, bases, here):
    first = ladder.climb(ladder.plan(values(bases), ["lora", "bitfit"]))
    here.clear()
    heard = []
    again = ladder.climb(
        ladder.plan(values(bases), ["lora", "bitfit", "ia3"]), listener=heard.append
    )
    assert here == [("bitfit", "new"), ("ia3", "new")]  # a failure is tried again
    assert again["rungs"][:2] == first["rungs"][:2]
    assert [e["how"] for e in heard if e["type"] == "rung"][:2] == ["done already"] * 2
    here.clear()
    ladder.climb(ladder.plan(values(bases, overwrite=True), ["lora"]))
    assert here == [("base", "base"), ("lora", "new")]


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_with_the_rung_it_was_in(place, bases, here, monkeypatch):
    whole = ladder.climb(ladder.plan(values(bases, output="whole", max_steps=3), ["lora"]))
    here.clear()
    real, asked = training_run.train, []

    def stopped(config, *, listener=None, resume=False):
        def stop(event):
            if event["type"] == "step" and not asked:
                asked.append(event)
                signal.raise_signal(signal.SIGINT)

        return real(config, listener=stop, resume=resume)

    monkeypatch.setattr(training_run, "train", stopped)
    given = values(bases, max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        ladder.climb(ladder.plan(given, ["lora"]))
    assert here == [("base", "base"), ("lora", "new")]
    assert [
        r["method"] for r in json.loads((place / "steps/ladder.json").read_text())["rungs"]
    ] == ["base"]
    again = yaml.safe_load((place / "steps" / "ladder.yaml").read_text())
    methods, own = again.pop("methods"), again.pop("per_method")
    here.clear()
    found = ladder.climb(ladder.plan(again, methods, own))
    assert here == [("lora", "resume")]
    for one, other in zip(whole["rungs"], found["rungs"], strict=True):
        assert one["quality"] == other["quality"]


def test_other_settings_or_rows_are_not_mixed_with_old_rungs(place, bases, here):
    ladder.climb(ladder.plan(values(bases), ["lora"]))
    for key, value in {"max_steps": 3, "seed": 1, "r": 4}.items():
        with pytest.raises(ConfigError, match=rf"FG-LADDER-006: .*{key} .* -> {value}"):
            ladder.plan(values(bases, **{key: value}), ["lora"])
    write(place / "rows.jsonl", rows(21))
    with pytest.raises(ConfigError, match=r"FG-LADDER-006: .* base: the rows"):
        ladder.plan(values(bases), ["lora"])


def test_a_run_of_another_kind_is_not_touched(place, bases):
    training_run.train(build(values(bases, output="steps/lora", max_steps=1)))
    with pytest.raises(ConfigError, match=r"FG-LADDER-007: steps/lora holds a run"):
        ladder.plan(values(bases), ["lora"])


def test_a_place_that_cannot_be_written(place, bases):
    planned = ladder.plan(values(bases, output="rows.jsonl/steps"), ["lora"])
    with pytest.raises(StorageError, match="FG-DISK-00"):
        ladder.climb(planned)


# --- measuring --------------------------------------------------------------------------------


def test_wilson_holds_what_the_paper_says():
    low, high = rung.wilson(0.5, 100)
    assert math.isclose(low, 0.4038, abs_tol=1e-4) and math.isclose(high, 0.5962, abs_tol=1e-4)
    low, high = rung.wilson(1.0, 20)
    assert math.isclose(low, 0.8389, abs_tol=1e-4) and high == 1.0
    assert rung.wilson(0.0, 20)[0] == 0.0


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    dice = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        tokens = dice.integers(5, 30, size=80)
        sums = tokens * (1.0 + dice.normal(0, 0.3, size=80))
        low, high = rung.bootstrap(sums, tokens)
        held += low <= 1.0 <= high
    assert 52 <= held <= 60
    assert rung.bootstrap([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)


def test_pauses_between_two_parts_of_a_run_are_no_training():
    steps = [{"type": "step", "seconds": s} for s in (1.0, 2.5, 3.5, 5.0)]
    events = [{"type": "start"}, *steps[:2], {"type": "eval"}, {"type": "start"}, *steps[2:]]
    assert rung.training_seconds(events) == 5.0  # a resumed run counts on
    assert rung.training_seconds([]) == 0.0


# --- the process of a rung --------------------------------------------------------------------


def test_a_process_that_breaks_off_leaves_a_reason(tmp_path, monkeypatch):
    (tmp_path / "lora.yaml").write_text("model: demo\n")
    target = tmp_path / "lora.json"
    script = tmp_path / "worker"
    script.write_text("#!/bin/sh\necho starting\necho 'RuntimeError: no luck'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(ladder_worker.sys, "executable", str(script))
    arguments = (tmp_path / "lora.yaml", target, "new", tmp_path / "events.jsonl", print)
    error = ladder_worker.work(*arguments)["error"]
    assert error["code"] == "FG-LADDER-008" and "RuntimeError: no luck" in error["found"]
    assert str(tmp_path / "lora.log") in error["fix"]
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    assert (
        "SIGKILL, as happens when memory ends" in ladder_worker.work(*arguments)["error"]["found"]
    )
    script.write_text(f"#!/bin/sh\nexit {rung.STATUS_INTERRUPTED}\n")
    with pytest.raises(KeyboardInterrupt):
        ladder_worker.work(*arguments)


def test_only_new_whole_events_are_passed_on(tmp_path, monkeypatch):
    events = tmp_path / "events.jsonl"
    events.write_text('{"type": "old"}\n')
    script = tmp_path / "worker"
    script.write_text(
        f'#!/bin/sh\necho \'{{"type": "new"}}\' >> {events}\nprintf \'{{"ty\' >> {events}\n'
        'echo \'{"quality": 1}\' > "$4"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(ladder_worker.sys, "executable", str(script))
    heard = []
    target = tmp_path / "r.json"
    found = ladder_worker.work(tmp_path / "r.yaml", target, "new", events, heard.append)
    assert found == {"quality": 1} and heard == [{"type": "new"}]


def test_the_log_must_be_writable(tmp_path):
    with pytest.raises(StorageError, match="FG-DISK-00"):
        ladder_worker.work(tmp_path / "no" / "r.yaml", tmp_path / "r", "new", tmp_path / "e", print)


def test_time_left_follows_the_rungs_before(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ladder_worker.time, "monotonic", lambda: now[0])
    clock = ladder_worker.Clock(3)
    clock.begin(1)
    assert clock.left() is None
    now[0] += 10
    clock.hear({"type": "step", "eta_seconds": 20})
    assert clock.left() == 20 + 2 * 30
    now[0] += 30
    clock.end()
    clock.begin(2)
    assert clock.left() == 40 + 40
    now[0] += 10
    assert clock.left() == 30 + 40


# --- the recommendation and the picture -------------------------------------------------------


def made(method, quality, trained, seconds=10.0, spread=0.2, **more):
    """A rung whose 100 rows lie around ``quality``, all methods finding the same rows hard."""
    noise = spread * np.sin(np.arange(100.0))
    sums = (quality + noise - noise.mean()).tolist()
    return {
        "method": method,
        "quality": quality,
        "interval": list(rung.bootstrap(sums, [1.0] * 100)),
        "metrics": {"perplexity": 2.0, "macro_f1": 0.5},
        "rows": {"sums": sums, "weights": [1.0] * 100},
        "trainable_parameters": trained,
        "parameters": 10_000_000,
        "steps": 5,
        "seconds": seconds,
        "peak_memory_bytes": 1e9,
        "adapter_bytes": 4 * trained,
        "error": None,
        "learning_rate": 1e-3,
        "run": method,
        **more,
    }


def answers(method, right, trained, **more):
    """A rung that gets those of 100 rows right whose numbers are in ``right``."""
    sums = [float(i in right) for i in range(100)]
    share = sum(sums) / 100
    own = {
        "interval": list(rung.wilson(share, 100)),
        "rows": {"sums": sums, "weights": [1.0] * 100},
    }
    return made(method, share, trained, **{**own, **more})


FAILED = {**made("bad", 0.0, 1), "quality": None, "error": {"code": "FG-X", "found": "x"}}
GUESSES = answers("base", range(50), 0)


def test_the_smallest_of_those_that_are_as_good_is_recommended():
    lora = answers("lora", range(15, 95), 4_000_000, seconds=90.0)
    ia3 = answers("ia3", range(20, 98), 40_000, seconds=60.0)  # 78, on other rows
    told = ladder_choice.recommend([GUESSES, lora, FAILED, ia3], "accuracy", "higher")
    assert told["method"] == "ia3"
    assert (
        "cannot be told apart from the best, lora with a held-out accuracy of 80.0%"
        in (told["reason"])
    )
    assert (
        "100 times fewer trained parameters and 30 s less training, at the price of 2.0 points"
        in (told["reason"])
    )


def test_overlapping_intervals_are_not_enough_when_the_rows_are_the_same():
    head, lora = answers("head", range(62), 700), answers("lora", range(75), 70_000)
    assert ladder_choice._overlap(head, lora)
    told = ladder_choice.recommend([GUESSES, head, lora], "accuracy", "higher")
    assert told["method"] == "lora" and "nothing that trains fewer" in told["reason"]
    rungs = [made("base", 3.0, 0), made("lora", 0.50, 4000), made("ia3", 0.53, 40)]
    assert ladder_choice._overlap(rungs[1], rungs[2])
    assert ladder_choice.recommend(rungs, "loss", "lower")["method"] == "lora"


def test_what_is_as_good_as_the_best_must_also_beat_the_untrained_model():
    weak = answers("weak", {*range(45), *range(80, 93)}, 10)  # 58
    best = answers("best", range(35, 100), 4000)  # 65, on other rows
    assert ladder_choice._overlap(weak, best) and ladder_choice._level(weak, best)
    base = answers("base", range(7, 57), 0)
    told = ladder_choice.recommend([base, weak, best], "accuracy", "higher")
    assert told["method"] is None  # 50 against 65 of 100, hardly on the same rows
    strong = answers("best", range(95), 4000)
    told = ladder_choice.recommend([base, weak, strong], "accuracy", "higher")
    assert told["method"] == "best" and "the only method" in told["reason"]


@pytest.mark.parametrize("right", [52, 20])
def test_nothing_is_recommended_that_is_not_better_than_no_training(right):
    rungs = [GUESSES, answers("lora", range(right), 4000)]
    told = ladder_choice.recommend(rungs, "accuracy", "higher")
    assert told["method"] is None and "beyond chance" in told["reason"]
    assert ladder_choice.recommend([rungs[0], FAILED], "loss", "lower")["method"] is None


def test_the_picture_needs_a_trained_method(tmp_path):
    common = {"model": "m", "data": "d", "measure": "loss", "better": "lower", "task": "causal"}
    common |= {"rows": 9, "held_out_rows": 3, "recommendation": {"method": None, "reason": "-"}}
    ladder_report.write({**common, "rungs": [made("base", 0.5, 0), FAILED]}, tmp_path)
    assert not (tmp_path / "ladder.png").exists()
    assert "ladder.png" not in (tmp_path / "report.md").read_text()
    several = [made(f"m{i}", 0.01 * 2**i, 10**i) for i in range(1, 14)]
    ladder_report.write({**common, "rungs": [made("base", 0.5, 0), *several]}, tmp_path)
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_a_task_is_measured_if_and_only_if_it_has_default_methods():
    assert set(rung.MEASURES) == set(ladder.METHODS) == set(ladder.EPOCHS) <= set(TASKS.names())

"""A sweep: what is varied, what is planned, what is kept, how a search goes on, what is told."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys

import pytest
import yaml
from training_tiny import llama, rows, tokenizer

from finegraft.core import charts
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.schema import TrainConfig, build
from finegraft.training import ladder_worker, rung
from finegraft.training import run as training_run
from finegraft.training.sweep import one, page, planning, results, running, search, space


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", rows(20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rung, "keep_freed_memory", lambda: True)
    return tmp_path


@pytest.fixture
def here(monkeypatch):
    """Train in this process; collects which runs were trained, and how."""
    trained = []

    def work(settings, target, how, events, listener, *, module, stop, broke_off):
        assert module == running.MODULE
        trained.append((settings.stem, how))
        told = len(events.read_text().splitlines()) if events.exists() else 0
        if rung.main([str(settings), str(target), how], one.train) == rung.STATUS_INTERRUPTED:
            raise KeyboardInterrupt
        for line in events.read_text().splitlines()[told:] if events.exists() else ():
            listener(json.loads(line))
            if stop and stop():
                target.unlink(missing_ok=True)
                return {"stopped": True}
        return json.loads(target.read_text())

    monkeypatch.setattr(running, "work", work)
    return trained


def values(model, **changes):
    common = {"model": model, "data": "rows.jsonl", "output": "steps", "eval_fraction": 0.2}
    common |= {"max_steps": 2, "warmup_steps": 0, "dtype": "float32", "report_rows": 0}
    return {**common, "data_check": False, **changes}


# --- what is varied ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8,16,32", (8, 16, 32)),
        ("1e-4, 3e-4", (1e-4, 3e-4)),
        ("lora,dora", ("lora", "dora")),
        ("true,false", (True, False)),
        ("[q_proj,v_proj],[q_proj]", (["q_proj", "v_proj"], ["q_proj"])),
        ("'a,b',c", ("a,b", "c")),
        ("8,8,16", (8, 16)),
        ([1, 2], (1, 2)),
        (5, (5,)),
        ("7", (7,)),
    ],
)
def test_values_between_commas(text, expected):
    (axis,) = space.axes({"r": text})
    assert axis.values == expected and axis.ends is None
    assert space.axes({"r": axis.written()}) == [axis]


@pytest.mark.parametrize(
    ("text", "ends", "whole", "logarithmic"),
    [
        ("1e-5..1e-3", (1e-5, 1e-3), False, True),
        ("4..64", (4, 64), True, True),
        ("0.0..0.3", (0.0, 0.3), False, False),
        ("2 .. 8", (2, 8), True, False),
    ],
)
def test_ranges(text, ends, whole, logarithmic):
    (axis,) = space.axes({"r": text})
    assert (axis.ends, axis.whole, axis.logarithmic) == (ends, whole, logarithmic)
    assert space.axes({"r": axis.written()}) == [axis]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rr": "8"}, r"FG-SWEEP-001: a sweep cannot vary 'rr'[\s\S]*did you mean 'r'"),
        ({"learnin_rate": "8"}, "did you mean 'learning_rate'"),
        ({"output": "a,b"}, "FG-SWEEP-001: a sweep cannot vary 'output'"),
        ({"r": "[8,"}, "FG-SWEEP-002"),
        ({"r": []}, "FG-SWEEP-002"),
        ({"r": "9..3"}, "FG-SWEEP-002"),
    ],
)
def test_what_cannot_be_varied(given, match):
    with pytest.raises(ConfigError, match=match):
        space.axes(given)


def test_a_grid_is_every_combination():
    found = space.grid(space.axes({"r": "2,4", "seed": "1,2,3"}))
    assert found[:4] == [{"r": 2, "seed": 1}, {"r": 2, "seed": 2}, {"r": 2, "seed": 3}, found[3]]
    assert found[3] == {"r": 4, "seed": 1} and len(found) == 6
    with pytest.raises(ConfigError, match="FG-SWEEP-003: learning_rate: a grid cannot"):
        space.grid(space.axes({"learning_rate": "1e-5..1e-3"}))


def test_names_are_plain_stable_and_never_the_same():
    assert space.name({"r": 8, "learning_rate": 1e-4}) == "r=8,learning_rate=0.0001"
    assert space.name({"bias": "all", "use_dora": True}) == "bias=all,use_dora=true"
    lists = [{"target_modules": [m]} for m in ("q_proj", "v_proj")]
    long = [{"data": "x" * 300 + end} for end in "ab"]
    odd = [{"data": "a/b"}, {"data": "a b"}]
    found = [space.name(one) for one in (*lists, *long, *odd)]
    assert len(set(found)) == 6
    assert all(re.fullmatch(r"[\w.+,=-]{1,100}", one) for one in found)


def test_the_size_of_a_space():
    assert space.size(space.axes({"r": "2,4", "seed": "1..5"})) == 10
    assert space.size(space.axes({"r": "2,4", "learning_rate": "1e-5..1e-3"})) is None


# --- planning ---------------------------------------------------------------------------------


def test_runs_share_everything_but_what_is_varied(place, model):
    planned = planning.plan(values(model), {"r": "2,4", "learning_rate": "1e-3,1e-2", "seed": "5"})
    assert planning.names(planned) == [
        f"r={r},learning_rate={rate}" for r in (2, 4) for rate in (0.001, 0.01)
    ]
    assert [axis.key for axis in planned.space] == ["r", "learning_rate"]  # one seed for all
    first, last = (
        planned.config(one, "x").model_dump()
        for one in ({"r": 2, "learning_rate": 1e-3}, {"r": 4, "learning_rate": 1e-2})
    )
    assert {key for key in first if first[key] != last[key]} == {"r", "learning_rate"}
    assert first["seed"] == 5 and planned.held_out and planned.count == 4


@pytest.mark.parametrize(
    ("changes", "vary", "more", "error", "match"),
    [
        ({}, {}, {}, ConfigError, "FG-SWEEP-005: nothing is varied"),
        ({}, {"r": "8"}, {}, ConfigError, "FG-SWEEP-005: nothing is varied"),
        ({}, {"seed": list(range(2000))}, {}, ConfigError, "FG-SWEEP-005: a grid of 2,000 runs"),
        ({}, {"r": "8,0"}, {}, ConfigError, "FG-CONF-002: the sweep, r=0"),
        ({}, {"r": "8,many"}, {}, ConfigError, "FG-CONF-001: the sweep, r=many"),
        ({"method": "ia3"}, {"r": "8,4"}, {}, ConfigError, "FG-CONF-006"),
        ({"clas_names": 1}, {"r": "8,4"}, {}, ConfigError, "FG-CONF-001"),
        ({}, {"r": "8,4"}, {"searching": "bayes"}, ConfigError, "FG-SWEEP-008: --search bayes"),
        ({}, {"r": "8,4"}, {"trials": 3}, ConfigError, "FG-SWEEP-008: --trials 3 without"),
        ({}, {"r": "8,4"}, {"searching": "optuna", "trials": 0}, ConfigError, "FG-SWEEP-008"),
        ({"nproc": 2}, {"r": "8,4"}, {}, ConfigError, "FG-SWEEP-013: nproc 2"),
        ({"data": "no.jsonl"}, {"r": "8,4"}, {}, DataError, "no.jsonl"),
    ],
)
def test_mistakes_are_answered_before_anything_is_made(
    place, model, changes, vary, more, error, match
):
    with pytest.raises(error, match=match):
        planning.plan(values(model, **changes), vary, **more)
    assert not (place / "steps").exists()


def test_a_search_without_optuna_says_what_to_install(place, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"FG-SWEEP-004[\s\S]*finegraft\[sweep\]"):
        planning.plan(values(model), {"r": "8,4"}, searching="optuna")


def test_a_search_of_few_combinations_has_no_more_trials(place, model):
    planned = planning.plan(values(model), {"r": "2,4,8"}, searching="optuna", trials=20)
    assert planned.count == 3
    planned = planning.plan(values(model), {"learning_rate": "1e-4..1e-2"}, searching="optuna")
    assert planned.count == 20 and planning.names(planned)[6] == "trial-007"


# --- running ----------------------------------------------------------------------------------


def test_a_grid(place, model, here):
    heard = []
    planned = planning.plan(values(model), {"r": "2,4", "learning_rate": "1e-4,1e-1"})
    found = running.sweep(planned, listener=heard.append)
    assert here == [(name, "new") for name in planning.names(planned)]
    runs = found["runs"]
    assert [row["loss"] for row in runs] == sorted(row["eval_loss"] for row in runs)
    assert len({row["loss"] for row in runs}) == 4
    for row in runs:
        config = yaml.safe_load((place / row["run"] / "config.yaml").read_text())
        assert {key: config[key] for key in row["values"]} == row["values"]
        told = training_run_events(place / row["run"])
        assert row["loss"] == [e["loss"] for e in told if e["type"] == "eval"][-1]
        assert row["steps"] == 2 and row["eval_step"] == 2 and row["state"] == "finished"
        assert math.isclose(
            row["train_loss"], sum(e["loss"] for e in told if e["type"] == "step") / 2
        )
    best = {key: runs[0][key] for key in ("name", "values", "loss", "run")}
    assert found["best"] == best and found["measure"] == "eval_loss"
    assert json.loads((place / "steps" / "sweep.json").read_text()) == found
    ended = [e for e in heard if e["type"] == "result"]
    assert [e["number"] for e in ended] == [1, 2, 3, 4]
    assert ended[-1]["best"]["name"] == runs[0]["name"]
    assert all(e["ladder_seconds"] is not None for e in heard if e["type"] == "step")


def training_run_events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_what_is_done_is_kept_and_a_grid_may_grow(place, model, here):
    first = running.sweep(planning.plan(values(model), {"r": "2,4"}))
    here.clear()
    again = running.sweep(planning.plan(values(model), {"r": "2,4,8"}))
    assert here == [("r=8", "new")]
    kept = {row["name"]: row for row in again["runs"]}
    assert all(kept[row["name"]] == row for row in first["runs"])
    here.clear()
    running.sweep(planning.plan(values(model, overwrite=True), {"r": "2,4"}))
    assert here == [("r=2", "new"), ("r=4", "new")]


def test_the_file_in_the_folder_gives_the_same_sweep_from_anywhere(place, model, here, monkeypatch):
    running.sweep(planning.plan(values(model), {"r": "2,4"}))
    written = yaml.safe_load((place / "steps" / "sweep.yaml").read_text())
    monkeypatch.chdir("/")
    vary = written.pop("sweep")
    here.clear()
    planned = planning.plan(written, vary)
    assert vary == {"r": [2, 4]} and len(running.sweep(planned)["runs"]) == 2 and here == []


def test_other_settings_or_rows_are_not_mixed_with_old_runs(place, model, here):
    running.sweep(planning.plan(values(model), {"r": "2,4"}))
    for key, value in {"max_steps": 3, "seed": 1, "lora_alpha": 9}.items():
        with pytest.raises(ConfigError, match=rf"FG-SWEEP-006: .*{key} .* -> {value}"):
            planning.plan(values(model, **{key: value}), {"r": "2,4"})
    write(place / "rows.jsonl", rows(21))
    with pytest.raises(ConfigError, match=r"FG-SWEEP-006: .*the rows of"):
        planning.plan(values(model), {"r": "2,4"})


def test_a_run_of_another_kind_is_not_touched(place, model):
    training_run.train(build(values(model, output="steps/r=2", max_steps=1)))
    with pytest.raises(ConfigError, match="FG-SWEEP-007: steps/r=2 holds a run"):
        planning.plan(values(model), {"r": "2,4"})


def test_one_sweep_a_folder(place, model, here):
    planned = planning.plan(values(model), {"r": "2,4"})
    (place / "steps").mkdir()
    with running.alone(place / "steps"), pytest.raises(ConfigError, match="FG-RUN-004"):
        running.sweep(planned)


def test_a_run_that_fails_leaves_its_reason_and_is_tried_again(place, model, here, monkeypatch):
    real = training_run.train

    def failing(config, **more):
        if config.r == 4:
            raise ConfigError("FG-CONF-002", "no luck", fix="try once more")
        return real(config, **more)

    monkeypatch.setattr(training_run, "train", failing)
    planned = planning.plan(values(model), {"r": "4,2"})
    found = running.sweep(planned)
    assert [row["state"] for row in found["runs"]] == ["finished", "failed"]
    assert found["runs"][1]["error"]["found"] == "no luck" and found["best"]["values"] == {"r": 2}
    assert "no luck" in (place / "steps" / "index.html").read_text()
    monkeypatch.setattr(training_run, "train", real)
    here.clear()
    found = running.sweep(planned)
    assert here == [("r=4", "new")] and found["runs"][1]["state"] == "finished"


def test_values_that_do_not_go_together_cost_one_run(place, model, here):
    vary = {"method": "lora,full", "load_in_4bit": "false,true"}
    configs = [{"method": m, "load_in_4bit": q} for m in ("lora", "full") for q in (False, True)]
    planned = planning.plan(values(model), vary)
    refused = [one for one in configs if one == {"method": "full", "load_in_4bit": True}]
    with pytest.raises(ConfigError, match="FG-ADAPT-041"):
        planned.config(refused[0], "x")
    sweep = running._Sweep(planned, None)
    result = sweep._train("x", refused[0], None, {})
    assert result["error"]["code"] == "FG-ADAPT-041" and here == []


def test_without_held_out_rows_the_training_loss_decides_and_that_is_said(place, model, here):
    found = running.sweep(
        planning.plan(values(model, eval_fraction=0.0, max_steps=14), {"r": "2,4"})
    )
    assert found["measure"] == "train_loss"
    assert any("No rows are held out" in note for note in found["notes"])
    row = found["runs"][0]
    told = [e["loss"] for e in training_run_events(place / row["run"]) if e["type"] == "step"]
    assert len(told) == 14 and math.isclose(row["loss"], sum(told[-10:]) / 10)


def test_losses_of_other_held_out_rows_are_not_called_comparable(place, model, here):
    found = running.sweep(planning.plan(values(model), {"max_length": "36,64"}))
    assert any("changes the held-out rows" in note for note in found["notes"])
    found = running.sweep(planning.plan(values(model, output="other"), {"r": "2,4"}))
    assert not any("changes the held-out rows" in note for note in found["notes"])


def test_held_out_rows_are_measured_at_the_end_wherever_that_is(place, model, here):
    given = values(model, eval_steps=2, max_steps=3)
    found = running.sweep(planning.plan(given, {"r": "2,4"}))
    assert [row["eval_step"] for row in found["runs"]] == [3, 3]


# --- searching --------------------------------------------------------------------------------


def past_of(losses, curves=None):
    axes = space.axes({"learning_rate": "1e-5..1e-2", "r": "2,4,8"})
    past = []
    for number, loss in enumerate(losses):
        found, _ = search.propose(axes, past, 7)
        curve = {500: loss + 1, 1000: loss} if curves is None else curves[number]
        past.append(search.Past(found, curve, loss))
    return axes, past


def test_a_search_proposes_the_same_again_whatever_happened_between():
    axes, past = past_of([3.0, 2.0, 1.0, 2.5, 1.5, 1.2, 1.1])
    for number in range(len(past)):
        found, _ = search.propose(axes, past[:number], 7)
        assert found == past[number].values
    other, _ = search.propose(axes, past, 8)
    again, _ = search.propose(axes, past, 7)
    assert other != again
    rates = [one.values["learning_rate"] for one in past]
    assert len(set(rates)) == 7 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert {one.values["r"] for one in past} <= {2, 4, 8}


def test_a_begun_trial_goes_on_with_its_values():
    axes, past = past_of([3.0, 2.0])
    begun = {"learning_rate": 0.0012345, "r": 8}
    found, judge = search.propose(axes, past, 7, begun)
    assert found == begun and not judge.hopeless


def test_a_search_learns_from_results():
    """With losses that fall with the rate's distance from 1e-3, later proposals come closer."""
    axes = space.axes({"learning_rate": "1e-6..1e-1"})
    past, away = [], []
    for _ in range(30):
        found, _ = search.propose(axes, past, 1)
        away.append(abs(math.log10(found["learning_rate"]) + 3))
        past.append(search.Past(found, {}, away[-1]))
    assert sum(away[-10:]) / 10 < 0.5 * sum(away[:5]) / 5


def test_listed_values_are_tried_once_each():
    axes = space.axes({"r": "2,4,8", "target_modules": "[q_proj,v_proj],[q_proj]"})
    past = []
    for _ in range(6):
        found, _ = search.propose(axes, past, 3)
        past.append(search.Past(found, {}, 1.0))
    assert len({space.label(one.values) for one in past}) == 6
    assert search.propose(axes, past, 3)[0] in [one.values for one in past]


def test_a_trial_worse_than_the_median_is_hopeless():
    axes, past = past_of([1.0, 1.1, 1.2])
    _, judge = search.propose(axes, past, 7)
    judge.hear(500, 1.9)
    assert not judge.hopeless  # the median at half is 2.1
    _, judge = search.propose(axes, past, 7)
    judge.hear(1000, 9.0)
    assert not judge.hopeless  # the end is no place to stop at
    judge.hear(500, 9.0)
    assert judge.hopeless
    _, early = search.propose(axes, past[:2], 7)
    early.hear(500, 9.0)
    assert not early.hopeless  # too few to compare with


def test_a_pruned_or_failed_trial_counts_as_that():
    axes, past = past_of([1.0, 1.1])
    first, second = (dict(one.values) for one in past)
    past.append(search.Past({**first, "learning_rate": 5e-3}, {500: 9.0}, None, pruned=True))
    past.append(search.Past({**second, "learning_rate": 6e-3}, {}, None))
    found, judge = search.propose(axes, past, 7)
    judge.hear(500, 9.0)
    assert not judge.hopeless and found  # two finished trials are no median of three


def test_a_search_is_remembered_and_hopeless_runs_are_pruned(place, model, here):
    given = values(model, max_steps=6, eval_steps=2)
    vary = {"learning_rate": [1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2]}
    planned = planning.plan(given, vary, searching="optuna", trials=9)
    found = running.sweep(planned)
    trials = sorted(found["runs"], key=lambda row: row["name"])
    assert [row["name"] for row in trials] == [f"trial-00{n}" for n in range(1, 8)]
    finished = []
    for trial in trials:
        told = [e for e in training_run_events(place / trial["run"]) if e["type"] == "eval"]
        curve = {e["step"]: e["loss"] for e in told}
        hopeless = len(finished) >= 3 and any(
            min(curve[k] for k in (2, 4) if k <= step)
            > statistics.median(other[step] for other in finished)
            for step in (2, 4)
        )
        assert trial["state"] == ("pruned" if hopeless else "finished"), trial["name"]
        if not hopeless:
            finished.append(curve)
    assert 3 <= len(finished) < 7  # some were pruned
    assert [row["state"] for row in found["runs"]] == ["finished"] * len(finished) + ["pruned"] * (
        7 - len(finished)
    )
    here.clear()
    again = running.sweep(planning.plan(given, vary, searching="optuna", trials=9))
    assert here == [] and again == found
    with pytest.raises(ConfigError, match=r"FG-SWEEP-006: .*learning_rate .*-> 1e-05\.\.0\.1"):
        planning.plan(given, {"learning_rate": "1e-5..1e-1"}, searching="optuna", trials=4)


# --- watching ---------------------------------------------------------------------------------


def test_a_run_is_followed_over_a_resume():
    following = running._Following(held_out=True)
    for event in (
        {"type": "start", "total_steps": 8},
        {"type": "step", "step": 2, "loss": 3.0},
        {"type": "eval", "step": 2, "loss": 2.5},
        {"type": "start", "total_steps": 8},
        {"type": "eval", "step": 4, "loss": 2.0},
        {"type": "step", "step": 6, "loss": 1.0},
    ):
        following(event)
    assert following.curve == {250: 2.5, 500: 2.0}
    assert following.so_far() == {
        "steps": 6,
        "total_steps": 8,
        "train_loss": 2.0,
        "eval_loss": 2.0,
    }


def test_the_process_is_asked_to_save_and_end(tmp_path, monkeypatch):
    script = tmp_path / "worker"
    script.write_text(  # no shell: one that starts with SIGINT ignored cannot trap it
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        f"    sys.exit({rung.STATUS_INTERRUPTED})\n"
        "signal.signal(signal.SIGINT, save)\ntime.sleep(10)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(ladder_worker.sys, "executable", str(script))
    arguments = (tmp_path / "a.yaml", tmp_path / "a.json", "new", tmp_path / "events", print)
    asked = []

    def stop():
        asked.append(1)
        return True

    assert ladder_worker.work(*arguments, stop=stop) == {"stopped": True}
    assert (tmp_path / "saved").exists() and len(asked) == 1


def test_a_run_that_breaks_off_has_a_code_of_sweeps(tmp_path, monkeypatch):
    script = tmp_path / "worker"
    script.write_text("#!/bin/sh\necho 'RuntimeError: no luck'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(ladder_worker.sys, "executable", str(script))
    arguments = (tmp_path / "a.yaml", tmp_path / "a.json", "new", tmp_path / "events", print)
    error = ladder_worker.work(*arguments, broke_off=running._broke_off)["error"]
    assert error["code"] == "FG-SWEEP-009" and "no luck" in error["found"]


def test_a_run_whose_sweep_is_gone_ends(monkeypatch):
    orphan = rung.Orphan(parent=1234567)
    with pytest.raises(KeyboardInterrupt):
        orphan({"type": "run"})
    raised = []
    monkeypatch.setattr(rung.signal, "raise_signal", raised.append)
    orphan({"type": "start"})
    orphan({"type": "eval"})
    assert raised == []
    orphan({"type": "step"})
    orphan({"type": "step"})
    assert raised == [rung.signal.SIGTERM]  # once, so that it is saved
    alive = rung.Orphan()
    alive({"type": "run"})


# --- what is shown ----------------------------------------------------------------------------


def row(name, loss, values=None, **more):
    keys = ("eval_step", "metrics", "error", "trainable_parameters", "peak_memory_bytes")
    common = {**dict.fromkeys(keys), "name": name, "state": "finished", "run": f"nowhere/{name}"}
    common |= {"values": values or {"r": 8}, "loss": loss, "eval_loss": loss, "train_loss": loss}
    return {**common, "steps": 9, "total_steps": 9, "seconds": 5.0, **more}


def test_the_order_of_runs():
    mixed = [
        row("d", None, state="failed"),
        row("c", None, state="pruned"),
        row("b", math.nan),
        row("a", 2.0),
        row("e", 1.0),
    ]
    assert [one["name"] for one in results.ordered(mixed)] == ["e", "a", "b", "c", "d"]


def test_a_best_value_at_the_end_is_told():
    axis = space.axes({"r": "2,4,8"})[0]
    best = {"values": {"r": 8}}
    assert "greatest that was tried; a higher one" in results._at_the_end(axis, best)
    assert "least that was tried; a lower one" in results._at_the_end(axis, {"values": {"r": 2}})
    assert results._at_the_end(axis, {"values": {"r": 4}}) is None
    assert results._at_the_end(space.axes({"r": "2,8"})[0], best) is None
    assert (
        results._at_the_end(space.axes({"method": "a,b,c"})[0], {"values": {"method": "c"}}) is None
    )


def page_values(runs, **changes):
    common = {"sweep": "sweeps/x", "task": "causal", "model": "m", "data": "d", "rows": 9}
    common |= {"search": "grid", "varied": {"r": [2, 4]}, "measure": "eval_loss", "of": len(runs)}
    best = runs[0] if runs and runs[0]["loss"] is not None else None
    return {**common, "runs": runs, "best": best, "notes": ["Mind the <gap>."], **changes}


def test_the_page_holds_every_run_and_needs_nothing_else():
    error = {"code": "FG-X", "found": "a <b> reason", "allowed": None, "fix": "do that"}
    runs = [
        row("a", 1.25, {"r": 2}),
        row("b", 1.5, {"r": 4}),
        row("c", None, {"r": 4}, state="pruned", steps=3),
        row("d", None, {"r": 2}, state="failed", error=error),
    ]
    text = page.document(page_values(runs))
    for words in ("1.2500", "pruned at step 3 of 9", "a &lt;b&gt; reason", "Mind the &lt;gap&gt;"):
        assert words in text
    assert "finegraft chat nowhere/a" in text and "src=" not in text and "<script" not in text
    assert "Next" not in page.document(page_values([runs[3]]))  # nothing to go on with


@pytest.mark.parametrize("places", [[1e-5, 1e-4, 1e-3], ["lora", "a very long name indeed"], [3]])
def test_dots_lie_inside_the_drawing(places):
    points = [(x, 1.0 + i, f"<{x}>") for i, x in enumerate(places)]
    drawing = charts.dots("Title", points, logarithmic_x=len(places) == 3)
    spots = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawing)
    assert len(spots) == len(places) + 1  # the ring
    assert all(0 < float(x) < 460 and 0 < float(y) < 218 for x, y in spots)
    assert spots[-1] == spots[0]  # around the lowest
    assert "&lt;" in drawing and "<1e" not in drawing
    assert "no values" in charts.dots("Title", [(1.0, math.nan, "")])


def test_every_key_that_cannot_be_varied_is_a_key():
    assert set(space.NEVER) <= set(TrainConfig.model_fields)

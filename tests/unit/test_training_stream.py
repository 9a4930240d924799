"""Training on streamed rows: the same bits after a stop, what is held out, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from training_tiny import llama, rows, tokenizer
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.errors import ConfigError, DataError
from finegraft.core.journal import read_events
from finegraft.core.schema import TrainConfig, build, from_file
from finegraft.data import stream
from finegraft.training import checkpoint, replay, stream_check
from finegraft.training.run import train
from finegraft.training.sft import SFTTrainer
from finegraft.training.stream import Renderer

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {
    "model": "base",
    "data": "rows.jsonl",
    "streaming": "true",
    "max_length": 64,
    "max_steps": 12,
    "save_steps": 4,
    "save_total_limit": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "r": 4,
}


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A folder with a base and rows; blocks and pieces so small that a run has many."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 600)
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 3)
    monkeypatch.setattr(stream, "PIECE_ROWS", 9)
    (tmp_path / "base").symlink_to(base)
    write(tmp_path / "rows.jsonl", rows(60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(run, step):
    """What a kill after ``step`` leaves of a whole run; its newer checkpoints are kept aside."""
    kept = run.parent / "kept"
    shutil.copytree(run, kept)
    shutil.rmtree(run / "adapter")
    for path in checkpoint.checkpoints(run / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    return kept


def same_bits(run, other):
    ends = [folder / "checkpoints" / "checkpoint-12" for folder in (run, other)]
    count = replay._compared(*ends, [])
    assert count[1] == [] and count[0] > 20
    assert (run / "adapter" / WEIGHTS).read_bytes() == (other / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True}, {"eval_fraction": 0.2, "data": ["rows.jsonl=1.5", "more.csv"]}],
    ids=["plain", "packed", "mixed"],
)
def test_a_resumed_run_equals_the_one_that_never_stopped(place, more, monkeypatch):
    lines = ["prompt,completion", *(f"hello {i},world you are {i}" for i in range(40))]
    (place / "more.csv").write_text("\n".join(lines))
    train(build({**SETTINGS, **more, "output": "runs/a"}))
    run = place / "runs" / "a"
    saved = json.loads((run / "checkpoints/checkpoint-8/manifest.json").read_text())["stream"]
    assert saved["rows"] == 32 and saved["mark"]["given"] > 0, "the test has to cross pieces"
    whole = killed(run, 8)
    heard, began = [], []
    stock = Renderer.piece

    def piece(self, cursor, rows):
        began.append(cursor.as_list())
        return stock(self, cursor, rows)

    monkeypatch.setattr(Renderer, "piece", piece)
    train(from_file(run / "config.yaml"), listener=heard.append, resume=True)
    assert began[0] == saved["mark"]["cursor"], "what lies before is not rendered again"
    assert next(e for e in heard if e["type"] == "start")["step"] == 8
    same_bits(run, whole)
    assert replay.verify(from_file(run / "config.yaml")).equal


def test_more_than_one_pass_and_other_portions_of_a_step(place):
    """60 rows are 15 steps of 4 rows; resumed with the same rows a step in other portions."""
    heard = []
    config = {**SETTINGS, "max_steps": 20, "save_steps": 8, "output": "runs/a"}
    config["lora_dropout"] = 0.0
    train(build(config), listener=heard.append)
    run = place / "runs" / "a"
    mark = json.loads((run / "checkpoints/checkpoint-20/manifest.json").read_text())["stream"]
    assert mark["mark"]["cursor"][0] == 1  # the second pass
    whole = killed(run, 8)
    again = yaml.safe_load((run / "config.yaml").read_text())
    again.update(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    (run / "config.yaml").write_text(yaml.safe_dump(again))
    train(from_file(run / "config.yaml"), listener=heard.append, resume=True)
    ends = [r / "checkpoints/checkpoint-20/manifest.json" for r in (run, whole)]
    one, other = (json.loads(end.read_text()) for end in ends)
    assert one["stream"] == other["stream"] and one["tokens"] == other["tokens"]


def test_memory_that_ends_goes_on_with_the_same_rows(place, monkeypatch):
    """A real allocation fails in step 5: smaller micro-batches, the rows of that step again."""
    stock = SFTTrainer.compute_loss
    seen = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = stock(self, model, inputs, *args, **kwargs)
        count = int((inputs["seq_lengths"][:-1] > 0).sum())
        if self.model.training and self.state.global_step >= 5 and count > 2:
            seen.append(self.state.global_step)
            torch.empty(1 << 50, dtype=torch.uint8)
        return loss

    more = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    more |= {"lora_dropout": 0.0, "share_prefix": False, "report_rows": 0}
    whole = train(build({**SETTINGS, **more, "output": "runs/a"}))
    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    result = train(build({**SETTINGS, **more, "output": "runs/b"}))
    assert seen == [5] and result.tokens == whole.tokens
    manifests = [r.run / "checkpoints/checkpoint-12/manifest.json" for r in (whole, result)]
    one, other = (json.loads(path.read_text())["stream"] for path in manifests)
    assert one == other


def test_a_killed_process_goes_on_to_the_same_bits(base, tmp_path, monkeypatch):
    """SIGKILL between two steps of the real command, with blocks and pieces as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    write(tmp_path / "rows.jsonl", rows(3000))
    config = {**SETTINGS, "max_steps": 120, "save_steps": 40, "report_rows": 0}
    config |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("finegraft"), "train", "run.yaml"]
    newest = tmp_path / "killed/checkpoints/checkpoint-80"
    with subprocess.Popen([*command, "--output", "killed"], stderr=subprocess.PIPE) as child:
        began = time.monotonic()
        while not newest.is_dir() and time.monotonic() - began < 100:
            assert child.poll() is None, child.stderr.read().decode()[-2000:]
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed/adapter").exists()
    train(from_file("killed/config.yaml"), resume=True)
    train(build({**config, "output": "whole"}))
    one, other = (tmp_path / name / "adapter" / WEIGHTS for name in ("killed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_pass_trains_every_row_that_is_not_held_out_once(place):
    config = build({**SETTINGS, "eval_fraction": 0.3, "output": "runs/a"})
    from finegraft.training.events import EventLog
    from finegraft.training.tasks import causal

    data = causal.check(config, EventLog())
    held = [tuple(ids) for ids in data.held_out.input_ids]
    count = 60 - len(held)
    given = [tuple(row["input_ids"]) for row, _ in zip(data.stream, range(count), strict=False)]
    assert 8 < len(held) < 30 and set(held).isdisjoint(given)
    plain = causal.check(
        config.model_copy(update={"streaming": "false", "eval_fraction": 0}), EventLog()
    )
    assert sorted(given + held) == sorted(tuple(ids) for ids in plain.train.input_ids)


def test_rows_that_changed_are_refused(place):
    train(build({**SETTINGS, "output": "runs/a"}))
    killed(place / "runs/a", 4)
    made = rows(60)
    made[30]["completion"] = "bye"
    write(place / "rows.jsonl", made)
    with pytest.raises(DataError, match=r"FG-RUN-003.*fingerprint"):
        train(from_file(place / "runs/a/config.yaml"), resume=True)


def test_rows_that_cannot_be_used_are_told_and_too_many_end_it(place):
    with open("rows.jsonl", "a") as out:
        out.write('{"prompt": "no answer"}\n{broken\n')
    heard = []
    train(build({**SETTINGS, "max_steps": 16, "output": "runs/a"}), listener=heard.append)
    notices = {e["message"] for e in heard if e["type"] == "notice" and "left out" in e["message"]}
    assert len(notices) == 2
    assert any("byte" in words and "not JSON" in words for words in notices)
    told = [e["message"] for e in heard if e["type"] == "notice"]
    assert re.search(r"^of [67]\d rows that were read .* [234] could not be used$", told[-1])
    with open("rows.jsonl", "a") as out:
        out.writelines("{broken\n" for _ in range(12))
    with pytest.raises(DataError, match=r"FG-STREAM-005: 1\d of the first"):
        train(build({**SETTINGS, "max_steps": 30, "output": "runs/b"}))


def test_steps_have_to_be_said_and_about_one_pass_is_proposed(place):
    with pytest.raises(ConfigError, match="FG-STREAM-001") as caught:
        train(build({**SETTINGS, "max_steps": -1, "output": "runs/a"}))
    assert "--max-steps 1" in caught.value.fix  # 60 rows, 4 a step: 15
    assert not (place / "runs").exists()


def test_rows_too_long_and_nothing_held_out(place):
    with pytest.raises(DataError, match=r"FG-STREAM-006.*none is left to learn"):
        train(build({**SETTINGS, "max_length": 8, "output": "runs/a"}))
    write(place / "rows.jsonl", rows(3))
    with pytest.raises(DataError, match=r"FG-STREAM-006.*eval_fraction"):
        train(build({**SETTINGS, "eval_fraction": 1e-9, "output": "runs/a"}))


def test_auto_streams_what_is_large_and_keeps_its_decision(place, monkeypatch):
    config = build({**SETTINGS, "streaming": "auto"})
    assert not stream_check.wanted(config)
    assert stream_check.resolved(config).streaming == "false"
    monkeypatch.setattr(stream_check, "SHARE", 1e-9)
    assert stream_check.resolved(config).streaming == "true"
    assert stream_check.wanted(build({**SETTINGS, "data": "http://x/y.jsonl", "streaming": "auto"}))
    train(build({**SETTINGS, "streaming": "auto", "output": "runs/a"}))
    assert from_file("runs/a/config.yaml").streaming == "true"
    for given, kept in ((True, "true"), (False, "false"), ("auto", "auto")):
        assert TrainConfig(model="m", data="d", streaming=given).streaming == kept


class _Server(BaseHTTPRequestHandler):
    """Files of a folder, in stretches or, without ``ranges``, only whole."""

    protocol_version = "HTTP/1.1"
    folder = None
    ranges = True
    asked: list[str]
    failing = 0

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        path = self.folder / self.path.lstrip("/")
        stretch = self.headers.get("Range") if self.ranges else None
        if not path.is_file() or (stretch and type(self).failing):
            code = 503 if path.is_file() else 404
            type(self).failing -= path.is_file()
            self.send_response(code)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = path.read_bytes()
        status = 200
        if stretch:
            first, last = stretch.removeprefix("bytes=").split("-")
            total, status = len(content), 206
            content = content[int(first) : int(last or total) + 1]
            self.asked.append(stretch)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if stretch:
            end = int(first) + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{total}")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def server(request, place):
    pytest.importorskip("aiohttp")
    values = {"folder": place, "ranges": request.param, "asked": [], "failing": 0}
    handler = type("Handler", (_Server,), values)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{made.server_port}"
        yield handler
        made.shutdown()


def test_rows_behind_a_url_train_to_the_same_bits_as_the_file(server, place, monkeypatch):
    monkeypatch.setattr("finegraft.data.stream_remote._PAUSES_SECONDS", (0.01, 0.01, 0.01))
    name = "rows.jsonl" if server.ranges else "rows.csv"
    if not server.ranges:  # read from front to back, as a csv here is
        made = [f"{r['prompt']},{r['completion']}" for r in rows(60)]
        (place / name).write_text("\n".join(["prompt,completion", *made]))
    train(build({**SETTINGS, "data": name, "output": "runs/a"}))
    server.failing = 2 * server.ranges
    url = f"{server.url}/{name}"
    train(build({**SETTINGS, "data": url, "streaming": "auto", "output": "runs/b"}))
    one, other = (place / "runs" / n / "adapter" / WEIGHTS for n in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert bool(server.asked) == server.ranges
    if server.ranges:
        killed(place / "runs/b", 8)
        train(from_file(place / "runs/b/config.yaml"), resume=True)
        assert one.read_bytes() == other.read_bytes()


def test_a_url_that_gives_nothing_is_told_in_the_terminal(server, place, monkeypatch):
    monkeypatch.setattr("finegraft.data.stream_remote._PAUSES_SECONDS", (0.01,))
    words = ["train", "--model", "base", "--output", "runs/a", "--max-steps", "2", "--data"]
    for url, code in (
        (f"{server.url}/none.jsonl", "FG-STREAM-002"),
        ("http://127.0.0.1:1/rows.jsonl", "FG-STREAM-002"),
        ("nosuch://host/rows.jsonl", "FG-STREAM-003"),
    ):
        done = CliRunner().invoke(app, [*words, url])
        assert done.exit_code == 2 and code in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (place / "runs").exists()


@pytest.mark.slow
def test_two_processes_share_the_steps_of_one_and_go_on_with_them(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    write(tmp_path / "rows.jsonl", rows(2600))
    config = {**SETTINGS, "dtype": "float32", "lora_dropout": 0.0, "max_steps": 40}
    config |= {"save_steps": 20, "per_device_train_batch_size": 64, "report_rows": 0}
    config["gradient_accumulation_steps"] = 1
    one = train(build({**config, "output": "one"}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "output": "two"}))

    def finegraft(*words):
        command = [Path(sys.executable).with_name("finegraft"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]

    finegraft("train", "run.yaml", "--nproc", "2", "--per-device-train-batch-size", "32")
    losses = [
        [e["loss"] for e in read_events(tmp_path / name / "events.jsonl") if e["type"] == "step"]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == one.steps
    whole = killed(tmp_path / "two", 20)
    finegraft("resume", "two")
    file = Path("adapter") / WEIGHTS
    assert (tmp_path / "two" / file).read_bytes() == (whole / file).read_bytes()

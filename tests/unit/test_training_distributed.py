"""Rows are shared out evenly, a step stays a step, and endings are told once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from typer.testing import CliRunner

from finegraft.cli import launch
from finegraft.cli.main import app
from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.schema import build
from finegraft.training.collate import IGNORED, Collator
from finegraft.training.distributed import addresses, launcher, sharding, world
from finegraft.training.distributed.batches import Blanks, SharedBatches, is_blank
from finegraft.training.distributed.portions import for_processes, rows_a_step
from finegraft.training.distributed.trainer import filled_up, row_lengths


def test_the_launching_process_loads_no_model():
    code = (
        "import sys, finegraft.cli.launch, finegraft.training.distributed.launcher;"
        "print([n for n in ('transformers', 'peft', 'finegraft.models') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def config(**values):
    return build({"model": "demo", "data": "rows.jsonl", **values})


def shares(lengths, rows, micro, processes):
    """The micro-batches of each process."""
    order = SequentialSampler(lengths)
    return [
        list(SharedBatches(order, lengths, rows, micro, rank, processes))
        for rank in range(processes)
    ]


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("count", [1, 23, 96, 500])
def test_every_row_is_in_its_step_once_and_tokens_are_even(processes, micro, count):
    dice = random.Random(count)
    lengths = [int(dice.lognormvariate(4, 1)) + 2 for _ in range(count)]
    rows = 4
    found = shares(lengths, rows, micro, processes)
    assert len({len(batches) for batches in found}) == 1
    one = SharedBatches(SequentialSampler(lengths), lengths, rows, micro, 0, processes)
    assert len(found[0]) == len(one)
    assert all(len(batch) <= rows for batches in found for batch in batches)
    step = rows * micro * processes
    for start in range(0, count, step):
        at = slice(start // step * micro, start // step * micro + micro)
        together = sorted(row for batches in found for batch in batches[at] for row in batch)
        assert together == list(range(start, min(start + step, count)))
    tokens = [sum(lengths[row] for batch in batches for row in batch) for batches in found]
    if count == 500:
        assert max(tokens) < 1.02 * min(tokens)


def test_rows_in_their_order_would_not_be_even():
    dice = random.Random(1)
    lengths = [int(dice.lognormvariate(4, 1)) + 2 for _ in range(500)]
    plain = [sum(lengths[i] for i in range(500) if i // 4 % 2 == rank) for rank in (0, 1)]
    assert max(plain) > 1.02 * min(plain)


def test_no_row_becomes_a_batch_without_labels():
    collate = Blanks(Collator(0, flat=True), {"input_ids": [5, 6, 7], "labels": [5, 6, 7]})
    batch = collate([])
    assert is_blank(batch["labels"]) and batch["input_ids"].shape == batch["labels"].shape
    assert not is_blank(collate([{"input_ids": [5, 6], "labels": [IGNORED, 6]}])["labels"])


def test_evaluation_is_filled_up_with_rows_that_do_not_count():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, 2, 3], [4, 5]]})
    full = filled_up(rows, 4)
    assert len(full) == 4 and full[:2] == rows[:2]
    assert full["labels"][2:] == [[IGNORED] * 2] * 2
    assert filled_up(rows, 2) is rows
    assert row_lengths(full) == [3, 2, 2, 2] and row_lengths(full.select([3, 0])) == [2, 3]


@pytest.mark.parametrize(
    ("batch", "micro", "before", "after", "wanted"),
    [
        (2, 1, 4, 2, (2, 2)),
        (2, 1, 4, 1, (2, 4)),
        (1, 1, 4, 8, None),
        (4, 2, 1, 2, (4, 1)),
        (4, 1, 1, 2, (2, 1)),
        (3, 1, 2, 3, (2, 1)),
    ],
)
def test_another_number_of_processes_keeps_the_rows_of_a_step(batch, micro, before, after, wanted):
    given = config(
        per_device_train_batch_size=batch, gradient_accumulation_steps=micro, nproc=before
    )
    if wanted is None:
        with pytest.raises(ConfigError, match=r"FG-DIST-003.*(?s:.*)--nproc 4"):
            for_processes(given, after, 1)
        return
    now = for_processes(given, after, 1)
    assert rows_a_step(now) == rows_a_step(given) and now.nproc == after
    assert (now.per_device_train_batch_size, now.gradient_accumulation_steps) == wanted


def test_one_process_needs_no_group():
    assert world.here() == world.World() and world.here().main and not world.here().several
    assert world.share("x") == "x" and world.gathered(3) == [3] and world.total([1.5]) == [1.5]
    world.wait()
    world.require_seen(None)
    with pytest.raises(ConfigError, match=r"FG-DIST-013: process 0 does not see"):
        world.require_seen(Path("no-such-checkpoint"))
    with pytest.raises(ConfigError, match=r"FG-DIST-001: the configuration is for 2 processes"):
        world.require_as_configured(config(nproc=2))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection"), False),
        (ConfigError("FG-DIST-001", "gloo"), False),
    ],
)
def test_a_lost_connection_is_known_from_a_bug(error, lost):
    assert world.is_lost(error) is lost


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"sharding": "fsdp2"}, "FG-DIST-011"),
        ({"sharding": "fsdp2", "nproc": 2, "load_in_4bit": True}, "FG-DIST-012.*quantized"),
        (
            {"sharding": "fsdp2", "nproc": 2, "method": "full", "task": "classification"},
            "FG-DIST-012.*every weight",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(values, code):
    with pytest.raises(ConfigError, match=code):
        sharding.require_possible(config(**values))
    sharding.require_possible(config(sharding="fsdp2", nproc=2))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--nnodes", "2"], "without a place to meet"),
        (["--rendezvous", "here:1"], "without --nnodes"),
        (["--nnodes", "2", "--rendezvous", "here:1", "--node-rank", "2"], "--node-rank 2"),
        (["--nproc", "2", "--max-restarts", "-1"], "--max-restarts -1"),
        (["--nproc", "2", "--data", "-"], "standard input"),
    ],
)
def test_options_that_do_not_go_together(words, found):
    given = ["train", "--model", "demo", "--data", "rows.jsonl", *words, "--json"]
    done = CliRunner().invoke(app, given)
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == 2 and error["code"] == "FG-DIST-007" and found in error["found"]


@pytest.mark.parametrize("text", ["here", "here:", ":29400", "here:port", "here:70000"])
def test_a_rendezvous_is_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match="FG-DIST-005"):
        addresses.host_and_port(text)
    assert addresses.host_and_port("10.0.0.1:29400") == ("10.0.0.1", 29400)


def test_the_address_of_one_machine_is_its_own():
    assert addresses.local("") == "127.0.0.1"
    assert addresses.interface("127.0.0.1") == "lo"
    assert addresses.interface("203.0.113.7") is addresses.interface("no address") is None


def failed(folder, rank, status, **told):
    if told:
        launcher.ending_file(folder, rank).write_text(json.dumps(told))
    return launcher._ending(folder, rank, SimpleNamespace(exitcode=status))


def test_the_error_that_explains_the_others_is_told_once(tmp_path):
    error = FinegraftError("FG-WATCH-001", "the loss is not a number", fix="less").as_dict()
    lost = failed(tmp_path, 0, 1, words="process 0 lost its connection to the others", error=None)
    cause = failed(tmp_path, 1, 1, words=error["found"], error=error)
    killed = failed(tmp_path, 2, -signal.SIGKILL)
    ended = failed(tmp_path, 3, -signal.SIGTERM)
    assert launcher.first_cause([lost, ended, killed, cause]) is cause and cause.final
    assert launcher.first_cause([lost, ended, killed]) is killed and not killed.final
    assert "SIGKILL" in killed.words and "connection" in ended.words
    told = launch._explained(
        launcher, [lost, cause], config(nproc=4, output=str(tmp_path)), launch.Machines()
    )
    assert told.code == "FG-WATCH-001" and told.found.startswith("process 1 of 4: the loss")
    told = launch._explained(
        launcher, [lost, killed], config(nproc=4, output=str(tmp_path)), launch.Machines()
    )
    assert told.code == "FG-DIST-008" and "restarts allowed: 3" in told.found
    assert "finegraft resume" in told.fix


def test_what_the_first_worker_could_not_record_is_recorded(tmp_path):
    events = tmp_path / "events.jsonl"
    events.write_text('{"type": "step", "step": 3, "loss": 1.0, "time": 1}\n')
    killed = failed(tmp_path, 1, -signal.SIGKILL)
    for _ in range(2):
        launch._explained(
            launcher, [killed], config(nproc=2, output=str(tmp_path)), launch.Machines()
        )
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["step", "failed"]
    assert lines[1]["code"] == "FG-DIST-008" and "SIGKILL" in lines[1]["message"]


def test_a_proof_is_for_one_process(tmp_path):
    (tmp_path / "config.yaml").write_text(config(nproc=2, output=str(tmp_path)).to_yaml())
    done = CliRunner().invoke(app, ["resume", str(tmp_path), "--verify", "--json"])
    assert json.loads(done.stdout)["error"]["code"] == "FG-DIST-010"

"""``finegraft eval`` on a real model that has learnt something, through the command line."""

from __future__ import annotations

import json

from command_line import finegraft

from finegraft.data import yoda


def test_a_trained_demo_is_better_than_its_base(tmp_path):
    """Twelve steps on sentences in Yoda's order; twelve that it has not seen are answered."""
    train, held = yoda.split(yoda.rows(204), heldout=12)
    for name, rows in (("train.jsonl", train), ("held.jsonl", held)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = finegraft(
        *("train", "--model", "demo", "--data", "train.jsonl", "--eval-data", "held.jsonl"),
        *("--max-steps", "12", "--per-device-train-batch-size", "16", "--learning-rate", "1e-3"),
        *("--lora-alpha", "32", "--max-length", "128", "--output", "run", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    trained = json.loads(done.stdout)
    done = finegraft("eval", "run", "--vs", "base", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["data"]["rows"] == 12
    measured = found["metrics"]
    # training scores in bfloat16 batches of its own, so the two agree to about a percent
    assert abs(measured["loss"]["value"] / trained["eval_loss"] - 1) < 0.02
    assert measured["loss"]["change"] == measured["chrf"]["change"] == "better"
    assert found["pairwise"]["wins"] > found["pairwise"]["losses"]
    rows = json.loads((tmp_path / "run" / "report" / "eval.json").read_text())["answers"]
    assert [row["reference"] for row in rows] == [row["completion"] for row in held]

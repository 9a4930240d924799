"""``finegraft data show``: what is shown is what training sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_masks import family
from test_data_tiny import SMOLLM2, tiny
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.errors import DataError
from finegraft.data import mix, show
from finegraft.data.prepare import IGNORE, prepare

runner = CliRunner()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hello", "completion": f"world {i} naïve 😀"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_states_are_the_labels_of_training(file: Path) -> None:
    tokenizer = tiny(SMOLLM2)
    for max_length in (1024, 30, 12):
        rows = show.rows(str(file), count=30)
        found = [show.shown(row, tokenizer, max_length=max_length) for row in rows]
        if max_length == 12:
            assert all(one.dropped and not one.trained for one in found)
            continue
        trained = prepare(mix.read(str(file)).conversations, tokenizer, max_length=max_length)
        for one, ids, labels in zip(found, trained.input_ids, trained.labels, strict=True):
            kept = len(one.ids) - one.cut
            assert one.ids[:kept] == ids and kept == min(len(one.ids), max_length)
            assert [s == "trained" for s in one.states[:kept]] == [x != IGNORE for x in labels]
            assert set(one.states[kept:]) <= {"cut"}


def test_parts_join_to_the_text_and_pieces_name_every_token(file: Path) -> None:
    for tokenizer in (tiny(SMOLLM2), family("zephyr")):
        one = show.shown(show.rows(str(file), count=1)[0], tokenizer, max_length=1024)
        assert "".join(text for _, text in one.parts) == tokenizer.decode(one.ids)
        assert len(one.pieces) == len(one.ids) and all(one.pieces)
        assert not any("\ufffd" in piece for piece in one.pieces)


def test_rows_are_counted_over_all_files(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.csv"
    other.write_text("question,answer\nq,a\n")
    (found,) = show.rows([str(file), str(other)], first=31, count=1)
    assert (found.place, found.number, found.format) == (31, 1, "question_answer")
    assert found.source == str(other)
    with pytest.raises(DataError, match=r"FG-DATA-039: there is no row 32(.|\n)*1 to 31"):
        show.rows([str(file), str(other)], first=32)


def test_the_rest_of_a_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 200 + "broken\n")
    assert len(show.rows(str(path), count=2)) == 2
    assert show.rows(str(path), first=200, count=1)[0].place == 200


def test_plain_output_has_brackets(file: Path) -> None:
    done = runner.invoke(app, ["data", "show", str(file), "-n", "1", "--max-length", "36"])
    assert done.exit_code == 0, done.output
    assert "<|im_start|>assistant\n[world 0 na" in done.stdout and "~~" in done.stdout
    assert "are cut off" in done.stdout and "Rendered for demo" in done.stdout
    done = runner.invoke(app, ["data", "show", str(file), "--tokens", "--row", "2"])
    assert "row 2 (" in done.stdout and "[world] [·] [1]" in done.stdout
    assert "<|im_start|> user \\n\n" in done.stdout
    assert "\x1b[" not in done.stdout


def test_json_has_every_token(file: Path) -> None:
    done = runner.invoke(app, ["data", "show", str(file), "--tokens", "-n", "2", "--json"])
    found = json.loads(done.stdout)
    assert found["model"] == "demo" and [row["row"] for row in found["rows"]] == [1, 2]
    row = found["rows"][0]
    assert len(row["pieces"]) == len(row["states"]) == len(row["ids"]) == row["tokens"]
    assert row["states"].count("trained") == row["trained_tokens"] > 0
    assert row["text"].endswith("<|im_end|>\n")


def test_settings_of_a_file_are_used(file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("ask,say\nhello,world\n")
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: demo\ndata: {tmp_path / 'b.csv'}\nmap: {{prompt: ask, completion: say}}\n"
        "chat_template: zephyr\ncompletion_only_loss: false\n"
    )
    done = runner.invoke(app, ["data", "show", str(settings), "--json"])
    (row,) = json.loads(done.stdout)["rows"]
    assert row["text"].startswith("<|user|>\nhello") and row["trained_tokens"] == row["tokens"] - 1


def test_mistakes_are_told(file: Path) -> None:
    for words, code in (
        (["none.jsonl"], "FG-DATA-001"),
        ([str(file), "--row", "99"], "FG-DATA-039"),
        ([str(file), "--map", "a"], "FG-CLI-003"),
        ([str(file), "--chat-template", "chatlm"], "FG-DATA-010"),
        ([str(file), "--max-length", "1"], "FG-DATA-013"),
    ):
        done = runner.invoke(app, ["data", "show", *words, "--json"])
        assert done.exit_code == 2 and json.loads(done.stdout)["error"]["code"] == code


def test_labelled_texts_show_their_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,sentiment\ngood film,pos\n" + "bad " * 600 + ",neg\n")
    done = runner.invoke(app, ["data", "show", str(path), "--max-length", "50", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    one, two = said["rows"]
    assert (one["label"], one["text"], one["cut_tokens"]) == ("pos", "[CLS] good film [SEP]", 0)
    assert (two["label"], two["tokens"], two["cut_tokens"]) == ("neg", 602, 552)
    assert (said["model"], said["max_length"]) == ("demo-encoder", 50)
    done = runner.invoke(app, ["data", "show", str(path), "--row", "2"])  # what the model knows
    assert "90 tokens beyond --max-length 512" in done.stdout.replace("\n", " "), done.output
    assert runner.invoke(app, ["data", "show", str(path), "--task", "causal"]).exit_code == 2
    assert runner.invoke(app, ["data", "show", str(path), "--task", "x"]).exit_code == 2


def test_marked_texts_show_their_spans(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"tokens": ["to", "Rome"], "tags": ["O", "B-city"]}) + "\n")
    words = ["data", "show", str(path), "--task", "token_classification", "--json"]
    (row,) = json.loads(runner.invoke(app, words).stdout)["rows"]
    assert (row["label"], row["text"]) == ("'Rome' city", "[CLS] to rome [SEP]")

"""A card says what is known and claims nothing else."""

from pathlib import Path

from training_tiny import llama

from finegraft.export import _card
from finegraft.export._contract import Check
from finegraft.export._origin import Origin
from finegraft.export._verify.report import Report


def origin():
    model = llama()
    model.config.name_or_path = "/home/somebody/models/base"
    return Origin("tuned", None, model, None)


def report(folder, *checks, **more):
    return Report(folder, "merged_16bit", "run", "built-in prompts", checks, **more)


def test_an_unverified_export_says_so(tmp_path):
    text = _card.write(origin(), tmp_path, "merged_16bit", []).read_text()
    assert "Not verified." in text and "passed" not in text
    assert "base_model: base\n" in text and "/home/somebody" not in text
    assert "license" not in text.lower() and "badge" not in text


def test_checks_are_told_as_they_are(tmp_path):
    good, bad = Check("log_probs", 0.01, 0.05, True), Check("adapter", float("inf"), 0.1, False)
    text = _card.write(origin(), tmp_path, "merged_16bit", [report(tmp_path, good)]).read_text()
    assert "passed" in text and "| log_probs | 0.01 | 0.05 | yes |" in text
    failed = report(tmp_path, good, bad, cause="adapter not merged")
    text = _card.write(origin(), tmp_path, "merged_16bit", [failed]).read_text()
    assert "**failed**: adapter not merged" in text
    assert "| adapter | cannot be compared | 0.1 | **no** |" in text


def test_somebody_elses_readme_is_left_alone(tmp_path):
    Path(tmp_path / "README.md").write_text("mine")
    assert _card.write(origin(), tmp_path, "gguf", []) is None
    assert (tmp_path / "README.md").read_text() == "mine"

"""Folders for vLLM: the files, the command, and what is refused."""

from __future__ import annotations

import shlex

import export_tiny
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finegraft.core.errors import ExportError
from finegraft.export import _save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.base(tmp_path_factory.mktemp("vllm") / "base")


def command(folder):
    line = (folder / "serve.sh").read_text().splitlines()[1]
    return shlex.split(line.partition("exec ")[2])


def test_a_merged_folder_and_its_command(base, tmp_path):
    done = _save.export(export_tiny.trained(base), tmp_path / "out", "vllm")
    assert [(one.format, one.verified) for one in done] == [("vllm:merged", True)]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert command(tmp_path / "out")[:3] == ["vllm", "serve", "."]
    assert (tmp_path / "out" / "serve.sh").stat().st_mode & 0o100


def test_an_adapter_beside_its_base(base, tmp_path):
    model, tokenizer = export_tiny.trained(base, r=4, rank_pattern={"q_proj": 12})
    done = _save.export((model, tokenizer), tmp_path / "out", "vllm:adapter")
    assert done[0].verified
    words = command(tmp_path / "out")
    assert words[:4] == ["vllm", "serve", str(base), "--enable-lora"]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


def test_what_vllm_cannot_load_is_refused_before_anything_is_written(base, tmp_path):
    source = export_tiny.trained(base, use_dora=True)
    with pytest.raises(ExportError, match=r"FG-EXPORT-075: .*DoRA"):
        _save.export(source, tmp_path / "out", "vllm:adapter")
    with pytest.raises(ExportError, match=r"FG-EXPORT-074: 2 kinds"):
        _save.export(source, tmp_path / "out", "vllm:merged,vllm:adapter")
    assert not (tmp_path / "out").exists()

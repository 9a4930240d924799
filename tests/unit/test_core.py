"""Errors, registry, configuration, folders."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import yaml

from finegraft.core import paths
from finegraft.core.errors import ConfigError, DataError, FinegraftError, StorageError, did_you_mean
from finegraft.core.hardware import default_dtype, facts
from finegraft.core.registry import Registry
from finegraft.core.schema import TrainConfig, build, from_file, groups, parse_assignment

GOOD = {"model": "demo", "data": "rows.jsonl"}


def test_errors_are_builtins_with_code_and_three_parts():
    error = DataError("FG-DATA-999", "row 3 is odd", allowed="even rows", fix="--even")
    assert isinstance(error, ValueError) and isinstance(error, FinegraftError)
    assert str(error).splitlines() == [
        "FG-DATA-999: row 3 is odd",
        "  allowed: even rows",
        "  fix:     --even",
    ]
    assert pickle.loads(pickle.dumps(error)).as_dict() == error.as_dict()


def test_a_near_name_is_suggested_and_else_the_list():
    assert did_you_mean("promt", ["prompt", "text"]) == "did you mean 'prompt'?"
    assert did_you_mean("zzz", ["b", "a"]) == "use one of a, b"


def test_registry_lists_without_importing_and_suggests():
    kernels: Registry = Registry("finegraft.kernels", "OP", "kernel")
    assert {"linear_cross_entropy", "lora_group"} <= set(kernels.names())
    assert not any(name.startswith("_") for name in kernels.names())
    with pytest.raises(ConfigError, match=r"(?s)FG-CORE-001.*unknown kernel 'lora_liner'.*did you"):
        kernels.get("lora_liner")


def test_all_problems_of_a_configuration_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        build({"model": "demo", "learning_rte": 1, "num_train_epochs": "many", "max_length": 1})
    message = str(caught.value)
    assert "FG-CONF-001" in message
    for part in ("'learning_rate'", "num_train_epochs", "'data' is missing", "max_length"):
        assert part in message


def test_rank_zero_and_two_precisions_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)FG-CONF-002.*r is 0"):
        build({**GOOD, "r": 0})
    assert build({**GOOD, "r": 0, "full_finetuning": True}).full_finetuning
    with pytest.raises(ConfigError, match="FG-CONF-003"):
        build({**GOOD, "load_in_4bit": True, "load_in_8bit": True})


def test_yaml_round_trip_is_complete(tmp_path):
    config = build({**GOOD, "target_modules": ["q_proj"], "map": {"prompt": "q"}, "seed": 7})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert from_file(file) == config
    assert set(yaml.safe_load(file.read_text())) == set(TrainConfig.model_fields)
    assert from_file(file, {"seed": 8}).seed == 8


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="FG-CONF-005"):
        from_file(file)
    with pytest.raises(ConfigError, match=r"FG-CONF-005.*cannot read"):
        from_file(tmp_path / "absent.yaml")


def test_assignments_are_read_as_yaml():
    assert parse_assignment("learning-rate=1e-4") == ("learning_rate", 1e-4)
    assert parse_assignment("packing=true") == ("packing", True)
    assert parse_assignment("target_modules=[q_proj, v_proj]")[1] == ["q_proj", "v_proj"]
    assert parse_assignment("data=a=b.jsonl") == ("data", "a=b.jsonl")
    with pytest.raises(ConfigError, match="FG-CONF-004"):
        parse_assignment("packing")


def test_every_field_has_a_help_text_and_a_group():
    assert sum(map(len, groups().values())) == len(TrainConfig.model_fields)
    assert all(info.description for info in TrainConfig.model_fields.values())
    assert "other" not in groups()


def test_a_folder_is_whole_or_absent(tmp_path):
    final = tmp_path / "out"
    with paths.whole_folder(final) as folder:
        (folder / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    with pytest.raises(RuntimeError), paths.whole_folder(final) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (final / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_disk_errors_get_a_code_and_other_errors_pass(tmp_path):
    with pytest.raises(StorageError, match="FG-DISK-001"), paths.whole_folder(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DataError, match="FG-DATA-001"), paths.whole_folder(tmp_path / "a"):
        raise DataError("FG-DATA-001", "x")
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"(?s)FG-DISK-002.*--output"):
        paths.require_writable(tmp_path / "file" / "run")
    paths.require_writable(tmp_path / "new" / "run")
    assert not list((tmp_path / "new" / "run").iterdir())


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / "finegraft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.cache_dir() == Path.home() / ".cache" / "finegraft"


def test_dtype_is_never_float16_on_a_cpu():
    import torch

    expected = torch.bfloat16 if facts().native_bf16 else torch.float32
    assert facts().gpus or default_dtype() == expected
    assert facts().cores >= 1 and facts().memory_bytes > 1 << 28

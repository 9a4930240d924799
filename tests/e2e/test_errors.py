"""Mistakes at the keyboard: one clear error each, status 2, and nothing left behind.

Every mistake is made twice, by real processes side by side: once for people and once with --json.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMMAND, NOWHERE, environment, finegraft, make_model, write_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubserver import HubServer, Repo

# with a limit on file sizes, Python would leave cut .pyc files behind and trip over them later
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}
LONGEST = 420  # characters of one part of a message: about five lines at 80 columns


@pytest.fixture
def place(base, tmp_path):
    """A working folder in which ``train run.yaml`` would do."""
    write_rows(tmp_path / "rows.jsonl", 12)
    (tmp_path / "run.yaml").write_text(f"model: {base}\ndata: rows.jsonl\nmax_length: 64\n")
    return tmp_path


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def refused(code, *words, cwd, prefix=(), preexec_fn=None, **env):
    """Run a command line for people and for programs; return the error that both showed."""
    before, beside = contents(cwd), cwd.parent / f"{cwd.name}-json"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(cwd, beside)  # side by side, not in each other's way
    processes = [
        subprocess.Popen(
            [*prefix, *COMMAND, *map(str, words), *more],
            cwd=folder,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        for folder, more in ((cwd, []), (beside, ["--json"]))
    ]
    (out, err), (json_out, json_err) = (p.communicate(timeout=240) for p in processes)
    assert [p.returncode for p in processes] == [2, 2], err + json_err
    assert "Traceback" not in out + err + json_out + json_err
    answer = json.loads(json_out)  # one object and nothing else
    assert list(answer) == ["error"]
    error = answer["error"]
    assert error["code"] == code, error
    assert out == ""
    errors = [line for line in err.splitlines() if "FG-" in line and "FG-CHECK-" not in line]
    assert len(errors) == 1 and f"{code}: {error['found']}" in err  # warnings of rows aside
    for part in ("found", "allowed", "fix"):
        assert len(error[part] or "") <= LONGEST, error[part]
        assert (error[part] or "") in err
    assert error["fix"]
    assert contents(cwd) == contents(beside) == before
    return error


def train(*words):
    return ["train", "run.yaml", "--output", "out/run", *words]


def hub_env(place, url=NOWHERE):
    return {"HF_ENDPOINT": url, "HF_HOME": str(place.parent / "hf-home"), "NO_PROXY": "127.0.0.1"}


# ---- models


def test_a_model_that_the_hub_does_not_know(place):
    with HubServer() as hub:
        env = hub_env(place, hub.url)
        error = refused("FG-MODEL-001", *train("--model", "owner/nosuch"), cwd=place, **env)
    assert hub.requests
    assert "'owner/nosuch'" in error["found"]
    assert "demo" in error["allowed"]


def test_a_misspelt_packaged_model(place):
    with HubServer() as hub:
        env = hub_env(place, hub.url)
        error = refused("FG-MODEL-001", *train("--model", "dmeo"), cwd=place, **env)
    assert "did you mean 'demo'?" in error["fix"]


def test_no_network(place):
    error = refused("FG-MODEL-002", *train("--model", "owner/name"), cwd=place, **hub_env(place))
    assert "refused" in error["found"]
    assert "'demo'" in error["fix"] and "HF_ENDPOINT" in error["fix"]


def test_a_gated_model_without_a_token_and_with_one(place, base):
    with HubServer({"owner/gated": Repo(base, access="gated")}) as hub:
        env = hub_env(place, hub.url)
        words = train("--model", "owner/gated", "--max-steps", "1")
        error = refused("FG-MODEL-003", *words, cwd=place, **env)
        assert f"{hub.url}/owner/gated" in error["fix"] and "HF_TOKEN" in error["fix"]
        done = finegraft(*words, cwd=place, HF_TOKEN="hf_good", **env)
    assert done.returncode == 0, done.stderr


def test_weights_that_are_cut_off(place, base):
    shutil.copytree(base, place / "cut")
    file = place / "cut" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    error = refused("FG-MODEL-005", *train("--model", "cut"), cwd=place)
    assert "cut/model.safetensors" in error["found"]
    assert f"{file.stat().st_size:,}" in error["found"]


# ---- rows


def test_other_columns_and_the_map_that_was_suggested(place):
    rows = [{"question": f"{i}?", "reply": f"It is {i}."} for i in range(8)]
    write_rows(place / "rows.jsonl", rows)
    error = refused("FG-DATA-007", *train(), cwd=place)
    assert "question, reply" in error["found"]
    suggested = shlex.split(error["fix"])
    assert "--map" in suggested
    done = finegraft(*train(*suggested, "--max-steps", "1"), cwd=place)
    assert done.returncode == 0, done.stderr


NOT_JSON = '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", completion: "b"}\n'
NULL = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": null}\n'


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "FG-DATA-002", ["rows.jsonl holds no rows"]),
        (NOT_JSON, "FG-DATA-003", ["rows.jsonl, line 3", "column 17"]),
        (NULL, "FG-DATA-005", ["row 2", "'completion' is null"]),
        (None, "FG-DATA-001", ["there is no file rows.jsonl"]),
    ],
    ids=["empty", "not json", "null", "missing"],
)
def test_rows_that_cannot_be_read(place, text, code, said):
    file = place / "rows.jsonl"
    if text is None:
        file.rename(place / "row.jsonl")
    else:
        file.write_text(text)
    error = refused(code, *train(), cwd=place)
    for words in said:
        assert words in error["found"]
    if text is None:
        assert error["fix"] == "did you mean row.jsonl?"


# ---- settings


def test_an_unknown_key_in_the_file(place):
    with open(place / "run.yaml", "a") as file:
        file.write("learnin_rate: 1e-4\nsead: 1\n")
    error = refused("FG-CONF-001", *train(), cwd=place)
    for wrong, right in (("learnin_rate", "learning_rate"), ("sead", "seed")):
        assert f"'{wrong}', did you mean '{right}'?" in error["found"]


def test_an_unknown_key_in_an_assignment(place):
    error = refused("FG-CONF-001", *train("--set", "batch_size=4"), cwd=place)
    assert "'batch_size', did you mean 'per_device_train_batch_size'?" in error["found"]
    assert "command line" in error["found"]


@pytest.mark.parametrize("text", ["learning_rate", "seed=[", "seed=*"])
def test_an_assignment_that_is_none(place, text):
    error = refused("FG-CONF-004", *train("--set", text), cwd=place)
    assert repr(text) in error["found"]


def test_a_rank_of_zero(place):
    error = refused("FG-CONF-002", *train("--r", "0"), cwd=place)
    assert "--r 16" in error["fix"] and "--full-finetuning" in error["fix"]


@pytest.mark.parametrize(
    "words",
    [
        ["--target-modules", "q_proj,v_prj"],
        ["--set", "target_modules=v_prj"],
        ["--set", "target_modules=[v_prj]"],
        ["--target-modules", r".*\.(x|y)_proj"],
    ],
    ids=["list", "name", "yaml", "expression"],
)
def test_modules_that_the_model_does_not_have(place, words):
    error = refused("FG-ADAPT-001", *train(*words), cwd=place)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"{name} (2)" in error["allowed"]
    assert "'v_proj'" in error["fix"] or "(x|y)" in error["found"]


@pytest.mark.parametrize("modules", ["q_proj", r".*\.(q|v)_proj"])
def test_modules_that_it_has(place, modules):
    words = ["--set", f"target_modules='{modules}'", "--max-steps", "1"]
    done = finegraft(*train(*words), cwd=place)
    assert done.returncode == 0, done.stderr
    assert f"{2 if modules == 'q_proj' else 4} x FastLoraLinear" in done.stderr


# ---- disks


@functools.cache
def private_mounts():
    """The command that gives a process mounts of its own, or None where that is not allowed."""
    for flags in ("-m", "-rm"):
        words = ["unshare", flags, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and subprocess.run(words, capture_output=True).returncode == 0:
            return words[:2]
    return None


def test_a_folder_that_cannot_be_written(place):
    target, prefix = "/sys/finegraft", ()  # nobody makes a folder there
    if private_mounts():
        target = "sealed/run"
        (place / "sealed").mkdir()
        mount = 'mount -t tmpfs -o ro none sealed && exec "$@"'
        prefix = [*private_mounts(), "sh", "-c", mount, "sh"]
    error = refused(
        "FG-DISK-002", "train", "run.yaml", "--output", target, cwd=place, prefix=prefix
    )
    assert target in error["found"]
    assert "--output" in error["fix"]


@pytest.mark.parametrize("target", ["rows.jsonl/run", "rows.jsonl"])
def test_a_file_where_the_folder_should_be(place, target):
    error = refused("FG-DISK-002", "train", "run.yaml", "--output", target, cwd=place)
    assert "rows.jsonl is a file" in error["found"]


SHORT = ["--max-steps", "4", "--save-steps", "2"]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of four steps with two checkpoints, on a disk with room."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.jsonl", 12)
    (folder / "run.yaml").write_text(f"model: {base}\ndata: rows.jsonl\nmax_length: 64\n")
    assert finegraft(*train(*SHORT), cwd=folder).returncode == 0
    return folder / "out" / "run"


def disk_bytes(*paths):
    """Bytes on a tmpfs, which gives whole pages to each file."""
    files = (p for path in paths for p in ([path] if path.is_file() else path.rglob("*")))
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in files if p.is_file())


def room(run, until):
    """Size of a disk that is full at half of ``until``, in bytes."""
    notes = disk_bytes(run / "config.yaml", run / "data.json", run / "events.jsonl")
    one = disk_bytes(run / "checkpoints" / "checkpoint-2")
    adapter = disk_bytes(run / "adapter")
    return (
        notes
        + {"first": one // 2, "second": one * 3 // 2, "adapter": one * 2 + adapter // 2}[until]
    )


SCRIPT = """
mkdir out && mount -t tmpfs -o size=$1 none out || exit 9
shift
"$@" --json >error.json 2>error.txt
echo $? >status
cp -r out left
mount -o remount,size=100M out
"$FINEGRAFT" resume out/run --json >resumed.json 2>resumed.txt
cp -r out after
"""


@pytest.mark.parametrize(
    ("until", "steps"), [("first", []), ("second", [2]), ("adapter", [2, 4])], ids=str
)
def test_a_disk_that_fills_up_and_is_freed(place, whole, until, steps):
    command = [*COMMAND, *train(*SHORT)]
    if private_mounts():
        script = [*private_mounts(), "sh", "-c", SCRIPT, "sh", room(whole, until), *command]
        env = environment(FINEGRAFT=COMMAND[0])
        subprocess.run(list(map(str, script)), cwd=place, env=env, check=True)
    else:
        without_mounts(place, command)
        steps = []
    assert (place / "status").read_text().strip() == "2", (place / "error.txt").read_text()
    assert "Traceback" not in (place / "error.txt").read_text()
    error = json.loads((place / "error.json").read_text())["error"]
    assert error["code"] == "FG-DISK-001"
    name = "adapter" if until == "adapter" and steps else "checkpoint-"
    assert f"out/run/{name}" in error["found"].replace("/checkpoints/", "/")
    assert ".partial" not in error["found"] and ".saving" not in error["found"]
    assert "finegraft resume out/run" in error["fix"]
    left = place / "left" / "run"
    assert sorted(p.name for p in left.glob("checkpoints/*")) == [f"checkpoint-{s}" for s in steps]
    assert not (left / "adapter").exists() and not list(left.rglob(".*"))
    for step in steps:
        for saved in (whole / f"checkpoints/checkpoint-{step}").iterdir():
            kept = left / f"checkpoints/checkpoint-{step}" / saved.name
            assert kept.stat().st_size > 0

    assert json.loads((place / "resumed.json").read_text())["steps"] == 4
    weights = "adapter/adapter_model.safetensors"
    assert (place / "after" / "run" / weights).read_bytes() == (whole / weights).read_bytes()


def without_mounts(place, command):
    """The same by a limit on the size of one file, which the optimizer's state exceeds."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def run(name, *words, **options):
        done = subprocess.run(
            [*words, "--json"],
            cwd=place,
            env=environment(**NO_BYTECODE),
            capture_output=True,
            text=True,
            **options,
        )
        (place / f"{name}.json").write_text(done.stdout)
        (place / f"{name}.txt").write_text(done.stderr)
        (place / "status").write_text(str(done.returncode))

    run("error", *command, preexec_fn=limit)
    status = (place / "status").read_text()
    shutil.copytree(place / "out", place / "left")
    run("resumed", *COMMAND, "resume", "out/run")
    (place / "status").write_text(status)
    shutil.copytree(place / "out", place / "after")


def test_a_limit_on_file_sizes_is_a_full_disk(place, whole, monkeypatch):
    """What the test above falls back to where nothing can be mounted."""
    monkeypatch.setattr(sys.modules[__name__], "private_mounts", lambda: None)
    test_a_disk_that_fills_up_and_is_freed(place, whole, "first", [])


def test_a_disk_without_room_for_the_settings(place):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    error = refused("FG-DISK-001", *train(), cwd=place, preexec_fn=limit, **NO_BYTECODE)
    assert "out/run/data.json" in error["found"]


# ---- adapters


@pytest.fixture(scope="module")
def others(base, tmp_path_factory):
    """Models that are not the base: of another width, and of the same with other weights."""
    folder = tmp_path_factory.mktemp("others")
    make_model(folder / "wider", hidden_size=64)
    make_model(folder / "twin", seed=1)
    return folder


@pytest.mark.parametrize("other", ["wider", "twin"])
def test_an_adapter_that_was_moved_to_another_base(place, whole, others, other):
    shutil.copytree(whole / "adapter", place / "adapter")
    config = place / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": str(others / other)}))
    error = refused("FG-ADAPT-003", "generate", "adapter", "hello", cwd=place)
    assert "another base" in error["found"]
    assert values["base_model_name_or_path"] in error["allowed"]
    said = {"wider": "32", "twin": "weights of its embedding"}[other]
    assert said in error["found"]
    config.write_text(json.dumps(values))
    assert finegraft("generate", "adapter", "hello", cwd=place).returncode == 0


def test_an_adapter_that_is_cut_off(place, whole):
    shutil.copytree(whole / "adapter", place / "adapter")
    os.truncate(place / "adapter" / "adapter_model.safetensors", 5000)
    error = refused("FG-MODEL-005", "generate", "adapter", "hello", cwd=place)
    assert "adapter/adapter_model.safetensors" in error["found"]

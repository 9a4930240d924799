"""Uploads over real sockets: every format arrives, what broke goes on, refusals say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from export_tiny import adapter, base, trained

from finegraft.core.errors import FinegraftError
from finegraft.export import _push, _save
from finegraft.export._verify import contents, verify

sys.path.insert(0, str(Path(__file__).parents[1]))
from hubserver import Fault, HubServer, client_env

CLIENT = """
import json, sys
from finegraft.core.errors import FinegraftError
from finegraft.export import _push
for line in sys.stdin:
    asked = json.loads(line)
    events = []
    try:
        what = _push.plan(asked.pop("path"), verified=asked.pop("verified", True))
        target = _push.open_target(**asked)
        done = _push.upload(target, what, listener=events.append, waits_s=(0.1, 0.1))
        said = {"files": done.files, "bytes": done.bytes, "url": done.url, "commit": done.commit}
    except FinegraftError as error:
        said = error.as_dict()
    print(json.dumps({**said, "events": events}), flush=True)
"""
TO = ("merged_16bit", "lora", "merged_4bit", "gguf:q8_0,gguf:f16", "ollama:q8_0", "vllm:merged")
PROVEN = TO[:2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    return adapter(*trained(base(folder / "base")), folder / "run")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """A folder of each format, two of them verified."""
    place = tmp_path_factory.mktemp("made")
    found = {}
    for to in TO:
        found[to] = place / to.partition(":")[0]
        options = {"max_shard_size": "100KB"} if to == "merged_16bit" else {}
        _save.export(str(run), found[to], to, verify=to in PROVEN, options=options)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(root=tmp_path_factory.mktemp("hub"), part_bytes=50_000) as hub:
        hub.accounts = {
            "hf_good": ("me", "write"),
            "hf_other": ("them", "write"),
            "hf_read": ("me", "read"),
        }
        yield hub


@pytest.fixture
def hub(server):
    server.puts.clear()
    server.requests.clear()
    server.faults.clear()
    yield server
    assert not server.cut, "a planned break did not happen"


def start(hub, home):
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env=client_env(hub.url, home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(home / "stderr", "w"),
        text=True,
        cwd=home,
    )


def ask(client, path, repo, token="hf_good", **more):
    asked = {"path": str(path), "repo": repo, "token": token, **more}
    client.stdin.write(json.dumps(asked) + "\n")
    client.stdin.flush()
    return json.loads(client.stdout.readline())


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    process = start(server, tmp_path_factory.mktemp("client"))
    yield process
    process.stdin.close()
    process.wait(20)


def held(hub, repo):
    folder = hub.repos[repo].folder
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def expected(folder):
    """All that the export wrote but its mark, which tells of local paths and held-out rows."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    del found["verification.json"]
    return found


@pytest.mark.parametrize("to", TO)
def test_every_format_arrives_byte_for_byte_and_nothing_else(hub, client, made, to):
    repo = f"me/{to.partition(':')[0]}"
    wanted = expected(made[to])
    (made[to] / "private.txt").write_text("not part of the export")
    (made[to] / "checkpoint.safetensors").write_bytes(b"nor this" * 1000)
    said = ask(client, made[to], repo, verified=to in PROVEN)
    assert "code" not in said, said
    (made[to] / "private.txt").unlink()
    (made[to] / "checkpoint.safetensors").unlink()
    folder = hub.repos[repo].folder
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == wanted
    assert "README.md" in wanted and ("ollama" not in to or "Modelfile" in wanted)
    listed = next(e for e in said["events"] if e["type"] == "uploading")
    assert listed["files"] == {name: len(data) for name, data in wanted.items()}
    assert said["bytes"] == listed["bytes"] == sum(map(len, wanted.values()))
    assert len(hub.repos[repo].commits) == 1


def parts(hub):
    """Addresses that were sent whole, and those that broke off."""
    whole = [p.path for p in hub.puts if p.whole]
    return whole, [p.path for p in hub.puts if not p.whole]


def test_a_connection_that_breaks_goes_on_with_the_part_that_broke(hub, client, made):
    hub.objects.clear()
    hub.faults += [Fault(3, 20_000)]
    said = ask(client, made["vllm:merged"], "me/broken", verified=False)
    assert "code" not in said, said
    whole, broken = parts(hub)
    assert len(broken) == 1 and hub.puts[3].bytes >= 20_000
    assert len(whole) == len(set(whole)) > 4, "a part was sent twice"
    assert broken[0] in whole
    name = "model.safetensors"
    assert held(hub, "me/broken")[name] == (made["vllm:merged"] / name).read_bytes()


def test_a_client_that_was_killed_sends_only_what_had_not_arrived(hub, client, made, tmp_path):
    hub.objects.clear()
    hub.faults += [hold := Fault(4, 10_000, "hold")]
    victim = start(hub, tmp_path / "victim")
    asked = {"path": str(made["merged_16bit"]), "repo": "me/killed", "token": "hf_good"}
    victim.stdin.write(json.dumps(asked) + "\n")
    victim.stdin.flush()
    assert hold.reached.wait(60), (tmp_path / "victim" / "stderr").read_text()
    victim.kill()
    victim.wait(20)
    hold.released.set()
    arrived = set(hub.objects)
    assert arrived and not held(hub, "me/killed"), "nothing shows before all is there"
    hub.puts.clear()
    said = ask(client, made["merged_16bit"], "me/killed")
    assert "code" not in said, said
    again = {p.path.split("/")[2] for p in hub.puts}
    assert again and not again & arrived
    assert held(hub, "me/killed") == expected(made["merged_16bit"])


def test_an_answer_that_is_lost_makes_no_second_commit(hub, client, made):
    hub.cut |= {"/repos/create": "before", "/commit/main": "after"}
    said = ask(client, made["lora"], "me/lost")
    assert "code" not in said, said
    assert sum(e["type"] == "retry" for e in said["events"]) == 2
    assert len(hub.repos["me/lost"].commits) == 1
    assert held(hub, "me/lost") == expected(made["lora"])


def test_private_and_a_name_without_an_owner(hub, client, made):
    said = ask(client, made["lora"], "secret", private=True)
    assert said["url"].endswith("/me/secret")
    assert hub.repos["me/secret"].access == "private"


@pytest.mark.parametrize(
    ("repo", "token", "code", "words"),
    [
        ("a/b/c", "hf_good", "FG-HUB-001", "owner/name"),
        ("me/x", None, "FG-HUB-002", "HF_TOKEN"),
        ("me/x", "hf_bad", "FG-HUB-003", "401"),
        ("me/x", "hf_read", "FG-HUB-004", "for reading"),
        ("them/x", "hf_good", "FG-HUB-004", "403"),
        ("me/lora", "hf_other", "FG-HUB-004", "403"),
    ],
)
def test_refusals_say_what_to_do(hub, client, made, repo, token, code, words):
    if repo == "me/lora" and repo not in hub.repos:
        ask(client, made["lora"], repo)
    said = ask(client, made["lora"], repo, token)
    assert said["code"] == code, said
    assert words in f"{said['found']} {said['allowed']} {said['fix']}"
    assert not hub.puts and "me/x" not in hub.repos


def test_a_branch_that_is_not_there(hub, client, made):
    assert ask(client, made["lora"], "me/branch", revision="v9")["code"] == "FG-HUB-013"


def test_what_was_not_verified_or_was_changed_is_not_sent(hub, client, made, run, tmp_path):
    said = ask(client, made["merged_4bit"], "me/no")
    assert said["code"] == "FG-HUB-006" and "not asked for" in said["found"]
    _save.export(str(run), tmp_path / "out", "lora")
    file = tmp_path / "out" / "adapter_model.safetensors"
    (tmp_path / "out" / "README.md").write_text("mine")  # a card may be edited
    assert "code" not in ask(client, tmp_path / "out", "me/card")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = ask(client, tmp_path / "out", "me/no")
    assert said["code"] == "FG-HUB-008" and "adapter_model.safetensors has changed" in said["found"]
    assert verify(tmp_path / "out", str(run)).verified  # one bit of one weight
    assert "code" not in ask(client, tmp_path / "out", "me/again")
    file.unlink()
    said = ask(client, tmp_path / "out", "me/no")
    assert said["code"] == "FG-HUB-007" or "missing" in said["found"]
    assert "me/no" not in hub.repos


def test_a_file_that_the_repository_ignores_is_missed(hub, client, made):
    ask(client, made["lora"], "me/ignoring")
    repo = hub.repos["me/ignoring"]
    repo.ignored = ("adapter_config.json",)
    (repo.folder / "adapter_config.json").unlink()
    said = ask(client, made["lora"], "me/ignoring")
    assert said["code"] == "FG-HUB-011" and "adapter_config.json" in said["found"], said
    repo.ignored = ()
    (repo.folder / "old.safetensors").write_bytes(b"weights of another export")
    assert "code" not in ask(client, made["lora"], "me/ignoring")


def test_folders_that_are_no_single_export(made, tmp_path):
    with pytest.raises(FinegraftError, match="FG-HUB-007"):
        _push.plan(tmp_path)
    with pytest.raises(FinegraftError, match=r"FG-HUB-009[\s\S]*gguf, "):
        _push.plan(made["lora"].parent)


def test_one_file_of_a_gguf_folder(made):
    file = next(made["gguf:q8_0,gguf:f16"].glob("*Q8_0.gguf"))
    assert set(_push.plan(file, verified=False).files) == {file.name, "README.md"}
    assert contents.digest(file) == _push.plan(file, verified=False).digests[file.name]


def command(*words, hub, home, **env):
    return subprocess.run(
        [sys.executable, "-c", "from finegraft.cli.main import main; main()", *map(str, words)],
        env=client_env(hub if isinstance(hub, str) else hub.url, home, **env),
        capture_output=True,
        text=True,
        timeout=100,
        cwd=home,
    )


def test_the_command_line(hub, run, made, tmp_path):
    words = ["export", run, "--to", "lora", "--output", "out", "--push", "me/typed", "--private"]
    done = command(*words, "--json", hub=hub, home=tmp_path, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["pushed"]
    assert told["repo"] == "me/typed" and told["url"] == f"{hub.url}/me/typed"
    assert held(hub, "me/typed") == expected(tmp_path / "out")
    assert "adapter_model.safetensors" in done.stderr and "uploading" in done.stderr
    assert hub.repos["me/typed"].access == "private"
    closed = "http://127.0.0.1:9"
    done = command("push", "out", "me/typed", hub=closed, home=tmp_path, HF_TOKEN="hf_good")
    assert done.returncode == 2 and "FG-HUB-005" in done.stderr and closed in done.stderr
    assert "Traceback" not in done.stderr


API = """
import json, sys
from finegraft import FastLanguageModel
from finegraft.core.errors import FinegraftError
model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], dtype="float32")
print(model.push_to_hub_merged("me/api", tokenizer, save_method="lora", private=True,
                               commit_message="from the API", tags=["x"]))
print(model.push_to_hub_gguf("me/api-gguf", tokenizer, "f16", verify=False))
print(model.save_pretrained_merged("me/saved", tokenizer, push_to_hub=True))
try:
    model.push_to_hub_merged("them/x", tokenizer, "lora")
except FinegraftError as error:
    print(error.code, error.fix)
"""


def test_unsloths_names(hub, run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", API, str(run)],
        env=client_env(hub.url, tmp_path, HF_TOKEN="hf_good", TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{hub.url}/me/api", f"{hub.url}/me/api-gguf"]
    assert hub.repos["me/api"].access == "private"
    assert hub.repos["me/api"].commits == ["from the API"]
    assert "adapter_model.safetensors" in held(hub, "me/api")
    assert any(name.endswith("F16.gguf") for name in held(hub, "me/api-gguf"))
    assert held(hub, "me/saved") == expected(tmp_path / "me" / "saved")
    # uploads that worked leave nothing behind, one that failed is kept for the next try
    assert lines[3].startswith("FG-HUB-004")
    [kept] = tmp_path.glob("finegraft-*")
    assert (kept / "x" / "adapter_config.json").is_file()

"""Manifests beside a folder for vLLM: the schemas they follow, and what they serve."""

from __future__ import annotations

import re
import shlex

import export_tiny
import pytest
import yaml
from export_tiny import moved
from typer.testing import CliRunner

from finegraft.cli.main import app
from finegraft.core.errors import ExportError
from finegraft.export import _manifests, _save

kubernetes = pytest.importorskip("kubernetes_validate")
compose_spec = pytest.importorskip("compose_spec")
VERSIONS = ("1.28", "1.37")  # the oldest and the newest that the package has


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tiny.base(tmp_path_factory.mktemp("manifests") / "base")


def interpolated(text):
    """A compose file as compose reads it: variables that are not set have their defaults."""
    body = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    variable = re.compile(r"\$(?:(\$)|\{\w+:-([^}]*)\}|(\w+)|(.))")

    def value(match):
        assert match[4] is None, f"compose refuses {match[0]}"
        return match[1] or match[2] or ""

    return variable.sub(value, body)


def checked(folder):
    """The manifests of a folder, proven to follow the published schemas."""
    text = interpolated((folder / "compose.yaml").read_text())
    compose_spec.PyCompose.from_yaml(text)
    parts = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    for part in parts:
        for version in VERSIONS:
            kubernetes.validate(part, version, strict=True)
    return yaml.safe_load(text)["services"]["vllm"], {part["kind"]: part for part in parts}


def script(folder):
    line = (folder / "serve.sh").read_text().splitlines()[1]
    return shlex.split(line.partition("exec ")[2])[2:-1]


def container(parts):
    return parts["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_the_schemas_refuse_what_is_wrong():
    """The two packages look at values and names of keys, or the tests below say nothing."""
    served = _manifests.texts(_manifests.Served("one"))
    text = interpolated(served["compose.yaml"])
    compose_spec.PyCompose.from_yaml(text)
    wrong = text.replace("entrypoint:", "entrypont:")
    with pytest.raises(ValueError):
        compose_spec.PyCompose.from_yaml(wrong)
    _, deployment, _ = yaml.safe_load_all(served["kubernetes.yaml"])
    spec = deployment["spec"]["template"]["spec"]["containers"][0]
    for key, value in (
        ("livenesProbe", {}),
        ("args", "serve"),
        ("ports", [{"containerPort": "x"}]),
    ):
        before = dict(spec)
        spec[key] = value
        with pytest.raises(Exception, match=r"(?i)valid|propert|type"):
            kubernetes.validate(deployment, VERSIONS[0], strict=True)
        spec.clear()
        spec.update(before)
    kubernetes.validate(deployment, VERSIONS[0], strict=True)


def test_several_adapters_of_one_base(base, tmp_path):
    main = export_tiny.trained(base, r=4)
    for name, rank in (("fr", 12), ("de", 8)):
        model, tokenizer = export_tiny.trained(base, r=rank)
        export_tiny.adapter(moved(model, rank), tokenizer, tmp_path / name)
    out = tmp_path / "out"
    also = {"french": str(tmp_path / "fr"), "german": str(tmp_path / "de")}
    done = _save.export(main, out, "vllm:adapter", options={"also": also})
    assert done[0].verified
    for name, place in (("french", "fr"), ("german", "de")):
        file = "adapter_model.safetensors"
        copied = (out / "adapters" / name / file).read_bytes()
        assert copied == (tmp_path / place / file).read_bytes()
    words = script(out)
    at = words.index("--lora-modules")
    assert words[0] == str(base)
    assert words[at + 2 : at + 4] == ["french=./adapters/french", "german=./adapters/german"]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--max-loras") + 1] == "3"
    service, parts = checked(out)
    assert service["command"][0] == "/base" and f"{base}:/base:ro" in service["volumes"]
    assert "french=/models/adapters/french" in service["command"]
    args = container(parts)["args"]
    assert args[0] == "/models/base" and any(a.endswith("/adapters/german") for a in args)
    assert args[1:3] == words[1:3] and args[-2:] == service["command"][-2:-1] + args[-1:]
    # an export may take its own place again
    _save.export(main, out, "vllm:adapter", options={"also": also}, verify=False)


def test_a_merged_model(base, tmp_path):
    _save.export(export_tiny.trained(base), tmp_path / "My Model", "vllm", verify=False)
    service, parts = checked(tmp_path / "My Model")
    assert service["command"][0] == "/models" and "--lora-modules" not in service["command"]
    assert service["command"][1:] == script(tmp_path / "My Model")[1:]
    deployment, claim = parts["Deployment"], parts["PersistentVolumeClaim"]
    assert container(parts)["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container(parts)[probe]["httpGet"] == {"path": "/health", "port": "http"}
    mounts = {m["name"]: m["mountPath"] for m in container(parts)["volumeMounts"]}
    volumes = {v["name"]: v for v in deployment["spec"]["template"]["spec"]["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert parts["Service"]["spec"]["selector"] == labels
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert container(parts)["args"][0].startswith(mounts["models"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("first", "first"), ("My Model_2.1", "my-model-2-1"), ("7b", "m-7b"), ("ü", "m"), ("", "m")],
)
def test_names_that_kubernetes_takes(name, expected):
    assert _manifests.label(name) == expected
    label = _manifests.label("x" * 39 + "--y" * 9)
    assert len(label) <= 40 and not label.endswith("-")


@pytest.mark.parametrize("name", ["$HOME", "a $(b) `c` \"d\" 'e'", "ä: [b] {c} #d"])
def test_names_survive_every_reader(name, tmp_path):
    """The shell, compose and the kubelet each have characters of their own."""
    served = _manifests.Served(name, "org/base", adapters=((name, "."),))
    for file, text in _manifests.texts(served).items():
        (tmp_path / file).write_text(text)
    service, parts = checked(tmp_path)
    assert script(tmp_path)[3] == f"{name}=."
    assert service["command"][3] == f"{name}=/models"
    assert service["image"] == _manifests.IMAGE and service["ports"] == ["8000:8000"]
    assert container(parts)["args"][3].replace("$$(", "$(").startswith(f"{name}=/models/")
    assert "$(" not in container(parts)["args"][3].replace("$$(", "")


def test_what_cannot_be_served_together_is_refused_before_anything_is_written(base, tmp_path):
    main = export_tiny.trained(base)
    other = export_tiny.base(tmp_path / "other_base")
    model, tokenizer = export_tiny.trained(other)
    export_tiny.adapter(model, tokenizer, tmp_path / "other")
    model, tokenizer = export_tiny.trained(base, use_dora=True)
    export_tiny.adapter(model, tokenizer, tmp_path / "dora")
    for also, said in (
        ({"a": str(tmp_path / "other")}, "FG-EXPORT-077: .*belongs to the base"),
        ({"a": str(tmp_path / "dora")}, "FG-EXPORT-075: .*DoRA"),
        ({"a/b": str(tmp_path / "dora")}, "FG-EXPORT-076: .*name"),
        ({"a": str(base)}, "FG-EXPORT-032"),
    ):
        with pytest.raises(ExportError, match=said):
            _save.export(main, tmp_path / "out", "vllm:adapter", options={"also": also})
    with pytest.raises(ExportError, match="FG-EXPORT-076: further adapters"):
        _save.export(main, tmp_path / "out", "vllm", options={"also": {"a": str(base)}})
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_pairs(base, tmp_path):
    for name in ("one", "two"):
        model, tokenizer = export_tiny.trained(base)
        export_tiny.adapter(model, tokenizer, tmp_path / name)
    words = ["export", str(tmp_path / "one"), "--to", "vllm:adapter", "--no-verify"]
    words += ["--output", str(tmp_path / "out"), "--also"]
    done = CliRunner().invoke(app, [*words, f"second={tmp_path / 'two'}"])
    assert done.exit_code == 0, done.stderr
    assert "second=./adapters/second" in script(tmp_path / "out")
    done = CliRunner().invoke(app, [*words, "second"])
    assert done.exit_code == 2 and "FG-EXPORT-076" in done.stderr

"""How a folder for vLLM is run: a command, a compose file, a Kubernetes manifest.

What: ``texts`` makes ``serve.sh``, ``compose.yaml`` and ``kubernetes.yaml`` from one ``Served``.
How: all three carry the same arguments; where the folder and a base that lies on this machine are
seen differs. Constraint: no image, cluster or registry is asked for, so what cannot be known here
(the image's version, the storage class, the number of GPUs) is a line that a person changes, and
each stands once. Trade-off: the manifests follow the published schemas and were never applied.

Source: https://docs.vllm.ai/en/latest/deployment/k8s.html
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

SCRIPT, COMPOSE, KUBERNETES = "serve.sh", "compose.yaml", "kubernetes.yaml"
ADAPTERS = "adapters"  # the folder of those beside the first
IMAGE = "vllm/vllm-openai:latest"
PORT = 8000
_MODELS, _BASE = "/models", "/base"
_START_SECONDS = 1800  # a large model is fetched and compiled before it answers
_PROBE_SECONDS = 10


@dataclass(frozen=True)
class Served:
    """What vLLM is to serve.

    Attributes:
        name: What clients call the model.
        base: A name on the hub or a path on this machine; None: the folder itself.
        base_is_here: ``base`` is a path.
        adapters: Names of adapters and their places in the folder, ``.`` or ``adapters/fr``.
        rank: The highest of the adapters, as vLLM takes it.
        chat_template: The folder has ``chat_template.jinja``, which goes with the adapters.
        bytes: Of the folder.
    """

    name: str
    base: str | None = None
    base_is_here: bool = False
    adapters: tuple[tuple[str, str], ...] = ()
    rank: int = 16
    chat_template: bool = False
    bytes: int = 0

    def arguments(self, folder: str, base: str | None) -> list[str]:
        """What follows ``vllm serve``, with the folder and the base as they are seen there."""
        if not self.adapters:
            return [folder, "--served-model-name", self.name]
        words = [base or folder, "--enable-lora", "--lora-modules"]
        words += [f"{name}={_under(folder, place)}" for name, place in self.adapters]
        words += ["--max-lora-rank", str(self.rank)]
        if len(self.adapters) > 1:  # as many in one batch; the default is one
            words += ["--max-loras", str(len(self.adapters))]
        if self.chat_template:
            words += ["--chat-template", _under(folder, "chat_template.jinja")]
        return words


def _under(folder: str, place: str) -> str:
    return folder if place == "." else f"{folder}/{place}"


def texts(served: Served) -> dict[str, str]:
    """The files, by name."""
    return {SCRIPT: _script(served), COMPOSE: _compose(served), KUBERNETES: _kubernetes(served)}


def _script(served: Served) -> str:
    words = shlex.join(["vllm", "serve", *served.arguments(".", served.base)])
    return f'#!/bin/sh\ncd "$(dirname "$0")" && exec {words} "$@"\n'


def _compose(served: Served) -> str:
    """A compose file that serves the folder it lies in."""
    base = _BASE if served.base_is_here else served.base
    volumes = [f".:{_MODELS}:ro", "cache:/root/.cache/huggingface"]
    if served.base_is_here:
        volumes.insert(1, f"{_escaped(str(served.base))}:{_BASE}:ro")
    service = {
        "image": f"${{VLLM_IMAGE:-{IMAGE}}}",
        "entrypoint": ["vllm", "serve"],
        "command": [_escaped(word) for word in served.arguments(_MODELS, base)],
        "environment": {"HF_TOKEN": "${HF_TOKEN:-}"},
        "ports": [f"${{PORT:-{PORT}}}:{PORT}"],
        "volumes": volumes,
        "ipc": "host",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _ask()],
            "interval": f"{_PROBE_SECONDS}s",
            "timeout": "5s",
            "retries": 3,
            "start_period": f"{_START_SECONDS}s",
        },
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
                }
            }
        },
    }
    head = (
        "# docker compose up\n"
        "# VLLM_IMAGE names another image (pin a version), PORT another port, HF_TOKEN opens a\n"
        "# private base. More GPUs: raise count, and add --tensor-parallel-size to the command.\n"
    )
    return head + _yaml({"services": {"vllm": service}, "volumes": {"cache": {}}})


def _escaped(word: str) -> str:
    """As compose reads it: a dollar sign begins a variable."""
    return word.replace("$", "$$")


def _ask() -> str:
    return f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=4)"


def label(name: str) -> str:
    """A name as Kubernetes takes it: small letters, digits and dashes, at most 40."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return text if text and text[0].isalpha() else f"m-{text}".rstrip("-")


def _kubernetes(served: Served) -> str:
    """A claim for the files, the server, and its address within the cluster."""
    name = label(served.name)
    base = f"{_MODELS}/base" if served.base_is_here else served.base
    folder = f"{_MODELS}/{name}"
    parts = [_claim(served, name), _deployment(served, name, folder, base), _service(name)]
    copied = [f"#   the content of this folder to {folder}"]
    if served.base_is_here:
        copied.append(f"#   the content of {served.base} to {_MODELS}/base")
    head = [
        "# kubectl apply -f kubernetes.yaml",
        f"# The claim {name} has to hold, under the paths of the container:",
        *copied,
        "# To read them from a folder of the node instead, put into the volume 'models'",
        "#   hostPath: {path: /srv/models, type: Directory}",
        "# in place of persistentVolumeClaim, and leave the claim out. A private base on the hub",
        "# takes its token from: kubectl create secret generic hf-token --from-literal=token=...",
    ]
    return "\n".join(head) + "\n" + "---\n".join(_yaml(part) for part in parts)


def _claim(served: Served, name: str) -> dict[str, Any]:
    gibibytes = 1 + math.ceil(1.2 * served.bytes / 2**30) + (100 if served.base_is_here else 0)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{gibibytes}Gi"}},
        },
    }


def _probe(failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": _PROBE_SECONDS,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _deployment(served: Served, name: str, folder: str, base: str | None) -> dict[str, Any]:
    secret = {"name": "hf-token", "key": "token", "optional": True}
    container = {
        "name": "vllm",
        "image": IMAGE,
        "command": ["vllm", "serve"],
        # the kubelet reads $(NAME) as a variable, and $$ as a dollar sign
        "args": [word.replace("$(", "$$(") for word in served.arguments(folder, base)],
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}}],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {
            "requests": {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"},
            "limits": {"nvidia.com/gpu": "1"},
        },
        "startupProbe": _probe(_START_SECONDS // _PROBE_SECONDS),
        "readinessProbe": _probe(1),
        "livenessProbe": _probe(6),
        "volumeMounts": [
            {"name": "models", "mountPath": _MODELS, "readOnly": True},
            {"name": "cache", "mountPath": "/root/.cache/huggingface"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {"name": "models", "persistentVolumeClaim": {"claimName": name}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
    ]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # there may be no second GPU to start the next one on
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [container], "volumes": volumes},
            },
        },
    }


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def _yaml(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)

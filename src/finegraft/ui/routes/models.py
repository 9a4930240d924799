"""Models on this machine: the list, and removing one. Fetching is a job."""

from __future__ import annotations

import shlex
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from finegraft.models import stored
from finegraft.training.report import read
from finegraft.ui import replies
from finegraft.ui.desk import At

router = APIRouter()


@router.get("/api/models")
def listing(at: At) -> Response:
    """What is stored, and which runs began with it."""
    used: dict[str, list[str]] = {}
    for run in read.runs(at.space.runs):
        name = run.relative_to(at.space.runs).as_posix()
        used.setdefault(str(read.summary(run).model), []).append(name)
    found = [_values(one, used) for one in stored.models()]
    here = {one["name"] for one in found}
    missing = [name for name in stored.PACKAGED if name not in here]
    values = {"models": found, "fetchable": missing, "command": "finegraft models list"}
    return replies.reply(values)


def _values(one: stored.Stored, used: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "size_bytes": one.size_bytes,
        "path": one.path,
        "removable": True,
        "used_by": used.get(one.name, []),
    }


@router.delete("/api/models/{name:path}")
def remove(name: str, at: At) -> Response:
    """Free the space of one."""
    gone = stored.remove(name)
    command = shlex.join(["finegraft", "models", "remove", name])
    return replies.reply({"freed_bytes": gone.size_bytes, "command": command})

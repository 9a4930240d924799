"""Signing in, and what the page shows in its frame: version, machine, models."""

from __future__ import annotations

import glob
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter
from starlette.responses import Response

from finegraft.core import hardware
from finegraft.models import stored
from finegraft.ui import replies
from finegraft.ui.commands import text_of
from finegraft.ui.desk import At
from finegraft.ui.guard import cookie_name

router = APIRouter()
_GPUS = "/proc/driver/nvidia/gpus/*/information"


@router.post("/api/session")
def open_session(body: dict[str, Any], at: At) -> Response:
    """Turn the token of an address into a cookie."""
    cookie = at.sessions.open(text_of(body, "token"))
    made = Response(status_code=204)
    name = cookie_name(at.port)
    made.set_cookie(name, cookie, httponly=True, samesite="strict", path="/")
    return made


@router.post("/api/session/new")
def new_address(at: At) -> Response:
    """An address for another browser."""
    return replies.reply({"address": at.address()})


@router.get("/api/state")
def state(at: At) -> Response:
    """Where this is, and what there is to train."""
    names = [*stored.PACKAGED, *(one.name for one in stored.models() if one.kind == "hub")]
    values = {
        "version": metadata.version("finegraft"),
        "workspace": str(at.space.root),
        "machine": machine(),
        "models": list(dict.fromkeys([*names, *at.space.model_folders()])),
        "now": time.time(),
    }
    return replies.reply(values)


def machine() -> dict[str, Any]:
    """Facts that need no torch, which would take seconds to import."""
    gpus = []
    for file in sorted(glob.glob(_GPUS)):
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        gpus += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model")]
    return {
        "processor": hardware._cpu_name(),
        "cores": len(psutil.Process().cpu_affinity() or [0])
        if hasattr(psutil.Process, "cpu_affinity")
        else (psutil.cpu_count() or 1),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }

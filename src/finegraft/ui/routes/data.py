"""Rows: the files there are, sending one, looking into one, the built-in sample."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from starlette.responses import Response

from finegraft.core.paths import write_whole
from finegraft.data import yoda
from finegraft.ui import replies, uploads
from finegraft.ui.desk import At
from finegraft.ui.workspace import DATA

router = APIRouter()
SAMPLE = "yoda.jsonl"
_SAMPLE_ROWS = 660


@router.get("/api/data")
def listing(at: At) -> Response:
    """Files of rows."""
    return replies.reply({"files": at.space.data_files()})


@router.get("/api/data/look")
def look(
    path: str,
    at: At,
    request: Request,
    model: str = "",
    n: int = 5,
    max_length: int = 0,
) -> Response:
    """Rows as training sees them."""
    first = request.query_params.get("from", "0")
    start = int(first) if first.isdecimal() and len(first) < 12 else 0
    return replies.reply(at.looks.look(at.space, path, model, start, n, max(0, max_length)))


@router.post("/api/data/sample")
def sample(at: At) -> Response:
    """Write the rows that the quickstart trains on."""
    file = at.space.inside(f"{DATA}/{SAMPLE}")
    file.parent.mkdir(exist_ok=True)
    rows = yoda.rows(_SAMPLE_ROWS)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    values = {"path": at.space.name_of(file), "rows": len(rows)}
    return replies.reply({**values, "command": None}, 201)


@router.put("/api/data/{name:path}")
async def send(name: str, request: Request, at: At) -> Response:
    """Keep a file of rows."""
    path = await uploads.receive(name, request.stream(), at.space)
    values = {"path": at.space.name_of(path), "size_bytes": path.stat().st_size}
    return replies.reply(values, 201)

"""Exports: what a run can be written as, and what was written."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from finegraft.ui import exports, replies
from finegraft.ui.desk import At

router = APIRouter()


@router.get("/api/exports")
def listing(at: At, run: str = "") -> Response:
    """Formats, for a run where one is named, and the exports there are."""
    folder = at.space.run(run) if run else None
    record = at.records.of(folder) if folder else None
    values = {"formats": at.formats.of(folder, record), "exports": exports.written(at.space)}
    return replies.reply(values)

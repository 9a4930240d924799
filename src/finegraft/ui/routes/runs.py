"""Runs: the list, one of them, its curves and events, notes, deleting, comparing."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.responses import Response

from finegraft.training.report import differences
from finegraft.ui import replies, runs
from finegraft.ui.desk import At
from finegraft.ui.routes.jobs import page_of
from finegraft.ui.streams import Events

router = APIRouter()
_MOST_POINTS = 4000


@router.get("/api/runs")
def listing(at: At) -> Response:
    """All runs, the newest first."""
    found = runs.listing(at.space, at.jobs)
    return replies.reply({"runs": found, "command": "finegraft runs"})


@router.get("/api/runs/{name:path}/series")
def series(name: str, at: At, points: int = 600) -> Response:
    """The curves, thinned, and the place in the events behind them."""
    record = at.records.of(at.space.run(name))
    found = record.series(max(10, min(points, _MOST_POINTS)))
    return replies.reply({"series": found, "offset": record.offset})


@router.get("/api/runs/{name:path}/stream")
async def stream(
    name: str,
    at: At,
    start: Annotated[int, Query(alias="from")] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Events behind a place, as they come."""
    run = at.space.run(name)
    place = int(last_event_id) if last_event_id and last_event_id.isdecimal() else start
    return Events(at.feeds.listen(run, max(0, place)))


@router.post("/api/runs/{name:path}/stop")
def stop(name: str, at: At) -> Response:
    """Finish the step, save, end."""
    run = at.space.run(name)
    runs.stop(run, name, at.records.of(run))
    return replies.reply({"stopping": name, "command": "Ctrl-C where it runs"}, 202)


@router.put("/api/runs/{name:path}/notes")
def write_notes(name: str, body: dict[str, Any], at: At) -> Response:
    """Keep what a person writes about a run."""
    run = at.space.run(name)
    runs.write_notes(run, body.get("text"))
    return replies.reply({"notes": runs.notes(run), "path": f"{at.space.name_of(run)}/notes.txt"})


@router.get("/api/runs/{name:path}")
def one(name: str, at: At) -> Response:
    """One run but its curves."""
    return replies.reply(runs.detail(at.space.run(name), at.space, at.records, at.jobs))


@router.delete("/api/runs/{name:path}")
def delete(name: str, at: At) -> Response:
    """Move a run to the trash."""
    run = at.space.run(name)
    runs.require_idle(run, name)
    return replies.reply(at.trash.take(run))


@router.get("/api/trash")
def trash(at: At) -> Response:
    """What was deleted."""
    entries = at.trash.entries()
    total = sum(entry["size_bytes"] for entry in entries)
    return replies.reply({"entries": entries, "size_bytes": total})


@router.delete("/api/trash")
def empty_trash(at: At) -> Response:
    """Remove it for good."""
    return replies.reply({"freed_bytes": at.trash.empty(), "command": "rm -r .trash"})


@router.post("/api/trash/{name}/restore")
def restore(name: str, at: At) -> Response:
    """Undo a deletion."""
    return replies.reply({"path": at.trash.restore(name)})


@router.get("/api/compare")
def compare(a: str, b: str, at: At) -> Response:
    """What differs between two runs."""
    paths = [at.space.name_of(at.space.run(name)) for name in (a, b)]
    found = differences.compare(*(at.space.root / path for path in paths))
    command = shlex.join(["finegraft", "compare", *paths])
    return replies.reply({**found, "runs": paths, "command": command})


@router.get("/runs/{name:path}/report/")
def report(name: str, at: At) -> Response:
    """The run's page."""
    return page_of(at.space.run(name) / "report" / "index.html", f"run '{name}'")

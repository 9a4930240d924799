"""Jobs: command lines that take time."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from finegraft.core.errors import ConfigError
from finegraft.ui import commands, replies
from finegraft.ui.desk import At
from finegraft.ui.guard import REPORT_POLICY
from finegraft.ui.streams import Events

router = APIRouter()


@router.post("/api/jobs")
def start(body: dict[str, Any], at: At) -> Response:
    """Start one."""
    kind = commands.text_of(body, "kind")
    job = at.jobs.start(kind, commands.of(kind, body, at.space))
    return replies.reply(job.brief(), 201)


@router.get("/api/jobs")
def listing(at: At, kind: str = "") -> Response:
    """All of them, or those of a kind, the newest first."""
    return replies.reply({"jobs": [job.brief() for job in at.jobs.all(kind)]})


@router.get("/api/jobs/{name}")
def one(name: str, at: At) -> Response:
    """One of them, with what it said."""
    return replies.reply(at.jobs.get(name).whole())


@router.get("/api/jobs/{name}/stream")
async def stream(name: str, at: At) -> Response:
    """What it says, as it says it."""
    return Events(at.jobs.get(name).follow(at.feeds.closed))


@router.post("/api/jobs/{name}/stop")
def stop(name: str, at: At) -> Response:
    """Ctrl-C."""
    job = at.jobs.get(name)
    job.stop()
    return replies.reply(job.brief())


@router.get("/jobs/{name}/page/")
def page(name: str, at: At) -> Response:
    """The page that it wrote."""
    job = at.jobs.get(name)
    file = commands.report_of(job.report, at.space) if job.report else None
    return page_of(file, f"job {name}")


def page_of(file: Any, what: str) -> Response:
    """A report as a page that runs nothing.

    Raises:
        ConfigError: FG-UI-010, it is not there.
    """
    if file is None or not file.is_file():
        raise ConfigError(
            "FG-UI-010",
            f"{what} has no report",
            allowed="a report that was written",
            fix="start a job of the kind report or check first",
        )
    headers = {"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"}
    return FileResponse(file, media_type="text/html; charset=utf-8", headers=headers)

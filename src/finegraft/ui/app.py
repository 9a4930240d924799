"""The application: the page's files, the addresses of ``routes``, and the guard in front.

What: ``build`` puts them together. How: FastAPI for the addresses, starlette for the files.
Constraint: every error has one shape, also those that the frameworks make. Trade-off: no generated
documentation page, because it would load scripts from elsewhere.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.ui import replies
from finegraft.ui.desk import Desk
from finegraft.ui.guard import MOST_UPLOAD_BYTES, Guard
from finegraft.ui.routes import data, jobs, models, results, runs, session, train, trying

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
_ROUTES = (session, data, jobs, runs, train, trying, results, models)
_MISSING = "<!doctype html><title>finegraft</title><p>The files of the page are not installed.</p>"


def build(desk: Desk, *, most_upload: int = MOST_UPLOAD_BYTES) -> Any:
    """Return the ASGI application.

    Args:
        desk: What the addresses share.
        most_upload: Bytes of an uploaded file.
    """
    app = FastAPI(title="finegraft ui", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk = desk
    for part in _ROUTES:
        app.include_router(part.router)
    app.add_api_route("/", _page, methods=["GET", "HEAD"])
    app.add_api_route("/favicon.ico", _nothing, methods=["GET", "HEAD"])
    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), name="static")
    app.add_exception_handler(FinegraftError, _deliberate)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)
    return Guard(app, desk.sessions, desk.port, most_upload)


def _page() -> Response:
    file = STATIC / "index.html"
    return FileResponse(file) if file.is_file() else HTMLResponse(_MISSING)


def _nothing() -> Response:
    return Response(status_code=204)


async def _deliberate(request: Request, error: Any) -> Response:
    return replies.error(error)


async def _invalid(request: Request, error: Any) -> Response:
    lines = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()]
    return replies.error(_bad("; ".join(lines[:5])))


async def _http(request: Request, error: Any) -> Response:
    if isinstance(error.__cause__, FinegraftError):  # raised while the body was read
        return replies.error(error.__cause__)
    if error.status_code in (404, 405):
        unknown = ConfigError(
            "FG-UI-010",
            f"there is nothing at {request.method} {request.url.path[:120]}",
            allowed="the addresses that the page uses",
            fix="reload the page; it may be older than the server",
        )
        return replies.error(unknown)
    return replies.error(_bad(str(error.detail)[:300]))


async def _bug(request: Request, error: Any) -> Response:
    """What no code here expected; the traceback goes to the terminal."""
    found = ConfigError(
        "FG-UI-024",
        f"unexpected {type(error).__name__}: {str(error)[:300]}",
        fix="see the terminal where `finegraft ui` runs; it is a bug, please report it",
    )
    return replies.reply({"error": replies.error_values(found)}, 500)


def _bad(found: str) -> ConfigError:
    return ConfigError(
        "FG-UI-009",
        found,
        allowed="what the page sends",
        fix="reload the page; it may be older than the server",
    )

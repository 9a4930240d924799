"""Trying a run: loading it, asking both models, ending it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from finegraft.ui import replies, trials
from finegraft.ui.commands import text_of
from finegraft.ui.desk import At
from finegraft.ui.streams import Events

router = APIRouter()


@router.post("/api/try")
async def start(body: dict[str, Any], at: At) -> Response:
    """Load a run."""
    trial = await at.trials.start(at.space.run(text_of(body, "run")))
    return replies.reply(trial.as_dict(), 201)


@router.get("/api/try")
def listing(at: At) -> Response:
    """What is loaded."""
    return replies.reply({"tries": [trial.as_dict() for trial in at.trials.all()]})


@router.get("/api/try/{name}")
def one(name: str, at: At) -> Response:
    """Whether it is loaded."""
    return replies.reply(at.trials.get(name).as_dict())


@router.delete("/api/try/{name}")
async def stop(name: str, at: At) -> Response:
    """End it."""
    await at.trials.stop(name)
    return Response(status_code=204)


@router.post("/api/try/{name}/chat")
async def chat(name: str, body: dict[str, Any], at: At) -> Response:
    """Ask one of the two."""
    trial = at.trials.get(name)
    question = trials.asked(trial, body)
    return Events(at.trials.chat(trial, question, at.feeds.closed))

"""The form of a training: its fields, its check, its forecast."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from finegraft.ui import forms, replies
from finegraft.ui.commands import wrong
from finegraft.ui.desk import At
from finegraft.ui.workspace import RUNS

router = APIRouter()


@router.get("/api/schema")
def schema() -> Response:
    """Fields of the form."""
    return replies.reply(forms.schema())


@router.post("/api/settings/check")
def check(body: dict[str, Any], at: At) -> Response:
    """Whether settings hold, as file and as command line."""
    form = _form(body, at)
    if not form.name:
        form = dataclasses.replace(form, name=at.space.free_name(RUNS, "run"))
    config = form.config.model_copy(update={"output": f"{RUNS}/{form.name}"})
    return replies.reply(
        {
            "settings": config.model_dump(mode="json"),
            "command": form.command("train"),
            "yaml": config.to_yaml(),
        }
    )


@router.post("/api/forecast")
def forecast(body: dict[str, Any], at: At) -> Response:
    """What the run would take."""
    return replies.reply(at.forecasts.of(_form(body, at)))


def _form(body: dict[str, Any], at: At) -> forms.Form:
    settings = body.get("settings")
    if not isinstance(settings, dict):
        raise wrong("settings", settings, "an object of settings")
    return forms.read(settings, at.space)

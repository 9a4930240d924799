"""Runs as the page shows them: a list, one in detail, stopping, notes.

What: values from ``training.report`` and from a ``Record``. How: what a folder does not say yet is
said by the job that makes it. Constraint: a run that was started in a terminal is shown and stopped
like one that was started here.

Units: seconds, bytes, steps.
"""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Any

from finegraft.core import alone
from finegraft.core.errors import ConfigError
from finegraft.core.paths import storage_error, write_whole
from finegraft.training.report import read
from finegraft.ui.jobs import Job, Jobs
from finegraft.ui.processes import Process
from finegraft.ui.record import Record, Records
from finegraft.ui.workspace import Workspace

NOTES = "notes.txt"
_MOST_NOTES = 20_000  # letters
_MOST_NOTE_BYTES = 4 * _MOST_NOTES
_AT_WORK = ("running", "waiting")


def listing(space: Workspace, jobs: Jobs) -> list[dict[str, Any]]:
    """Every run, the newest first; also those whose folder is not there yet."""
    found = [brief(path, space) for path in read.runs(space.runs)]
    paths = {one["path"] for one in found}
    for job in jobs.all("train"):
        if job.run and job.run not in paths and job.state == "running":
            paths.add(job.run)
            found.append(_coming(job))
    return sorted(found, key=lambda run: -(run["began"] or 0.0))


def _coming(job: Job) -> dict[str, Any]:
    """A run that its process has not made the folder of."""
    unknown = ("steps", "loss", "eval_loss", "tokens_per_second", "model", "method", "data", "task")
    return {
        "name": str(job.run).removeprefix("runs/"),
        "path": job.run,
        "state": "waiting",
        "step": 0,
        **dict.fromkeys((*unknown, "error")),
        "seconds": job.seconds,
        "began": job.began,
        "notes": "",
        "job": job.id,
    }


def brief(run: Path, space: Workspace) -> dict[str, Any]:
    """One run in one line."""
    line = read.summary(run)
    return {
        "name": run.relative_to(space.runs).as_posix(),
        "path": space.name_of(run),
        "state": line.state,
        "step": line.step,
        "steps": line.total_steps,
        "loss": line.loss,
        "eval_loss": line.eval_loss,
        "tokens_per_second": line.tokens_per_second,
        "seconds": line.seconds,
        "model": line.model,
        "method": line.method,
        "task": line.task,
        "data": line.data,
        "error": line.error,
        "began": line.started,
        "notes": notes(run),
        "job": None,
    }


def detail(run: Path, space: Workspace, records: Records, jobs: Jobs) -> dict[str, Any]:
    """Everything about one run but its curves."""
    record, values = records.of(run), brief(run, space)
    job = jobs.at_work_on(values["path"])
    at_work = values["state"] in _AT_WORK
    end = record.last("end")
    return {
        **values,
        "job": job.id if job else None,
        "config": record.last("run").get("config") or {},
        "versions": record.last("run").get("versions") or {},
        "hardware": record.last("run").get("hardware") or {},
        "command": f"finegraft report {shlex.quote(values['path'])}",
        "commands": _commands(values["path"]),
        "phase": record.last("phase").get("name") if at_work else None,
        "summary": end or record.last("interrupted") or record.last("failed") or None,
        "start": record.last("start") or None,
        "forecast": record.last("forecast") or None,
        "actual": _actual(record, end, run),
        "eta_seconds": record.last("step").get("eta_seconds") if at_work else None,
        "before_after": record.last("before_after") or None,
        "has_report": (run / "report" / "index.html").is_file(),
        "can_stop": at_work,
        "can_resume": not at_work
        and values["state"] != "finished"
        and (run / "config.yaml").is_file(),
        "warnings": _warnings(record),
        "notices": [e.get("message") for e in record.all("notice")][-20:],
        "offset": record.offset,
    }


def _commands(path: str) -> dict[str, str]:
    run = shlex.quote(path)
    return {
        "watch": f"finegraft report {run}",
        "resume": f"finegraft resume {run}",
        "chat": f"finegraft chat {run}",
        "serve": f"finegraft serve {run}",
        "eval": f"finegraft eval {run} --vs base",
    }


def _actual(record: Record, end: dict[str, Any], run: Path) -> dict[str, Any]:
    """What the forecast said, as it turned out so far."""
    memory = record.curves["memory_bytes"].values
    step = record.last("step")
    return {
        "peak_memory_bytes": end.get("peak_memory_bytes") or (int(max(memory)) if memory else None),
        "seconds": end.get("seconds", step.get("seconds")),
        "disk_bytes": sum(p.lstat().st_size for p in run.rglob("*") if p.is_file()),
    }


def _warnings(record: Record) -> list[dict[str, Any]]:
    """What the rows and the watch over training said, and what ended it."""
    found = [
        {"code": None, "severity": "warning", "message": text, "cause": None, "cure": None}
        for text in record.last("data").get("warnings") or []
    ]
    keys = ("code", "severity", "step", "message", "cause", "cure")
    found += [{key: event.get(key) for key in keys} for event in record.all("watch")]
    failed = record.last("failed")
    if failed and failed.get("code") not in {one["code"] for one in found}:
        more = {"cause": None, "cure": None}
        told = {"code": failed.get("code"), "message": failed.get("message")}
        found.append({**told, "severity": "error", **more})
    return found


def stop(run: Path, name: str, record: Record) -> None:
    """Ask the process of a run to finish its step, save and end.

    Raises:
        ConfigError: FG-UI-017, there is no such process on this machine.
    """
    about = record.last("run").get("process") or {}
    here = about.get("host") == socket.gethostname() and "pid" in about
    state = read.summary(run).state
    if state in _AT_WORK and here and Process(about["pid"], about["started"]).signal():
        return
    raise ConfigError(
        "FG-UI-017",
        f"no process on this machine is at work on run '{name}' ({state})",
        allowed="a run that is waiting or running here",
        fix="a stopped run goes on with Resume; one on another computer is stopped there",
    )


def require_idle(run: Path, name: str) -> None:
    """Prove that nobody is at work on a run.

    Raises:
        ConfigError: FG-UI-016.
    """
    if alone.in_use(run) or read.summary(run).state in _AT_WORK:
        raise ConfigError(
            "FG-UI-016",
            f"run '{name}' is at work",
            allowed="a run that has ended or was stopped",
            fix="stop it first, and wait until its state is stopped",
        )


def notes(run: Path) -> str:
    """What a person has written about a run."""
    try:
        with open(run / NOTES, "rb") as text:
            return text.read(_MOST_NOTE_BYTES).decode("utf-8", "replace")[:_MOST_NOTES]
    except OSError:
        return ""


def write_notes(run: Path, text: Any) -> None:
    """Keep notes in the run's folder; no file for no text.

    Raises:
        ConfigError: FG-UI-009, too long or no text.
        StorageError: FG-DISK-001 to FG-DISK-003.
    """
    if not isinstance(text, str) or len(text) > _MOST_NOTES:
        raise ConfigError(
            "FG-UI-009",
            "the field 'text' is not text, or too long",
            allowed=f"up to {_MOST_NOTES:,} letters",
            fix="shorten the notes; a file in the run's folder may be longer",
        )
    if text.strip():
        write_whole(run / NOTES, text.encode("utf-8", "replace").decode())
        return
    try:
        (run / NOTES).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, run / NOTES) from error

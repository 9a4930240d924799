"""Several processes: what ``finegraft train --nproc`` starts, and what each of them runs.

What: ``run_launched`` starts workers, waits for them and tells their result or the error that
explains it; ``python -m finegraft.cli.launch FOLDER`` is a worker. How: a folder of this job holds
the configuration, and how each worker ended; the first worker draws progress on the same terminal.
Constraint: the launching process loads no model, and only the first worker prints. Trade-off: the
result of a launched run is what ``--json`` shows, without the model in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finegraft.cli.output import Output, Stopped, debugging, quiet_datasets, quiet_libraries
from finegraft.cli.progress import progress
from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.hardware import facts
from finegraft.core.journal import read_events
from finegraft.core.process import give_back_memory, keep_freed_memory
from finegraft.core.schema import TrainConfig, build
from finegraft.data import sources, stdin

_JOB, _RESULT, _STARTED = "job.json", "result.json", "started"
_TOLD = ("failed", "stopped", "end", "interrupted")


@dataclass(frozen=True)
class Machines:
    """Where this process stands among the machines, and how often a loss is answered."""

    node_rank: int = 0
    rendezvous: str = ""
    max_restarts: int = 3


def wanted(config: TrainConfig) -> bool:
    """Whether a configuration asks for more than this process."""
    return config.nproc * config.nnodes > 1


def require_possible(config: TrainConfig, machines: Machines) -> None:
    """Prove that the options of a launch go together.

    Raises:
        ConfigError: FG-DIST-007.
    """
    problem = None
    if not wanted(config):
        if machines.rendezvous or machines.node_rank:
            problem = ("--rendezvous or --node-rank without --nnodes", "--nnodes 2")
    elif not 0 <= machines.node_rank < config.nnodes:
        problem = (
            f"--node-rank {machines.node_rank} of {config.nnodes} machines",
            f"--node-rank {config.nnodes - 1}",
        )
    elif config.nnodes > 1 and not machines.rendezvous:
        problem = (
            f"--nnodes {config.nnodes} without a place to meet",
            "--rendezvous HOST:29400, with the name or address of machine 0",
        )
    elif machines.max_restarts < 0:
        problem = (f"--max-restarts {machines.max_restarts}", "--max-restarts 0")
    elif facts().gpus and config.nproc > len(facts().gpus):
        count = len(facts().gpus)
        problem = (f"--nproc {config.nproc} with {count} GPU(s)", f"--nproc {count}")
    elif any(p.path == stdin.NAME for p in sources.parts(config.data)):
        problem = ("rows from standard input, which only one process can read", "a file")
    if problem:
        raise ConfigError(
            "FG-DIST-007",
            problem[0],
            allowed="--nproc N on one machine; on each of M machines the same command with "
            "--nnodes M, --rendezvous HOST:PORT and its own --node-rank 0 to M-1",
            fix=problem[1],
        )


def run_launched(
    out: Output, config: TrainConfig, machines: Machines, *, resume: bool = False
) -> Any:
    """Train in several processes and return what ``cli.train`` shows.

    Raises:
        FinegraftError: of the worker that explains the end; FG-DIST-008, workers were lost more
            often than allowed; FG-DIST-009, a bug in one of them.
    """
    require_possible(config, machines)
    with out.busy("starting"), quiet_libraries():
        from finegraft.training.distributed import launcher
    folder = Path(tempfile.mkdtemp(prefix="finegraft-job-"))
    try:
        values = {"config": config.model_dump(mode="json"), "resume": resume}
        (folder / _JOB).write_text(json.dumps(values), encoding="utf-8")
        job = launcher.Job(
            "finegraft.cli.launch",
            folder,
            config.nproc,
            config.nnodes,
            machines.node_rank,
            machines.rendezvous,
            machines.max_restarts,
        )
        with _environment(job):
            threads = os.environ["OMP_NUM_THREADS"]
            out.note(f"{job.processes} processes, {threads} thread(s) each")
            endings = launcher.launch(job, out.note)
        if out.err.is_terminal:
            out.err.show_cursor(True)  # a worker that was killed could not
        if endings:
            raise _explained(launcher, endings, config, machines)
        return _result(folder, config, machines)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(job: Any) -> Iterator[None]:
    """Threads and the network interface of the workers, where nobody chose them."""
    from finegraft.training.distributed import addresses

    chosen = {"OMP_NUM_THREADS": str(max(1, facts().cores // job.nproc))}
    name = addresses.interface(addresses.local(job.rendezvous))
    if name is not None:
        chosen["GLOO_SOCKET_IFNAME"] = name
    added = {k: v for k, v in chosen.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _explained(launcher: Any, endings: list[Any], config: TrainConfig, machines: Machines) -> Any:
    """The error to show for workers that did not come to a good end; told once, with the rank."""
    cause = launcher.first_cause(endings)
    resume = f"finegraft resume {config.output}"
    if cause.stopped:
        return Stopped("Ctrl-C", resume)
    of = f"process {cause.rank} of {config.nproc * config.nnodes}"
    error = cause.error
    if error is None:
        _record(config, "FG-DIST-008", cause.words)
        return FinegraftError(
            "FG-DIST-008",
            f"{cause.words} (restarts allowed: {machines.max_restarts})",
            allowed="up to --max-restarts losses of a process",
            fix=f"{resume} goes on from the last checkpoint",
        )
    if error["code"] is None:
        _record(config, "FG-DIST-009", f"{of}: {cause.words}")
        return FinegraftError(
            "FG-DIST-009",
            f"{of}: {cause.words}",
            fix="run the command again with FINEGRAFT_DEBUG=1 set to see where it comes from",
        )
    found = error["found"] if cause.rank == 0 else f"{of}: {error['found']}"
    if cause.rank:
        _record(config, error["code"], found)
    return FinegraftError(error["code"], found, allowed=error["allowed"], fix=error["fix"])


def _record(config: TrainConfig, code: str, words: str) -> None:
    """Put what ended the run into its events, where the first worker could not."""
    file = Path(config.output) / "events.jsonl"
    if not file.is_file():
        return
    events = read_events(file)
    if events and events[-1]["type"] in _TOLD:
        return
    event = {"type": "failed", "time": round(time.time(), 3), "code": code, "message": words}
    with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(event) + "\n")


def _result(folder: Path, config: TrainConfig, machines: Machines) -> Any:
    """What the first worker wrote; on other machines only that it is done."""
    file = folder / _RESULT
    if not file.is_file():
        return SimpleNamespace(
            run=Path(config.output), elsewhere=True, node=machines.node_rank, interrupted=False
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in ("run", "adapter"):
        values[name] = Path(values[name]) if values[name] else None
    return SimpleNamespace(**values)


# What follows runs in a worker.


def _worker(folder: Path) -> None:
    """Be one of the processes of a job."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the launcher ends a group without a member
    rank = int(os.environ["RANK"])
    os.dup2(2, 1)  # stdout is the launching process's own
    values = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    (keep_freed_memory if values["config"]["sharding"] == "none" else give_back_memory)()
    _watch_launcher(os.getppid())
    from finegraft.training.distributed import launcher, world

    if not debugging():
        warnings.simplefilter("ignore")  # other libraries' advice to programmers
        sys.excepthook = lambda *_: os._exit(1)  # told by the launcher, once

    def end(words: str, error: dict[str, Any] | None = None, stopped: bool = False) -> None:
        told = {"words": words, "error": error, "stopped": stopped}
        file = launcher.ending_file(folder, rank)
        file.write_text(json.dumps(told), encoding="utf-8")

    try:
        with quiet_libraries(), quiet_datasets():
            world.join(launcher.attempt_file(folder).read_text(encoding="utf-8"))
            result = _trained(folder, build(values["config"]), values["resume"], rank)
        if rank == 0:
            (folder / _RESULT).write_text(json.dumps(result), encoding="utf-8")
        world.leave()
    except FinegraftError as error:
        end(error.found, error.as_dict())
        _leave_at_once(1)
    except KeyboardInterrupt:
        end("stopped at once", stopped=True)
        _leave_at_once(130)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        if world.is_lost(error):
            end(f"process {rank} lost its connection to the others")
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({place.filename}:{place.lineno})"
            end(words + where, {"code": None, "found": words, "allowed": None, "fix": None})
        raise


def _leave_at_once(status: int) -> None:
    """End without waiting for a group whose other members may wait for this one."""
    sys.stderr.flush()
    os._exit(status)


def _watch_launcher(parent: int) -> None:
    """Stop after the step when the launching process is gone."""
    import threading

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=look, daemon=True).start()


def _trained(folder: Path, config: TrainConfig, resume: bool, rank: int) -> dict[str, Any]:
    """Train, and return what the launching process shows."""
    from finegraft.cli.train import summary
    from finegraft.training import run
    from finegraft.training.distributed import launcher

    again = launcher.restart_file(folder)
    notes = [json.loads(again.read_text(encoding="utf-8"))["words"]] if again.is_file() else []
    resume = resume or (folder / _STARTED).exists()
    with progress(Output(False).err) if rank == 0 else contextlib.nullcontext() as shown:
        listener = _noting(shown, folder / _STARTED, notes) if rank == 0 else None
        result = run.train(config, listener=listener, resume=resume, notes=notes)
    return {**summary(result), "task": result.task, "metrics": result.metrics}


def _noting(shown: Any, started: Path, told: list[str]) -> Callable[[dict[str, Any]], None]:
    """Also keep that there is a run folder now, so that a new start goes on with it.

    Args:
        shown: Draws what happens.
        started: The file that says so.
        told: Notices that the launching process has shown already.
    """

    def listen(event: dict[str, Any]) -> None:
        if event["type"] == "phase" and event["name"] == "training":
            started.touch()
        if event.get("message") not in told:
            shown(event)

    return listen


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))

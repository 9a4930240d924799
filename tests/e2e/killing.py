"""A warm process that forks command lines, so that a test can kill one hundred of them.

What: ``Warm`` starts this file as a process that imports the libraries once and then forks a child
for each command; the child is a process of its own, and SIGKILL is the real one. How: one JSON
object a line each way. A child may also kill itself at a chosen operation on files (an audit hook
counts them), which hits instants that no clock does. Constraint: nothing is imported that starts a
thread, because a fork takes one thread along.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
_FILLER = ".filler"


class Warm:
    """The test's side.

    Args:
        log: File for what the children print.
        environment: Of the process and its children.
        prefix: Words before the interpreter, ``unshare -m`` say.
    """

    def __init__(self, log: Path, environment: dict[str, str], prefix: tuple[str, ...] = ()):
        self.log = log
        self.process = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._answer()  # it has imported everything

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def start(self, *words: object, cwd: Path, die: dict[str, Any] | None = None) -> int:
        """Fork a command line and return its process number.

        Args:
            words: Of the command line.
            cwd: Where it runs.
            die: ``at``: the number of the operation on files (of those whose path contains
                ``match``, and of the kind ``event`` if given) before which it kills itself; 0 only
                counts, and the count is what ``wait`` adds.
        """
        given = {"words": list(map(str, words)), "cwd": str(cwd), "die": die}
        return self.do("start", log=str(self.log), **given)["pid"]

    def wait(self) -> dict[str, int]:
        """``status`` of the command, negative for the signal that ended it; ``count``."""
        return self.do("wait")

    def run(self, *words: object, cwd: Path, die: dict[str, Any] | None = None) -> dict[str, int]:
        """Start and wait."""
        self.start(*words, cwd=cwd, die=die)
        return self.wait()

    def do(self, what: str, **values: Any) -> dict[str, Any]:
        """Send one command and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm process is gone"
        return json.loads(line)


def _import_everything() -> Any:
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    from finegraft.cli import main
    from finegraft.training import run  # noqa: F401

    return main.app


def _serve() -> None:
    app = _import_everything()
    child, counts = 0, 0

    def answer(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    answer(ready=True)
    for line in sys.stdin:
        given = json.loads(line)
        if given["do"] == "start":
            counts, writes = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(counts)
                _be_a_command(app, given, writes)
            os.close(writes)
            answer(pid=child)
        elif given["do"] == "wait":
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with os.fdopen(counts) as told:
                answer(status=status, count=int(told.read() or 0))
        elif given["do"] == "fill":
            answer(bytes=_fill(Path(given["folder"])))
        elif given["do"] == "free":
            (Path(given["folder"]) / _FILLER).unlink()
            answer(done=True)
        elif given["do"] == "copy":
            shutil.copytree(given["source"], given["target"])
            answer(done=True)
        elif given["do"] == "remove":
            shutil.rmtree(given["folder"], ignore_errors=True)
            answer(done=True)
        elif given["do"] == "exists":
            answer(exists=Path(given["path"]).exists())


def _be_a_command(app: Any, given: dict[str, Any], writes: int) -> None:
    """Become the command line; never returns."""
    status = 1
    with contextlib.suppress(BaseException):
        log = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for own, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(own, number)
        os.chdir(given["cwd"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        count = _count_files(**given["die"]) if given["die"] else [0]
        sys.argv = ["finegraft", *given["words"]]
        try:
            app(prog_name="finegraft")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001  told in the log
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writes, str(count[0]).encode())
    os._exit(status)


def _count_files(at: int, match: str, event: str = "") -> list[int]:
    """Count operations on files, and end this process before the ``at``-th."""
    count = [0]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in _EVENTS or (event and name != event):
            return
        if not any(match in str(a) for a in arguments[:2] if isinstance(a, str | os.PathLike)):
            return
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _fill(folder: Path) -> int:
    """Take all room that is left on the disk of ``folder``; return the bytes."""
    taken = 0
    with open(folder / _FILLER, "ab") as filler:
        for step in (1 << 22, 1 << 16, 1 << 12):
            while True:
                try:
                    os.posix_fallocate(filler.fileno(), taken, step)
                except OSError:
                    break
                taken += step
    return taken


if __name__ == "__main__":
    _serve()

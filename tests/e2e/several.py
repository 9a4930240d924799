"""A warm process that forks the processes of one run, so that a test need not import N times.

What: ``Several`` starts this file once; each ``train`` forks as many children as the run has
processes, which join a group of their own and train. How: the test holds the store that they meet
at. Constraint: the children are what a worker of the launcher is, but for the launcher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import uuid
from pathlib import Path
from typing import Any


class Several:
    """The test's side.

    Args:
        log: File for what the children print.
        environment: Of the process and its children.
    """

    def __init__(self, log: Path, environment: dict[str, str]):
        import torch.distributed as dist

        self.log = log
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), "it could not import"

    def __enter__(self) -> Several:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def train(self, values: dict[str, Any], cwd: Path, resume: bool = False) -> list[int]:
        """Train a configuration in its processes; return their statuses by rank."""
        given = {"values": values, "cwd": str(cwd), "resume": resume, "log": str(self.log)}
        given |= {"port": self.store.port, "attempt": uuid.uuid4().hex}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def good(self, values: dict[str, Any], cwd: Path, resume: bool = False) -> Path:
        """The same for a run that must succeed; return its folder."""
        statuses = self.train(values, cwd, resume)
        assert set(statuses) == {0}, f"{statuses}\n{self.log.read_text()[-4000:]}"
        return cwd / values["output"]


def _serve() -> None:
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    from finegraft.training import run  # noqa: F401

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        given = json.loads(line)
        count = given["values"].get("nproc", 1)
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                _be_a_worker(given, rank, count)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps(statuses) + "\n")
        sys.stdout.flush()


def _be_a_worker(given: dict[str, Any], rank: int, count: int) -> None:
    """Join, train, leave; never returns."""
    status = 1
    try:
        log = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.chdir(given["cwd"])
        from finegraft.core.schema import build
        from finegraft.training import run
        from finegraft.training.distributed import world

        if count > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                LOCAL_WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(given["port"]),
                GLOO_SOCKET_IFNAME="lo",
            )
            world.join(given["attempt"])
        run.train(build(given["values"]), resume=given["resume"])
        world.leave()
        status = 0
    except BaseException:  # noqa: BLE001  told in the log
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()

"""Start the processes of a run, watch them, and start them again after a loss.

What: ``launch`` runs one machine's share of a job to its end. How: torch.distributed's elastic
agent (that of torchrun): the machines meet at a rendezvous, each starts its workers, and a lost
worker makes all of them start again from the last checkpoint. Constraint: a mistake that would
happen again (any deliberate error, any bug) ends the job at once; a kill or a lost connection is
tried again, ``restarts`` times. This process loads no model. Trade-off: workers are always started
anew together, because a group of processes cannot go on without one of its members.

Units: seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic import metrics
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.hardware import facts
from finegraft.training.distributed import addresses

logger = logging.getLogger(__name__)

GRACE = 5  # for a worker to end itself before it is killed
_LOOK_EVERY = 0.25
_BEAT_EVERY = 2.0
SILENCE = 30.0  # of another machine, after which it counts as lost
_STORE_WAIT = 20  # for one answer of the rendezvous
_RUN_ID = "finegraft"


@dataclass(frozen=True)
class Job:
    """One machine's share of a job.

    Attributes:
        entry: Module that a worker runs with ``folder`` as its argument.
        folder: Where workers say how they ended; of this machine alone.
        nproc: Workers on this machine.
        nnodes: Machines.
        node: Number of this machine, from 0; the first one holds the rendezvous.
        rendezvous: ``host:port``; empty for one machine.
        restarts: How often a lost worker is answered by a new start.
        join: How long to wait for the other machines.
    """

    entry: str
    folder: Path
    nproc: int
    nnodes: int = 1
    node: int = 0
    rendezvous: str = ""
    restarts: int = 3
    join: int = 600

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.nproc * self.nnodes


@dataclass(frozen=True)
class Ending:
    """How a worker ended.

    Attributes:
        rank: Of the worker.
        error: A deliberate error or a bug; None for a kill and for a lost connection.
        words: What happened.
        stopped: It was told to stop at once.
    """

    rank: int
    error: dict[str, Any] | None = None
    words: str = ""
    stopped: bool = False

    @property
    def final(self) -> bool:
        """Whether a new start would end the same way."""
        return self.error is not None or self.stopped


@dataclass
class _Wish:
    """What a person asked of the job."""

    count: int = 0
    signals: list[str] = field(default_factory=list)


def ending_file(folder: Path, rank: int) -> Path:
    """Where a worker says how it ended."""
    return folder / f"ending-{rank}.json"


def restart_file(folder: Path) -> Path:
    """Where workers read why they were started again."""
    return folder / "restart.json"


def attempt_file(folder: Path) -> Path:
    """Where workers read the name of this start."""
    return folder / "attempt"


class _Agent(LocalElasticAgent):
    """torchrun's agent, which also knows final endings and machines that fall silent."""

    def __init__(self, spec: WorkerSpec, job: Job, wish: _Wish, tell: Callable[[str], None]):
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=60, shutdown_timeout=GRACE)
        self.job, self.wish, self.tell = job, wish, tell
        self.endings: list[Ending] = []
        self._beats: dict[int, tuple[int, float]] = {}
        self._beat, self._beaten = 0, 0.0

    def signal_workers(self, number: int) -> bool:
        """Send a signal to every worker of this machine; False where there is none."""
        pids = list(self._pcontext.pids().values()) if self._pcontext else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(pids)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = GRACE) -> None:
        super()._shutdown(death_sig, min(timeout, GRACE))

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> Any:
        """Machine 0 has the first ranks, in whichever order the machines came."""
        if store.add(f"machine/{self.job.node}", 1) > 1:
            raise ConfigError(
                "FG-DIST-004",
                f"two machines call themselves --node-rank {self.job.node}",
                allowed=f"each of 0 to {self.job.nnodes - 1} once",
                fix="give every machine its own --node-rank",
            )
        self._beats, self._beat = {}, 0
        if self.job.node == 0:
            store.set("attempt", uuid.uuid4().hex)
        attempt_file(self.job.folder).write_bytes(store.get("attempt"))
        return super()._assign_worker_ranks(store, self.job.node, group_world_size, spec)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for file in self.job.folder.glob("ending-*.json"):
            file.unlink()
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and (silent := self._silent(worker_group)):
            self._lost(f"machine {silent[0]} has not answered for {SILENCE:g} s")
            return RunResult(state=WorkerState.UNHEALTHY)
        if result.state == WorkerState.FAILED:
            self.endings = [
                _ending(self.job.folder, rank, failure) for rank, failure in result.failures.items()
            ]
            if any(ending.final for ending in self.endings) or self.wish.count:
                self._remaining_restarts = 0
            else:
                self._lost(first_cause(self.endings).words)
        return result

    def _silent(self, group: WorkerGroup) -> list[int]:
        """Other machines without a sign of life; this one gives its own."""
        now = time.monotonic()
        if self.job.nnodes == 1 or now - self._beaten < _BEAT_EVERY:
            return []
        self._beaten, self._beat = now, self._beat + 1
        store = group.store
        store.set(f"beat/{self.job.node}", str(self._beat))
        silent = []
        for node in range(self.job.nnodes):
            if node == self.job.node or not store.check([f"beat/{node}"]):
                continue
            beat = int(store.get(f"beat/{node}"))
            if self._beats.get(node, (-1, 0.0))[0] != beat:
                self._beats[node] = (beat, now)
            elif now - self._beats[node][1] > SILENCE:
                silent.append(node)
        return silent

    def _lost(self, words: str) -> None:
        """Say why there is a new start, here and to the workers."""
        left = self._remaining_restarts
        if left:
            number, most = self.job.restarts - left + 1, self.job.restarts
            words = f"{words}; starting again from the last checkpoint (restart {number} of {most})"
            restart_file(self.job.folder).write_text(json.dumps({"words": words}))
            self.tell(words)


def first_cause(endings: list[Ending]) -> Ending:
    """The ending that explains the others: an error, else a kill, else a lost connection."""

    def weight(ending: Ending) -> tuple[bool, bool, bool, int]:
        lost = "connection" in ending.words
        return (ending.error is None, not ending.stopped, lost, ending.rank)

    return min(endings, key=weight)


def _ending(folder: Path, rank: int, failure: Any) -> Ending:
    """What a worker wrote, or what its exit status says."""
    file = ending_file(folder, rank)
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        return Ending(rank, values.get("error"), values["words"], values.get("stopped", False))
    status = failure.exitcode
    if status < 0:
        name = signal.Signals(-status).name
        after = " after the others had ended" if name == "SIGTERM" else ""
        if after:
            return Ending(rank, words=f"process {rank} lost its connection to the others")
        hint = "; the memory may have ended" if name == "SIGKILL" else ""
        return Ending(rank, words=f"process {rank} was ended by {name}{hint}")
    return Ending(rank, words=f"process {rank} ended with status {status}")


def launch(job: Job, tell: Callable[[str], None]) -> list[Ending]:
    """Run this machine's workers until they are done.

    Args:
        job: What to run.
        tell: Shows one line to the person.

    Returns:
        How the workers ended that did not come to a good end; empty when all did.

    Raises:
        ConfigError: FG-DIST-004, a machine number twice; FG-DIST-005, a rendezvous that is none.
        FinegraftError: FG-DIST-006, the other machines did not come.
    """
    wish, box = _Wish(), []
    metrics.initialize_metrics(metrics.MetricsConfig({}))
    with _forwarding(box, wish, tell), _quiet_torch():
        again = job.restarts
        while True:
            try:
                return _attempt(job, box, wish, tell)
            except (RendezvousTimeoutError, TimeoutError) as error:
                raise _nobody(job) from error
            except (RendezvousError, DistError, ConnectionError) as error:
                logger.debug("rendezvous lost: %s", error)
                if not again or wish.count or job.nnodes == 1:
                    raise _nobody(job) from error
                again -= 1
                words = f"the connection to {job.rendezvous} was lost; joining again"
                restart_file(job.folder).write_text(json.dumps({"words": words}))
                tell(words)
                time.sleep(1)


def _attempt(job: Job, box: list[_Agent], wish: _Wish, tell: Callable[[str], None]) -> list[Ending]:
    address = addresses.local(job.rendezvous)
    endpoint = job.rendezvous or "127.0.0.1:0"
    if job.nnodes > 1 and job.node == 0:
        tell(f"waiting for {job.nnodes - 1} more machine(s) at {endpoint}")
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id=_RUN_ID,
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        local_addr=address,
        is_host=str(job.node == 0).lower(),
        timeout=job.join,
        read_timeout=_STORE_WAIT,
        join_timeout=job.join,
    )
    spec = WorkerSpec(
        role="finegraft",
        local_world_size=job.nproc,
        entrypoint=sys.executable,
        args=("-m", job.entry, str(job.folder)),
        rdzv_handler=_handler(parameters, job),
        max_restarts=job.restarts,
        monitor_interval=_LOOK_EVERY,
        local_addr=address,
        virtual_local_rank=bool(facts().gpus),  # each process sees its own GPU, as the first one
    )
    agent = _Agent(spec, job, wish, tell)
    box[:] = [agent]
    closed = True
    try:
        result = agent.run()
        return agent.endings if result is None or result.is_failed() else []
    except (RendezvousError, DistError, ConnectionError):
        closed = False  # this machine comes back
        raise
    finally:
        if closed:
            with contextlib.suppress(RendezvousError, DistError):
                spec.rdzv_handler.shutdown()


def _handler(parameters: RendezvousParameters, job: Job) -> Any:
    """Meet the others; the first machine may be some time in coming."""
    until = time.monotonic() + job.join
    while True:
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousError:
            if job.node == 0 or time.monotonic() > until:
                raise
            time.sleep(1)


def _nobody(job: Job) -> FinegraftError:
    return FinegraftError(
        "FG-DIST-006",
        f"the {job.nnodes} machines did not meet at {job.rendezvous or 'this machine'}",
        allowed="a host and port of machine 0 that every machine reaches",
        fix="start the same command on every machine, with its own --node-rank, and look at "
        "firewalls",
    )


@contextlib.contextmanager
def _forwarding(box: list[_Agent], wish: _Wish, tell: Callable[[str], None]) -> Iterator[None]:
    """Hand Ctrl-C and SIGTERM on to the workers as SIGINT; a third one kills them."""

    def handle(number: int, frame: Any) -> None:
        wish.count += 1
        wish.signals.append(signal.Signals(number).name)
        kill = wish.count > 2
        if not box or not box[0].signal_workers(signal.SIGKILL if kill else signal.SIGINT):
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    kept = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # or the agent would take them away
    try:
        yield
    finally:
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE")
        if kept is not None:
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = kept
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """The agent's log is for programmers; what a person needs is told here."""
    log = logging.getLogger("torch.distributed.elastic")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)

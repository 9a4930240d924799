"""Who this process is among those of a run, and the few words that they exchange.

What: ``here`` says which of how many, ``share`` hands the first one's value to all, ``total`` adds
numbers up. How: torch.distributed, gloo between CPUs and nccl between GPUs; one process has no
group, and every function returns at once. Constraint: each of these calls is made by all processes
or by none, in the same order; ``is_lost`` knows the errors that a process without the others meets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig

# Long enough for the first process to look at the data while the others wait for it.
TIMEOUT = timedelta(minutes=30)
# How gloo, nccl and the store say that somebody is gone.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """One process among those of a run.

    Attributes:
        rank: From 0; the first one writes and prints.
        size: Processes on all machines.
        local_size: Processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1


def here() -> World:
    """This process; alone where no group was joined."""
    if not dist.is_available() or not dist.is_initialized():
        return World()
    size = dist.get_world_size()
    return World(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def join(attempt: str) -> World:
    """Join the group that the launcher's environment names.

    Args:
        attempt: The same in all processes of one start and in no other: what an earlier start left
            in the store leads to processes that are gone.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT
    )
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(attempt, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    return here()


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Return when every process has come here."""
    if here().several:
        dist.barrier()


def share(value: Any) -> Any:
    """Return the first process's ``value`` in all of them."""
    if not here().several:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every process's ``value``, in order of rank."""
    place = here()
    if not place.several:
        return [value]
    found: list[Any] = [None] * place.size
    dist.all_gather_object(found, value)
    return found


def total(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums over all processes; exact for whole numbers below 2**53."""
    if not here().several:
        return list(values)
    sums = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block before the others do: it fetches what they then find."""
    if not here().main:
        wait()
    yield
    if here().main:
        wait()


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process of the group is gone."""
    if isinstance(error, dist.DistError):
        return True
    kinds = (RuntimeError, ConnectionError, TimeoutError)
    return type(error) in kinds and _LOST.search(str(error)) is not None


def require_as_configured(config: TrainConfig) -> None:
    """Prove that there are as many processes as the configuration says.

    Raises:
        ConfigError: FG-DIST-001.
    """
    wanted, there = config.nproc * config.nnodes, here().size
    if wanted != there:
        raise ConfigError(
            "FG-DIST-001",
            f"the configuration is for {wanted} processes (nproc {config.nproc}, nnodes "
            f"{config.nnodes}), and {there} {'is' if there == 1 else 'are'} here",
            allowed="as many processes as configured",
            fix=f"finegraft train --nproc {config.nproc} starts them; --nproc 1 needs no others",
        )


def require_alike(what: dict[str, Any]) -> None:
    """Prove that every process was given the same.

    Args:
        what: Values by name, JSON.

    Raises:
        ConfigError: FG-DIST-002, with the names that differ and the rank.
    """
    if not here().several:
        return
    own = {name: _digest(value) for name, value in what.items()}
    for rank, theirs in enumerate(gathered(own)):
        wrong = [name for name in own if theirs.get(name) != own[name]]
        if wrong:
            raise ConfigError(
                "FG-DIST-002",
                f"process {rank} has other {', '.join(wrong)} than process {here().rank}",
                allowed="the same settings, rows and base model on every machine",
                fix="run the same command on each machine, with the same files in the same place",
            )


def require_seen(path: Path | None) -> None:
    """Prove that every process sees a checkpoint that the first one has found.

    Raises:
        ConfigError: FG-DIST-013, with the ranks that do not.
    """
    blind = [rank for rank, sees in enumerate(gathered(path is None or path.is_dir())) if not sees]
    if blind:
        raise ConfigError(
            "FG-DIST-013",
            f"process {', '.join(map(str, blind))} does not see {path}",
            allowed="a run folder that every machine sees, to go on from a checkpoint",
            fix="put the run folder on a disk that all machines share, in the same place",
        )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

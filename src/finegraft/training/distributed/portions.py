"""The same rows a step for another number of processes.

What: ``for_processes`` gives a configuration another number of processes and as many rows a step
as before. How: the micro-batch stays if it can, and their number in a step makes up for the rest.
Constraint: no row is skipped or used twice when a run goes on elsewhere. Trade-off: numbers that do
not divide the rows of a step are refused.
"""

from __future__ import annotations

from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig


def rows_a_step(config: TrainConfig) -> int:
    """Rows that all processes take in one step."""
    return (
        config.per_device_train_batch_size
        * config.gradient_accumulation_steps
        * config.nproc
        * config.nnodes
    )


def for_processes(config: TrainConfig, nproc: int, nnodes: int) -> TrainConfig:
    """Return ``config`` for ``nproc`` processes on each of ``nnodes`` machines.

    Raises:
        ConfigError: FG-DIST-003, the rows of a step cannot be divided so.
    """
    rows, processes = rows_a_step(config), nproc * nnodes
    if processes < 1 or rows % processes:
        possible = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ConfigError(
            "FG-DIST-003",
            f"{rows} rows a step for {processes} processes",
            allowed=f"{', '.join(map(str, possible))} processes, so that a step stays the same",
            fix=f"--nproc {max(n for n in possible if n <= max(processes, 1))}",
        )
    share = rows // processes
    most = min(config.per_device_train_batch_size, share)
    size = next(b for b in range(most, 0, -1) if share % b == 0)
    return config.model_copy(
        update={
            "nproc": nproc,
            "nnodes": nnodes,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": share // size,
        }
    )

"""``finegraft train --ray``: the same run as a job of a Ray cluster.

What: ``run_on_ray`` hands a configuration to ``training.ray_job`` and draws what the workers tell.
How: their events come through Ray, so the progress is that of a run on this machine. Constraint:
what is shown in the end and on Ctrl-C is that of ``finegraft train``. Trade-off: the model stays
where it was trained; only the run folder comes back.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from finegraft.cli.output import Output, quiet_datasets, quiet_libraries
from finegraft.cli.progress import progress
from finegraft.core.errors import ConfigError
from finegraft.core.schema import TrainConfig

Address = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Train as a Ray job: local, auto or HOST:6379.",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="PLACE",
        help="With --ray: where checkpoints go as well, s3://bucket/folder say.",
    ),
]


def run_on_ray(
    out: Output, config: TrainConfig, address: str | None, storage: str | None, max_restarts: int
) -> Any:
    """Train on Ray with progress on stderr and return what ``cli.train`` shows.

    Raises:
        ConfigError: FG-RAY-009, a storage and no Ray.
    """
    if address is None:
        raise ConfigError(
            "FG-RAY-009",
            f"--storage {storage} without --ray",
            allowed="--storage together with --ray",
            fix="add --ray local, or leave out --storage",
        )
    from finegraft.cli.train import terminable, way_on

    with terminable():
        with out.busy("starting"), quiet_libraries():
            from finegraft.training import ray_job

            ray_job.require_ray()
        with (
            quiet_libraries(),
            quiet_datasets(),
            progress(out.err) as listener,
            way_on(listener.picture, config.output),
        ):
            return ray_job.train(
                config,
                address=address,
                storage=storage,
                max_restarts=max_restarts,
                listener=listener,
            )

"""A run as a job on a Ray cluster; the only place where ray is imported.

What: ``train`` starts a Ray Train job whose workers call ``run.train``, the entry point of every
run, and returns what they return. How: one worker is a plain process, several are a torch group
that Ray makes and ``distributed`` uses; the first worker sends its events to an actor, from which
the calling process passes them on. A worker that is lost is started again and resumes from the
newest checkpoint: the run folder's, or that of ``--storage``. Constraint: the numbers are those of
the same run without Ray. Trade-off: workers train in a thread, so no signal reaches them; Ctrl-C
ends the run at the next event, and it goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finegraft.core.errors import ConfigError, FinegraftError, TrainingError
from finegraft.core.schema import TrainConfig
from finegraft.training import run
from finegraft.training.events import EventLog, Listener
from finegraft.training.ray_storage import Store
from finegraft.training.ray_worker import MARK, work

LOCAL = "local"
MAX_RESTARTS = 3
_LOOK_SECONDS = 0.3
_ANSWER_SECONDS = 10.0
_USAGE = "RAY_USAGE_STATS_ENABLED"


def require_ray() -> None:
    """Raises ConfigError FG-RAY-001 where ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "FG-RAY-001",
            "--ray needs ray, which is not installed",
            allowed="training without it: leave out --ray",
            fix="pip install 'finegraft[ray]'",
        ) from error


def train(
    config: TrainConfig,
    *,
    address: str = LOCAL,
    storage: str | None = None,
    max_restarts: int = MAX_RESTARTS,
    listener: Listener | None = None,
) -> Any:
    """Train a configuration on Ray.

    Args:
        config: The whole configuration; ``nproc`` workers are started.
        address: ``local`` starts Ray on this machine for the length of the run; else that of a
            cluster, ``auto`` or ``HOST:6379``.
        storage: Where checkpoints and the result are copied, see ``ray_storage.Store``.
        max_restarts: How often a lost worker is started again.
        listener: Called with every event of the run.

    Returns:
        What ``RunResult`` has, without model and tokenizer.

    Raises:
        ConfigError: FG-RAY-001 ray is missing, FG-RAY-002 the cluster does not answer, FG-RAY-005
            several machines without a storage, FG-RAY-006 a finished run in the storage,
            FG-RAY-008 what this way of training does not have.
        StorageError: FG-RAY-003, FG-RAY-004.
        TrainingError: FG-RAY-007, the workers were lost more often than allowed.
        FinegraftError: of the run.
    """
    require_ray()
    _require_possible(config)
    run.require_own_keys(config)
    shown = Path(config.output)  # as it was typed
    config = run.anywhere(config)
    config = config.model_copy(update={"output": str(Path(config.output).absolute())})
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).absolute())  # workers have another current folder
    tell = EventLog(listener)
    store = _store(config, storage)
    with _connected(address):
        _require_storage(store, config)
        job = {
            "id": uuid.uuid4().hex,
            "config": config.model_dump(mode="json"),
            "storage": storage,
        }
        found = _run(job, config, max_restarts, listener)
    if "error" in found:
        raise _error(found["error"])
    folder = Path(config.output)
    if store and not (folder / "data.json").is_file():
        store.fetch(folder, lambda words: tell.emit("notice", message=words))
    (folder / MARK).unlink(missing_ok=True)
    values = found["result"]
    adapter = shown / Path(values["adapter"]).name if values["adapter"] else None
    return SimpleNamespace(**{**values, "run": shown, "adapter": adapter})


def _require_possible(config: TrainConfig) -> None:
    if config.nnodes > 1:
        raise ConfigError(
            "FG-RAY-008",
            f"--ray with nnodes {config.nnodes}",
            allowed="--nproc N with --ray; the cluster says on which machines",
            fix=f"--nproc {config.nproc * config.nnodes} instead of --nnodes",
        )


def _store(config: TrainConfig, storage: str | None) -> Store | None:
    """The storage, proved; what is not finished there is gone on with.

    Raises:
        ConfigError: FG-RAY-006.
    """
    if storage is None:
        return None
    store = Store(storage, Path(config.output).name)
    if config.overwrite:
        store.clear()
    latest = store.latest()
    if latest and latest["done"]:
        raise ConfigError(
            "FG-RAY-006",
            f"{store.address} holds a finished run",
            allowed="a new address, or one with an unfinished run, which is gone on with",
            fix="--storage or --output with another name; --overwrite replaces it",
        )
    store.require_writable()
    return store


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray for the block; one that the caller has started stays.

    Raises:
        ConfigError: FG-RAY-002.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _require_answer(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    own = {"include_dashboard": False} if address == LOCAL else {}
    told = os.environ.get(_USAGE)
    os.environ.setdefault(_USAGE, "0")  # ray would report its use over the network
    try:
        ray.init(address=address, **quiet, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise _no_answer(address, error) from error
    finally:
        if told is None:
            os.environ.pop(_USAGE, None)
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would wait for minutes for a cluster that is not there.

    Raises:
        ConfigError: FG-RAY-002.
    """
    place = re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", address)
    if place is None:
        if address in (LOCAL, "auto"):
            return
        raise _no_answer(address, ValueError("it is no HOST:PORT"))
    try:
        socket.create_connection((place[1], int(place[2])), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> ConfigError:
    words = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(
        "FG-RAY-002",
        f"Ray at '{address}' does not answer: {words[0][:300]}",
        allowed="local, auto (the cluster that this machine belongs to), HOST:6379",
        fix="--ray local starts Ray here; `ray status` shows whether a cluster runs",
    )


def _require_storage(store: Store | None, config: TrainConfig) -> None:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if store is None and len(nodes) > 1:
        raise ConfigError(
            "FG-RAY-005",
            f"a cluster of {len(nodes)} machines and no --storage: another machine would not find "
            "the checkpoints of one that is lost",
            allowed="an address that all machines reach",
            fix="--storage s3://bucket/folder, or --storage with a folder that all of them share",
        )


def _run(
    job: dict[str, Any], config: TrainConfig, max_restarts: int, listener: Listener | None
) -> dict[str, Any]:
    """Start the job and pass its events on until it is over."""
    import ray
    import ray.train

    mailbox = ray.remote(num_cpus=0)(_Mailbox).options(max_concurrency=4).remote()
    own = Path(tempfile.mkdtemp(prefix="finegraft-ray-"))
    trainer = _trainer({**job, "send": partial(_send, mailbox)}, config, max_restarts, own)
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value)
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            ended.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_LOOK_SECONDS)
            _pass_on(ray.get(mailbox.taken.remote()), listener)
    except KeyboardInterrupt:
        mailbox.stop.remote()
        thread.join(timeout=60)
        raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if job["storage"]:
            _own_store(job).clear()
    return _outcome(ended, max_restarts, config)


def _pass_on(events: list[dict[str, Any]], listener: Listener | None) -> None:
    for event in events:
        if listener:
            listener(event)


def _outcome(ended: list[Any], max_restarts: int, config: TrainConfig) -> dict[str, Any]:
    """What the first worker returned.

    Raises:
        TrainingError: FG-RAY-007.
    """
    if ended and isinstance(ended[0], dict):
        return ended[0]
    words = str(ended[0]).strip().splitlines() if ended else ["Ray gave no answer"]
    last = next((line for line in reversed(words) if line.strip()), "Ray gave no reason")
    raise TrainingError(
        "FG-RAY-007",
        f"the workers were lost more often than {max_restarts} times: {last.strip()[:300]}",
        allowed="up to --max-restarts losses",
        fix=f"finegraft resume {config.output} goes on from the last checkpoint, if there is one",
    )


def _error(values: dict[str, Any]) -> FinegraftError:
    """The error of the run, as it would have been raised without Ray."""
    from finegraft.core import errors

    kind = getattr(errors, values["kind"])
    made = kind(values["code"], values["found"], allowed=values["allowed"], fix=values["fix"])
    assert isinstance(made, FinegraftError)
    return made


def _trainer(job: dict[str, Any], config: TrainConfig, max_restarts: int, own: Path) -> Any:
    """The Ray Train job: a torch group only where there is more than one worker."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    resources = ray.cluster_resources()
    gpu = resources.get("GPU", 0) >= config.nproc
    cores = min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    each = max(1, min(int(cores), int(resources.get("CPU", 1) // config.nproc)))
    scaling = ray.train.ScalingConfig(
        num_workers=config.nproc, use_gpu=gpu, resources_per_worker={"CPU": each, "GPU": int(gpu)}
    )
    settings = ray.train.RunConfig(
        name="run",
        **_place(job, own),
        failure_config=ray.train.FailureConfig(max_failures=max_restarts),
    )
    common = {"train_loop_config": job, "scaling_config": scaling, "run_config": settings}
    if config.nproc == 1:
        return DataParallelTrainer(work, **common)
    backend = None if gpu else "gloo"
    return TorchTrainer(work, torch_config=TorchConfig(backend=backend), **common)


def _own_store(job: dict[str, Any]) -> Store:
    """Beside the run; gone when the job is over."""
    return Store(job["storage"], f".ray-{job['id'][:8]}")


def _place(job: dict[str, Any], own: Path) -> dict[str, Any]:
    """Where Ray keeps what it knows of the job; several machines have to share that."""
    if job["storage"] is None:
        return {"storage_path": str(own)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    store = _own_store(job)
    return {
        "storage_path": store.root,
        "storage_filesystem": PyFileSystem(FSSpecHandler(store.files)),
    }


class _Mailbox:
    """An actor that the first worker sends events to, and the calling process takes them from."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.stopped = False

    def put(self, event: dict[str, Any]) -> bool:
        """Take an event; answers whether the run is to stop."""
        self.events.append(event)
        return self.stopped

    def taken(self) -> list[dict[str, Any]]:
        """Everything since the last call."""
        found, self.events = self.events, []
        return found

    def stop(self) -> None:
        """Stop the run at its next event."""
        self.stopped = True


def _send(mailbox: Any, event: dict[str, Any]) -> bool:
    """Send an event from a worker; answers whether the run is to stop."""
    import ray

    return bool(ray.get(mailbox.put.remote(event)))

"""Other programs that follow a run: TensorBoard, W&B, trackio, MLflow and the rest.

What: ``report_to`` of a configuration, checked before weights load and handed to transformers,
whose callbacks do the reporting. How: names from transformers' own table; a package that is missing
is looked for without importing anything. Constraint: nothing is reported unless it was asked for.
Trade-off: whether a server answers shows when training begins; the offline modes of the trackers
need none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finegraft.core.errors import ConfigError, did_you_mean

# What to install, where it is not called as the tracker is; a dot leads to a part of a package.
_PACKAGES = {
    "azure_ml": ("azureml.core", "azureml-core"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("kubeflow", "kubeflow"),
}


def names(report_to: str) -> list[str]:
    """``tensorboard,wandb`` as a list; empty for ``none``."""
    given = [name.strip() for name in report_to.split(",") if name.strip()]
    return [] if given == ["none"] else given


def require(report_to: str) -> None:
    """Prove that every tracker is known and installed.

    Raises:
        ConfigError: FG-RUN-021 an unknown name, FG-RUN-022 a package that is missing.
    """
    for name in names(report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            known = sorted(INTEGRATION_TO_CALLBACK)
            raise ConfigError(
                "FG-RUN-021",
                f"report_to is {name!r}",
                allowed=f"none, or one or more of {', '.join(known)}, separated by commas",
                fix=did_you_mean(name, known),
            )
        module, package = _PACKAGES.get(name, (name, name))
        if not _is_there(module):
            raise ConfigError(
                "FG-RUN-022",
                f"report_to is {name!r}, and the package {package} is not installed",
                allowed="trackers whose package is installed, or none",
                fix=f"pip install {package}",
            )


def _is_there(module: str) -> bool:
    """Whether a module can be imported; its parent packages are, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def place(trainer: Any, run: Path) -> None:
    """Put TensorBoard's files into the run folder, unless TENSORBOARD_LOGGING_DIR says where."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(run / "tensorboard")

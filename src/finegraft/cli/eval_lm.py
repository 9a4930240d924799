"""Benchmarks of lm-evaluation-harness, where it is installed.

What: the model in memory is handed to ``lm_eval.simple_evaluate``. Constraint: the library is an
extra that a person installs (it brings its own data sets from the hub). Trade-off: its results
stand beside ours as it reports them, without our intervals.
"""

from __future__ import annotations

from importlib import util
from typing import Any

from finegraft.core.errors import ConfigError


def require_harness() -> None:
    """Prove that lm-eval is installed, before a model is loaded.

    Raises:
        ConfigError: FG-EVAL-007, it is not.
    """
    if util.find_spec("lm_eval") is None:
        raise ConfigError(
            "FG-EVAL-007",
            "--lm-eval, and lm-evaluation-harness is not installed",
            allowed="an environment that has the package lm-eval",
            fix="pip install lm-eval, or leave --lm-eval out",
        )


def benchmarks_of(model: Any, tokenizer: Any, tasks: str, batch_size: int) -> dict[str, Any]:
    """Run benchmarks and return what the harness reports, by task.

    Args:
        tasks: Names, separated by commas.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: dict[str, Any] = simple_evaluate(model=wrapped, tasks=names) or {}
    return dict(found.get("results", {}))

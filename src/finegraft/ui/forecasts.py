"""Forecasts while a form is filled in: slow the first time for rows and a model, then at once.

What: ``Forecasts.of`` is what ``finegraft plan`` says. How: a ``Study`` (rows read, model taken
apart) is kept for the settings that it depends on, and asked about the others. Constraint: a file
that has changed is read again. Trade-off: the studies that were asked for last stay in memory with
their rows.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from finegraft.core.errors import ConfigError, FinegraftError
from finegraft.core.schema import TrainConfig, groups
from finegraft.data import sources
from finegraft.ui.forms import Form

_KEPT = 3
# A study answers for every value of these.
_FREE = {*groups()["training"], *groups()["run"], "load_in_4bit", "load_in_8bit"}


class Forecasts:
    """Studies by what they depend on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._studies: OrderedDict[str, Any] = OrderedDict()

    def of(self, form: Form) -> dict[str, Any]:
        """The forecast of a form, with settings that fit where it does not.

        Raises:
            FinegraftError: what a run would say about the same settings, rows or model.
        """
        from finegraft.training import plan
        from finegraft.training.plan.anatomy import LIBRARY_ERRORS
        from finegraft.training.run import require_own_keys

        config = form.config
        require_own_keys(config)
        try:
            with self._lock:
                studied = self._study(config)
                made = studied.of(config)
                choice = None if made.fits else _fitting(plan, config, studied)
        except LIBRARY_ERRORS as error:
            if isinstance(error, FinegraftError):
                raise
            raise ConfigError(
                "FG-UI-022",
                f"no forecast can be made of these settings: {str(error)[:300]}",
                allowed="models and methods whose layers can be counted",
                fix="start the run; it tells what is wrong, if anything is",
            ) from error
        values = {**made.as_dict(), "command": form.command("plan"), "suggestions": []}
        if choice is not None:
            values["suggestions"] = [{"changed": choice.changed, "why": list(choice.why)}]
        return values

    def _study(self, config: TrainConfig) -> Any:
        from finegraft.training import plan

        key = _key(config)
        studied = self._studies.pop(key, None)
        if studied is None:
            # what the check of the rows finds has a page of its own
            studied = plan.study(config.model_copy(update={"data_check": False}))
        self._studies[key] = studied
        while len(self._studies) > _KEPT:
            self._studies.popitem(last=False)
        return studied


def _fitting(plan: Any, config: TrainConfig, studied: Any) -> Any:
    try:
        return plan.fitting(config, studied)
    except ConfigError as error:
        if error.code != "FG-PLAN-001":
            raise
        return None


def _key(config: TrainConfig) -> str:
    """Settings that a study depends on, and the files as they are now."""
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
    files = []
    for rows in (config.data, config.eval_data):
        for part in sources.parts(rows) if rows else ():
            path = Path(part.path)
            facts = path.stat() if path.is_file() else None
            files.append((part.path, facts and (facts.st_size, facts.st_mtime_ns)))
    return json.dumps([values, files], sort_keys=True, default=str)

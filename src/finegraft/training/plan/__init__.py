"""Forecasts: what a run will take, before it takes it.

``study(config).of(config)`` says it from the configuration and the rows; ``probe`` corrects it by
some real steps; ``fitting`` chooses settings that stay within the memory there is.
"""

from finegraft.training.plan.choose import Choice, fitting
from finegraft.training.plan.forecast import Forecast, Study, of_checked, study
from finegraft.training.plan.probe import probe

__all__ = [
    "Choice",
    "Forecast",
    "Study",
    "fitting",
    "of_checked",
    "probe",
    "study",
]

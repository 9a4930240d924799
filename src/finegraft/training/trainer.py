"""``Trainer``: transformers' trainer, called with the keyword names of any year.

What: classification and everything else that ``SFTTrainer`` is not for. How: keywords are
translated, then the stock constructor takes over. Constraint: nothing but names is changed, so what
transformers documents is what happens. Trade-off: no loss of our own here.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from finegraft.core.arguments import Rename, translate

LEGACY = {"tokenizer": Rename("processing_class")}


class Trainer(transformers.Trainer):
    """transformers' ``Trainer``; the arguments are its own, of any year.

    Args:
        positional: In transformers' order.
        keywords: Under today's names or older ones, which are translated with a warning.

    Raises:
        ArgumentError: FG-ARG-001 a name that no version has, FG-ARG-002 a setting given twice.
    """

    def __init__(self, *positional: Any, **keywords: Any):
        known = {*inspect.signature(transformers.Trainer.__init__).parameters} - {"self"}
        super().__init__(*positional, **translate("Trainer", keywords, known, LEGACY))

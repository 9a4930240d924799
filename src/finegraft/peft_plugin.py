"""Importing this lets plain peft make and open finegraft's own methods.

What: ``import finegraft.peft_plugin``, then ``PeftModel.from_pretrained(base, folder)`` or
``get_peft_model(base, BitFitConfig())`` as with peft's own. How: the import calls
``finegraft.adapters._plugin.register``, which adds to peft's tables and changes none of its
entries. Constraint: the one module here whose import does something to another library, and what it
is imported for. Trade-off: a program that opens such an adapter needs finegraft installed.
"""

from __future__ import annotations

from finegraft.adapters._plugin import register
from finegraft.adapters.bitfit import BitFitConfig
from finegraft.adapters.bottleneck import BottleneckConfig
from finegraft.adapters.head import HeadConfig

__all__ = ["BitFitConfig", "BottleneckConfig", "HeadConfig", "register"]

register()

"""What a model family exports as ``SPEC``: facts only, found by ``config.model_type``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        swaps: Name of a stock module class to the function that makes its fast class.
        refuses: ``refuses(config)`` returns why this configuration stays stock, or None.
        tiny: Makes a small random model of the family, for tests.
    """

    swaps: Mapping[str, Callable[[type], type]]
    refuses: Callable[[Any], str | None]
    tiny: Callable[[], Any]

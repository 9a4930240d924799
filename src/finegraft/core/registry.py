"""Find extensions by file name.

What: one small registry for formats, methods, families, kernels and exports. How: a name is the
stem of a module in one package, discovered by listing the package and imported on look-up; third
parties add names through entry points of the group ``finegraft.<kind>``. Constraint: listing
imports nothing. Trade-off: a module that breaks is noticed when it is looked up, not at start; the
contract tests look every one of them up.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from finegraft.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects, one module each.

    Args:
        package: Dotted name of the package that holds the modules.
        attribute: Name of the object that each module exports, ``FORMAT`` say.
        kind: The word used in messages and in the entry-point group.
    """

    def __init__(self, package: str, attribute: str, kind: str):
        self.package = package
        self.attribute = attribute
        self.kind = kind

    @functools.cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        """Read once: looking through all installed packages takes 6 ms."""
        return {point.name: point for point in entry_points(group=f"finegraft.{self.kind}")}

    def names(self) -> list[str]:
        """All known names, sorted; imports none of them."""
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        own = {m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")}
        return sorted(own | set(self._plugins))

    def get(self, name: str) -> T:
        """Import and return the object called ``name``.

        Raises:
            ConfigError: FG-CORE-001, no such name; lists a near one.
        """
        names = self.names()
        if name not in names:
            raise ConfigError(
                "FG-CORE-001",
                f"unknown {self.kind} '{name}'",
                allowed=", ".join(names),
                fix=did_you_mean(name, names),
            )
        plugin = self._plugins.get(name)
        found: Any = (
            plugin.load()
            if plugin is not None
            else getattr(importlib.import_module(f"{self.package}.{name}"), self.attribute)
        )
        return found

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield every name with its object, in name order."""
        for name in self.names():
            yield name, self.get(name)

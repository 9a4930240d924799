"""The registry of checks: every file of ``checks`` is a family.

What: ``CHECKS`` maps each code to its explanation, ``scans`` lists how texts are searched. How: the
families are found by file name. Constraint: a code belongs to one family.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping

from finegraft.core.registry import Registry
from finegraft.data.audit._contract import Check, Scan

PACKAGE = "finegraft.data.audit.checks"
FAMILIES: Registry[tuple[Check, ...]] = Registry(PACKAGE, "CHECKS", "check family")


class _Checks(Mapping[str, Check]):
    """Codes to checks, imported when the first one is asked for."""

    @functools.cached_property
    def _all(self) -> dict[str, Check]:
        found: dict[str, Check] = {}
        for family, checks in FAMILIES.items():
            for check in checks:
                if check.code in found:
                    raise ValueError(f"{check.code} is in two families, {family} is one")
                found[check.code] = check
        return dict(sorted(found.items()))

    def __getitem__(self, code: str) -> Check:
        return self._all[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


CHECKS = _Checks()


def scans() -> list[Scan]:
    """How texts are searched, all families together."""
    return [
        scan
        for name in FAMILIES.names()
        for scan in getattr(importlib.import_module(f"{PACKAGE}.{name}"), "SCANS", ())
    ]

"""Every error that finegraft raises on purpose.

What: one root, one class per part of the library, each also a builtin so that callers who know
nothing of finegraft still catch it. How: a stable code, what was found, what is allowed, and the
argument or command that fixes it; the command line prints exactly that and exits with 2.
Constraint: a code never changes its meaning. Trade-off: a few more words at each raise, so that
nobody needs a traceback to know what to type next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FinegraftError(Exception):
    """Root of all deliberate errors.

    Args:
        code: Stable identifier, ``FG-<PART>-<NNN>``.
        found: What was met, with the value or the place.
        allowed: What would have been accepted, if that can be listed.
        fix: The argument or command that cures it.
    """

    def __init__(
        self, code: str, found: str, *, allowed: str | None = None, fix: str | None = None
    ):
        self.code = code
        self.found = found
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.found}"]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  fix:     {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.found, self.allowed, self.fix))

    def as_dict(self) -> dict[str, str | None]:
        """The error as the command line's ``--json`` shows it."""
        return {
            "code": self.code,
            "found": self.found,
            "allowed": self.allowed,
            "fix": self.fix,
        }


def _rebuild(
    cls: type[FinegraftError], code: str, found: str, allowed: str | None, fix: str | None
) -> FinegraftError:
    return cls(code, found, allowed=allowed, fix=fix)


class ConfigError(FinegraftError, ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


class ArgumentError(FinegraftError, TypeError):
    """A keyword argument that no function here has."""


class DataError(FinegraftError, ValueError):
    """Rows that cannot be trained on as they are."""


class ModelError(FinegraftError, OSError):
    """A model that cannot be found, fetched or read."""


class AdapterError(FinegraftError, ValueError):
    """An adapter that cannot be made, read or attached."""


class ExportError(FinegraftError, ValueError):
    """A model or adapter that cannot be written in the format asked for."""


class HubError(FinegraftError, OSError):
    """An upload that cannot begin, was refused, or did not arrive."""


class TrainingError(FinegraftError, ArithmeticError):
    """A training that went wrong while it ran."""


class StorageError(FinegraftError, OSError):
    """A folder or disk that cannot take what must be written."""


def near(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for a near name, else the first known names.

    The end of a longer name comes first: ``batch_size`` of ``per_device_train_batch_size``.
    """
    known = list(known)
    names = sorted(known)
    close = next((k for k in known if k.endswith(f"_{name}")), None) or near(name, names)
    if close:
        return f"did you mean '{close}'?"
    return "use one of " + ", ".join(names[:40])

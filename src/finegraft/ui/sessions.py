"""Who may use the page: one-time tokens that become cookies.

What: ``Sessions`` keeps both in memory. Constraint: a token opens one session, once; both are
random, compared in constant time and written nowhere, so they end with the server. Trade-off: after
a restart the new address must be opened again.
"""

from __future__ import annotations

import hmac
import secrets

from finegraft.core.errors import ConfigError

_MOST_TOKENS = 16  # addresses that nobody has opened yet


class Sessions:
    """Tokens and cookies of one server."""

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._cookies: list[str] = []

    def token(self) -> str:
        """A new token, for a new address."""
        self._tokens = [*self._tokens, secrets.token_urlsafe(32)][-_MOST_TOKENS:]
        return self._tokens[-1]

    def open(self, token: str) -> str:
        """Use a token up and return the cookie of a new session.

        Raises:
            ConfigError: FG-UI-004, no such token, or it was used before.
        """
        found = _find(token, self._tokens)
        if found is None:
            raise ConfigError(
                "FG-UI-004",
                "this address was opened before, or it is of another server",
                allowed="each printed address once",
                fix="press Enter where `finegraft ui` runs, which prints a new address",
            )
        self._tokens.remove(found)
        self._cookies.append(secrets.token_urlsafe(32))
        return self._cookies[-1]

    def knows(self, cookie: str) -> bool:
        """Whether a cookie is one of ours."""
        return _find(cookie, self._cookies) is not None


def _find(given: str, known: list[str]) -> str | None:
    """The entry that equals what was given, every one compared."""
    guess, found = given.encode("utf-8", "replace"), None
    for one in known:
        if hmac.compare_digest(one.encode(), guess):
            found = one
    return found

"""What a hub's refusals mean, and what to type next.

What: ``translated`` turns the errors of huggingface_hub, of its HTTP client and of its transfer
library into ``HubError``. How: by the HTTP status anywhere in the chain of causes, else by being an
error of a connection. Constraint: an error that is not about the hub or the connection is raised as
it is. Trade-off: texts of the hub are shown by their first lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finegraft.core.errors import FinegraftError, HubError
from finegraft.core.paths import storage_error

_PASSING = (408, 409, 412, 425, 429)  # and all of 500 and above: worth another try
_TOKENS = "https://huggingface.co/settings/tokens"


def not_a_name(repo: str) -> HubError:
    """The error for a text that no repository can be called."""
    return HubError(
        "FG-HUB-001",
        f"'{repo}' cannot be the name of a repository",
        allowed="owner/name of letters, digits, '-', '_' and '.', at most 96 characters",
        fix="--push owner/name",
    )


def no_token(repo: str) -> HubError:
    """The error where no token is to be found."""
    return HubError(
        "FG-HUB-002",
        f"'{repo}' cannot be written to without a token, and none was found",
        allowed="HF_TOKEN in the environment, a stored login, or token=...",
        fix=f"hf auth login, or HF_TOKEN=hf_... with a token for writing from {_TOKENS}",
    )


def may_not_write(repo: str, reason: str) -> HubError:
    """The error for a token that the hub knows and that may not write there."""
    return HubError(
        "FG-HUB-004",
        f"'{repo}' may not be written to with this token: {reason}",
        allowed="a token for writing, of an account that may write to the repository",
        fix=f"check the owner's name, or make a token for writing at {_TOKENS}",
    )


@contextlib.contextmanager
def translated(repo: str, path: Path | None = None) -> Iterator[None]:
    """Run the block; what the hub or the connection raises becomes a ``HubError``.

    Args:
        path: The export that is uploaded, for what to type next.

    Raises:
        HubError: FG-HUB-003 token refused, FG-HUB-004 no right to write, FG-HUB-005 no connection,
            FG-HUB-010 refused for another reason, FG-HUB-013 no such branch.
    """
    from huggingface_hub import errors

    http_error: Any = errors.HfHubHTTPError.__bases__[0]  # the HTTP client's own root
    try:
        yield
    except FinegraftError:
        raise
    except (OSError, RuntimeError, ValueError, http_error) as error:
        raise _meaning(error, repo, path) from error


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error not in found:
        found.append(error)
        after = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if after is None:
            break
        error = after
    return found


def _meaning(error: Exception, repo: str, path: Path | None) -> Exception:
    from huggingface_hub import errors

    chain = _chain(error)
    for one in chain:
        if isinstance(one, errors.RevisionNotFoundError):
            return HubError(
                "FG-HUB-013",
                f"'{repo}' has no branch of that name",
                allowed="a branch of the repository",
                fix="leave the revision out, or make the branch on the repository's page",
            )
        if isinstance(one, errors.HfHubHTTPError):
            return _refused(one, repo, path)
        if isinstance(one, PermissionError) and one.errno is None:  # of the transfer library
            return may_not_write(repo, _line(one))
        if isinstance(one, ValueError) and "README.md" in str(one):
            return _other(repo, " ".join(str(one).split()), "correct the head of README.md")
    for one in chain:
        lost = isinstance(one, ConnectionError | TimeoutError)
        if isinstance(one, OSError) and one.errno is not None and not lost and one.filename:
            return storage_error(one, Path(one.filename))
    if isinstance(error, ValueError):
        return _other(repo, _line(error), "push again; an older huggingface_hub may help")
    return _broken(repo, _line(chain[-1]), path)


def _refused(error: BaseException, repo: str, path: Path | None) -> HubError:
    from huggingface_hub import errors

    status = error.response.status_code  # type: ignore[attr-defined]
    said = getattr(error, "server_message", None) or _line(error)
    hidden = isinstance(error, errors.RepositoryNotFoundError)
    if status == 401 and not hidden:
        return HubError(
            "FG-HUB-003",
            f"the hub refused the token for '{repo}' (HTTP 401): {said}",
            allowed="a token that is valid",
            fix=f"hf auth login, or HF_TOKEN=hf_... with a new token from {_TOKENS}",
        )
    if hidden:
        return may_not_write(repo, "the hub hides the repository from it")
    if status == 403:
        return may_not_write(repo, f"HTTP 403, {said}")
    if status in _PASSING or status >= 500:
        return _broken(repo, f"HTTP {status}, {said}", path)
    return _other(repo, f"HTTP {status}, {said}", "see what the hub says")


def _other(repo: str, reason: str, fix: str) -> HubError:
    return HubError("FG-HUB-010", f"the hub refused the upload to '{repo}': {reason}", fix=fix)


def _broken(repo: str, reason: str, path: Path | None) -> HubError:
    from huggingface_hub import constants

    again = f"; finegraft push {path} {repo} goes on, and what has arrived is not sent again"
    return HubError(
        "FG-HUB-005",
        f"no connection to {constants.ENDPOINT} for '{repo}': {reason}",
        allowed="a hub that answers; HF_ENDPOINT names another one",
        fix=f"check the network{again if path else ''}",
    )


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

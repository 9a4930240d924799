"""Models from the hub, with errors that say what to do.

What: ``download`` brings one repository's model files into the hub's own cache and returns the
folder. How: ``huggingface_hub.snapshot_download``, so ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``,
``HF_TOKEN``, ``HF_HOME`` and an already filled cache work as everywhere else; safetensors first,
pickles only where there are none. Constraint: nothing of the environment is changed here.
Trade-off: a repository that only has pickles is listed twice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from finegraft.core.errors import FinegraftError, ModelError, near
from finegraft.core.paths import storage_error

# Code files are fetched because a folder that was trusted must be complete; nothing runs them
# unless trust_remote_code=True is passed.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
# second copies of the weights in other layouts, and left-over training checkpoints
_IGNORED = ["original/*", "consolidated*", "onnx/*", "openvino/*", "checkpoint-*/*"]


def suggestion(name: str) -> str:
    """Return what to try instead of an unknown ``name``: a near packaged model or local folder."""
    from finegraft.models import packaged

    folders = []
    with contextlib.suppress(OSError):
        folders = [f"./{p.parent.name}" for p in Path().glob("*/config.json")]
    known = [*packaged.names(), *folders]
    close = near(name, known) or near(f"./{name}", known)
    if close:
        return f"did you mean '{close}'?"
    return "check the spelling on the hub, or use one of " + ", ".join(known[:20])


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _unknown(repo: str, reason: str) -> ModelError:
    return ModelError(
        "FG-MODEL-001",
        f"no model '{repo}': {reason}",
        allowed="owner/name of a model on the hub, a local folder, a GGUF file, "
        "an adapter folder, demo or demo-encoder",
        fix=f"{suggestion(repo)} (a private model needs token= or HF_TOKEN)",
    )


def _unreachable(repo: str, reason: str) -> ModelError:
    return ModelError(
        "FG-MODEL-002",
        f"'{repo}' is not in the cache and the hub could not be asked: {reason}",
        allowed="a reachable hub, or a model that is already on this machine",
        fix="pass a local folder, use the packaged model 'demo', or set HF_ENDPOINT to a mirror",
    )


def _refused(repo: str, reason: str) -> ModelError:
    return ModelError(
        "FG-MODEL-003",
        f"'{repo}' is gated or private and the hub refused it: {reason}",
        allowed="a token of an account that was granted access",
        fix=f"accept the terms at {_page(repo)}, then pass token=... or set HF_TOKEN",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The error at the start of the chain: 'connection refused' rather than what was made of it."""
    seen = {id(error)}
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None or id(cause) in seen:
            return error
        seen.add(id(cause))
        error = cause


def _translate(error: Exception, repo: str, revision: str | None) -> FinegraftError | None:
    """Return our error for one of the hub's, None for one that is not about the hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _refused(repo, "no token, or one without access")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            "FG-MODEL-004",
            f"'{repo}' has no revision '{revision}'",
            allowed="a branch, a tag or a commit of the repository",
            fix=f"leave revision unset, or pick one from {_page(repo)}/commits/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _unknown(repo, "the hub knows no such repository, or hides it from this token")
    if isinstance(error, errors.HFValidationError):
        return _unknown(repo, "it is neither a folder here nor a name that the hub could have")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(repo, _first_line(_root(error)))
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return _refused(repo, f"HTTP {status}, the token is wrong or lacks access")
        return _unreachable(repo, _first_line(error))
    # the HTTP client's own root error; which client that is depends on huggingface_hub's version
    if isinstance(error, errors.HfHubHTTPError.__bases__[0]):
        return _unreachable(repo, _first_line(_root(error)))
    if isinstance(error, OSError) and error.errno is not None:
        from huggingface_hub import constants

        return storage_error(error, Path(constants.HF_HUB_CACHE))
    return None


def _snapshot(repo: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    http_error = errors.HfHubHTTPError.__bases__[0]
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
            )
        )
    except (OSError, errors.HFValidationError, http_error) as error:
        ours = _translate(error, repo, revision)
        if ours is None:
            raise
        raise ours from error


def download(repo: str, revision: str | None = None, token: str | None = None) -> Path:
    """Return a folder with the model, tokenizer and configuration files of a hub repository.

    Args:
        repo: ``owner/name``.
        revision: Branch, tag or commit; the default branch where unset.
        token: Access token; else ``HF_TOKEN`` or the stored login.

    Returns:
        The snapshot folder in the hub's cache. With ``HF_HUB_OFFLINE=1``, or without a network, the
        cached one.

    Raises:
        ModelError: FG-MODEL-001 unknown, FG-MODEL-002 unreachable and not cached, FG-MODEL-003
            gated or private, FG-MODEL-004 unknown revision, FG-MODEL-005 no weights in it.
        StorageError: FG-DISK-001 to FG-DISK-003, the cache cannot take it.
    """
    folder = _snapshot(repo, revision, token, _FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    folder = _snapshot(repo, revision, token, _FILES + _PICKLES)
    if not any(folder.glob("*.bin")):
        raise ModelError(
            "FG-MODEL-005",
            f"'{repo}' holds neither safetensors nor pytorch_model.bin",
            allowed="a repository in the transformers layout",
            fix="for a GGUF repository, download one .gguf file and pass its path",
        )
    return folder

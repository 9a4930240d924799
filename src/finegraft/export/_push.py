"""Upload an export to a model hub: the files it consists of and nothing else.

What: ``open_target`` proves name, token and network before anything is exported, ``plan`` lists
what goes, ``upload`` sends it. How: huggingface_hub sends file by file and makes one commit when
all have arrived, so that the repository never holds half an export; what broke is tried again
after a while. Constraint: what has arrived is not sent again, in the same command or the next one,
and what the hub then holds is compared with what was sent. Trade-off: files go one after the other.

Source: https://huggingface.co/docs/huggingface_hub/guides/upload
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from finegraft.core.errors import HubError
from finegraft.export import _hub_errors
from finegraft.export._verify import contents, report

logger = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]
_WAITS_S = (2.0, 5.0, 15.0, 30.0, 60.0)  # after huggingface_hub's own five tries of a request
_LARGE_BYTES = 8_000_000  # files that are sent, and told of, one by one
_WEIGHTS = (".safetensors", ".gguf", ".bin")
_MESSAGE = "Upload of an export made with finegraft"


@dataclass(frozen=True)
class Target:
    """A repository that a token may be able to write to.

    Attributes:
        repo: ``owner/name``.
        token: None: the one that huggingface_hub finds.
        private: Of a repository that is made; None: as its owner's default is.
        revision: A branch; None: the default one.
        create_pr: Make a pull request instead of a commit on the branch.
        message: Of the commit.
        description: Of the commit.
    """

    repo: str
    token: str | None = None
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str = _MESSAGE
    description: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is uploaded.

    Attributes:
        path: The export.
        files: By their name in the repository.
        digests: SHA-256 by the same names; None for what may have changed since, the model card.
    """

    path: Path
    files: dict[str, Path]
    digests: dict[str, str | None]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: file.stat().st_size for name, file in self.files.items()}


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        repo: ``owner/name``.
        url: Of the repository's page.
        commit: Its identifier.
        files: Names of what is there now.
        bytes: Of all files together.
        request: Address of the pull request, where one was asked for.
    """

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    bytes: int
    request: str | None = None


def open_target(repo: str, *, token: str | None = None, **settings: Any) -> Target:
    """Prove that ``repo`` may be written to, as far as the hub tells without writing.

    Args:
        repo: ``owner/name``, or a name alone for a repository of the token's owner.
        token: None: ``HF_TOKEN`` or the stored login.
        settings: The other attributes of ``Target``.

    Raises:
        HubError: FG-HUB-001 not a name, FG-HUB-002 no token, FG-HUB-003 a token that the hub does
            not take, FG-HUB-004 a token for reading, FG-HUB-005 no connection, FG-HUB-012 offline
            mode.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise _hub_errors.not_a_name(str(repo)) from error
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "FG-HUB-012",
            f"'{repo}' cannot be written to: HF_HUB_OFFLINE is set",
            allowed="a connection to the hub",
            fix="unset HF_HUB_OFFLINE",
        )
    if not (token or get_token()):
        raise _hub_errors.no_token(repo)
    with _hub_errors.translated(repo):
        account = HfApi(token=token).whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise _hub_errors.may_not_write(repo, "the token is one for reading")
    owned = repo if "/" in repo else f"{account['name']}/{repo}"
    given = {name: value for name, value in settings.items() if value is not None}
    return Target(owned, token, **given)


def plan(path: str | Path, *, verified: bool = True, only: Sequence[Path] = ()) -> Plan:
    """List what uploading the export at ``path`` would send.

    Args:
        path: A folder that an export made, or one GGUF file in it.
        verified: Refuse what was not compared with what was trained, or failed.
        only: Files of it, where the folder holds earlier exports as well.

    Raises:
        HubError: FG-HUB-006 not verified, FG-HUB-007 not an export, FG-HUB-009 several exports.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    values = report.read(folder / report.FILE)
    listed = values.get("contents", {})
    names = set(listed)
    if not path.is_dir():
        names &= {path.name, contents.CARD}
    if only:
        names &= {file.relative_to(folder).as_posix() for file in only} | {contents.CARD}
    if not names - {contents.CARD}:
        raise _no_export(path)
    if verified:
        _require_verified(path, values, names)
    ordered = sorted(names, key=lambda name: (listed[name]["bytes"], name))
    files = {name: folder / name for name in ordered}
    return Plan(path, files, {name: listed[name].get("sha256") for name in ordered})


def _no_export(path: Path) -> HubError:
    inside = sorted(p.parent for p in path.glob(f"*/{report.FILE}")) if path.is_dir() else []
    if len(inside) > 1:
        return several(str(path), [p.name for p in inside])
    return HubError(
        "FG-HUB-007",
        f"{path} is no export: no {report.FILE} there lists its files",
        allowed="a folder that finegraft export wrote, or a .gguf file in one",
        fix="finegraft export RUN --to FORMAT --output DIR --push owner/name",
    )


def several(where: str, names: Sequence[str]) -> HubError:
    """The error for more than one export in one repository."""
    return HubError(
        "FG-HUB-009",
        f"{where} holds several exports: {', '.join(names)}",
        allowed="one export a repository; types of GGUF are one export",
        fix=f"finegraft push {where}/{names[0]} owner/name, and so on for each",
    )


def _require_verified(path: Path, values: dict[str, Any], names: set[str]) -> None:
    """Raises HubError FG-HUB-006."""
    each = {n: v for n, v in values.get("files", {}).items() if n in names} or {path.name: values}
    failed = {n: v.get("cause") for n, v in each.items() if not v.get("verified")}
    if failed:
        name, cause = next(iter(failed.items()))
        raise HubError(
            "FG-HUB-006",
            f"{name} was not proven to be what was trained: {cause or 'not verified'}",
            allowed="an export whose every check passes",
            fix=f"finegraft verify {path}; --no-verify (verify=False) uploads it as it is",
        )


def _require_unchanged(what: Plan) -> None:
    """Raises HubError FG-HUB-008."""
    for name, file in what.files.items():
        wanted = what.digests[name]
        reason = None if file.is_file() else "is missing"
        if reason is None and wanted and contents.digest(file) != wanted:
            reason = "has changed"
        if reason:
            raise HubError(
                "FG-HUB-008",
                f"{file} {reason} since it was written",
                allowed="the files as they were exported and verified",
                fix=f"finegraft verify {what.path} looks at it as it is now; or export again",
            )


def upload(
    target: Target,
    what: Plan,
    *,
    listener: Listener | None = None,
    waits_s: Sequence[float] = _WAITS_S,
) -> Pushed:
    """Make the repository if it is missing, and send the files in one commit.

    Args:
        listener: Called with an event for each step.
        waits_s: Seconds before each further try after a broken connection.

    Raises:
        HubError: FG-HUB-003, FG-HUB-004 no right to write, FG-HUB-005 the connection broke again
            and again, FG-HUB-008 a file that is not what was written, FG-HUB-010 refused for
            another reason, FG-HUB-011 something else arrived, FG-HUB-013 no such branch.
    """
    from huggingface_hub import HfApi

    tell = listener or (lambda event: None)
    _require_unchanged(what)
    _warn_of_paths(what)
    sizes = what.sizes
    tell({"type": "uploading", "repo": target.repo, "files": sizes, "bytes": sum(sizes.values())})
    version = metadata.version("finegraft")
    api = HfApi(token=target.token, library_name="finegraft", library_version=version)
    for number in range(len(waits_s) + 1):
        try:
            with _hub_errors.translated(target.repo, what.path):
                return _sent(api, target, what, tell)
        except HubError as error:
            if error.code != "FG-HUB-005" or number == len(waits_s):
                raise
            wait = waits_s[number]
            tell({"type": "retry", "seconds": wait, "reason": error.found})
            logger.warning("%s; trying again in %.0f s", error.found, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _sent(api: Any, target: Target, what: Plan, tell: Listener) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    url = api.create_repo(target.repo, private=target.private, exist_ok=True)
    where: dict[str, Any] = {
        "repo_id": target.repo,
        "revision": target.revision,
        "create_pr": target.create_pr,
    }
    adds = [CommitOperationAdd(name, str(file)) for name, file in what.files.items()]
    sizes, done = what.sizes, 0
    small = [a for a in adds if sizes[a.path_in_repo] < _LARGE_BYTES]
    large = [[a] for a in adds if sizes[a.path_in_repo] >= _LARGE_BYTES]
    for group in [small, *large] if small else large:
        names, started = [a.path_in_repo for a in group], time.monotonic()
        api.preupload_lfs_files(additions=group, free_memory=False, **where)
        done += sum(sizes[name] for name in names)
        seconds = round(time.monotonic() - started, 1)
        event = {"type": "sent", "names": names, "bytes": done, "of": sum(sizes.values())}
        tell({**event, "seconds": seconds})
    commit = api.create_commit(
        operations=adds,
        commit_message=target.message,
        commit_description=target.description,
        **where,
    )
    _require_arrived(api, target, what, commit.oid)
    return Pushed(target.repo, str(url), commit.oid, tuple(sizes), done, commit.pr_url)


def _require_arrived(api: Any, target: Target, what: Plan, commit: str) -> None:
    """Raises HubError FG-HUB-011; tells of weights that are there from before."""
    there = {}
    for item in api.list_repo_tree(target.repo, recursive=True, revision=commit):
        if hasattr(item, "blob_id"):
            there[item.path] = item
    for name, file in what.files.items():
        item = there.get(name)
        found = item and (item.lfs.sha256 if item.lfs else item.blob_id)
        wanted = None
        if item:
            wanted = contents.digest(file) if item.lfs else contents.git_digest(file)
        if item is None or found != wanted:
            raise HubError(
                "FG-HUB-011",
                f"{name} in {target.repo} is {'missing' if item is None else 'another file'} "
                "after the upload",
                allowed="the bytes of the export",
                fix="push again; if a .gitignore in the repository names the file, remove it there",
            )
    others = [n for n in there if n.endswith(_WEIGHTS) and n not in what.files]
    if others:
        logger.warning(
            "%s also holds weights from before: %s", target.repo, ", ".join(sorted(others)[:5])
        )


def _warn_of_paths(what: Plan) -> None:
    """Tell of files that name the base by a folder of this machine, where nobody else finds it."""
    folder = what.path if what.path.is_dir() else what.path.parent
    settings = report.read(folder / "adapter_config.json") if folder.is_dir() else {}
    base = str(settings.get("base_model_name_or_path") or "")
    if "adapter_config.json" in what.files and Path(base).is_absolute():
        logger.warning(
            "adapter_config.json names the base as %s, a folder of this machine: who downloads the "
            "adapter must name the base; train from a hub name to avoid it",
            base,
        )

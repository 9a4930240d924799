"""Files behind a URL: http, s3, gs and whatever else fsspec opens.

What: ``Remote`` looks to the readers like a path, and gives stretches of bytes. How: fsspec finds
the file system by the scheme; credentials are those of its libraries (environment, ~/.aws, gcloud).
Constraint: a request that fails is repeated a few times before training ends for it; a file that is
not there is not asked for again. Trade-off: a server that gives no ranges is read from front to
back, so going on with a stopped run reads again what was read before.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from finegraft.core.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+")
_PATTERN = re.compile(r"[*\[]")  # a question mark begins the query of a URL
_PAUSES_SECONDS = (0.5, 2.0, 8.0)
_BUFFER_BYTES = 1 << 20
_MARKS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated", "Content-MD5", "md5")
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_url(path: Any) -> bool:
    """Whether a path names a place outside of this machine."""
    return bool(_URL.fullmatch(str(path)))


@dataclass(frozen=True)
class Remote:
    """One file. ``suffix``, ``stem``, ``name`` and ``open`` are those of a path."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(urlsplit(self.url).path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """What the name ends in, with the dot."""
        return self._path.suffix

    @property
    def stem(self) -> str:
        """The name without ``suffix``."""
        return self._path.stem

    @property
    def size(self) -> int | None:
        """Bytes; None where the server does not say."""
        found = _info(self.url).get("size")
        return None if found is None else int(found)

    @property
    def ranges(self) -> bool:
        """Whether stretches of it can be had."""
        return self.size is not None and _gives_ranges(self.url)

    def mark(self) -> str:
        """What the server says that changes with the content."""
        info = _info(self.url)
        return " ".join(f"{name}={info[name]}" for name in _MARKS if info.get(name) is not None)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A binary handle; it can seek where there are ranges."""
        system, path = _system(self.url)
        block = _BUFFER_BYTES if self.ranges else 0

        def opened() -> Any:
            return system.open(path, mode, **({"block_size": block} if _is_http(self.url) else {}))

        handle: IO[bytes] = _repeated(self.url, opened)
        return handle

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``.

        Raises:
            DataError: FG-STREAM-002, they cannot be had.
        """
        end = min(end, self.size or 0)
        if start >= end:
            return b""
        system, path = _system(self.url)
        found: bytes = _repeated(self.url, lambda: system.cat_file(path, start=start, end=end))
        if len(found) > end - start:
            raise _unreachable(self.url, "the server sent another stretch than was asked for")
        return found


def files(url: str) -> list[Remote]:
    """The files that a URL or a pattern means, sorted.

    Raises:
        DataError: FG-STREAM-002 no such file, FG-STREAM-003 nothing opens such URLs.
    """
    if not _PATTERN.search(url):
        _info(url)
        return [Remote(url)]
    system, path = _system(url)
    found = _repeated(url, lambda: sorted(system.glob(path)), 1)
    if not found:
        raise _unreachable(url, "no file fits this pattern")
    return [Remote(system.unstrip_protocol(one)) for one in found]


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http:", "https:"))


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.partition("://")[0].lower()
        package = _PACKAGES.get(scheme)
        raise DataError(
            "FG-STREAM-003",
            f"nothing here opens {scheme}:// ({_first_line(error)})",
            allowed="http, https, s3 and gs with the extra 'stream', and what fsspec lists",
            fix=f"pip install {package}, or pip install 'finegraft[stream]'"
            if package
            else "check the beginning of the URL",
        ) from error
    return system, path


@functools.lru_cache(maxsize=4096)
def _info(url: str) -> dict[str, Any]:
    system, path = _system(url)
    return dict(_repeated(url, lambda: system.info(path), 1))  # a misspelt host is told at once


@functools.lru_cache(maxsize=4096)
def _gives_ranges(url: str) -> bool:
    """Whether a server keeps to a stretch that is asked for; many do not say."""
    if not _is_http(url):
        return True
    system, path = _system(url)
    try:
        return len(_repeated(url, lambda: system.cat_file(path, start=1, end=2))) == 1
    except ValueError:  # how fsspec says that all of it came
        return False


def failures() -> tuple[type[BaseException], ...]:
    """What a request can end with; libraries that are not loaded have raised nothing."""
    found: list[type[BaseException]] = [OSError, TimeoutError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
    ):
        if module in sys.modules and hasattr(sys.modules[module], name):
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _repeated(url: str, ask: Callable[[], T], times: int | None = None) -> T:
    """What ``ask`` gives, asked again after a pause where the connection failed.

    Args:
        times: How often at most; None: as long as a training may wait.

    Raises:
        DataError: FG-STREAM-002.
    """
    for pause in (*_PAUSES_SECONDS[:times], None):
        try:
            return ask()
        except (FileNotFoundError, PermissionError) as error:
            raise _unreachable(url, _first_line(error)) from error
        except failures() as error:
            if pause is None:
                raise _unreachable(url, _first_line(error)) from error
            logger.warning("%s: %s; asking again in %.1f s", url, _first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _unreachable(url: str, reason: str) -> DataError:
    return DataError(
        "FG-STREAM-002",
        f"{url} cannot be read: {reason}",
        allowed="a file that this machine can reach, with the rights that reading it takes",
        fix="check the address and the credentials; a pattern such as s3://bucket/rows/*.jsonl "
        "takes several files",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]

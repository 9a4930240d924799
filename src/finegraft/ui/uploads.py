"""Files that a browser sends: streamed, limited, whole or not there.

What: ``receive`` writes a body to a file of rows. How: beside the final name first, then renamed.
Constraint: only what has a reader for rows is taken, and it is read as rows alone, never run.
Trade-off: a file of the same name is replaced, as the person who drops it again wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import ClientDisconnect

from finegraft.core.errors import ConfigError
from finegraft.core.paths import storage_error, sync_names
from finegraft.data.readers import COMPRESSED, READERS, readable
from finegraft.ui.workspace import DATA, Workspace

_NAME = re.compile(r"[^\W_][\w.\- ()+@,]*")
_LONGEST = 200


async def receive(name: str, parts: AsyncIterator[bytes], space: Workspace) -> Path:
    """Write a body to ``data/NAME`` and return the path.

    Raises:
        ConfigError: FG-UI-009 a name that no file of rows can have, FG-UI-007 a type without a
            reader, FG-UI-005 a link to elsewhere; FG-UI-023, the sender hung up.
        StorageError: FG-DISK-001 to FG-DISK-003; and what counting the body raises.
    """
    final = _target(name, space)
    beside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as out:
            async for part in parts:
                await asyncio.to_thread(out.write, part)
            out.flush()
            await asyncio.to_thread(os.fsync, out.fileno())
        beside.replace(final)
        sync_names(final.parent)
    except ClientDisconnect as gone:
        raise ConfigError(
            "FG-UI-023",
            f"the browser hung up while it sent {name}",
            fix="send it again; nothing of it was kept",
        ) from gone
    except OSError as error:
        raise error if hasattr(error, "code") else storage_error(error, final) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return final


def _target(name: str, space: Workspace) -> Path:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise ConfigError(
            "FG-UI-009",
            f"'{name[:80]}' cannot be the name of a file of rows",
            allowed="letters, digits, spaces, dots and dashes, without folders",
            fix="rename the file",
        )
    path = space.inside(f"{DATA}/{name}")
    if not readable(path):
        raise ConfigError(
            "FG-UI-007",
            f"{name} is no type of file that rows are read from",
            allowed=f"{', '.join(sorted(READERS))}; text also with {', '.join(COMPRESSED)}",
            fix="save it as one of these, .jsonl say",
        )
    return path

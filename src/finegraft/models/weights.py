"""Weight files are looked at before a model is built from them.

What: ``check`` finds the files that will be read and proves that they are complete and harmless.
How: a safetensors file states in its header how long it is; an index names its shards; a pickle is
opened with ``weights_only=True``. Constraint: milliseconds for safetensors of any size, since only
headers are read. Trade-off: a flipped bit inside a tensor is not seen; no checksum travels with it.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

from finegraft.core.errors import ModelError

# in the order in which transformers looks for them
_CANDIDATES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# how torch's restricted unpickler says that a pickle asks for more than tensors
_CODE = re.compile(r"GLOBAL (\S+)|allowlisted|unrecognized function")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


def damaged(path: Path, reason: str) -> ModelError:
    """Return the error for a weight file that cannot be used."""
    return ModelError(
        "FG-MODEL-005",
        f"{path}: {reason}",
        allowed="complete safetensors files, or a pytorch_model.bin that holds tensors only",
        fix="fetch or save the model again; an interrupted download is the usual cause",
    )


def check_safetensors(path: Path) -> None:
    """Check that a safetensors header can be read and the file is as long as it says.

    Raises:
        ModelError: FG-MODEL-005, damaged or cut off.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise damaged(path, f"no safetensors header in its {size:,} bytes")
        try:
            header = json.loads(handle.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            wanted = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise damaged(path, f"its safetensors header is damaged ({error})") from error
    if size != wanted:
        raise damaged(path, f"it is {size:,} bytes long and should be {wanted:,}")


def check_pickle(path: Path) -> None:
    """Open a pickled checkpoint without running anything that it names.

    Raises:
        ModelError: FG-MODEL-005 damaged; FG-MODEL-007 it holds more than tensors.
    """
    import torch

    try:
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # files from before torch 1.6 are no zip archives and cannot be mapped
            torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = _CODE.search(str(error))
        if code is None:
            raise damaged(path, "it is not a readable checkpoint") from error
        named = f"it names {code[1]}" if code[1] else "it builds objects"
        raise ModelError(
            "FG-MODEL-007",
            f"{path} holds more than tensors and was not loaded ({named})",
            allowed="safetensors, or a pytorch_model.bin that holds tensors only",
            fix="do not trust this file; look for a safetensors version of the model",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise damaged(path, f"it is not a readable checkpoint ({error})") from error


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(index, f"it is not a shard index ({error})") from error
    if any(Path(name).name != name for name in names):
        raise damaged(index, "it names shards outside of its folder")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise damaged(index, f"it names shards that are not there: {', '.join(missing[:5])}")
    return sorted(index.parent / name for name in names)


def files(folder: Path) -> list[Path]:
    """Return the weight files that ``transformers`` would read from ``folder``.

    Raises:
        ModelError: FG-MODEL-005, no weights, or an index that names a missing shard.
    """
    for name in _CANDIDATES:
        path = folder / name
        if path.is_file():
            return _shards(path) if name.endswith(".index.json") else [path]
    raise damaged(folder, "it holds neither model.safetensors nor pytorch_model.bin")


def check(folder: Path) -> list[Path]:
    """Check every weight file of ``folder`` and return them.

    Raises:
        ModelError: FG-MODEL-005 missing, damaged or cut off; FG-MODEL-007 a pickle with code.
    """
    found = files(folder)
    for path in found:
        (check_safetensors if path.suffix == ".safetensors" else check_pickle)(path)
    return found

"""What verifying needs to know of GGUF files: which are exports, and what they must hold.

What: ``read`` says what a file is, ``checks`` and ``adapter_checks`` compare its tensors and keys,
``base`` gives the file that an adapter is loaded beside. How: a Modelfile in the folder names the
base of its ADAPTER; without one the base is written for as long as it is needed. Constraint: the
gguf package is imported only where there is such a file. Trade-off: a base that is written takes
its size among the temporary files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finegraft.export._contract import Check
from finegraft.export._origin import SMALL_BYTES, Origin
from finegraft.export._verify import causes
from finegraft.models import swap

MODELFILE = "Modelfile"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def read(path: Path) -> Any:
    """The facts of a file, see ``export.gguf._facts``."""
    from finegraft.export.gguf import _facts

    return _facts.read(path)


def listed(folder: Path) -> list[Path]:
    """GGUF files in ``folder`` that are exports; the base beside an adapter is checked with it."""
    bases = set(_bases(folder).values())
    return [file for file in sorted(folder.glob("*.gguf")) if file not in bases]


def _bases(folder: Path) -> dict[Path, Path]:
    """Adapters and their bases, as the Modelfile in ``folder`` names them."""
    file = folder / MODELFILE
    if not file.is_file():
        return {}
    said: dict[str, Path] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        word, _, rest = line.partition(" ")
        if word in ("FROM", "ADAPTER") and rest.startswith("./"):
            said.setdefault(word, folder / rest.strip().removeprefix("./"))
    return {said["ADAPTER"]: said["FROM"]} if len(said) == 2 else {}


def checks(
    origin: Origin, path: Path, facts: Any, before: str = ""
) -> tuple[list[Check], str | None]:
    """The checks of a model's tensors and keys, and a wrong rotary embedding by name.

    Args:
        before: Goes before the names of the checks.
    """
    from finegraft.export import gguf
    from finegraft.export._save import gguf_source

    found = gguf.verify(gguf_source(origin), path, name=facts.name)
    told = next((c.cause for c in found if c.name == "facts" and c.cause), None)
    rope = None
    if told and "rope" in told:
        rope = causes.ROPE.format(told.removeprefix("other values than the model's: "))
    return [dataclasses.replace(c, name=before + c.name) for c in found], rope


def new_rows(model: Any, path: Path, ids: Sequence[int]) -> Check:
    """A check of the embedding's rows of new tokens beside those of the trained model."""
    from finegraft.export.gguf import check

    found, allowed = check.rows_of(path, EMBEDDING, ids)
    core = swap.core(model)
    with torch.no_grad():
        wanted = core.get_input_embeddings()(torch.tensor(list(ids), device=core.device))
    wanted = wanted.float().cpu()
    off = float((wanted - found).norm() / wanted.norm()) if found is not None else math.inf
    allowed = max(allowed, causes.ROWS_OFF)
    return Check("new_tokens", off, allowed, off <= allowed)


def own_head(path: Path) -> bool:
    """Whether the head in ``path`` is another matrix than its embedding, not a copy of it."""
    from finegraft.export.gguf import check

    (head, one), (table, two) = (check.rows_of(path, n, range(16)) for n in (HEAD, EMBEDDING))
    if head is None or table is None:
        return False
    return bool((head - table).norm() > (one + two + causes.ROWS_OFF) * table.norm())


def adapter_checks(origin: Origin, path: Path, base: Path) -> tuple[list[Check], str | None]:
    """The checks of an adapter's tensors and keys and of its base, and what is wrong."""
    from finegraft.export import gguf, gguf_lora

    config = gguf_lora.base_config(origin)
    found = gguf.verify_lora(gguf_lora.adapter_of(origin), path, base=config)
    facts = next(check for check in found if check.name == "facts")
    cause = causes.ALPHA if facts.cause and "lora.alpha" in facts.cause else None
    if base.parent == path.parent:
        more, rope = checks(origin.base_origin, base, read(base), "base_")
        return [*found, *more], cause or rope
    return found, cause


@contextlib.contextmanager
def base(adapter: Path, origin: Origin) -> Iterator[Path]:
    """Run the block with the GGUF file of the base that ``adapter`` goes on."""
    beside = _bases(adapter.parent).get(adapter)
    if beside is not None and beside.is_file():
        yield beside
        return
    from finegraft.export import gguf
    from finegraft.export._save import gguf_source

    source = gguf_source(origin.base_origin)
    count = sum(4 * math.prod(tensor.get_shape()) for tensor in source.tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        kind = "f32" if count < SMALL_BYTES else "f16"
        [record] = gguf.write(source, folder, [kind], name="base")
        yield record.file

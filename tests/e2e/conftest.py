"""What the end-to-end tests share; the functions are in ``command_line``."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import make_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; nobody writes into it."""
    return make_model(tmp_path_factory.mktemp("base") / "tiny")

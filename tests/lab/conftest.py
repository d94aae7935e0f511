"""A made-up corpus, and a run on it that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.lab import Config
from tests.lab.made_up import SMALL, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three domains, and a cache beside it."""
    folder = tmp_path_factory.mktemp("lab") / "text"
    write_text(folder)
    return folder


@pytest.fixture
def configure(text: Path) -> Callable[..., Config]:
    """A small config on that text; values by dotted name, with __ for the dot."""

    def make(**values: Any) -> Config:
        places = {"data.source": str(text), "data.cache": str(text.parent / "cache")}
        return Config().change(
            {**SMALL, **places, **{key.replace("__", "."): v for key, v in values.items()}}
        )

    return make
